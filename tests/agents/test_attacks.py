"""What Byzantine agents send, against recorded attacks and by definition."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.agents import attacks
from tests import golden

KEY = jax.random.key(0)
A, F = 7, 2
BYZANTINE = np.isin(np.arange(A), (1, 4))
ROWS = np.random.default_rng(0).normal(size=(A, 6)).astype(np.float32)
HONEST = ROWS[~BYZANTINE]
MESSAGES = {
    "w": jnp.asarray(ROWS).reshape(A, 2, 3),
    "half": jnp.asarray(ROWS[:, 0], jnp.bfloat16),
    "count": jnp.arange(A, dtype=jnp.int32),
    "none": None,
}


@jax.jit
def every_attack(messages, byzantine):
    return {text: attacks.parse(text)(KEY, messages, byzantine) for text in EXPECTED}


# The closed form for 7 agents of which 2 are Byzantine: s = 4 - 2, quantile of 3 / 5.
HIDDEN = 0.2533471
DEVIATION = HONEST.std(axis=0, ddof=1)
EXPECTED = {
    "alie": HONEST.mean(axis=0) + HIDDEN * DEVIATION,
    "alie(tau=-0.5)": HONEST.mean(axis=0) - 0.5 * DEVIATION,
    "empire": -0.1 * HONEST.mean(axis=0),
    "infinite": np.inf,
    "ipm(tau=3.0)": -3 * HONEST.mean(axis=0),
    "mimic(target=1)": ROWS[2],
    "mimic(target=99)": HONEST[-1],
    "random(scale=1.0)": None,
    "reversed": -10 * ROWS[BYZANTINE],
    "scaled(factor=4.0)": 4 * ROWS[BYZANTINE],
    "sign_flipping": -HONEST.mean(axis=0),
    "uniform": None,
}


def test_attacks_put_rows_in_the_places_of_byzantine_agents():
    assert {text.split("(")[0] for text in EXPECTED} | {"label_flip", "augmentation_noise"} == set(
        attacks.ATTACKS
    )
    found = every_attack(MESSAGES, jnp.asarray(BYZANTINE))
    for text, expected in EXPECTED.items():
        sent = found[text]
        rows = np.asarray(sent["w"]).reshape(A, 6)
        np.testing.assert_array_equal(rows[~BYZANTINE], HONEST, err_msg=text)
        np.testing.assert_array_equal(sent["count"], MESSAGES["count"])
        assert sent["none"] is None
        assert sent["half"].dtype == jnp.bfloat16
        if expected is not None:
            expected = np.broadcast_to(expected, (F, 6))
            np.testing.assert_allclose(rows[BYZANTINE], expected, rtol=1e-5, err_msg=text)
    noise = np.asarray(found["uniform"]["w"])[BYZANTINE]
    assert noise.min() >= 0
    assert noise.max() < 1
    assert len(np.unique(noise)) == noise.size
    gauss = np.asarray(found["random(scale=1.0)"]["w"])[BYZANTINE]
    assert not np.array_equal(gauss[0], gauss[1])


@pytest.mark.parametrize(("case", "f"), [("byzfl0_n9_f2", 2), ("byzfl1_n11_f3", 3)])
def test_byzfl(case, f):
    v = golden.load("decentral/public_extra")
    rows = jnp.asarray(v[f"{case}/G"], jnp.float32)
    byzantine = jnp.arange(len(rows)) < f
    for text, name in {
        "sign_flipping": "SignFlipping",
        "ipm": "IPM_tau2",
        "alie(tau=1.5)": "ALIE_tau1.5",
        "mimic(target=0)": "Mimic_0",
    }.items():
        sent = attacks.parse(text)(KEY, rows, byzantine)
        np.testing.assert_allclose(sent[0], v[f"{case}/att_{name}"], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("c1_reverse_n11_f2", None),
        ("c3_lie_n15_f3", "alie(tau=-0.21)"),
        ("c4_empire_n9_f1", "empire"),
    ],
)
def test_garfield(case, text):
    """The recorded rows of the attackers, made again from those of the others."""
    v = golden.load("decentral/public_robust")
    rows, f = v[f"{case}/G"], int(v[f"{case}/f"])
    byzantine = jnp.arange(len(rows)) < f
    if text is None:
        given = jnp.asarray(rows).at[:f].divide(-10)
        sent = attacks.reversed()(KEY, given, byzantine)
    else:
        sent = attacks.parse(text)(KEY, jnp.asarray(rows).at[:f].set(0), byzantine)
    np.testing.assert_allclose(sent, rows, rtol=2e-5, atol=1e-7)


def test_hidden_as_far_as_a_little_is_enough_goes():
    """Of 15 agents with 3 Byzantine ones, 0.21 deviations, the number in Garfield's code."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(15, 1)), jnp.float32)
    sent = attacks.alie()(KEY, rows, jnp.arange(15) < 3)
    z = (sent[0, 0] - np.mean(rows[3:])) / np.std(rows[3:], ddof=1)
    assert math.isclose(z, 0.21, abs_tol=5e-3)
    for faulty in (0, 14, 15):
        assert np.all(np.isfinite(attacks.alie()(KEY, rows, jnp.arange(15) < faulty)))


def test_labels_and_images():
    image = jnp.arange(1, 2 * 32 * 32 * 3 + 1, dtype=jnp.float32).reshape(2, 32, 32, 3)
    batch = {"image": image, "label": jnp.eye(4)[jnp.array([0, 2])], "mask": jnp.ones(2)}
    flipped = attacks.label_flip()(KEY, batch)
    np.testing.assert_array_equal(np.argmax(flipped["label"], axis=1), [3, 1])
    assert flipped["image"] is image

    bent = attacks.augmentation_noise()(KEY, batch)
    assert bent["image"].dtype == image.dtype
    assert bent["label"] is batch["label"]
    found = np.asarray(bent["image"])
    rows, columns, inside = attacks._carried(32, 32, 0.01)
    # Pixel (26, 26) is the point (-10.5, -10.5); where it is after 0.01, by many small steps.
    x, y = -10.5, -10.5
    for _ in range(2000):
        x, y = x + 5e-6 * (2 / 3 * x - 4 / 3 * x * y), y + 5e-6 * (x * y - y)
    assert (rows[26, 26], columns[26, 26]) == (round(15.5 - x), round(15.5 - y)) != (26, 26)
    np.testing.assert_array_equal(found[:, 26, 26], image[:, rows[26, 26], columns[26, 26]])
    moved = np.mean((rows != np.indices((32, 32))[0]) | ~inside)
    assert 0.3 < moved < 0.95
    assert not found[:, ~inside].any()
    rows, columns, inside = attacks._carried(5, 8, 1e-9)
    np.testing.assert_array_equal([rows, columns], np.indices((5, 8)))
    assert inside.all()


def test_errors():
    with pytest.raises(ValueError, match="target counts the honest agents from 0, got -1"):
        attacks.mimic(-1)
    with pytest.raises(ValueError, match="time must be above 0, got 0"):
        attacks.augmentation_noise(0)
    for make in (attacks.random, attacks.scaled, attacks.reversed, attacks.ipm, attacks.empire,
                 attacks.alie, attacks.mimic, attacks.augmentation_noise):  # fmt: skip
        with pytest.raises(
            TypeError, match=r"(scale|factor|tau|target|time) must be one number, got 'x'"
        ):
            make("x")
        with pytest.raises(ValueError, match="must be finite, got nan"):
            make(math.nan)
    with pytest.raises(TypeError, match=r"key is a PRNG key such as jax.random.key\(0\), got 7"):
        attacks.random()(7, jnp.zeros((2, 3)), jnp.asarray([True, False]))
    with pytest.raises(TypeError, match="scaled in 'scaled'"):
        attacks.parse("scaled")
    attack = attacks.ipm()
    assert attacks.parse(attack) is attack
    assert all(inspect.getdoc(make) for make in attacks.ATTACKS.values())
