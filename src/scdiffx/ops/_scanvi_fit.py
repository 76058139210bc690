"""How the networks of semi-supervised annotation are trained, and what labelled cells that are held out say of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scdiffx._core import counts as C
from scdiffx._core.minibatch import SparseRows, densify, draw, widest
from scdiffx._log import progress_bar, warn
from scdiffx.ops._annotation_fit import folds, limits, temperature, whitened
from scdiffx.ops._logistic_annotation import calibration_error
from scdiffx.ops._scanvi_net import bound, classify, entropy, initial
from scdiffx.ops._vae import VAE, add_coefficients, encode
from scdiffx.ops._vae_fit import STEPS_AT_ONCE, lowered, optimizer

__all__ = ["ENOUGH", "Cells", "SemiSupervisedTraining", "Surroundings", "checked", "trained"]

Net = dict[str, Any]
# Labelled cells that must have been held out for a temperature to be found.
ENOUGH = 20


class SemiSupervisedTraining(NamedTuple):
    """How labels enter: `max_epochs` None is a tenth of the autoencoder's epochs, rounded up.

    Each epoch goes over at most `n_samples_per_label` cells of each label, again and again, beside all cells.
    `classification_weight` is that of their classification loss beside the bound in nats per cell. In `n_folds` further
    trainings some labels are held out, for the calibration.
    """

    max_epochs: int | None = None
    learning_rate: float = 1e-3
    n_samples_per_label: int = 100
    classification_weight: float = 50.0
    n_folds: int = 3
    progress: bool = False


class Surroundings(NamedTuple):
    """Where labelled cells lie in the latent space, and how well those that were held out were told.

    Latent vectors times `projection` are white within the types; `centres` (types, dims) are the means of these and
    `limit` (types,) the squared distance from them that 2 % of held-out cells exceed. Where too few cells
    could be held out, the limits are infinite, and `accuracy` and `calibration_error` NaN.
    """

    projection: Float[Array, "n_latent dims"] | None = None
    centres: Float[Array, "types dims"] | None = None
    limit: Float[Array, " types"] | None = None
    accuracy: Float[Array, ""] | None = None
    calibration_error: Float[Array, ""] | None = None


class Cells(NamedTuple):
    """The counts on the host, with the batch and the label of each cell, -1 for none."""

    csr: Any
    batch: np.ndarray
    label: np.ndarray

    def without(self, held: np.ndarray) -> Cells:
        label = self.label.copy()
        label[held] = -1
        return self._replace(label=label)


def _draw_noise(key: Array, size: int, net: Net) -> tuple[Array, Array]:
    types, latent = net["inner_type"].shape[0], net["decoder_in"].shape[0]
    first, second = jax.random.split(key)
    return jax.random.normal(first, (size, latent)), jax.random.normal(second, (size, types, latent))


@partial(jax.jit, static_argnames=("likelihood",), donate_argnums=(0,))
def _step(
    state: Any,
    all_cells: tuple[SparseRows, Array, Array],
    labelled: tuple[SparseRows, Array],
    numbers: tuple[Array, Array],
    seed: Array,
    *,
    likelihood: str,
) -> tuple[Any, Array, Array]:
    """One gradient step; returns the state, the negative bound and the classification loss."""
    (rows, batch, label), (known_rows, known), (rate, weight) = all_cells, labelled, numbers
    keys = jax.random.split(jax.random.key(seed), 3)

    def cost(net: Net) -> tuple[Array, tuple[Array, Array]]:
        genes = net["encoder_in"].shape[0]
        x = densify(rows, len(batch), genes)
        fit, divergence = bound(net, x, batch, label, _draw_noise(keys[0], len(batch), net), likelihood, keys[1])
        negative = (divergence - add_coefficients(net, rows, batch, fit)).mean()
        loss = entropy(net, densify(known_rows, len(known), genes), known, keys[2]).mean()
        return negative + weight * loss, (negative, loss)

    net, optimizer_state = state
    (_, values), grads = jax.value_and_grad(cost, has_aux=True)(net)
    steps, optimizer_state = optimizer().update(grads, optimizer_state)
    return (lowered(net, steps, rate), optimizer_state), *values


def _cycled(cells: Cells, most: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` labelled cells: at most so many of each label, again and again in new orders."""
    chosen = [rng.permutation(np.flatnonzero(cells.label == code))[:most] for code in range(cells.label.max() + 1)]
    pool = np.concatenate(chosen)
    return np.concatenate([rng.permutation(pool) for _ in range(-(-n // len(pool)))])[:n]


class _Minibatches:
    """What is drawn in turn; sizes and widths are the same for every fold, so that all share compiled code."""

    def __init__(self, cells: Cells, size: int, known: int) -> None:
        self.size, self.known = min(size, len(cells.batch)), min(size, known)
        self.widths = widest(cells.csr, self.size), widest(cells.csr, self.known)

    def epoch(self, cells: Cells, most: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        steps = len(cells.batch) // self.size
        everyone = rng.permutation(len(cells.batch))[: steps * self.size].reshape(steps, self.size)
        labelled = _cycled(cells, most, steps * self.known, rng).reshape(steps, self.known)
        for start in range(0, steps, STEPS_AT_ONCE):
            parts = everyone[start : start + STEPS_AT_ONCE], labelled[start : start + STEPS_AT_ONCE]
            drawn = (draw(cells.csr, part, width) for part, width in zip(parts, self.widths, strict=True))
            for rows, known_rows, at, known in zip(*drawn, *parts, strict=True):
                yield (rows, cells.batch[at], cells.label[at]), (known_rows, cells.label[known])


def _one(
    start: Net, cells: Cells, vae: VAE, settings: SemiSupervisedTraining, known: int, rng: np.random.Generator, bar: Any
) -> tuple[Net, dict[str, np.ndarray]]:
    """Train from `start` on the labels that `cells` has."""
    draws = _Minibatches(cells, vae.training.batch_size, known)
    net = {name: jnp.array(value) for name, value in start.items()}  # a copy: the first step reuses its memory
    state = (net, optimizer().init(net))
    history: dict[str, list[float]] = {"bound": [], "classification": []}
    epochs = _epochs(vae, settings, len(cells.batch))
    for epoch in range(epochs):
        rate = settings.learning_rate * min(1.0, 3 * (1 - epoch / epochs))
        numbers = np.float32(rate), np.float32(settings.classification_weight)
        seed, values = int(rng.integers(2**31)), []
        for step, (everyone, labelled) in enumerate(draws.epoch(cells, settings.n_samples_per_label, rng)):
            state, *found = _step(state, everyone, labelled, numbers, np.uint32(seed + step), likelihood=vae.likelihood)
            values.append(found)
        for name, value in zip(history, np.mean(np.asarray(values), 0), strict=True):
            history[name].append(float(value))
        if not math.isfinite(history["bound"][-1]):
            raise FloatingPointError(f"the likelihood is not finite after epoch {epoch}: lower the learning rate")
        bar.update()
    return state[0], {name: np.asarray(values) for name, values in history.items()}


def _epochs(vae: VAE, settings: SemiSupervisedTraining, n_cells: int) -> int:
    return settings.max_epochs or -(-vae.training.epochs(n_cells) // 10)


@jax.jit
def _latent(net: Net, x: C.Counts) -> Array:
    return C.map_rows(x, lambda block: encode(net, block)[0])


def trained(
    vae: VAE, cells: Cells, settings: SemiSupervisedTraining, rng: np.random.Generator
) -> tuple[Net, dict[str, np.ndarray], float, Surroundings]:
    """Networks trained on all labels, how that went, the temperature and the surroundings of the types."""
    assert vae.net is not None
    types = int(cells.label.max()) + 1
    known = np.flatnonzero(cells.label >= 0)
    start = dict(vae.net) | initial(vae.n_latent, vae.n_hidden, types, rng)
    fold = folds(cells.label[known], settings.n_folds, rng)
    n_folds = settings.n_folds if _counted(cells.label[known]).sum() >= ENOUGH else 0
    # The least that a fold leaves.
    least = len(known) - (int(np.bincount(fold).max()) if n_folds else 0)
    labelled = C.Counts.from_scipy(cells.csr[known])
    bar = progress_bar((n_folds + 1) * _epochs(vae, settings, len(cells.batch)), "labels", settings.progress)
    logits, square = np.zeros((len(known), types)), np.full(len(known), np.nan)
    for number in range(n_folds):
        held = fold == number
        if not held.any():
            continue
        net, _ = _one(start, cells.without(known[held]), vae, settings, least, rng, bar)
        z = _latent(net, labelled)
        logits[held] = np.asarray(classify(net, z), np.float64)[held]
        square[held] = _squares(np.asarray(z), cells.label[known], logits.argmax(1), ~held, types)[held]
    net, history = _one(start, cells, vae, settings, least, rng, bar)
    bar.close()
    z = np.asarray(_latent(net, labelled))
    places = whitened(z, z.T @ z, cells.label[known], types)
    heat, *told = checked(logits, square, cells.label[known])
    numbers = (*places, *told)
    return net, history, heat, Surroundings(*(jnp.asarray(v, jnp.float32) for v in numbers))


def _squares(z: np.ndarray, codes: np.ndarray, told: np.ndarray, own: np.ndarray, types: int) -> np.ndarray:
    """Squared distances from the most probable type, `told`, as the `own` cells with their labels place it."""
    projection, centres = whitened(z[own], z[own].T @ z[own], codes[own], types)
    return np.asarray(((z @ projection - centres[told]) ** 2).sum(1))


def _counted(codes: np.ndarray) -> np.ndarray:
    """The only cell of its type cannot be told by networks that have never seen one."""
    return np.asarray(np.bincount(codes)[codes] > 1)


def checked(logits: np.ndarray, square: np.ndarray, codes: np.ndarray) -> tuple[float, np.ndarray, float, float]:
    """The temperature that suits held-out cells; limits of their distances; accuracy and calibration error."""
    counted = _counted(codes)
    if counted.sum() < ENOUGH:
        warn(
            f"{counted.sum()} labelled cells can be held out, and {ENOUGH} are needed to calibrate probabilities: they "
            "are left as the networks give them, and no cell is found to be unlike the others of its type"
        )
        return 1.0, np.full(logits.shape[1], np.inf), math.nan, math.nan
    heat, _ = temperature(logits[counted], codes[counted])
    chances = np.asarray(jax.nn.softmax(logits[counted] / heat))
    right = chances.argmax(1) == codes[counted]
    alike = limits(square, logits.argmax(1), logits.shape[1])
    return heat, alike, float(right.mean()), calibration_error(chances.max(1), right)
