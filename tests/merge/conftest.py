import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _quick_compilation():
    """Compiling is most of the time of these tests, and they hold whatever the compiler does."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
