"""mixlab: mix data, models and agents in JAX.

A mixing op is a pure function over the leading axis of a pytree: of examples (`mixlab.augment`),
of models (`mixlab.merge`), of agents (`mixlab.agents`). `mixlab.align` finds and matches the
permutation symmetries of a network, so that models trained apart can be mixed at all.
"""

__version__ = "0.1.0"
