"""Every test runs on eight forced CPU devices, with strict dtype promotion."""

import os
import pathlib

# Before jax starts: it reads these once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["PJRT_NPROC"] = "32"  # see mixlab.agents.parallel.host_callbacks_are_safe
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the tests' time is compilation: workers, the processes that tests start and later runs
# share what was compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# No test depends on how fast the machine is.
hypothesis.settings.register_profile("mixlab", deadline=None)
hypothesis.settings.load_profile("mixlab")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Drops what was compiled before Linux, which limits them to some 65,000, is out of maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Runs the test in double precision."""
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
