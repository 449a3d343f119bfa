"""Transplantation: the region of one class of the partner, as its segmentation has it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mixlab.augment.core import Augmentation, image_of
from mixlab.augment.mixing.frame import blend_by_mask, mixed_sample
from mixlab.augment.targets import mask_of
from mixlab.types import Array, Batch, Key, Plan

_RANKS = (3, 4, 5)


def transplant(
    exclude: int | Sequence[int] = (), *, prob: float = 0.5, pairing: str = "roll"
) -> Augmentation:
    """Transplantation: pastes everything of one class of the partner, at its place.

    The class is drawn uniformly from those that the partner's mask shows, whatever their area; if
    `exclude` leaves none, the example stays as it is. Equals kornia `RandomTransplantation` but for
    the random numbers; image labels, where a batch has them, are mixed by area.

    Args:
        exclude: classes that are not transplanted, such as background or unlabelled pixels.
        prob: probability for each example.
        pairing: `"roll"` (as kornia), `"permutation"`, `"flip"`, `"pair"` or `"half"`, see
            `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] (one class for all T, wherever it is
        in a frame) or [B, L, C], with an integer `mask` of their shape without channels, and the
        plan `partner` int32 [B]; `mask` float32 of the same shape, 1 where the own pixel is kept;
        `lam` float32 [B], its mean; `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.
        KeyError: (when applied) the batch has no `mask`.
        TypeError: (when applied) the mask does not hold whole numbers.

    Source: Sellner et al., "Semantic segmentation of surgical hyperspectral images under geometric
    domain shifts", MICCAI 2023, section 2.
    """
    left_out = (exclude,) if isinstance(exclude, int) else tuple(exclude)

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del shape, key
        return {"which": u[0]}

    frame = mixed_sample(
        decide,
        blend_by_mask,
        uniforms=1,
        per_batch=False,
        prob=prob,
        pairing=pairing,
        ranks=_RANKS,
        whole=True,
    )

    def sample(key: Key, batch: Batch) -> Plan:
        mask = _classes(batch)
        plan = frame.sample(key, batch)
        which = plan.pop("which")
        donor = jnp.take(mask, plan["partner"], axis=0, mode="clip")
        chosen = jax.vmap(lambda m, u: _drawn_class(m, u, left_out))(donor, which)
        keep = (~chosen).astype(jnp.float32)
        return {**plan, "mask": keep, "lam": jnp.mean(keep, axis=tuple(range(1, keep.ndim)))}

    def apply(plan: Plan, batch: Batch) -> Batch:
        _classes(batch)
        return frame.apply(plan, batch)

    return Augmentation(sample, apply)


def _classes(batch: Batch) -> Array:
    image = image_of(batch, ranks=_RANKS)
    mask = mask_of(batch, image)
    if mask is None:
        raise KeyError(
            "transplant needs a batch with 'mask', the class of each pixel: whole numbers of the "
            f"shape {image.shape[:-1]}"
        )
    if mask.ndim != image.ndim - 1 or not jnp.issubdtype(mask.dtype, jnp.integer):
        raise TypeError(
            f"transplant needs an integer 'mask' of the shape {image.shape[:-1]}, got {mask.dtype} "
            f"{mask.shape}; of one-hot masks take jnp.argmax(mask, -1)"
        )
    return mask


def _drawn_class(mask: Array, u: Array, exclude: tuple[int, ...]) -> Array:
    """Where a mask [...] has the class that `u` in [0, 1) draws; nowhere if there is none."""
    ordered = jnp.sort(mask.ravel())
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    for excluded in exclude:
        first = first & (ordered != jnp.asarray(excluded, mask.dtype))
    rank = jnp.cumsum(first, dtype=jnp.int32)
    number = jnp.floor(u * rank[-1].astype(u.dtype)).astype(jnp.int32) + 1
    label = ordered[jnp.argmax(first & (rank == number))]
    return (mask == label) & (rank[-1] > 0)
