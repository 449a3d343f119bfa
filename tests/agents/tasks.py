"""Tiny tasks and a way to run one function over the agent axis, for the tests of strategies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixlab import agents, align, models
from mixlab.agents.parallel import whole_axis

FEATURES, CLASSES = 5, 3
WIDTHS = (FEATURES, 7, 6, CLASSES)


def mlp(variables, x):
    """Two hidden layers; tanh, so that no unit is dead and every match has one best answer."""
    params = variables["params"]
    for i in range(3):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        x = jnp.tanh(x) if i < 2 else x
    return x


def mlps(num_agents, seed=0):
    """Variables of `num_agents` unlike MLPs, leaves [A, ...]."""
    rng = np.random.default_rng(seed)

    def layer(i):
        fan_in, fan_out = WIDTHS[i : i + 2]
        kernel = rng.normal(size=(num_agents, fan_in, fan_out), scale=fan_in**-0.5)
        bias = rng.normal(size=(num_agents, fan_out), scale=0.3)
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    return {"params": {f"Dense_{i}": layer(i) for i in range(3)}}


def adam(learning_rate=1e-2):
    """Adam whose steps do not magnify the rounding of tiny gradients."""
    plain = optax.adam(learning_rate, eps=1e-3)

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):  # optax 0.2.8 counts in int32
            return plain.update(*arguments)

    return optax.GradientTransformation(plain.init, update)


@functools.cache
def mlp_symmetry():
    one = jax.tree.map(lambda x: x[0], mlps(1))
    return align.infer_symmetry(mlp, one, np.ones((2, FEATURES), np.float32), check=False)


def mlp_problem(optimizer=None, num_images=40):
    rng = np.random.default_rng(1)
    return agents.Problem(
        optimizer=optimizer or optax.sgd(0.1, momentum=0.9),
        symmetry=mlp_symmetry(),
        images=jnp.asarray(rng.normal(size=(num_images, FEATURES)), jnp.float32),
    )


CNN = models.CNN(CLASSES, features=(4,))


def cnn_problem():
    """A convolution with BatchNorm, statistics re-estimated from one batch."""
    images = jax.random.normal(jax.random.key(3), (12, 4, 4, 1))
    variables = jax.jit(CNN.init)(jax.random.key(0), images[:1])

    def seen(variables, x):
        return CNN.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    def batch_stats(variables, x):
        momentum = models.BATCH_NORM_MOMENTUM
        return align.reestimate_batch_stats(seen, variables, [x], momentum=momentum)

    problem = agents.Problem(
        optimizer=optax.sgd(0.05, momentum=0.9),
        symmetry=align.infer_symmetry(CNN.apply, variables, images[:2], check=False),
        batch_stats=batch_stats,
        images=images,
    )
    return problem, variables


def mlp_gradients(variables, batch):
    def loss(params):
        logits = mlp({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return jax.grad(loss)(variables["params"]), None


def cnn_gradients(variables, batch):
    def loss(params):
        logits, changed = CNN.apply(
            {**variables, "params": params}, batch["image"], train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), changed["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def batches(num_agents, shape, steps, size=6, seed=2):
    """Examples for every agent and step, leaves [A, steps, B, ...]."""
    rng = np.random.default_rng(seed)
    lead = (num_agents, steps, size)
    return {
        "image": rng.normal(size=(*lead, *shape)).astype(np.float32),
        "label": rng.integers(0, CLASSES, lead).astype(np.int32),
    }


def start(variables, optimizer, num_agents):
    """The state of A agents before the first step, on the host."""
    opt_state = jax.vmap(optimizer.init)(variables["params"])
    failed_at = np.full(num_agents, -1, np.int32)
    return jax.tree.map(np.asarray, agents.AgentState(variables, opt_state, failed_at))


def network(axis, topology, weights=None, **others):
    """The network of one round on a topology: other fields of `agents.Network` by name.

    `weights` [A, A] may be traced, and are the topology's own by default.
    """
    weights = topology.weights if weights is None else weights
    given = {"key": jax.random.key(7), "time": jnp.int32(0), **others}
    return agents.Network(axis, jnp.asarray(weights, jnp.float32), topology.adjacency, **given)


def axis(num_agents):
    """All agents as one block, for calls outside of compiled programs."""
    return whole_axis(jnp.arange(num_agents), jax.vmap)


def over(where, fn, *states, shared=()):
    """`fn(axis, *states, *shared)` on the backend `where`; states and result have leaves [A, ...].

    `where` may be a number of agents, which then run vectorised on one device.
    """
    if isinstance(where, int):
        where = agents.parallel(where, "vmap")
    run = where.compile(lambda axis, state, held, shared: fn(axis, *state, *shared))
    return where.get(run(where.put(states), (), where.replicate(tuple(shared))))


def agent(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def assert_trees(found, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol, err_msg=name
        )
