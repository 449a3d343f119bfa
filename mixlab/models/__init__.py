"""Flax Linen networks for images of any size and channel count.

All are called as `model.apply(variables, x, train=...)` with float x [B, H, W, C] and give float32
logits [B, num_classes]. `CNN` and `ResNet` keep running statistics in `batch_stats`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from mixlab import spec
from mixlab.models.common import BATCH_NORM_MOMENTUM
from mixlab.models.convolutional import CNN, ResNet
from mixlab.models.mlp import MLP
from mixlab.models.vit import ViT

__all__ = ["BATCH_NORM_MOMENTUM", "CNN", "MLP", "MODELS", "ResNet", "ViT", "parse"]

MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN, "resnet20": ResNet, "vit": ViT}
"""Every module by its name: what `parse` knows. The first attribute of each is `num_classes`."""


def parse(text: str, num_classes: int) -> nn.Module:
    """The module that `text` describes.

    Args:
        text: a name in `MODELS`, with the module's attributes as arguments:
            `"mlp(hidden=(256, 256))"`, `"resnet20(width=8, dtype='bfloat16')"`.
        num_classes: width of the output.

    Raises:
        ValueError: the text names no model, or does not parse.
        TypeError: the model takes no such argument.
    """
    return spec.parse(text, {name: _with(num_classes, cls) for name, cls in MODELS.items()})


def _with(num_classes: int, module: type[nn.Module]) -> Callable[..., nn.Module]:
    """A constructor that takes the attributes of `module` other than `num_classes`."""

    def construct(*args: Any, **kwargs: Any) -> nn.Module:
        return module(num_classes, *args, **kwargs)

    # Flax adds `parent` and `name` to every module; they are not for configs.
    fields = inspect.signature(module).parameters.values()
    own = [p for p in fields if p.name not in ("num_classes", "parent", "name")]
    construct.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return construct
