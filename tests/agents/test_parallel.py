import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import agents
from mixlab.agents.parallel import (
    _loop,
    exchange_rounds,
    force_cpu_devices,
    host_callbacks_are_safe,
    largest_divisor,
    parallel,
)

LAYOUTS = {
    "loop": {"backend": "loop"},
    "vmap": {"backend": "vmap"},
    "pmap of 8": {"backend": "pmap"},
    "pmap of 4, loop": {"backend": "pmap", "num_devices": 4},
    "pmap of 2, vmap": {"backend": "pmap", "num_devices": 2, "per_device": "vmap"},
}


def program(axis, state, agents, shared):
    """Touches everything that an axis offers: ids, each, gather."""
    mean = jax.tree.map(lambda x: axis.gather(x).mean(0), state)

    def one(agent, own, bias):
        return {"x": jnp.sin(own["x"]) + mean["x"] * shared + bias, "id": agent}

    return axis.each(one)(axis.ids, state, agents)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("donate", [False, True])
def test_every_backend_gives_the_same(layout, donate):
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(8, 3)).astype(np.float32), np.arange(8, dtype=np.float32)
    where = parallel(8, **layout)
    run = where.compile(program, donate=donate)
    found = where.get(run(where.put({"x": x}), where.put(bias), where.replicate(np.float32(2))))
    np.testing.assert_allclose(found["x"], np.sin(x) + x.mean(0) * 2 + bias[:, None], rtol=1e-5)
    np.testing.assert_array_equal(found["id"], np.arange(8))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("asked", [1, 3, 8])
def test_what_is_asked_for_is_fetched(layout, asked):
    rng = np.random.default_rng(asked)
    x, ids = rng.normal(size=(8, 3)).astype(np.float32), np.arange(8, dtype=np.int32)
    # Some ask for themselves, some twice for the same.
    sources = (ids[:, None] + rng.integers(0, asked, size=(8, asked))) % 8
    where = parallel(8, **layout)

    def columns(axis, state, held, shared):
        fetched = axis.fetch(state, sources)
        return [fetched.column(s) for s in range(asked)]

    found = where.get(where.compile(columns)(where.put({"x": x, "id": ids}), {}, 0))
    for s, tree in enumerate(found):
        np.testing.assert_array_equal(tree["id"], sources[:, s])
        np.testing.assert_array_equal(tree["x"], x[sources[:, s]])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_one_agent_is_picked(layout):
    tree = {
        "x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),
        "nan": np.where(np.arange(8) == 2, np.nan, np.inf).astype(np.float32),
        "id": np.arange(8, dtype=np.int32),
        "odd": np.arange(8) % 2 == 1,
    }
    where = parallel(8, **layout)

    def picked(axis, state, held, agent):
        one = axis.pick(state, agent)
        return axis.each(lambda own: one)(axis.ids)

    run = where.compile(picked)
    for agent in range(8):
        found = where.get(run(where.put(tree), {}, where.replicate(np.int32(agent))))
        for name, leaf in tree.items():
            assert found[name].dtype == leaf.dtype
            np.testing.assert_array_equal(found[name], np.stack([leaf[agent]] * 8))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_all_agents_are_reduced_and_combined_column_by_column(layout):
    rng = np.random.default_rng(0)
    # Sizes that the devices do not divide, several leaves of a dtype, scalars, nothing at all.
    tree = {
        "x": rng.normal(size=(8, 3, 5)).astype(np.float32),
        "y": rng.normal(size=(8, 16)).astype(np.float32),
        "half": rng.normal(size=(8, 1)).astype(np.float16),
        "id": np.arange(8, dtype=np.int32),
        "odd": np.arange(8) % 2 == 1,
        "empty": np.zeros((8, 0), np.float32),
        "none": None,
    }
    order = rng.permutation(8)
    where = parallel(8, **layout)

    def program(axis, state, held, shared):
        last = axis.reduce(lambda x: x[order[-1]], state)
        total = axis.reduce(lambda x: x.sum(0), {"x": state["x"], "y": state["y"]})
        moved = axis.combine(lambda x: x[order], state)
        last, total = axis.each(lambda agent: (last, total))(axis.ids)
        return last, total, moved

    last, total, moved = where.get(where.compile(program)(where.put(tree), {}, 0))
    assert last["none"] is None
    assert moved["none"] is None
    for name in ("x", "y"):
        np.testing.assert_allclose(total[name], np.stack([tree[name].sum(0)] * 8), rtol=1e-5)
    for name, leaf in tree.items():
        if leaf is not None:
            assert last[name].dtype == moved[name].dtype == leaf.dtype
            np.testing.assert_array_equal(last[name], np.stack([leaf[order[-1]]] * 8))
            np.testing.assert_array_equal(moved[name], leaf[order])


@pytest.mark.parametrize(
    ("topology", "rounds"),
    [
        (agents.ring(8), 2),
        (agents.torus(25), 4),
        (agents.exponential(16), 4),
        (agents.hypercube(8), 3),
        (agents.star(6), 5),
        (agents.erdos_renyi(20, p=0.2, seed=0), None),
        (agents.disconnected(3), 0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_exchange_is_split_into_permutations(topology, rounds):
    wanted = topology.adjacency
    found = exchange_rounds(wanted)
    for pairs in found:
        sources, targets = zip(*pairs, strict=True)
        assert len(set(sources)) == len(sources)
        assert len(set(targets)) == len(targets)
    sent = sorted((target, source) for pairs in found for source, target in pairs)
    assert sent == sorted(map(tuple, np.argwhere(wanted).tolist()))
    most = int(max(wanted.sum(0).max(), wanted.sum(1).max()))
    assert len(found) == rounds if rounds is not None else most <= len(found) <= most + 2


def mixed(network, state):
    return network.mix(state)


def averaged(network, state):
    return network.mean(state)


def uploaded(network, state):
    center = {"params": jnp.zeros(state.shape[1:], state.dtype)}
    one = network.upload({"params": state}, jnp.arange(16) < 9, center)["params"]
    return network.axis.each(lambda agent: one)(network.axis.ids)


def met(network, state):
    return network.select(state, jnp.asarray([3, 11]))[:1]


@pytest.mark.parametrize(
    ("topology", "communicate"),
    [
        (agents.ring(16), mixed),
        (agents.complete(16), mixed),
        (agents.complete(16), averaged),
        (agents.star(16), uploaded),
        (agents.complete(16), met),
    ],
)
def test_no_device_holds_all_agents(topology, communicate):
    where, size = parallel(16), 1 << 16

    def program(axis, state, held, weights):
        network = agents.Network(axis, weights, topology.adjacency, jax.random.key(0), jnp.int32(0))
        return communicate(network, state)

    run = where.compile(program)
    weights = where.replicate(np.asarray(topology.mixing_matrix(), np.float32))
    state = where.put(np.zeros((16, size), np.float32))
    compiled = jax.jit(lambda state, weights: run(state, {}, weights))
    memory = compiled.lower(state, weights).compile().memory_analysis()
    models = memory.temp_size_in_bytes / (4 * size)
    print(models)
    assert models < 10  # of two agents a device


def test_put_and_get_are_inverse_and_get_copies():
    where = parallel(8, "pmap", num_devices=4)
    tree = {"a": np.arange(16, dtype=np.int32).reshape(8, 2), "b": np.ones(8, bool)}
    placed = where.put(tree)
    assert placed["a"].shape == (4, 2, 2)
    back = where.get(placed)
    for name, leaf in tree.items():
        np.testing.assert_array_equal(back[name], leaf)
        assert back[name].dtype == leaf.dtype
    assert back["a"].flags.owndata or back["a"].base.flags.owndata


def test_loop_is_vmap():
    def fn(x, y):
        return {"s": x["a"] @ y, "n": None}

    x, y = {"a": jnp.arange(12.0).reshape(3, 2, 2)}, jnp.ones((3, 2))
    looped, mapped = _loop(fn)(x, y), jax.vmap(fn)(x, y)
    np.testing.assert_allclose(looped["s"], mapped["s"])
    assert looped["n"] is None


def test_collectives_many_times_over_do_not_wait_for_each_other():
    where = parallel(8)
    run = where.compile(lambda axis, s, a, t: s / 2 + axis.gather(s).mean(0)[None] / 2, donate=True)
    x = where.put(np.arange(8, dtype=np.float32)[:, None])
    for _ in range(200):
        x = run(x, None, 0)
    np.testing.assert_allclose(where.get(x), np.full((8, 1), 3.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_agents": 0}, "at least 1"),
        ({"num_agents": 8, "backend": "pmpa"}, "loop, vmap, pmap"),
        ({"num_agents": 8, "num_devices": 3}, "multiple of 3 agents, or devices=2"),
        ({"num_agents": 16, "num_devices": 16}, "there are 8 cpu devices"),
        ({"num_agents": 8, "per_device": "map"}, "auto, loop or vmap"),
        ({"num_agents": 8, "backend": "loop", "per_device": "vmap"}, "is for backend 'pmap'"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        parallel(**arguments)


@pytest.mark.parametrize(("agents", "devices"), [(5, 5), (7, 7), (9, 3), (12, 6), (16, 8), (11, 1)])
def test_agents_take_as_many_devices_as_divide_them(agents, devices):
    where = parallel(agents)
    assert len(where.devices) == devices
    assert where.per_block * devices == agents
    assert str(agents) in str(where)


def test_largest_divisor():
    assert [largest_divisor(n, 8) for n in (1, 8, 9, 11, 1000)] == [1, 8, 3, 1, 8]


def test_cpu_devices_are_forced_before_jax_starts():
    code = (
        "from mixlab.agents.parallel import force_cpu_devices, parallel, host_callbacks_are_safe\n"
        "print(force_cpu_devices(6)); import jax; print(len(jax.devices()))\n"
        "print(host_callbacks_are_safe(parallel(6)))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["6", "6", "True"]


def test_given_flags_are_left_alone():
    assert force_cpu_devices(3) == 8
    assert host_callbacks_are_safe(parallel(8))
