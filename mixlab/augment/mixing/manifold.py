"""Manifold mixup: mixing the hidden features of a network at a layer drawn for each batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixlab.augment.core import along_batch, entry, image_of, soft_label_of
from mixlab.augment.mixing.frame import lam_of, lerp, mixup
from mixlab.spec import nearest
from mixlab.types import Array, Batch, Key, Plan

INPUT = "input"
"""The name of the layer that is the image itself."""


def hidden_layers(
    model: Any, variables: Any, *args: Any, depth: int = 1, **kwargs: Any
) -> list[str]:
    """The layers of a Flax Linen module where features can be mixed, in the order they run.

    Args:
        model: the module; it is traced, not computed.
        variables: its variables.
        *args: what `model.apply` takes besides, as for `ManifoldMixup.run`.
        depth: how deep submodules are followed: 1 lists those of the module itself.
        **kwargs: likewise.

    Returns:
        `["input", "Dense_0", ...]`: the input, and paths of submodules joined by `/` that return
        one floating array along the batch.
    """
    found = [INPUT]
    size = jnp.shape(args[0])[0]

    def note(path: str, output: Any) -> Any:
        if path.count("/") < depth and _is_hidden(output, size) and path not in found:
            found.append(path)
        return output

    jax.eval_shape(lambda: _intercepted(note, model.apply, variables, *args, **kwargs))
    return found


@dataclasses.dataclass(frozen=True)
class ManifoldMixup:
    """What `manifold_mixup` returns; see there.

    Attributes:
        layers: names of the layers, of which `plan["layer"]` is an index.
        sample: `(key, batch) -> plan`.
    """

    layers: tuple[str, ...]
    sample: Callable[[Key, Batch], Plan]

    def run(
        self, plan: Plan, apply: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a Linen module, mixing its features at the layer that was drawn.

        Args:
            plan: from `sample`.
            apply: `model.apply` of any Flax Linen module.
            variables: its variables.
            *args: what `apply` takes besides, the input [B, ...] first.
            **kwargs: likewise (`train`, `mutable`, `rngs`).

        Returns:
            What `apply` returns.

        Raises:
            ValueError: a name in `layers` is no layer that ran, or its output is not one floating
                array [B, ...].
        """
        seen: dict[str, bool] = {}
        size = jnp.shape(args[0])[0]

        def mix(path: str, output: Any) -> Any:
            hidden = _is_hidden(output, size)
            seen[path] = hidden
            return self.mix(plan, path, output) if hidden and path in self.layers else output

        seen[INPUT] = True
        args = (mix(INPUT, args[0]), *args[1:])
        result = _intercepted(mix, apply, variables, *args, **kwargs)
        for name in self.layers:
            if not seen.get(name):
                layers = [path for path, hidden in seen.items() if hidden]
                raise ValueError(
                    f"manifold_mixup: no layer {name!r} gave one floating array [B, ...]; "
                    f"{nearest(name, layers)}"
                )
        return result

    def mix(self, plan: Plan, layer: str, features: Array) -> Array:
        """Mixes features [B, ...] if `layer` is the one drawn; for models that are not Linen.

        Raises:
            ValueError: the layer is none of `layers`.
        """
        if layer not in self.layers:
            raise ValueError(f"unknown layer {layer!r}; {nearest(layer, self.layers)}")

        def mixed(x: Array) -> Array:
            partner = jnp.take(x, entry(plan, "partner", x.shape[:1]), axis=0, mode="clip")
            return lerp(along_batch(_weight(plan, x), x), x, partner)

        drawn = jnp.asarray(plan["layer"]) == self.layers.index(layer)
        return jax.lax.cond(drawn, mixed, lambda x: x, features)

    def mix_label(self, plan: Plan, label: Array) -> Array:
        """Mixes soft labels [B, K] as the features were, whatever the layer."""
        checked = soft_label_of({"label": label})
        assert checked is not None
        partner = jnp.take(checked, entry(plan, "partner", checked.shape[:1]), axis=0, mode="clip")
        return lerp(along_batch(_weight(plan, checked), checked), checked, partner)


def manifold_mixup(
    alpha: float = 2.0,
    layers: Sequence[str] = (INPUT,),
    *,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> ManifoldMixup:
    """Manifold mixup: mixup of the features at a layer drawn uniformly for each batch.

    The model needs no change: `run` mixes what the named submodules return.

        mixer = augment.manifold_mixup(2.0, augment.hidden_layers(model, variables, images)[:3])
        plan = mixer.sample(key, batch)
        logits = mixer.run(plan, model.apply, variables, batch["image"])
        label = mixer.mix_label(plan, batch["label"])

    It works under `jit` and `grad`, with the layer traced. Equals OpenMixup's `manifoldmix` with a
    permutation and `per_batch`, whose layers are the input and the stages of a ResNet.

    Args:
        alpha: parameter of the Beta law; 0 mixes nothing.
        layers: names, as `hidden_layers` gives them; `"input"` is the image itself.
        per_batch: one lam for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"` or `"pair"`, see `mixed_sample`.

    Returns:
        A `ManifoldMixup`, whose plan has `partner` int32 [B], `lam` float32 [B], `use` bool [B] and
        `layer` int32 [].

    Raises:
        ValueError: an argument is out of its range, or there are no layers.

    Source: Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States",
    ICML 2019, section 2.
    """
    names = tuple(layers)
    if not names or len(set(names)) < len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"layers are different names of layers, at least one, got {layers!r}")
    if pairing == "half":
        raise ValueError(
            "manifold_mixup keeps the size of the batch: not pairing='half' but 'pair'"
        )
    plain = mixup(alpha, per_batch=per_batch, prob=prob, pairing=pairing)

    def sample(key: Key, batch: Batch) -> Plan:
        image_of(batch, ranks=(3, 4, 5))
        mix_key, layer_key = jax.random.split(key)
        layer = jax.random.randint(layer_key, (), 0, len(names), jnp.int32)
        return {**plain.sample(mix_key, batch), "layer": layer}

    return ManifoldMixup(names, sample)


def _weight(plan: Plan, x: Array) -> Array:
    return jnp.where(jnp.asarray(plan.get("use", True)), lam_of(plan, x), 1.0)


def _is_hidden(output: Any, size: int) -> bool:
    return (
        isinstance(output, jax.Array)
        and output.shape[:1] == (size,)
        and bool(jnp.issubdtype(output.dtype, jnp.floating))
    )


def _intercepted(
    see: Callable[[str, Any], Any], apply: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls `apply`, and puts what every submodule returns through `see(path, output)`."""
    from flax import linen as nn

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        path = "/".join(context.module.path)
        return see(path, output) if path and context.method_name == "__call__" else output

    with nn.intercept_methods(interceptor):
        return apply(*args, **kwargs)
