"""What the networks that integrate batches share: an autoencoder, clusters that mix batches, and the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import called, replace
from scdiffx._core.knn import nearest
from scdiffx._core.random import as_seed
from scdiffx._log import progress_bar
from scdiffx.ops._harmony import Harmony
from scdiffx.ops._integration_models import Cells, CountsModel, EmbeddingModel, Model, Net, encode
from scdiffx.ops._vae import encode as latent

__all__ = ["IntegrationResult", "IntegrationTraining", "applied", "discrepancy", "features", "fitted", "memberships"]

_MOST_CLUSTERS, _CELLS_PER_CLUSTER = 30, 30
# Widths of the Gaussian kernels, in mean squared distances within clusters, and random features of all together.
_WIDTHS = (0.125, 0.5, 1.0, 2.0, 8.0)
_FEATURES = 128
# Cells that progress is judged by.
_SAMPLE = 4096
_CHECKED = ("reconstruction", "discrepancy", "mixing", "conservation")


class IntegrationResult(NamedTuple):
    """`corrected`: the embedding, or the code of counts, without the batches (cells, dims)."""

    corrected: Float[Array, "cells dims"]


class IntegrationTraining(NamedTuple):
    """How the networks are trained: at most `max_steps` gradient steps of Adam, at a rate that falls along a cosine.

    A step sees `minibatch` cells at most. Every `check_every` steps the clusters are found anew and cells are judged by
    their reconstruction error plus a multiple of the discrepancy. Of an embedding the error is squared, the multiple
    10, and both are of a fixed sample of 4,096 cells; of counts the error is the negative bound of a tenth of the
    cells, which is not trained on, and the discrepancy counts in units of what that has fallen by so far. Training ends
    after `patience` checks in which the sum has not fallen (by 1 %, of an embedding); the weights of the best check are
    kept.
    """

    max_steps: int = 400
    learning_rate: float = 2e-3
    minibatch: int = 4096
    check_every: int = 50
    patience: int = 4
    progress: bool = False


def features(key: Array, dims: int, spread: Array) -> tuple[Array, Array]:
    """Frequencies and phases of random Fourier features of Gaussian kernels of several widths (Rahimi and Recht)."""
    widths = jnp.asarray(_WIDTHS)[jnp.arange(_FEATURES) % len(_WIDTHS)] * spread
    first, second = jax.random.split(key)
    return jax.random.normal(first, (dims, _FEATURES)) / jnp.sqrt(widths), jax.random.uniform(
        second, (_FEATURES,), maxval=2 * jnp.pi
    )


def discrepancy(cells: Cells, h: Array, batches: int, frequencies: Array, phases: Array) -> Array:
    """Squared maximum mean discrepancies of each batch from all cells in each soft cluster, averaged over the cells."""
    found = jnp.cos(h @ frequencies + phases) * math.sqrt(2 / len(phases))
    own = jax.nn.one_hot(cells.batch, batches, dtype=h.dtype)
    total = cells.member.sum(0)
    mass = cells.member.T @ own
    sums = jnp.stack([(cells.member * own[:, b, None]).T @ found for b in range(batches)], 1)
    means = sums / jnp.maximum(mass, 1e-6)[:, :, None]
    overall = sums.sum(1) / jnp.maximum(total, 1e-6)[:, None]
    return (((means - overall[:, None]) ** 2).sum(2) * mass).sum() / h.shape[0]


def memberships(h: np.ndarray, batch: np.ndarray, seed: int) -> np.ndarray:
    """Soft clusters that mix the batches: two rounds of Harmony, then its assignments to the clusters found."""
    count = max(2, min(round(len(h) / _CELLS_PER_CLUSTER), _MOST_CLUSTERS, len(h)))
    op = Harmony(nclust=count, rounds=2).init(jnp.asarray(h), jnp.asarray(batch), key=jax.random.key(seed))
    centroids = called(op, jnp.asarray(h), jnp.asarray(batch)).centroids
    return np.asarray(_assigned(jnp.asarray(h), jnp.asarray(batch), centroids, batches=int(batch.max()) + 1))


@partial(jax.jit, static_argnames="batches")
def _assigned(h: Array, batch: Array, centroids: Array, *, batches: int) -> Array:
    """Harmony's memberships with the penalty on over-represented batches at its fixed point, by damped iterations."""
    sigma, theta = 0.1, 2.0
    unit = h / jnp.maximum(jnp.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    near = -2 * (1 - unit @ centroids.T) / sigma
    own = jax.nn.one_hot(batch, batches, dtype=h.dtype)
    share = own.mean(0)[:, None]

    def step(member: Array, _: None) -> tuple[Array, None]:
        expected = share * member.sum(0)
        penalty = theta * jnp.log((expected + 1) / (own.T @ member + expected + 1))
        return 0.5 * member + 0.5 * jax.nn.softmax(near + penalty[batch]), None

    return jax.lax.scan(step, jax.nn.softmax(near), None, length=20)[0]


def _spread(h: np.ndarray, member: np.ndarray) -> float:
    """The mean squared distance between cells of one cluster."""
    label = member.argmax(1)
    return max(2 * float(np.mean([h[label == k].var(0).sum() for k in np.unique(label)])), 1e-12)


def _mixing(h: np.ndarray, batch: np.ndarray) -> float:
    """Local inverse Simpson's index of the batches among 30 neighbours: 0 apart, 1 mixed as in all cells."""
    index = nearest(h, min(31, len(h)))[0][:, 1:]
    shares = np.stack([(batch[index] == b).mean(1) for b in range(batch.max() + 1)])
    best = 1 / ((np.bincount(batch) / len(batch)) ** 2).sum()
    return float(((1 / (shares**2).sum(0)).mean() - 1) / max(best - 1, 1e-12))


def _conservation(x: np.ndarray, h: np.ndarray, batch: np.ndarray) -> float:
    """The share of a cell's 15 neighbours in its own batch that it keeps."""
    kept, cells = 0.0, 0
    for b in np.unique(batch):
        of = batch == b
        k = min(16, int(of.sum()))
        if k > 1:
            before, after = (np.sort(nearest(v[of], k)[0][:, 1:], 1) for v in (x, h))
            kept += sum(len(np.intersect1d(p, q)) for p, q in zip(before, after, strict=True)) / (k - 1)
            cells += int(of.sum())
    return kept / max(cells, 1)


def fitted(
    op: Any,
    x: C.Matrix,
    batch: Int[Array, " cells"],
    key: Array | None,
    step: Callable[..., Any],
    more: Callable[..., Net] = lambda rng, dims, batches: {},
) -> Any:
    """`op` with the networks that training by `step` yields, their scale and how training went.

    ``step(state, cells, rate, key, weight, batches=, forward=)`` takes and returns the networks, `more` of them
    included, with what their optimisers remember. Training is in float32, the result in the precision of `x`.
    """
    if op.net is not None:
        return op
    codes = np.asarray(batch, np.int32)
    if codes.min() < 0 or len(np.unique(codes)) < 2:
        raise ValueError("integration needs the batch of each cell, and at least two batches")
    seed = 0 if key is None else as_seed(key)
    model: Model
    with jax.enable_x64(False):
        if op.n_latent is None:
            model = EmbeddingModel(x, codes, op.n_hidden)
        else:
            model = CountsModel(x, codes, op.n_hidden, op.n_latent)
        step = partial(step, batches=int(codes.max()) + 1, forward=model.forward)
        net, history = _trained(model, codes, (op.weight, op.training), seed, step, more)
    net, scale, history = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), (net, model.scale, history))
    return replace(op, net=net, scale=scale, history=history)


def applied(op: Any, x: C.Matrix, batch: Int[Array, " cells"]) -> IntegrationResult:
    """The codes of cells, those of an embedding in its own units."""
    if op.net is None or (op.n_latent is None and op.scale is None):
        raise ValueError(f"{type(op).__name__} needs its networks: call `op = op.init(x, batch)` first")
    net = {part: jnp.asarray(value, x.dtype) for part, value in op.net.items()}
    if op.n_latent is not None:
        return IntegrationResult(C.map_rows(x, lambda block: latent(net, block)[0]))
    z, scale = jnp.asarray(x), jnp.asarray(op.scale, x.dtype)
    return IntegrationResult(encode(net, z / scale, batch) * scale)


def _trained(
    model: Model,
    codes: np.ndarray,
    settings: tuple[float, IntegrationTraining],
    seed: int,
    step: Callable[..., Any],
    more: Callable[..., Net],
) -> tuple[Net, dict[str, np.ndarray]]:
    weight, training = settings
    rng = np.random.default_rng(seed)
    net = model.initial(rng)
    dims = model.codes(net).shape[1]
    state = step(net | more(rng, dims, int(codes.max()) + 1), None, 0.0, None, 0.0)
    sample = np.sort(rng.choice(len(codes), min(_SAMPLE, len(codes)), replace=False))
    judged = (sample, model.before(sample), training.minibatch)
    key = jax.random.key(seed)
    checks: list[tuple[float, ...]] = []
    best, best_check = state[0], 0
    bar = progress_bar(training.max_steps, "integration", training.progress)
    for i in range(training.max_steps + 1):
        if i % training.check_every == 0 or i == training.max_steps:
            cells, found = _checked(model, state[0], codes, judged, seed, i)
            checks.append(found)
            unit = model.unit([check[0] for check in checks])
            value, least = (
                error + model.check_weight * unit * apart for error, apart, *_ in (found, checks[best_check])
            )
            if len(checks) == 1 or value < least - model.least * abs(least):
                best, best_check = jax.tree.map(np.array, state[0]), len(checks) - 1
            if len(checks) - 1 - best_check >= training.patience:
                break
            bar.set_postfix({"mixing": f"{found[2]:.3f}", "kept": f"{found[3]:.3f}"}, refresh=False)
        if i < training.max_steps:
            few = len(model.train) > training.minibatch
            chosen = rng.choice(model.train, training.minibatch, replace=False) if few else model.train
            rate = training.learning_rate * 0.5 * (1 + math.cos(math.pi * i / training.max_steps))
            state = step(
                state,
                _taken(model, cells, chosen),
                np.float32(rate),
                jax.random.fold_in(key, i),
                np.float32(weight * unit),
            )
            bar.update()
    bar.close()
    kept = {name: value for name, value in best.items() if not name.startswith("critic")}
    history = dict(zip(_CHECKED, np.asarray(checks).T, strict=True))
    return kept, history | {"kept": np.asarray(best_check)}


def _checked(
    model: Model, net: Net, codes: np.ndarray, judged: tuple[np.ndarray, np.ndarray, int], seed: int, i: int
) -> tuple[Cells, tuple[float, ...]]:
    """The cells in clusters found anew, and what `_CHECKED` names, on the sample."""
    h = model.codes(net)
    if not np.isfinite(h).all():
        raise FloatingPointError(f"integration is not finite after {i} steps: lower the learning rate")
    member = memberships(h, codes, seed)
    cells = Cells(None, codes, member, np.float32(_spread(h, member)))
    sample, before, size = judged
    some = Cells(None, codes[sample], member[sample], cells.spread)
    apart = float(_apart(some, h[sample], jax.random.key(0), batches=int(codes.max()) + 1))
    error = _error(model, net, cells, sample if model.held is None else model.held, size)
    return cells, (error, apart, _mixing(h[sample], some.batch), _conservation(before, h[sample], some.batch))


def _taken(model: Model, cells: Cells, index: np.ndarray) -> Cells:
    return Cells(model.rows(index), cells.batch[index], cells.member[index], cells.spread)


def _error(model: Model, net: Net, cells: Cells, index: np.ndarray, size: int) -> float:
    """The mean error of cells, so many at a time."""
    size = min(size, len(index))
    padded = np.concatenate([index, index[: -len(index) % size]]).reshape(-1, size)
    parts = [_forward(net, _taken(model, cells, part), forward=model.forward)[1] for part in padded]
    return float(np.concatenate([np.asarray(part) for part in parts])[: len(index)].mean())


@partial(jax.jit, static_argnames=("forward",))
def _forward(net: Net, cells: Cells, *, forward: Callable[..., tuple[Array, Array]]) -> tuple[Array, Array]:
    return forward(net, cells, None)


@partial(jax.jit, static_argnames=("batches",))
def _apart(cells: Cells, h: Array, key: Array, *, batches: int) -> Array:
    return discrepancy(cells, h, batches, *features(key, h.shape[1], cells.spread))
