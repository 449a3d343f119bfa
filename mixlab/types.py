"""The names that type annotations share across mixlab."""

from typing import Any

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray | float | int
Key = jax.Array
"""A typed PRNG key, as `jax.random.key` makes it."""
PyTree = Any
Batch = dict[str, Any]
"""Examples along the leading axis B: `image` [B, H, W, C] and `label` [B, K] (soft), and any
other leaves with leading axis B, which travel along."""
Plan = dict[str, Any]
"""What an op decided, before it is applied: a plain pytree that can be printed, saved, replayed."""
