"""mixlab: mix data, models and agents in JAX.

A mixing op is a pure function over the leading axis of a pytree: of examples (`mixlab.augment`),
of models (`mixlab.merge`), of agents (`mixlab.agents`). `mixlab.align` finds and matches the
permutation symmetries of a network, so that models trained apart can be mixed at all.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["agents", "align", "augment", "data", "merge", "models"]


def __getattr__(name: str) -> ModuleType:
    # Imported when first used: a room should not cost those that do not enter it.
    if name in __all__:
        return importlib.import_module(f"mixlab.{name}")
    raise AttributeError(f"module 'mixlab' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
