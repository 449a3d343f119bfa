"""Random programs: whatever is inferred must hold, in double precision, when checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align

SIZES = (2, 3, 4, 6)


def random_program(seed, length=8):
    """A function that applies random operations, its variables, and an input.

    Every other operation is a layer with weights of its own, so that most operations meet axes
    that are still free.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 6))
    variables = {}
    steps = []
    plan = rng.integers(0, 1 << 30, size=length).tolist()
    kinds = [rng.integers(0, 8) if i % 2 == 0 else rng.integers(8, 27) for i in range(length)]

    def weight(shape):
        same = [name for name, w in variables.items() if w.shape == tuple(shape)]
        if same and rng.random() < 0.3:
            return str(rng.choice(same))
        name = f"w{len(variables)}"
        variables[name] = rng.normal(size=shape)
        return name

    def step(kind, draw, value, earlier):
        """One operation on `value` [.., ..., n]; returns a function of (variables, values)."""
        n, axis = value.shape[-1], value.ndim - 1 if draw % 3 else draw // 3 % value.ndim
        size = SIZES[draw // 100 % len(SIZES)]
        if kind <= 4:
            name = weight((n, size))
            return lambda v, z, _: z @ v[name]
        if kind <= 6:
            name = weight((n,))
            return lambda v, z, _: jax.nn.tanh(z + v[name])
        if kind == 7:
            name = weight((n,))
            return lambda v, z, _: z * v[name]
        if kind == 8:
            divisors = [d for d in (2, 3) if value.shape[axis] % d == 0]
            if divisors and value.ndim < 4:
                d, shape = divisors[0], value.shape
                split = (*shape[:axis], d, shape[axis] // d, *shape[axis + 1 :])
                return lambda v, z, _: z.reshape(split)
        if kind == 9 and value.ndim > 2:
            shape = value.shape
            return lambda v, z, _: z.reshape(*shape[:-2], shape[-2] * shape[-1])
        if kind == 10:
            order = tuple(np.random.default_rng(draw).permutation(value.ndim).tolist())
            return lambda v, z, _: z.transpose(order)
        matching = [i for i, other in enumerate(earlier) if other.shape == value.shape]
        if kind in (11, 12) and matching:
            i = matching[draw // 7 % len(matching)]
            return lambda v, z, old: z + old[i]
        if kind == 13 and matching:
            i = matching[draw // 7 % len(matching)]
            return lambda v, z, old: jnp.concatenate([z, old[i]], axis=axis)
        if kind == 14 and value.shape[axis] > 1:
            cut = 1 + draw // 11 % (value.shape[axis] - 1)

            def halves(v, z, _):
                first, second = jnp.split(z, [cut], axis=axis)
                return first * second.sum(axis, keepdims=True)

            return halves
        if kind == 15 and value.shape[axis] % 2 == 0:

            def gate(v, z, _):
                first, second = jnp.split(z, 2, axis=axis)
                return first * jax.nn.sigmoid(second)

            return gate
        if kind == 16 and value.shape[axis] > 2:
            return lambda v, z, _: jax.lax.slice_in_dim(z, 1, z.shape[axis], axis=axis)
        if kind == 17:
            return lambda v, z, _: jax.nn.softmax(z, axis=axis)
        if kind == 18:
            return lambda v, z, _: jnp.cumsum(z, axis=axis)
        if kind == 19:
            return lambda v, z, _: jnp.sort(z, axis=axis)
        if kind == 20:
            return lambda v, z, _: jnp.einsum("...ni,...mi->...nm", z, z)
        if kind == 21:
            return lambda v, z, _: z - z.mean(axis=axis, keepdims=True)
        if kind == 22 and value.shape[axis] < 8:
            widths = [(0, 0)] * value.ndim
            widths[axis] = (1, 2)
            return lambda v, z, _: jnp.pad(z, widths)
        if kind == 23:
            constant = np.random.default_rng(draw).normal(size=n)
            return lambda v, z, _: z * constant
        if kind == 24:
            reps = [1] * value.ndim
            reps[axis] = 2
            return lambda v, z, _: jnp.tile(z, reps)
        if kind == 25:
            index = np.random.default_rng(draw).integers(0, value.shape[axis], 3)
            return lambda v, z, _: jnp.take(z, index, axis=axis)
        return lambda v, z, _: jax.nn.relu(z)

    values = [x]
    for kind, draw in zip(kinds, plan, strict=True):
        function = step(kind, draw, values[-1], values)
        result = np.asarray(function(variables, values[-1], values))
        if result.size > 4000:
            continue
        steps.append(function)
        values.append(result)
    name = weight((values[-1].shape[-1], 2))

    def fn(v, x):
        values = [x]
        for function in steps:
            values.append(function(v, values[-1], values))
        return values[-1] @ v[name], values[len(values) // 2].sum()

    return fn, variables, x


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_are_invariant(seed, x64):
    fn, variables, x = random_program(seed)
    symmetry = align.infer_symmetry(fn, variables, x, check=False)
    assert symmetry.check(jax.random.key(seed)) < 1e-9
