"""Manifold mixup of networks that know nothing of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mixlab import augment, models

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Foreign(nn.Module):
    """Two named layers, a list of outputs that is no feature, BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(6, name="first")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(4, name="last")(x)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.random((5, 3, 4, 2)), jnp.float32),
        "label": jnp.asarray(rng.dirichlet(np.ones(4), 5), jnp.float32),
    }
    model = Foreign()
    return model, model.init(jax.random.key(0), batch["image"]), batch


def test_layers_are_found_in_order(setting):
    model, variables, batch = setting
    layers = augment.hidden_layers(model, variables, batch["image"])
    assert layers == ["input", "first", "norm", "Dropout_0", "last"]
    cnn = models.parse("cnn", 4)
    image = jnp.zeros((2, 8, 8, 1))
    held = cnn.init(jax.random.key(0), image)
    assert len(augment.hidden_layers(cnn, held, image)) > 3


def test_each_layer_against_the_network_by_hand(setting):
    model, variables, batch = setting
    mixer = augment.manifold_mixup(2.0, ("input", "first", "norm"))
    plan = mixer.sample(jax.random.key(1), batch)
    lam = np.asarray(plan["lam"], np.float64)[:, None]
    partner = np.asarray(plan["partner"])
    dense = {
        name: jax.tree.map(np.asarray, variables["params"][name]) for name in ("first", "last")
    }
    run = jax.jit(lambda plan: mixer.run(plan, model.apply, variables, batch["image"]))
    for drawn, name in enumerate(mixer.layers):

        def mixed(x, here, name=name):
            return lam * x + (1 - lam) * x[partner] if here == name else x

        x = mixed(np.asarray(batch["image"], np.float64).reshape(5, -1), "input")
        x = mixed(x @ dense["first"]["kernel"] + dense["first"]["bias"], "first")
        x = mixed(np.tanh(x) / np.sqrt(1 + 1e-5), "norm")
        x = x @ dense["last"]["kernel"] + dense["last"]["bias"]
        found = run({**plan, "layer": jnp.asarray(drawn)})
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)
    label = np.asarray(batch["label"])
    np.testing.assert_allclose(
        mixer.mix_label(plan, batch["label"]), lam * label + (1 - lam) * label[partner], atol=1e-6
    )


def test_at_the_input_it_is_mixup(setting):
    model, variables, batch = setting
    mixer = augment.manifold_mixup(0.7)
    plan = mixer.sample(jax.random.key(2), batch)
    plain = augment.mixup().apply({k: v for k, v in plan.items() if k != "layer"}, batch)
    found = mixer.run(plan, model.apply, variables, batch["image"])
    np.testing.assert_allclose(found, model.apply(variables, plain["image"]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(mixer.mix_label(plan, batch["label"]), plain["label"], atol=1e-6)


def test_trains_with_state_and_dropout(setting):
    model, variables, batch = setting
    mixer = augment.manifold_mixup(1.0, augment.hidden_layers(model, variables, batch["image"])[:3])

    @jax.jit
    def grads(params, key):
        def loss(params):
            plan = mixer.sample(key, batch)
            held = {**variables, "params": params}
            logits, changed = mixer.run(
                plan,
                model.apply,
                held,
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            label = mixer.mix_label(plan, batch["label"])
            return -jnp.mean(jnp.sum(label * jax.nn.log_softmax(logits), -1)), changed

        return jax.grad(loss, has_aux=True)(params)

    found, changed = grads(variables["params"], jax.random.key(4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert all(np.abs(found[name]["kernel"]).max() > 0 for name in ("first", "last"))
    mean = changed["batch_stats"]["norm"]["mean"]
    assert np.abs(mean - variables["batch_stats"]["norm"]["mean"]).max() > 0


def test_layers_are_drawn_uniformly(setting):
    batch = setting[2]
    mixer = augment.manifold_mixup(1.0, ("input", "a", "b"))
    keys = jax.random.split(jax.random.key(5), 3000)
    drawn = np.asarray(jax.vmap(lambda key: mixer.sample(key, batch)["layer"])(keys))
    for layer in range(3):
        assert np.mean(drawn == layer) == pytest.approx(1 / 3, abs=4 * (2 / 9 / 3000) ** 0.5)


def test_errors(setting):
    model, variables, batch = setting
    with pytest.raises(ValueError, match="layers"):
        augment.manifold_mixup(1.0, ())
    with pytest.raises(ValueError, match="half"):
        augment.manifold_mixup(1.0, pairing="half")
    mixer = augment.manifold_mixup(1.0, ("frist",))
    plan = mixer.sample(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="did you mean 'first'"):
        mixer.run(plan, model.apply, variables, batch["image"])
    with pytest.raises(ValueError, match="frist"):
        mixer.mix(plan, "last", batch["image"])
