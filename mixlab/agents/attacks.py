"""What Byzantine agents send, and what they train on.

An attack on messages sees what all agents honestly would send, as an adversary of the strongest
kind does, and puts other rows in the places of the Byzantine ones. An attack on data changes the
batch of an agent that follows the protocol otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import spec, trees
from mixlab.merge.core import check_number
from mixlab.random import check_key
from mixlab.types import Array, Batch, Key, PyTree

_FLOW_STEPS = 32


@dataclass(frozen=True)
class Attack:
    """What Byzantine agents send in the place of their messages.

    Attributes:
        name: as reports show it.
        leaf: `leaf(key, messages, byzantine) -> sent` for one floating leaf `[A, ...]`, in float32
            or wider; gives `[A, ...]`, or `[...]` where all Byzantine agents send the same. What
            it has in the rows of honest agents is not used.
    """

    name: str
    leaf: Callable[[Key, Array, Array], Array]

    def __call__(self, key: Key, messages: PyTree, byzantine: Array) -> PyTree:
        """Puts what Byzantine agents send in the places of their honest messages.

        Args:
            key: a PRNG key; every leaf draws with its own.
            messages: leaves [A, ...], what every agent would send; integer leaves stay as they are.
            byzantine: bool [A]; may be traced.

        Returns:
            messages: the rows of the others are untouched.

        Raises:
            TypeError: the key is none.
        """
        check_key(key)

        def replace(name: str, leaf: Array) -> Array:
            if not trees.is_inexact(leaf):
                return leaf
            honest = leaf.astype(trees.wide(leaf.dtype))
            sent = self.leaf(trees.name_key(key, name), honest, byzantine)
            return jnp.where(trees.along(byzantine, leaf), sent.astype(leaf.dtype), leaf)

        return trees.map_named(replace, messages)


@dataclass(frozen=True)
class DataAttack:
    """What Byzantine agents train on in the place of their batches.

    Attributes:
        name: as reports show it.
        corrupt: `corrupt(key, batch) -> batch`.
    """

    name: str
    corrupt: Callable[[Key, Batch], Batch]

    def __call__(self, key: Key, batch: Batch) -> Batch:
        """Corrupts the batch of one agent."""
        return self.corrupt(key, batch)


def random(scale: float = 200.0) -> Attack:
    """Sends Gaussian noise of mean zero.

    Args:
        scale: its standard deviation.

    Raises:
        TypeError: `scale` is no number.
        ValueError: it is not finite.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries", section 5.
    """
    check_number(scale, "scale")
    return Attack("random", lambda key, x, _: scale * jax.random.normal(key, x.shape, x.dtype))


def uniform() -> Attack:
    """Sends noise that is uniform in [0, 1).

    Source: Almasi et al. 2024, "Flag Aggregator": the random gradients of the authors' code.
    """
    return Attack("uniform", lambda key, x, _: jax.random.uniform(key, x.shape, x.dtype))


def scaled(factor: float) -> Attack:
    """Sends one's own message, multiplied by `factor`.

    Raises:
        TypeError: `factor` is no number.
        ValueError: it is not finite.
    """
    check_number(factor, "factor")
    return Attack("scaled", lambda key, x, _: factor * x)


def reversed(scale: float = 10.0) -> Attack:
    """Sends one's own message in the other direction, multiplied by `scale`.

    Raises:
        TypeError: `scale` is no number.
        ValueError: it is not finite.

    Source: Guerraoui et al. 2021, "Garfield: System Support for Byzantine Machine Learning",
    section 6 (reversed vectors); the factor is that of the authors' code.
    """
    check_number(scale, "scale")
    return Attack("reversed", lambda key, x, _: -scale * x)


def sign_flipping() -> Attack:
    """Sends the opposite of the honest agents' mean.

    Source: Allen-Zhu et al. 2021, "Byzantine-Resilient Non-Convex Stochastic Gradient Descent",
    section 5; of the mean, as in ByzFL.
    """
    return Attack("sign_flipping", lambda key, x, byzantine: -_mean(x, byzantine))


def ipm(tau: float = 2.0) -> Attack:
    """Inner-product manipulation: sends the opposite of the honest mean, multiplied by `tau`.

    Args:
        tau: with a small one, about 0.1, the message hides among the honest ones, while the inner
            product of the true mean and a careless aggregate may still become negative.

    Raises:
        TypeError: `tau` is no number.
        ValueError: it is not finite.

    Source: Xie et al. 2019, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation", section 4.
    """
    check_number(tau, "tau")
    return Attack("ipm", lambda key, x, byzantine: -tau * _mean(x, byzantine))


def empire(scale: float = 0.1) -> Attack:
    """`ipm` with the small factor that hides best, under the name it has in Garfield.

    Raises:
        TypeError: `scale` is no number.
        ValueError: it is not finite.

    Source: as for `ipm`.
    """
    check_number(scale, "scale")
    return Attack("empire", ipm(scale).leaf)


def alie(tau: float | None = None) -> Attack:
    """A little is enough: sends the honest mean plus `tau` standard deviations, entry by entry.

    Args:
        tau: how many; negative goes below the mean. Default: the most that still hides, of A
            agents of which f are Byzantine, the quantile of the normal distribution at
            `(A - f - s) / (A - f)` with `s = floor(A / 2 + 1) - f`. ByzFL takes 1.5.

    Raises:
        TypeError: `tau` is no number.
        ValueError: it is not finite.

    Source: Baruch et al. 2019, "A Little Is Enough: Circumventing Defenses For Distributed
    Learning", algorithm 3.
    """
    if tau is not None:
        check_number(tau, "tau")

    def leaf(key: Key, x: Array, byzantine: Array) -> Array:
        mean, honest = _mean(x, byzantine), jnp.sum(~byzantine)
        squares = jnp.where(trees.along(byzantine, x), 0, jnp.square(jnp.abs(x - mean)))
        degrees = jnp.maximum(honest - 1, 1).astype(squares.dtype)
        deviation = jnp.sqrt(jnp.sum(squares, axis=0) / degrees)
        return mean + _hidden(byzantine).astype(squares.dtype) * deviation

    def _hidden(byzantine: Array) -> Array:
        if tau is not None:
            return jnp.asarray(tau, float)
        num_agents, faulty = len(byzantine), jnp.sum(byzantine)
        honest = (num_agents - faulty).astype(float)
        supporters = (num_agents // 2 + 1 - faulty).astype(float)
        # With a majority, or alone, nothing needs to hide: then as far as float32 has quantiles.
        share = jnp.clip((honest - supporters) / jnp.maximum(honest, 1), 1e-6, 1 - 1e-6)
        return jax.scipy.special.ndtri(share)

    return Attack("alie", leaf)


def mimic(target: int = 0) -> Attack:
    """All send what one honest agent sends, which over-represents it.

    Args:
        target: which of the honest agents, counted from 0; the last if there are not so many.

    Raises:
        TypeError: `target` is no number.
        ValueError: it is negative.

    Source: Karimireddy et al. 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing", section 4.2; the target is fixed, as in ByzFL.
    """
    check_number(target, "target")
    if target < 0:
        raise ValueError(f"target counts the honest agents from 0, got {target}")

    def leaf(key: Key, x: Array, byzantine: Array) -> Array:
        last = jnp.maximum(jnp.sum(~byzantine) - 1, 0)
        return x[jnp.argsort(byzantine, stable=True)[jnp.minimum(target, last)]]

    return Attack("mimic", leaf)


def infinite() -> Attack:
    """Sends infinity in every entry."""
    return Attack("infinite", lambda key, x, _: jnp.full_like(x, jnp.inf))


def label_flip() -> DataAttack:
    """Trains on class K - 1 - c where the label says c.

    Takes soft labels `[B, K]` under `label`, whose classes are put in the other order.

    Source: Tolpegin et al. 2020, "Data Poisoning Attacks Against Federated Learning Systems";
    this permutation of classes is that of Karimireddy et al. 2022, section 6.
    """

    def corrupt(key: Key, batch: Batch) -> Batch:
        return {**batch, "label": batch["label"][..., ::-1]}

    return DataAttack("label_flip", corrupt)


def augmentation_noise(time: float = 0.01) -> DataAttack:
    """Trains on images that a non-linear flow has bent out of shape.

    The pixel at `(x, y)`, counted from the centre, shows what lies where the predator-prey system
    of Lotka and Volterra, `x' = 2/3 x - 4/3 x y` and `y' = x y - y`, carries the point in the
    given time; it is 0 where that is no pixel. Takes `image` [B, H, W, C].

    Args:
        time: above 0. Speeds grow with the square of the distance from the centre: 0.01 moves the
            corners of 32 x 32 images by about 3 pixels.

    Raises:
        TypeError: the time is no number.
        ValueError: it is not above 0, or not finite.

    Source: Almasi et al. 2024, "Flag Aggregator", experiments with augmented workers; constants and
    times of 0.001 to 0.01 are those of the authors' code.
    """
    check_number(time, "time")
    if not time > 0:
        raise ValueError(f"time must be above 0, got {time}")

    def corrupt(key: Key, batch: Batch) -> Batch:
        image = jnp.asarray(batch["image"])
        rows, columns, inside = _carried(image.shape[1], image.shape[2], time)
        moved = jnp.where(inside[..., None], image[:, rows, columns], 0)
        return {**batch, "image": moved.astype(image.dtype)}

    return DataAttack("augmentation_noise", corrupt)


def _carried(height: int, width: int, time: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the flow of Lotka and Volterra carries pixels: row, column and if inside, [H, W]."""
    middle = np.array([height - 1, width - 1]).reshape(2, 1, 1) / 2

    def speed(point: np.ndarray) -> np.ndarray:
        x, y = point
        return np.stack([2 / 3 * x - 4 / 3 * x * y, x * y - y])

    point, step = middle - np.indices((height, width)), time / _FLOW_STEPS
    with np.errstate(all="ignore"):  # points may be carried to infinity, which is no pixel
        for _ in range(_FLOW_STEPS):
            # Runge and Kutta's method of fourth order
            a = speed(point)
            b = speed(point + step / 2 * a)
            c = speed(point + step / 2 * b)
            d = speed(point + step * c)
            point = point + step / 6 * (a + 2 * b + 2 * c + d)
        found = np.rint(middle - point)
        inside = np.all((found >= 0) & (found <= 2 * middle), axis=0)
    rows, columns = np.where(inside, found, 0).astype(np.int32)
    return rows, columns, inside


def _mean(x: Array, byzantine: Array) -> Array:
    """The mean of the honest rows, zero where there are none."""
    honest = jnp.maximum(jnp.sum(~byzantine), 1)
    return jnp.sum(jnp.where(trees.along(byzantine, x), 0, x), axis=0) / honest.astype(x.real.dtype)


ATTACKS: dict[str, Callable[..., Attack | DataAttack]] = {
    make.__name__: make
    for make in (
        alie,
        augmentation_noise,
        empire,
        infinite,
        ipm,
        label_flip,
        mimic,
        random,
        reversed,
        scaled,
        sign_flipping,
        uniform,
    )
}
"""Every attack by its name."""


def parse(text: str | Attack | DataAttack) -> Attack | DataAttack:
    """Builds an attack from text such as `"ipm(tau=0.1)"`.

    Raises:
        ValueError: an unknown name, of which the message lists the known ones, or an argument out
            of range.
        TypeError: an argument that the attack does not take.
    """
    if isinstance(text, Attack | DataAttack):
        return text
    made: Attack | DataAttack = spec.parse(text, ATTACKS)
    return made
