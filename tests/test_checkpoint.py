import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from mixlab.checkpoint import (
    CheckpointError,
    Checkpoints,
    read_agents,
    read_models,
    resize,
    write_model,
)


def state(value=0.0):
    params = {"dense": {"kernel": np.full((4, 300, 20), value, np.float32)}}
    opt_state = jax.tree.map(np.array, optax.adam(1e-3).init(params))
    return params, None, opt_state, np.arange(4, dtype=np.int32)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def filled(folder, steps=(10, 20, 30), keep=3):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"round": step // 10})
        checkpoints.wait()
        assert checkpoints.steps() == list(steps)[-keep:]


def test_the_newest_comes_back_bit_for_bit(tmp_path):
    filled(tmp_path, keep=2)
    with Checkpoints(tmp_path, 2) as checkpoints:
        step, found, meta = checkpoints.restore(state())
    assert (step, meta) == (30, {"round": 3})
    assert type(found[2]) is type(state()[2])
    np.testing.assert_array_equal(found[0]["dense"]["kernel"], state(30)[0]["dense"]["kernel"])
    assert found[3].dtype == np.int32


def test_an_empty_folder_gives_nothing(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(state()) is None


# orbax leaves a coroutine behind when a file is missing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "missing"])
def test_a_damaged_one_is_reported_and_the_one_before_is_used(tmp_path, damage):
    filled(tmp_path)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 300, 20)).astype(np.float32)  # does not compress away
    with Checkpoints(tmp_path, 3) as checkpoints:
        newest = state()
        newest[0]["dense"]["kernel"][:] = noise
        checkpoints.save(40, newest, {})
        checkpoints.wait()
    file = largest_file(tmp_path / "step_40" / "state")
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut short":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with Checkpoints(tmp_path, 3) as checkpoints:
        with pytest.warns(UserWarning, match="step 40 .* is damaged"):
            step, _, _ = checkpoints.restore(state())
        assert step == 30
        assert 40 not in checkpoints.steps()
        checkpoints.save(40, state(41), {})  # the run comes by again
        checkpoints.wait()
        assert checkpoints.restore(state())[0] == 40


def test_all_damaged_is_an_error_that_says_so(tmp_path):
    filled(tmp_path, steps=(10,))
    largest_file(tmp_path / "step_10" / "state").write_bytes(b"")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="all checkpoints"),
    ):
        checkpoints.restore(state())


def test_another_structure_or_shape_is_an_error_and_loses_nothing(tmp_path):
    filled(tmp_path)
    other = state()
    other[0]["extra"] = np.zeros(1)
    wider = state()
    wider[0]["dense"]["kernel"] = np.zeros((4, 300, 21), np.float32)
    with Checkpoints(tmp_path, 3) as checkpoints:
        with pytest.raises(ValueError, match="0/extra"):
            checkpoints.restore(other)
        with pytest.raises(ValueError, match="0/dense/kernel"):
            checkpoints.restore(wider)
        assert checkpoints.steps() == [10, 20, 30]


def test_one_checkpoint_alone_may_not_be_kept(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_a_failed_save_names_the_folder_and_what_is_left(tmp_path):
    filled(tmp_path)
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints._manager.save = lambda *a, **k: (_ for _ in ()).throw(
            OSError(28, "No space left on device")
        )
        with pytest.raises(CheckpointError, match=r"No space left .* step 30 is whole"):
            checkpoints.save(40, state(), {})


@pytest.mark.parametrize(
    ("wanted", "rows"), [(2, [0, 1]), (3, [0, 1, 2]), (7, [0, 1, 2] * 2 + [0])]
)
def test_agents_are_dropped_or_cloned_in_turn(wanted, rows):
    tree = {"x": np.arange(6.0).reshape(3, 2), "none": None, "count": np.arange(3, dtype=np.int8)}
    found = resize(tree, wanted)
    np.testing.assert_array_equal(found["x"], tree["x"][rows])
    assert found["none"] is None
    assert found["count"].dtype == np.int8
    with pytest.raises(ValueError, match="at least 1"):
        resize(tree, 0)


def test_another_run_begins_from_the_agents_of_this_one(tmp_path):
    class State(NamedTuple):  # the fields of a run's state, before they are read
        variables: Any
        opt_state: Any
        failed_at: Any

    params = {"kernel": np.arange(8, dtype=np.float32).reshape(4, 2)}
    optimizer = optax.sgd(0.1, momentum=0.9)
    opt_state = jax.tree.map(lambda x: np.array(x) + 1, optimizer.init(params))
    saved = State({"params": params}, opt_state, np.zeros(4, np.int32))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"state": saved, "totals": {"loss": np.zeros(4)}}, {})
        checkpoints.wait()
    like = {"variables": saved.variables, "opt_state": opt_state}
    found, told = read_agents(tmp_path, like, 6)
    assert told.endswith("agents 4 to 5 are clones of them in turn")
    assert jax.tree.structure(found) == jax.tree.structure(like)
    rows = [0, 1, 2, 3, 0, 1]
    np.testing.assert_array_equal(found["variables"]["params"]["kernel"], params["kernel"][rows])
    np.testing.assert_array_equal(found["opt_state"][0].trace["kernel"], np.ones((6, 2)))
    assert read_agents(tmp_path, like, 1)[1].endswith("agents 1 to 3 are dropped")
    with pytest.raises(ValueError, match=r"same model and optimizer.*lack.*nu/kernel"):
        read_agents(tmp_path, {**like, "opt_state": optax.adam(0.1).init(params)}, 4)
    wider = {"params": {"kernel": np.zeros((4, 3), np.float32)}}
    with pytest.raises(ValueError, match=r"kernel is .2,. there and .3,. here"):
        read_agents(tmp_path, {**like, "variables": wider}, 4)


def arrays(value=0.0):
    return {"a.weight": np.full((2, 3), value, np.float32), "b.bias": np.arange(3, dtype=np.int32)}


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_folder_with_one_safetensors_file_is_a_model(tmp_path):
    save_file(arrays(2.0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (model,) = read_models(tmp_path)
    assert_same(model, arrays(2.0))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read_models(tmp_path)


def test_all_shards_that_an_index_names_are_read(tmp_path):
    files = {"a.weight": "model-00001-of-00002.safetensors"}
    files["b.bias"] = "model-00002-of-00002.safetensors"
    for name, file in files.items():
        save_file({name: arrays()[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (model,) = read_models(tmp_path)
    assert_same(model, arrays())

    index.write_text(json.dumps({"weight_map": {**files, "c": files["b.bias"]}}))
    with pytest.raises(ValueError, match="lack c"):
        read_models(tmp_path)
    (tmp_path / files["b.bias"]).unlink()
    with pytest.raises(ValueError, match="not there: model-00002-of-00002"):
        read_models(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        read_models(tmp_path)


@pytest.mark.parametrize("prefix", [None, "step"])
def test_the_newest_step_of_an_orbax_manager_is_read(tmp_path, prefix):
    options = ocp.CheckpointManagerOptions(step_prefix=prefix)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in (2, 9, 10):  # in which the order of numbers is not that of names
            manager.save(step, args=ocp.args.StandardSave({"a": arrays(step)}))
    (model,) = read_models(tmp_path)
    assert_same(model, {"a": arrays(10)})
    (model,) = read_models(tmp_path / (f"{prefix}_9" if prefix else "9"))
    assert_same(model, {"a": arrays(9)})


def test_what_is_no_model_is_an_error_that_says_what_is(tmp_path):
    (tmp_path / "3").mkdir()
    with pytest.raises(ValueError, match=r"is no model; give .* its index, a checkpoint of orbax"):
        read_models(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*/nothing; give"):
        read_models(tmp_path / "nothing")
    items = ocp.args.Composite(state=ocp.args.StandardSave(arrays()))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=items)
    with pytest.raises(ValueError, match=r"neither of a run .*; give .*/4/state"):
        read_models(tmp_path)
    (model,) = read_models(tmp_path / "4" / "state")
    assert_same(model, arrays())


KINDS = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_is_read_again(tmp_path, suffix, mmap):
    special = {".safetensors": ["float8_e4m3fn", "float8_e5m2"], ".npz": ["complex64"]}
    kinds = [*KINDS.split(), *special[suffix]]
    model = {name: np.arange(6).reshape(2, 3).astype(jnp.dtype(name)) for name in kinds}
    model["int64"] += 2**40  # JAX alone would cut it off
    model["turned"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    model |= {"scalar": np.float32(3), "empty": np.zeros((0, 2), np.int8)}
    model["nested"] = {"jax": jnp.ones(2, jnp.bfloat16), "none": None}
    file = tmp_path / "made" / f"model{suffix}"
    write_model(file, model)
    (found,) = read_models(file, mmap=mmap)
    nested = model.pop("nested")
    wanted = {**model, "nested/jax": nested["jax"]}
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert type(found[name]) is np.ndarray
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_damaged_archive_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "model.npz"
    write_model(file, arrays())
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"NUMPY") + 100] ^= 1
    for content in (b"", b"something else", whole[:-40], bytes(damaged)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.npz cannot be read as \.npz"):
            read_models(file)


def test_a_mapped_model_survives_the_replacement_of_its_file(tmp_path):
    file = tmp_path / "model.safetensors"
    write_model(file, arrays(1.0))
    (model,) = read_models(tmp_path, mmap=True)
    write_model(file, arrays(2.0))
    assert_same(model, arrays(1.0))
    assert_same(read_models(file)[0], arrays(2.0))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_failed_write_leaves_what_was_there(tmp_path, suffix, monkeypatch):
    file = tmp_path / f"model{suffix}"
    write_model(file, arrays(1.0))
    monkeypatch.setattr("mixlab.checkpoint.os.fsync", lambda number: number.no_space)
    with pytest.raises(AttributeError, match="no_space"):
        write_model(file, arrays(2.0))
    assert_same(read_models(file)[0], arrays(1.0))
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_file_cannot_hold_is_an_error_that_says_so(tmp_path):
    small = {"x": np.ones(2, jnp.float8_e5m2)}
    with pytest.raises(ValueError, match=r"'x' is float8_e5m2, which .npz cannot hold; .safet"):
        write_model(tmp_path / "x.npz", small)
    with pytest.raises(ValueError, match=r"complex128, which .safetensors cannot hold$"):
        write_model(tmp_path / "x.safetensors", {"x": np.ones(2, complex)})
    with pytest.raises(ValueError, match=r"a .safetensors or .npz file, not to .*x\.bin"):
        write_model(tmp_path / "x.bin", small)
    with pytest.raises(ValueError, match=r"same name: \['a/b'\]"):
        write_model(tmp_path / "x.npz", {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})
    assert not list(tmp_path.iterdir())
