"""Which groups are found in the architectures that are in use, each proved in float64."""

import jax
import numpy as np
import pytest

from mixlab import align, models
from tests.align import networks

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 11, size=(2, 5)).astype(np.int32)
SERIES = RNG.normal(size=(2, 4, 3)).astype(np.float32)


def random_like(shapes):
    """Random variables of both signs, statistics positive: quicker than compiling `init`."""

    def draw(path, leaf):
        values = RNG.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        positive = "batch_stats" in jax.tree_util.keystr(path)
        return (np.abs(values) + 0.1 if positive else values).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def infer(module, *inputs):
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return align.infer_symmetry(module.apply, variables, *inputs, check=False)


@pytest.mark.parametrize(
    ("module", "inputs", "sizes"),
    [
        # One group a layer.
        (networks.VGG(), IMAGES, [4, 5, 6, 7, 9, 8]),
        # The stem, the stream of each of four stages, two inner groups in each of 16 blocks.
        (
            networks.ResNet50(2),
            IMAGES,
            [2] + [8, 16, 32, 64] + [2] * 6 + [4] * 8 + [8] * 12 + [16] * 6,
        ),
        # The stem, and for each stage its stream and one inner group in each of two blocks.
        (networks.WideResNet(), IMAGES, [4] + [6] * 3 + [8] * 3 + [10] * 3),
        # Every layer's new channels and every bottleneck by itself: nothing is summed.
        (networks.DenseNet(), IMAGES, [4, 6, 3, 6, 3, 5, 6, 3]),
        # The stem is tied to the first block's output; expanded and squeezed channels are free.
        (networks.MobileNet(), IMAGES, [4, 8, 2, 12, 3, 6]),
        # A stream and hidden units for each of two stages.
        (networks.ConvNeXt(), IMAGES, [5, 20, 6, 24]),
        # The channels, and in each block hidden units over patches and over channels.
        (networks.Mixer(), IMAGES, [6, 5, 9, 5, 9]),
        # The stream; in each block heads, query-key and value dimensions in them, hidden units.
        (models.ViT(3, "micro"), IMAGES, [64] + [4, 16, 16, 256] * 4),
        # As in a ViT: the three parts of the fused projection share their heads.
        (networks.WindowAttention(), IMAGES, [8, 2, 4, 4]),
        (networks.UNet(), IMAGES, [4, 6, 5, 7, 8]),
        # As in a ViT, once for all the layers.
        (networks.GPT(), TOKENS, [8, 2, 3, 3, 16]),
        # Rotations tell the query-key dimensions apart. Two heads of keys and values, three
        # queries to each, and the value dimensions.
        (networks.Llama(), TOKENS, [8, 2, 3, 5, 10]),
        # Hidden state, cell state and the four gates are permuted together.
        (networks.LSTM(), SERIES, [6]),
        (networks.Recurrent(), SERIES, [4, 5, 7]),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "apply") else "",
)
def test_groups_of_architectures(module, inputs, sizes):
    symmetry = infer(module, inputs)
    assert symmetry.notes == ()
    assert sorted(symmetry.groups.values()) == sorted(sizes), str(symmetry)
    # Flax's norms mix precisions when the variables are in float64.
    with jax.numpy_dtype_promotion("standard"):
        assert symmetry.check(jax.random.key(1)) < 1e-9
