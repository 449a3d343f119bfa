"""Losses of mixed labels against their definitions, class by class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment
from tests import golden


def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 6))
    label = np.eye(6)[[0, 1, 2, 3, 4]] * 0.7 + np.eye(6)[[5, 5, 2, 0, 1]] * 0.3
    label[4] = 1 / 6  # everything mixed: nothing is left to compare with
    return logits, label


def test_decoupled_loss():
    logits, label = case()
    total = 0.0
    for z, y in zip(logits, label, strict=True):
        p = np.exp(z) / np.exp(z).sum()
        total -= np.sum(y * np.log(p))
        mixed = [i for i in range(6) if y[i] > 1e-3]
        if len(mixed) > 1:
            rest = sum(np.exp(z[j]) for j in range(6) if j not in mixed)
            total -= 0.3 * sum(np.log(np.exp(z[i]) / (np.exp(z[i]) + rest)) for i in mixed)
    loss = jax.jit(augment.decoupled_loss)
    found = loss(jnp.asarray(logits), jnp.asarray(label), eta=0.3)
    assert found == pytest.approx(total / 5, rel=1e-6)
    gradient = jax.grad(loss)(jnp.asarray(logits), jnp.asarray(label))
    assert np.isfinite(gradient).all()


def test_rescale_lam_recorded():
    table = golden.load("mixing/public_featmix")["lambda_adjust/table/vals"]
    for mode, threshold, power, lam, out in table:
        name = ("pow", "exp")[int(mode)]
        if name == "exp" and power == 1:
            continue
        found = augment.rescale_lam(lam, threshold=threshold, power=power, mode=name)
        assert found == pytest.approx(out, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("mode", ["pow", "exp"])
def test_two_hot_loss(mode):
    logits, label = case()
    options = {"threshold": 0.8, "power": 2.0, "mode": mode}
    target = np.asarray(augment.rescale_lam(label, **options), np.float64)
    assert target.min() == 0
    assert target[2, 2] == 1  # a mixture within one class
    p = 1 / (1 + np.exp(-logits))
    losses = -(target * np.log(p) + (1 - target) * np.log1p(-p))
    losses = np.where(label > 0, losses, 0.25 * losses)
    found = augment.two_hot_loss(logits, label, negative_weight=0.25, **options)
    assert found == pytest.approx(losses.sum(1).mean(), rel=1e-6)


def test_errors():
    logits, label = case()
    with pytest.raises(ValueError, match="one_hot"):
        augment.decoupled_loss(logits, label[:, 0])
    for options in ({"threshold": 0.0}, {"power": 0.0}, {"mode": "exp"}, {"mode": "log"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            augment.rescale_lam(0.5, **options)
