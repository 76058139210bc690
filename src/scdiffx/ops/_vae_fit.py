"""How the autoencoders of counts are trained: on minibatches of sparse rows, watched by cells that are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from scdiffx._core.minibatch import SparseRows, draw, widest
from scdiffx._log import progress_bar

__all__ = ["STEPS_AT_ONCE", "lowered", "optimizer", "trained"]

Net = dict[str, Any]
# Log likelihood and divergence of the cells of a minibatch: (net, rows, batch, key, likelihood, training=...).
Terms = Callable[..., tuple[Array, Array]]
# Minibatches drawn from the sparse matrix together: few enough that a large epoch takes no memory.
STEPS_AT_ONCE = 64
# The dispersions lie orders of magnitude apart: at the rate of the weights they would not get there.
_DISPERSION_RATE = 10


def optimizer() -> Any:
    import optax

    return optax.scale_by_adam()


def lowered(net: Net, steps: Net, rate: Any) -> Net:
    """The weights after a step against the gradient."""
    rates = {name: _DISPERSION_RATE * rate if name.endswith("log_theta") else rate for name in net}
    return {name: net[name] - rates[name] * steps[name] for name in net}


@partial(jax.jit, static_argnames=("terms", "likelihood"), donate_argnums=(0,))
def _train_step(
    state: Any,
    rows: SparseRows,
    batch: Array,
    weight: Array,
    rate: Array,
    seed: Array,
    *,
    terms: Terms,
    likelihood: str,
) -> tuple[Any, Array]:
    """One gradient step; returns the state and the bound of the minibatch."""

    def cost(net: Net) -> tuple[Array, Array]:
        fit, divergence = terms(net, rows, batch, jax.random.key(seed), likelihood, training=True)
        return (weight * divergence - fit).mean(), (divergence - fit).mean()

    net, optimizer_state = state
    (_, value), grads = jax.value_and_grad(cost, has_aux=True)(net)
    steps, optimizer_state = optimizer().update(grads, optimizer_state)
    return (lowered(net, steps, rate), optimizer_state), value


@partial(jax.jit, static_argnames=("terms", "likelihood"))
def _evaluate(
    net: Net, rows: SparseRows, batch: Array, seed: Array, *, terms: Terms, likelihood: str
) -> tuple[Array, Array]:
    return terms(net, rows, batch, jax.random.key(seed), likelihood, training=False)


class _Run:
    """One training: the data, and what is compiled for them."""

    def __init__(self, op: Any, csr: Any, codes: np.ndarray, train: np.ndarray, terms: Terms) -> None:
        self.csr, self.codes = csr, codes
        self.program = {"terms": terms, "likelihood": op.likelihood}
        self.size = min(op.training.batch_size, len(train))
        self.spare = train[: self.size]
        self.width = widest(csr, self.size)

    def minibatches(self, cells: np.ndarray) -> Iterator[tuple[SparseRows, np.ndarray]]:
        """The cells (steps, size) in turn, with their batches."""
        for start in range(0, len(cells), STEPS_AT_ONCE):
            part = cells[start : start + STEPS_AT_ONCE]
            yield from zip(draw(self.csr, part, self.width), self.codes[part], strict=True)

    def epoch(self, state: Any, cells: np.ndarray, weight: float, rate: float, seed: int) -> tuple[Any, float]:
        """One pass over the cells, less a rest that fills no minibatch; and the mean bound."""
        cells = cells[: len(cells) // self.size * self.size].reshape(-1, self.size)
        values = []
        for step, (rows, batch) in enumerate(self.minibatches(cells)):
            numbers = (np.float32(weight), np.float32(rate), np.uint32((seed + step) % 2**32))
            state, value = _train_step(state, rows, batch, *numbers, **self.program)
            values.append(value)
        return state, float(np.mean(values))

    def evaluate(self, net: Net, cells: np.ndarray) -> tuple[float, float]:
        """Mean negative log likelihood and divergence of the cells, with one fixed latent sample each."""
        n = len(cells)
        padded = np.concatenate([cells, self.spare[: -n % self.size]]).reshape(-1, self.size)
        parts = [
            _evaluate(net, rows, batch, np.uint32(step), **self.program)
            for step, (rows, batch) in enumerate(self.minibatches(padded))
        ]
        fit, divergence = (np.concatenate([np.asarray(p[i]) for p in parts])[:n].mean() for i in (0, 1))
        return -float(fit), float(divergence)


def trained(
    op: Any, csr: Any, codes: np.ndarray, seed: int, initial: Callable[..., Net], terms: Terms
) -> tuple[Net, dict[str, Any]]:
    """Train on the cells that are not held out; returns the weights to keep and how training went.

    `op` says how; `initial` makes the weights to start from, and `terms` the two parts of a minibatch's bound.
    """
    settings = op.training
    rng = np.random.default_rng(seed)
    held, train = np.split(rng.permutation(len(codes)), [max(1, round(settings.validation * len(codes)))])
    run = _Run(op, csr, codes, train, terms)
    net = initial(op, csr[train], codes[train], int(codes.max()) + 1, rng)
    state = (net, optimizer().init(net))
    epochs = settings.epochs(len(train))
    history: dict[str, list[float]] = {"train": [], "validation": [], "validation_nll": []}
    best, best_epoch = net, 0
    bar = progress_bar(epochs, "vae", settings.progress)
    for epoch in range(epochs):
        weight = min(1.0, (epoch + 1) / max(1, settings.warmup))
        # Over the last third the steps shrink to nothing; with patience nobody knows when the last third is.
        shrink = 1.0 if settings.patience is not None else min(1.0, 3 * (1 - epoch / epochs))
        rate = settings.learning_rate * shrink
        state, value = run.epoch(state, rng.permutation(train), weight, rate, int(rng.integers(2**31)))
        nll, divergence = run.evaluate(state[0], held)
        for name, entry in zip(history, (value, nll + divergence, nll), strict=True):
            history[name].append(entry)
        if not math.isfinite(nll + divergence):
            raise FloatingPointError(f"the likelihood is not finite after epoch {epoch}: lower the learning rate")
        if settings.patience is None or epoch == int(np.argmin(history["validation"])):
            # The next step reuses the memory of the weights.
            best, best_epoch = jax.tree.map(np.array, state[0]) if settings.patience else state[0], epoch
        bar.set_postfix({"validation": f"{nll + divergence:.2f}"}, refresh=False)
        bar.update()
        # While the second term of the bound is still faded in, the first one moves the bound the wrong way.
        if settings.patience is not None and epoch - max(best_epoch, settings.warmup) >= settings.patience:
            break
    bar.close()
    return best, {name: np.asarray(values) for name, values in history.items()} | {"kept": np.asarray(best_epoch)}
