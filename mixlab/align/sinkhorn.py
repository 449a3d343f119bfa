"""Sinkhorn re-basin: doubly stochastic matrices in place of permutations, learned by gradient."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixlab import trees
from mixlab.align.assignment import assignment, is_concrete
from mixlab.align.inference.layout import Layout
from mixlab.align.soft import apply_to_tree, arguments, parameter_names, point_between
from mixlab.align.symmetry import Permutations, Symmetry
from mixlab.random import check_key
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, Key, PyTree

POINTS = ("midpoint", "random")


def sinkhorn(scores: ArrayLike, *, temperature: ArrayLike = 1.0, num_iters: int = 20) -> Array:
    """The doubly stochastic matrix that balances `exp(scores / temperature)`.

    High scores get high entries; as the temperature falls the matrix tends to the permutation
    that `assignment` finds. Each iteration normalises the columns, then the rows, of the
    logarithm, so that rows always sum to one and columns do in the limit.

    The derivative is the limit's (implicit differentiation): one linear system of n unknowns
    whatever the number of iterations. It is exact once the columns sum to one. Works under `jit`,
    `vmap` and `grad`.

    Args:
        scores: floating array [..., n, n]; leading axes are batch axes.
        temperature: positive, the weight of the entropy; may be traced.
        num_iters: at least 1; low temperatures need more.

    Returns:
        [..., n, n] of the scores' dtype, computed in float32 or wider.

    Raises:
        ValueError: the scores are not floating square matrices, `num_iters` is less than one, or
            `temperature` is known and not positive.

    Source: Sinkhorn (1964); Cuturi (2013); the derivative from Eisenberger et al. (CVPR 2022),
    "A unified framework for implicit Sinkhorn differentiation".
    """
    scores = jnp.asarray(scores)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must be square matrices [..., n, n], got shape {scores.shape}")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be floating, got {scores.dtype}: convert them first")
    _check(temperature, num_iters)
    wide = trees.wide(scores.dtype)
    logits = scores.astype(wide) / jnp.asarray(temperature, wide)
    return _balance(logits, num_iters).astype(scores.dtype)


def _check(temperature: ArrayLike, num_iters: int) -> None:
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    if is_concrete(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _balance(logits: Array, num_iters: int) -> Array:
    def normalise(_: Array, x: Array) -> Array:
        x = x - jax.nn.logsumexp(x, axis=-2, keepdims=True)
        return x - jax.nn.logsumexp(x, axis=-1, keepdims=True)

    return jnp.exp(jax.lax.fori_loop(0, num_iters, normalise, logits))


def _balance_forward(logits: Array, num_iters: int) -> tuple[Array, Array]:
    balanced = _balance(logits, num_iters)
    return balanced, balanced


def _balance_backward(num_iters: int, balanced: Array, cotangent: Array) -> tuple[Array]:
    """Projects the cotangent: `P * (G - a[:, None] - b)`, whose rows and columns sum to zero.

    Eliminating `a` leaves a system for `b` with the matrix of a weighted graph, `diag(W 1) - W`
    for `W = P^T P`. Built from the off-diagonal entries it stays positive semi-definite under
    rounding; the small multiple of the identity keeps it regular where P is a permutation.
    """
    del num_iters
    n = balanced.shape[-1]
    rows = functools.partial(jnp.sum, axis=-1, keepdims=True)
    centred = cotangent - rows(balanced * cotangent)
    right = jnp.sum(balanced * centred, axis=-2)
    eye = jnp.eye(n, dtype=balanced.dtype)
    edges = jnp.matmul(balanced.mT, balanced, precision=jax.lax.Precision.HIGHEST) * (1 - eye)
    # Constants are in the kernel: `a` and `b` may be shifted against each other.
    regular = 1 / n + 10 * jnp.finfo(balanced.dtype).eps * eye
    matrix = rows(edges) * eye - edges + regular
    flat = _solve(matrix.reshape(-1, n, n), right.reshape(-1, n))
    b = flat.reshape(right.shape)
    shifted = centred - b[..., None, :]
    return (balanced * (shifted - rows(balanced * shifted)),)


def _solve(matrices: Array, right: Array) -> Array:
    """Solves the systems [K, n, n] for right-hand sides [K, n]."""

    def together(matrices: Array, right: Array) -> Array:
        return jnp.linalg.solve(matrices, right[..., None])[..., 0]

    def in_turn(matrices: Array, right: Array) -> Array:
        return jax.lax.map(lambda pair: jnp.linalg.solve(*pair), (matrices, right))

    # Batched LU decompositions inside a larger program can wait for one another forever where
    # XLA has only two threads (seen with jaxlib on two cores; one after the other never was).
    return jax.lax.platform_dependent(matrices, right, cpu=in_turn, default=together)


_balance.defvjp(_balance_forward, _balance_backward)


def sinkhorn_matching(
    symmetry: Symmetry,
    loss: Callable[..., Array] | None,
    reference: PyTree,
    other: PyTree,
    batches: Iterable[Any] | None = None,
    *,
    key: Key,
    steps: int = 200,
    learning_rate: float = 0.1,
    temperature: float = 1.0,
    num_iters: int = 20,
    point: str = "midpoint",
    backend: str | None = None,
) -> Permutations:
    """Matches the units of two models by gradient descent over soft permutations.

    Every group has a matrix of scores, whose `sinkhorn` takes the place of the permutation along
    all axes of the group, batch statistics included. Adam lowers either the squared distance of
    the parameters to the reference's, or a loss at a point between the two models; at the end
    `assignment` rounds the scores. The rounded permutations are what is returned: no refinement
    follows, and nothing guarantees that rounding keeps what was gained. All steps are one compiled
    program, and with a backend other than "scipy" only one flag comes back to the host.

    Args:
        symmetry: the groups.
        loss: differentiable `loss(variables, *batch)`, a scalar; None for the distance, which
            needs no data. Pass the same function again to compile only once.
        reference: variables of the model that keeps its order.
        other: variables of the model to permute.
        batches: for `loss`: batches of one shape, held on the device together and used in turn. A
            tuple or list is spread as arguments, anything else is the one argument.
        key: draws the first scores, which are small, and the random points.
        steps: of Adam.
        learning_rate: of Adam, in units of the scores.
        temperature: see `sinkhorn`; relative to `learning_rate` it sets how fast the soft
            permutations harden.
        num_iters: see `sinkhorn`.
        point: where `loss` is taken: at the "midpoint" of the line from the reference to the
            softly permuted model, or at a uniformly "random" point of it, a new one each step.
        backend: see `assignment`.

    Returns:
        int32 [n] by group, or `symmetry.shape(group)`: unit j of the reference goes with unit
        `p[j]` of the other.

    Raises:
        ValueError: trees that do not match the symmetry or each other, `loss` without batches or
            batches without it, an unknown `point`, fewer than one step or iteration, a
            temperature that is not positive, or an objective that is not finite.
        TypeError: the key is none.

    Source: Peña et al. (CVPR 2023), "Re-basin via implicit Sinkhorn differentiation".
    """
    if point not in POINTS:
        raise ValueError(f"unknown point {point!r}; {nearest(point, POINTS)}")
    check_key(key)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    _check(temperature, num_iters)
    drawn = [arguments(batch) for batch in batches or ()]
    if (loss is None) == bool(drawn):
        raise ValueError("give a loss with at least one batch, or neither: None is the distance")
    parameters = parameter_names(symmetry, reference, other)
    scores, values = _descend(
        reference,
        other,
        trees.stack(drawn) if drawn else (),
        key,
        learning_rate,
        temperature,
        shapes=tuple((name, symmetry.shape(name)) for name in symmetry.groups),
        layouts=tuple(symmetry.layouts.items()),
        parameters=parameters,
        loss=loss,
        steps=steps,
        num_iters=num_iters,
        random_point=point == "random",
    )
    if is_concrete(values) and not bool(jnp.all(jnp.isfinite(values))):
        step = int(jnp.argmin(jnp.isfinite(values)))
        raise ValueError(
            f"the objective is {values[step]} at step {step}: look for NaN in the models and "
            "batches, or lower learning_rate"
        )
    return {name: assignment(scores[name], backend=backend) for name in symmetry.groups}


@functools.partial(
    jax.jit,
    static_argnames=(
        "shapes",
        "layouts",
        "parameters",
        "loss",
        "steps",
        "num_iters",
        "random_point",
    ),
)
def _descend(
    reference: PyTree,
    other: PyTree,
    batches: PyTree,
    key: Key,
    learning_rate: Array,
    temperature: Array,
    *,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    layouts: tuple[tuple[str, Layout], ...],
    parameters: tuple[str, ...],
    loss: Callable[..., Array] | None,
    steps: int,
    num_iters: int,
    random_point: bool,
) -> tuple[dict[str, Array], Array]:
    """The scores [*shape, n] by group after all steps, and the objective [steps] before each."""
    ours = dict(trees.named_leaves(reference))

    def objective(scores: dict[int, Array], step: Array) -> Array:
        balanced = {
            width: sinkhorn(stack, temperature=temperature, num_iters=num_iters)
            for width, stack in scores.items()
        }
        moved = apply_to_tree(dict(layouts), _by_group(balanced, shapes), other)
        if loss is None:
            theirs = dict(trees.named_leaves(moved))
            wide = [trees.wide(ours[name].dtype) for name in parameters]
            differences = [
                ours[name].astype(dtype) - theirs[name].astype(dtype)
                for name, dtype in zip(parameters, wide, strict=True)
            ]
            squares = [jnp.sum(jnp.square(jnp.abs(d))).astype(jnp.float32) for d in differences]
            return jnp.sum(jnp.stack(squares))
        weight = jax.random.uniform(jax.random.fold_in(key, step)) if random_point else 0.5
        batch = jax.tree.map(lambda x: x[step % len(x)], batches)
        return loss(point_between(weight, reference, moved), *batch)

    optimizer = optax.adam(learning_rate)

    def descend(carry: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], Array]:
        scores, state = carry
        value, gradient = jax.value_and_grad(objective)(scores, step)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(scores, updates), state), value

    drawn = {
        name: 0.1 * jax.random.normal(trees.name_key(key, name), (*shape, shape[-1]), jnp.float32)
        for name, shape in shapes
    }
    scores = _by_width(drawn)
    carry, values = jax.lax.scan(descend, (scores, optimizer.init(scores)), jnp.arange(steps))
    return _by_group(carry[0], shapes), values


def _by_width(matrices: dict[str, Array]) -> dict[int, Array]:
    """The matrices [*shape, n] of all groups of n units as one stack [., n, n]: by n."""
    stacks: dict[int, list[Array]] = {}
    for matrix in matrices.values():
        width = matrix.shape[-1]
        stacks.setdefault(width, []).append(matrix.reshape(-1, width, width))
    return {width: jnp.concatenate(stack) for width, stack in stacks.items()}


def _by_group(
    stacks: dict[int, Array], shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> dict[str, Array]:
    """The inverse of `_by_width`."""
    matrices: dict[str, Array] = {}
    used = dict.fromkeys(stacks, 0)
    for name, (*outer, width) in shapes:
        start, used[width] = used[width], used[width] + math.prod(outer)
        matrices[name] = stacks[width][start : used[width]].reshape(*outer, width, width)
    return matrices
