"""The `Augmentation` type, what builds bigger ones from smaller ones, and the checks all share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.types import Array, Batch, Key, Plan, PyTree


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Examples to examples, in two halves with a plain pytree, the plan, between them.

    `a | b` is `chain(a, b)`, as in text. A dataclass rather than a tuple, since `jax.jit(aug)`
    takes only what can be weakly referenced.

    Attributes:
        sample: `(key, batch) -> plan` makes all the random decisions.
        apply: `(plan, batch) -> batch` carries them out; it is deterministic.
        direct: `(key, batch) -> batch` does both, where that is less work than the two halves.
        parts: of an augmentation made of others, those others: part i has the entry `str(i)` of
            the plan.
        ops: of a policy, the names that `op` in its plan counts.
    """

    sample: Callable[[Key, Batch], Plan]
    apply: Callable[[Plan, Batch], Batch]
    direct: Callable[[Key, Batch], Batch] | None = None
    parts: tuple["Augmentation", ...] = ()
    ops: tuple[str, ...] = ()

    def __call__(self, key: Key, batch: Batch) -> Batch:
        """Decides with `key` and applies the decision to `batch`."""
        if self.direct is not None:
            return self.direct(key, batch)
        return self.apply(self.sample(key, batch), batch)

    def __or__(self, then: "Augmentation") -> "Augmentation":
        """This one and then another; `a | b | c` is `chain(a, b, c)`."""
        return chain(*(self.parts if isinstance(self, _Chain) else (self,)), then)


class _Chain(Augmentation):
    """What `chain` makes, so that `|` can go on with it."""


def image_of(batch: Batch, *, ranks: Sequence[int] = (4,)) -> Array:
    """The image of a batch, once the batch is known to be sound.

    Args:
        batch: `image`, uint8 or floating; `label`, if any, of the same B.
        ranks: the numbers of axes that `image` may have: 3 for signals [B, L, C], 4 for images
            [B, H, W, C], 5 for videos [B, T, H, W, C].

    Returns:
        `batch["image"]` as a JAX array.

    Raises:
        KeyError: there is no `image`.
        TypeError: the batch is no dict, or the image is neither uint8 nor floating.
        ValueError: the image has another rank or no examples, or the label another batch size.
    """
    if not isinstance(batch, dict):
        raise TypeError(f"a batch is a dict with the key 'image', got {type(batch).__name__}")
    if "image" not in batch:
        raise KeyError(f"the batch has no 'image'; it has {sorted(map(str, batch))}")
    image = jnp.asarray(batch["image"])
    check_image(image, ranks, "image")
    if image.shape[0] == 0:
        raise ValueError(f"'image' holds no examples: its shape is {image.shape}")
    label = batch.get("label")
    if label is not None and np.shape(label)[:1] != image.shape[:1]:
        raise ValueError(
            f"'label' and 'image' must agree on the leading batch axis, got shapes "
            f"{np.shape(label)} and {image.shape}"
        )
    return image


def check_image(image: Array, ranks: Sequence[int], name: str, *, batched: bool = True) -> None:
    """Raises unless `image` is uint8 or floating and has one of the given ranks.

    Three axes are a batch of signals or, if it need not be `batched`, a single image.
    """
    layouts = {
        3: "[B, L, C]" if batched else "[H, W, C]",
        4: "[B, H, W, C]",
        5: "[B, T, H, W, C]",
    }
    if image.ndim not in ranks:
        accepted = " or ".join(layouts[rank] for rank in ranks)
        raise ValueError(f"{name!r} must be {accepted}, got the shape {image.shape}")
    if image.dtype != jnp.uint8 and not jnp.issubdtype(image.dtype, jnp.floating):
        raise TypeError(
            f"{name!r} must be uint8 in 0..255 or floating in [0, 1], got {image.dtype}; "
            "cast it with image.astype(jnp.uint8)"
        )


def soft_label_of(batch: Batch) -> Array | None:
    """The soft label [B, K] of a batch, or None where the batch has none.

    Raises:
        ValueError: the label is not of rank two.
        TypeError: the label is not floating.
    """
    if batch.get("label") is None:
        return None
    label = jnp.asarray(batch["label"])
    if label.ndim != 2:
        raise ValueError(
            f"'label' must be soft, [B, K], got the shape {label.shape}; "
            "use jax.nn.one_hot(label, num_classes)"
        )
    if not jnp.issubdtype(label.dtype, jnp.floating):
        raise TypeError(
            f"'label' must be floating, got {label.dtype}; use label.astype(jnp.float32)"
        )
    return label


def working_dtype(dtype: Any) -> Any:
    """The dtype to compute in: float32, or float64 for float64 images."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def to_dtype(x: Array, dtype: Any) -> Array:
    """Casts a result in the working dtype back; to uint8 it rounds half to even."""
    if dtype == jnp.uint8 and x.dtype != jnp.uint8:
        x = jnp.clip(jnp.round(x), 0.0, 255.0)
    return x.astype(dtype)


def unfused(product: Array) -> Array:
    """Keeps a product apart from the addition that follows.

    Fused into one instruction, the two would round once where the references round twice, and
    an integer result just missed would be truncated to the one below. A compiled program that
    computes a sum in several places may fuse in some of them only: of a point on the edge of two
    pixels one place would take the pixel before, another the distance from the one after. The
    bound is never met.
    """
    return jnp.minimum(product, 1e30)


def along_batch(x: Any, like: Array) -> Array:
    """Reshapes [B] to [B, 1, 1, ...] with the rank of `like`."""
    return trees.along(jnp.asarray(x), like)


def entry(
    plan: Plan,
    name: str,
    shape: tuple[int, ...],
    dtype: Any = None,
    *,
    default: Any = None,
    limits: tuple[float, float] | None = None,
) -> Array:
    """What a plan, which may be written by hand, holds under a name.

    Args:
        plan: the decisions; an entry that all examples share may lack the axis of the batch. A
            tuple of arrays has the parts of the last axis, as (top, left, bottom, right).
        name: of the entry.
        shape: of the result.
        dtype: of the result; by default the entry's own.
        default: for a plan without the entry; None if it must have one.
        limits: the smallest and largest value. Of arrays on a device this is not checked, which
            would wait for the device.

    Raises:
        KeyError: there is no such entry.
        ValueError: its shape does not fit, or a number is out of its limits.
    """
    value = plan.get(name, default)
    if value is None:
        raise KeyError(
            f"the plan has no {name!r}, which sample(key, batch) makes; it has {sorted(plan)}"
        )
    if isinstance(value, tuple) and any(hasattr(part, "shape") for part in value):
        value = jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, value)), axis=-1)
    if limits is not None and not isinstance(value, jax.Array):
        low, high = limits
        wrong = [x for x in np.ravel(value) if not low <= x <= high]
        if wrong:
            raise ValueError(f"the plan's {name!r} must lie in [{low}, {high}], got {wrong[0]}")
    array = jnp.asarray(value, dtype)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"the plan's {name!r} must have the shape {shape}, or without the first axis what all "
            f"examples share; got {array.shape}"
        ) from None


def size_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a batch of images, videos, or signals (height 1)."""
    return (1, shape[1]) if len(shape) == 3 else (shape[-3], shape[-2])


def in_layout(x: Array, image: Array) -> Array:
    """Lets what each pixel is given, [B, H, W, ...], broadcast to signals, images or videos."""
    return x[:, 0] if image.ndim == 3 else x[:, None] if image.ndim == 5 else x


def as_images(fn: Callable[[Array], Array], image: Array) -> Array:
    """Applies a function of images [B, H, W, C] to signals of height 1, images or videos.

    What `fn` decides, or was told, about an example holds for all frames of it.
    """
    if image.ndim == 3:
        return fn(image[:, None])[:, 0]
    return jax.vmap(fn, in_axes=1, out_axes=1)(image) if image.ndim == 5 else fn(image)


def pair_of(size: int | Sequence[int], what: str = "size", *, least: int = 1) -> tuple[int, int]:
    """Height and width from one number for both or a pair.

    Args:
        size: the number, or the pair.
        what: its name, for the error.
        least: how small each may be.

    Raises:
        ValueError: it is neither, not whole, or too small.
    """
    sides = tuple(size) if isinstance(size, Sequence | np.ndarray) else (size, size)
    if len(sides) != 2 or not all(isinstance(n, int | np.integer) and n >= least for n in sides):
        raise ValueError(
            f"{what} is a whole number, at least {least}, or a pair of them, got {size!r}"
        )
    return int(sides[0]), int(sides[1])


def check_probability(name: str, value: float) -> None:
    """Raises a `ValueError` unless `value` lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a probability in [0, 1], got {value!r}")


def check_augmentations(name: str, augs: Sequence[Any]) -> None:
    """Raises a `TypeError` unless all of `augs` are augmentations."""
    for position, aug in enumerate(augs):
        if not isinstance(aug, Augmentation):
            hint = "; call the constructor: mixup(), not mixup" if callable(aug) else ""
            raise TypeError(f"{name} takes Augmentations, but part {position} is {aug!r}{hint}")


def identity() -> Augmentation:
    """Leaves the batch as it is; its plan is empty."""

    def sample(key: Key, batch: Batch) -> Plan:
        del key, batch
        return {}

    def apply(plan: Plan, batch: Batch) -> Batch:
        del plan
        return batch

    return Augmentation(sample, apply)


def chain(*augs: Augmentation) -> Augmentation:
    """Applies augmentations one after the other, each with its own key.

    `sample` carries the batch through the parts, since a later part may look at the pixels that
    an earlier one made; under `jit` the compiler drops what no decision depends on. A call decides
    and applies each part once.

    Args:
        *augs: the parts; none of them is the identity.

    Returns:
        An augmentation whose plan is `{"0": plan of the first, "1": ...}`.

    Raises:
        TypeError: a part is no augmentation.
    """
    check_augmentations("chain", augs)

    def sample(key: Key, batch: Batch) -> Plan:
        plan: Plan = {}
        for i, aug in enumerate(augs):
            plan[str(i)] = aug.sample(jax.random.fold_in(key, i), batch)
            if i + 1 < len(augs):
                batch = aug.apply(plan[str(i)], batch)
        return plan

    def apply(plan: Plan, batch: Batch) -> Batch:
        for i, aug in enumerate(augs):
            batch = aug.apply(plan[str(i)], batch)
        return batch

    def direct(key: Key, batch: Batch) -> Batch:
        for i, aug in enumerate(augs):
            batch = aug(jax.random.fold_in(key, i), batch)
        return batch

    return _Chain(sample, apply, direct, parts=augs)


def one_of(
    *augs: Augmentation,
    weights: Sequence[float] | None = None,
    per_batch: bool = False,
    per_pair: bool = False,
) -> Augmentation:
    """Applies one of several augmentations, drawn for each example or once a batch.

    A choice per example computes every alternative and keeps one of the results; a choice per
    batch computes only the one that was drawn. All must give the same shapes and dtypes.

    Args:
        *augs: the alternatives.
        weights: relative probabilities, one an alternative; equal by default.
        per_batch: one draw for the whole batch.
        per_pair: one draw for examples i and B - 1 - i, as the pairings `"pair"` and `"half"` of
            mixing need it.

    Returns:
        An augmentation whose plan is `{"choice": int32 [B], or [] per batch, "0": plan, ...}`.

    Raises:
        TypeError: a part is no augmentation.
        ValueError: no parts, weights that are not one non-negative number a part, both per_batch
            and per_pair, or (when applied) alternatives whose results differ in structure, shape or
            dtype.
    """
    check_augmentations("one_of", augs)
    if not augs:
        raise ValueError("one_of needs at least one augmentation")
    if per_batch and per_pair:
        raise ValueError("one_of draws per_batch or per_pair, not both")
    shares = np.ones(len(augs)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(augs),) or not np.all(shares >= 0) or not 0 < shares.sum() < np.inf:
        raise ValueError(
            f"one_of weights must be {len(augs)} non-negative numbers, one an augmentation and "
            f"not all zero, got {weights!r}"
        )
    bounds = (np.cumsum(shares) / shares.sum())[:-1].astype(np.float32)

    def sample(key: Key, batch: Batch) -> Plan:
        size = image_of(batch, ranks=(3, 4, 5)).shape[0]
        key, choice_key = jax.random.split(key)
        u = jax.random.uniform(choice_key, () if per_batch else (size,))
        if per_pair:
            u = jnp.concatenate([u[: size - size // 2], u[: size // 2][::-1]])
        plan: Plan = {"choice": jnp.sum(u[..., None] >= bounds, axis=-1, dtype=jnp.int32)}
        for i, aug in enumerate(augs):
            plan[str(i)] = aug.sample(jax.random.fold_in(key, i), batch)
        return plan

    def apply(plan: Plan, batch: Batch) -> Batch:
        branches = [
            lambda batch, aug=aug, part=plan[str(i)]: aug.apply(part, batch)
            for i, aug in enumerate(augs)
        ]
        choice = jnp.asarray(plan["choice"])
        if choice.ndim == 0:
            _check_alternatives([jax.eval_shape(branch, batch) for branch in branches])
            return jax.lax.switch(choice, branches, batch)
        results = [branch(batch) for branch in branches]
        _check_alternatives(results)

        def pick(*leaves: Any) -> Any:
            if all(leaf is leaves[0] for leaf in leaves):
                return leaves[0]
            chosen = jnp.asarray(leaves[0])
            own = choice[: chosen.shape[0]]  # of pairs halved to one example each
            for i, leaf in enumerate(leaves[1:], 1):
                chosen = jnp.where(along_batch(own == i, chosen), leaf, chosen)
            return chosen

        return jax.tree.map(pick, *results)

    return Augmentation(sample, apply, parts=augs)


def _check_alternatives(results: Sequence[PyTree]) -> None:
    """Raises unless the results of all alternatives have the same leaves."""
    first = dict(trees.named_leaves(results[0]))
    for i, other in enumerate(results[1:], 1):
        try:
            trees.check_same_structure(results[0], other, what=f"the results of parts 0 and {i}")
        except ValueError as error:
            raise ValueError(
                f"{error}; move what adds leaves out of one_of and sometimes (mixing, which adds "
                "weights of boxes and keypoints, takes prob=)"
            ) from error
        for name, leaf in trees.named_leaves(other):
            if leaf is first[name]:
                continue
            a, b = (f"{jnp.result_type(x)}{list(np.shape(x))}" for x in (first[name], leaf))
            if a != b:
                raise ValueError(
                    f"the alternatives of one_of must agree in shape and dtype, but {name!r} is "
                    f"{a} after part 0 and {b} after part {i}; move what changes them out of one_of"
                )


def sometimes(p: float, aug: Augmentation, *, per_batch: bool = False) -> Augmentation:
    """Applies an augmentation with probability `p`, to each example or to the whole batch.

    The same as `one_of(identity(), aug, weights=(1 - p, p))`, with its plan.

    Args:
        p: probability in [0, 1].
        aug: what to apply; it must keep shapes and dtypes.
        per_batch: one draw for the whole batch.

    Raises:
        ValueError: `p` is no probability.
        TypeError: `aug` is no augmentation.
    """
    check_probability("p", p)
    return one_of(identity(), aug, weights=(1.0 - p, p), per_batch=per_batch)


def views(n: int, aug: Augmentation, *, clean: bool = False) -> Augmentation:
    """Makes `n` independent versions of every example, stacked along a new axis after the batch.

    Args:
        n: number of views, at least one.
        aug: drawn afresh for each view.
        clean: the first view is the example as it is, as AugMix's loss has it.

    Returns:
        An augmentation after which every leaf [B, ...] is [B, n, ...], the label included; its
        plan is `{"0": plan of the first view, ...}`.

    Raises:
        ValueError: `n` is less than one.
        TypeError: `n` is no int, or `aug` no augmentation.
    """
    check_augmentations("views", [aug])
    if not isinstance(n, int):
        raise TypeError(f"views takes the number of views first, an int, got {n!r}")
    if n < 1:
        raise ValueError(f"views makes at least one view, got n={n}")
    augs = [identity() if clean and i == 0 else aug for i in range(n)]

    def sample(key: Key, batch: Batch) -> Plan:
        return {str(i): a.sample(jax.random.fold_in(key, i), batch) for i, a in enumerate(augs)}

    def apply(plan: Plan, batch: Batch) -> Batch:
        results = [a.apply(plan[str(i)], batch) for i, a in enumerate(augs)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *results)

    return Augmentation(sample, apply, parts=tuple(augs))
