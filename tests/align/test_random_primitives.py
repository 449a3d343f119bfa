"""Random programs of layers and rarer primitives: whatever is inferred must hold when checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align


def sliced(z, axis, parts, draw):
    """Equal slices of an axis, joined with each other."""
    size = z.shape[axis] // parts
    first, *others = (
        jax.lax.slice_in_dim(z, i * size, (i + 1) * size, axis=axis) for i in range(parts)
    )
    for i, other in enumerate(others):
        first = first * jnp.tanh(other) if (draw + i) % 2 else first + other
    return first


def read_apart(z, axis, parts, draw):
    """A fused axis reshaped and read one part at a time, the parts outermost or innermost."""
    sizes = (parts, z.shape[axis] // parts)
    at = axis
    if draw % 2:
        sizes, at = sizes[::-1], axis + 1
    apart = jnp.moveaxis(z.reshape(*z.shape[:axis], *sizes, *z.shape[axis + 1 :]), at, 0)
    found = jnp.unstack(apart) if draw % 3 else [apart[i] for i in range(parts)]
    if draw % 5 == 0:
        return found[-1]
    return jnp.concatenate(found[::-1], axis=axis) if draw % 5 == 1 else sum(map(jnp.sin, found))


def pooled(z, axis, draw):
    """The gradient or the tangent of maximum pooling along one axis."""
    ones = (1,) * z.ndim
    window = tuple(2 if a == axis else 1 for a in range(z.ndim))

    def pool(y):
        return jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, window, ones, "SAME")

    if draw % 2:
        return jax.grad(lambda y: (pool(y) ** 2).sum())(z)
    return jax.jvp(pool, (z,), (jnp.sin(z),))[1]


def updated(z, axis, draw):
    """Rows along an axis added to, overwritten, or summed by segment."""
    rows, size = jnp.moveaxis(z, axis, 0), z.shape[axis]
    where = jnp.asarray(np.random.default_rng(draw).integers(0, size, 3), jnp.int32)
    if draw % 3 == 0:
        rows = rows.at[where].add(1.5)
    elif draw % 3 == 1:
        rows = rows.at[draw % size].set(2 * rows[0])
    else:
        rows = jax.ops.segment_sum(rows, jnp.resize(where, size) % 3, 3)
    return jnp.moveaxis(rows, 0, axis)


def indexed(z, axis, draw):
    """Each line along an axis read or changed at an index of its own, or all at the same."""
    size = z.shape[(axis + 1) % z.ndim]
    rng = np.random.default_rng(draw)
    index = rng.integers(0, size, z.shape[axis]) if draw % 2 else np.full(z.shape[axis], size - 1)
    lines = jnp.moveaxis(z, ((axis + 1) % z.ndim, axis), (0, 1))

    def one(line, i):
        return line[i] if draw % 3 else line.at[i].multiply(0.5)

    return jax.vmap(one, (1, 0))(lines, jnp.asarray(index, jnp.int32))


def reordered(z, axis, draw):
    """Sorting, cumulating and selecting along an axis; masks and reductions of any kind."""
    shared = tuple(1 if a != axis else z.shape[axis] for a in range(z.ndim))
    return [
        lambda: z + jnp.argsort(z, axis=axis).astype(z.dtype),
        lambda: jax.lax.cumlogsumexp(z, axis),
        lambda: jax.lax.approx_max_k(z, min(2, z.shape[axis]), reduction_dimension=axis)[0],
        lambda: jnp.where(jax.random.bernoulli(jax.random.key(draw), 0.6, shared), z, 0.0),
        lambda: z * jnp.expand_dims(jax.lax.reduce(z, 0.0, jnp.hypot, (axis,)), axis),
        lambda: z.transpose(np.random.default_rng(draw).permutation(z.ndim).tolist()),
        lambda: z.reshape(*z.shape[:-2], -1),
        lambda: jnp.stack([z, jnp.cos(z)], axis).reshape(*z.shape[:axis], -1, *z.shape[axis + 1 :]),
    ][draw % 8]()


def random_program(seed, length=8):
    """A function of every other layer and operation, its variables, and an input."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 6))
    shape, steps, variables = x.shape, [], {}

    def weight(*shape):
        same = [name for name, w in variables.items() if w.shape == shape]
        if same and rng.random() < 0.3:
            return str(rng.choice(same))
        name = f"w{len(variables)}"
        variables[name] = rng.normal(size=shape)
        return name

    def layer():
        width = shape[-1]
        kind = rng.integers(0, 4)
        if kind == 0:
            bias = weight(width)
            return lambda v, z: jnp.tanh(z + v[bias])
        if kind == 1 and len(shape) == 3:
            groups = int(rng.choice([g for g in (1, 2, 3) if width % g == 0]))
            kernel = weight(2, width // groups, groups * 2)
            return lambda v, z: jax.lax.conv_general_dilated(
                z, v[kernel], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=groups,
            )  # fmt: skip
        if kind == 2:
            experts, first = weight(2, width, 4), int(rng.integers(0, np.prod(shape[:-1])))

            def ragged(v, z):
                rows = z.reshape(-1, z.shape[-1])
                sizes = jnp.array([first, rows.shape[0] - first], jnp.int32)
                return jax.lax.ragged_dot(rows, v[experts], sizes).reshape(*z.shape[:-1], 4)

            return ragged
        kernel = weight(width, int(rng.choice([4, 6, 8, 12])))
        return lambda v, z: jnp.tanh(z @ v[kernel])

    def operation():
        axis = int(rng.integers(0, len(shape))) if rng.random() < 0.4 else len(shape) - 1
        draw, kind = int(rng.integers(0, 1000)), rng.integers(0, 6)
        if kind < 2:
            divisors = [d for d in (2, 3) if shape[axis] % d == 0]
            if not divisors:
                return None
            function, parts = (sliced, read_apart)[kind], divisors[draw % len(divisors)]
            return lambda v, z: function(z, axis, parts, draw)
        function = (pooled, updated, indexed, reordered)[kind - 2]
        return lambda v, z: function(z, axis, draw)

    while len(steps) < length:
        step = operation() if len(steps) % 2 else layer()
        if step is None:
            continue
        result = jax.eval_shape(step, variables, jax.ShapeDtypeStruct(shape, x.dtype))
        if result.size < 500 and 2 <= result.ndim <= 4:
            steps.append(step)
            shape = result.shape
    last = weight(shape[-1], 2)

    def fn(v, x):
        for step in steps:
            x = step(v, x)
        return x @ v[last]

    return fn, variables, x


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_are_invariant(seed, x64):
    fn, variables, x = random_program(seed)
    symmetry = align.infer_symmetry(fn, variables, x, check=False)
    assert symmetry.check(jax.random.key(seed)) < 1e-9
