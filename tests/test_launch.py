"""What the launch scripts make of their arguments; the programs that they call are stand-ins."""

import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
ARGUMENTS = ("--config", "quick start.py", "--config.strategy=fedavg(merge='krum(1)')")


@pytest.fixture
def place(tmp_path):
    """A copy of the scripts, in a folder with a space in its name, with a `mixlab` that tells."""
    root = tmp_path / "a b"
    shutil.copytree(LAUNCH, root / "launch")
    program(root / ".venv/bin/mixlab", 'printf "%s\\n" "$@" >"$0.${MIXLAB_PROCESS:-0}"')
    return root


def program(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/usr/bin/env bash", *lines, "")))
    path.chmod(0o755)


def launch(place, script, *arguments, **environment):
    return subprocess.run(
        ["bash", place / "launch" / script, *arguments],
        cwd=place,
        env={"PATH": f"{place}/bin:/usr/bin:/bin", "HOME": str(place / "home"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def told(place, process=0):
    """The arguments that `mixlab` got."""
    return tuple((place / f".venv/bin/mixlab.{process}").read_text().splitlines())


without_uv = pytest.mark.skipif(
    shutil.which("uv", path="/usr/bin:/bin") is not None, reason="uv would be found"
)


def test_processes_start_where_the_path_has_a_space(place):
    result = launch(place, "processes.sh", "2", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert told(place, 0) == told(place, 1) == ("train", *ARGUMENTS)


@pytest.mark.parametrize("cores", ["", "8"])
def test_srun_takes_the_cores_that_sbatch_was_told_of(place, cores):
    program(place / "bin/srun", 'printf "%s\\n" "$@"')
    result = launch(place, "slurm.sh", *ARGUMENTS, SLURM_CPUS_PER_TASK=cores)
    before, _, after = result.stdout.partition(".venv/bin/mixlab\n")
    wanted = ["--cpus-per-task=8"] if cores else []
    assert before.split() == [*wanted, "--kill-on-bad-exit=1"]
    assert tuple(after.splitlines()) == ("train", *ARGUMENTS)


@without_uv
def test_a_python_that_is_too_old_is_told_and_leaves_nothing(place):
    shutil.rmtree(place / ".venv")
    program(place / "bin/python3", "exit 1")
    result = launch(place, "install.sh", MIXLAB_ACCELERATOR="cpu")
    assert result.returncode == 2
    assert "python3 is not Python 3.11 to 3.13" in result.stderr
    assert not (place / ".venv").exists()


@without_uv
def test_a_tpu_with_an_old_python_gets_what_is_committed_and_runs_it(place):
    bin_, home = place / "bin", place / "home"
    home.mkdir()
    # A TPU whose only worker is this machine; of it there is a Python 3.10 with pip.
    program(
        bin_ / "gcloud",
        'cd "$HOME"',
        'case "$4" in scp) cp "$5" . ;; ssh) bash -c "$9" ;; esac',
    )
    program(
        bin_ / "python3",
        '[ "$*" = "-m pip install --quiet --user uv" ] || exit 1',
        'mkdir -p "$HOME/.local/bin" && cp "$(dirname "$0")/fake_uv" "$HOME/.local/bin/uv"',
    )
    program(bin_ / "fake_uv", '[ "$1" = pip ] || cp -r "$(dirname "$0")/../../../.venv" .')
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "launch"), ("commit", "-q", "-m", "all")):
        subprocess.run([*git, *command], cwd=place, check=True)
    result = launch(place, "tpu_vm.sh", "pod", *ARGUMENTS, TPU_ZONE="here")
    assert result.returncode == 0, result.stderr
    assert "not committed is not copied to pod" in result.stderr
    assert told(home / "mixlab") == ("train", *ARGUMENTS)


def test_all_scripts_are_read_by_bash():
    for script in LAUNCH.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
