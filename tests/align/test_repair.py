import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mixlab import align


class Net(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=self.momentum)(x)
        return nn.BatchNorm(use_running_average=False, momentum=self.momentum)(nn.relu(x))


BATCHES = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 16, 4)).astype(np.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_statistics_are_the_average_over_batches(momentum):
    net = Net(momentum)
    variables = net.init(jax.random.key(0), BATCHES[0])

    @jax.jit
    def fn(variables, batch):
        return net.apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]

    found = align.reestimate_batch_stats(fn, variables, iter(BATCHES), momentum=momentum)
    first = found["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(first["mean"], BATCHES.mean(1).mean(0), rtol=1e-5)
    # Flax's variance divides by the number of rows.
    np.testing.assert_allclose(first["var"], BATCHES.var(1).mean(0), rtol=1e-4)
    normal = (BATCHES - BATCHES.mean(1, keepdims=True)) / np.sqrt(
        BATCHES.var(1, keepdims=True) + 1e-5
    )
    second = np.maximum(normal, 0).mean(1).mean(0)
    np.testing.assert_allclose(found["batch_stats"]["BatchNorm_1"]["mean"], second, rtol=1e-4)
    assert found["params"] is variables["params"]


def test_dtypes_are_kept_and_averages_are_wide():
    variables = {"batch_stats": {"mean": jnp.zeros(2, jnp.bfloat16)}}
    batches = [jnp.full(2, v, jnp.bfloat16) for v in (256.0, 1.0, 1.0, 2.0)]
    found = align.reestimate_batch_stats(lambda v, x: {"mean": x}, variables, batches)
    assert found["batch_stats"]["mean"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["batch_stats"]["mean"].astype(jnp.float32), [65.0, 65.0])


def test_errors():
    variables = {"params": {}, "batch_stats": {"mean": jnp.zeros(2)}}

    def fn(variables, batch):
        return {"mean": batch}

    with pytest.raises(ValueError, match="no batches"):
        align.reestimate_batch_stats(fn, variables, [])
    with pytest.raises(ValueError, match="momentum"):
        align.reestimate_batch_stats(fn, variables, [jnp.ones(2)], momentum=1.0)
    with pytest.raises(KeyError, match="no collection 'stats'"):
        align.reestimate_batch_stats(fn, variables, [jnp.ones(2)], collection="stats")
    with pytest.raises(ValueError, match="'batch_stats' before and after fn"):
        align.reestimate_batch_stats(lambda v, b: {"var": b}, variables, [jnp.ones(2)])
