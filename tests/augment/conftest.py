import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose time goes into compiling, and that hold whatever the compiler does."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
