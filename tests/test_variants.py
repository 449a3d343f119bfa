"""One op of each room, under every way that chex knows to run a function."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from mixlab import align, augment, merge, trees

KEY = jax.random.key(0)
BATCH = {
    "image": np.random.default_rng(0).random((5, 8, 6, 3), np.float32),
    "label": np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]],
}
MODELS = [
    {"w": np.random.default_rng(seed).normal(size=(7, 3)).astype(np.float32)} for seed in range(3)
]
BASE = {"w": np.zeros((7, 3), np.float32)}


def network(variables, x):
    return jnp.tanh(x @ variables["a"]) @ variables["b"]


VARIABLES = {"a": np.ones((4, 6), np.float32), "b": np.arange(18, dtype=np.float32).reshape(6, 3)}
SYMMETRY = align.infer_symmetry(network, VARIABLES, np.ones((2, 4), np.float32))

OPS = {
    "mixup": lambda: augment.mixup(alpha=0.4)(KEY, BATCH),
    "cutmix": lambda: augment.cutmix()(KEY, BATCH),
    "randaugment": lambda: augment.randaugment()(KEY, BATCH),
    "average": lambda: merge.average([0.2, 0.3, 0.5])(MODELS),
    "ties": lambda: merge.ties(density=0.4)(MODELS, base=BASE),
    "permute": lambda: SYMMETRY.permute(SYMMETRY.random(KEY), VARIABLES),
}


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    @parameterized.named_parameters((name, op) for name, op in OPS.items())
    def test_every_way_gives_the_same(self, op):
        # The argument is there for pmap, which needs something to spread over the devices.
        found = self.variant(lambda zero: jax.tree.map(lambda x: x + zero.astype(x.dtype), op()))(
            jnp.zeros(())
        )
        expected = op()
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
        chex.assert_trees_all_close(found, expected, atol=1e-5)
        chex.assert_tree_all_finite(found)


def test_stacking_is_undone():
    stacked = trees.stack(MODELS)
    chex.assert_tree_shape_prefix(stacked, (3,))
    for model, back in zip(MODELS, trees.unstack(stacked), strict=True):
        chex.assert_trees_all_equal(model, back)
