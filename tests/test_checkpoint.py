import pathlib

import jax
import numpy as np
import optax
import pytest

from mixlab.checkpoint import CheckpointError, Checkpoints


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
