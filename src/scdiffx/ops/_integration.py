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

from scdiffx._core.knn import nearest
from scdiffx._core.random import as_seed
from scdiffx._log import progress_bar
from scdiffx.ops._harmony import Harmony

__all__ = [
    "Cells",
    "IntegrationResult",
    "IntegrationTraining",
    "Net",
    "discrepancy",
    "encode",
    "features",
    "memberships",
    "moved",
    "reconstruction",
    "trained",
    "uniform",
]

Net = dict[str, Any]
_MOST_CLUSTERS, _CELLS_PER_CLUSTER = 30, 30
# Widths of the Gaussian kernels, in mean squared distances within clusters, and random features of all together.
_WIDTHS = (0.125, 0.5, 1.0, 2.0, 8.0)
_FEATURES = 128
# Cells that progress is judged by, and what the discrepancy counts there.
_SAMPLE = 4096
_CHECK_WEIGHT = 10.0
_CHECKED = ("reconstruction", "discrepancy", "mixing", "conservation")


class IntegrationResult(NamedTuple):
    """`corrected`: the embedding without the batches (cells, dims)."""

    corrected: Float[Array, "cells dims"]


class IntegrationTraining(NamedTuple):
    """How the networks are trained: at most `max_steps` gradient steps of Adam, at a rate that falls along a cosine.

    A step sees `minibatch` cells at most. Every `check_every` steps the clusters are found anew and a fixed sample of
    4,096 cells is judged by its squared reconstruction error plus ten times its discrepancy; training ends after
    `patience` checks in which that has not fallen by 1 %, and the weights of the best check are kept.
    """

    max_steps: int = 400
    learning_rate: float = 2e-3
    minibatch: int = 4096
    check_every: int = 50
    patience: int = 4
    progress: bool = False


class Cells(NamedTuple):
    """Cells of a step: standardised coordinates, batches, soft clusters, and the mean squared distance within these."""

    x: Float[Array | np.ndarray, "cells dims"]
    batch: Int[Array | np.ndarray, " cells"]
    member: Float[Array | np.ndarray, "cells clusters"]
    spread: Any


def uniform(rng: np.random.Generator, n_in: int, n_out: int) -> np.ndarray:
    return (rng.uniform(-1, 1, (n_in, n_out)) * math.sqrt(3 / n_in)).astype(np.float32)


def initial(rng: np.random.Generator, dims: int, batches: int, hidden: int) -> Net:
    """Networks that change nothing yet: what they add to their input starts at 0."""
    net: Net = {}
    for name in ("encoder", "decoder"):
        net |= {
            f"{name}_in": uniform(rng, dims, hidden),
            f"{name}_batch": uniform(rng, batches, hidden),
            f"{name}_out": np.zeros((hidden, dims), np.float32),
            f"{name}_shift": np.zeros((batches, dims), np.float32),
        }
    return net


def _layer(net: Net, name: str, x: Any, batch: Any) -> Array:
    hidden = jax.nn.relu(x @ net[f"{name}_in"] + net[f"{name}_batch"][batch])
    return x + hidden @ net[f"{name}_out"] + net[f"{name}_shift"][batch]


def encode(net: Net, x: Any, batch: Any) -> Float[Array, "cells dims"]:
    """Standardised coordinates plus what a network of them and the batch adds."""
    return _layer(net, "encoder", x, batch)


def moved(net: Net | None, scale: Array | None, z: Array, batch: Array, name: str) -> IntegrationResult:
    """The corrected embedding, in its own units."""
    if net is None or scale is None:
        raise ValueError(f"{name} needs its networks: call `op = op.init(z, batch)` first")
    net = {part: jnp.asarray(value, z.dtype) for part, value in net.items()}
    scale = jnp.asarray(scale, z.dtype)
    return IntegrationResult(encode(net, z / scale, batch) * scale)


def reconstruction(net: Net, cells: Cells, h: Array) -> Array:
    """Mean squared error of the cells when a network of the corrected embedding and the batch puts them back."""
    return ((_layer(net, "decoder", h, cells.batch) - cells.x) ** 2).sum(1).mean()


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
    centroids = op(jnp.asarray(h), jnp.asarray(batch)).centroids
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


def trained(
    z: Float[Array, "cells dims"],
    batch: Int[Array, " cells"],
    hidden: int,
    training: IntegrationTraining,
    key: Array | None,
    step: Callable[..., Any],
    more: Callable[..., Net] = lambda rng, dims, batches: {},
) -> tuple[Net, Array, dict[str, Array]]:
    """Train by `step`; returns the weights kept, the scale of the coordinates, and how training went.

    ``step(state, cells, rate, key)`` takes and returns the networks, `more` of them included, with what their
    optimisers remember. Training is in float32, the result in the precision of `z`.
    """
    seed = 0 if key is None else as_seed(key)
    with jax.enable_x64(False):
        found = _trained(np.asarray(z, np.float32), np.asarray(batch, np.int32), hidden, training, seed, step, more)
    return jax.tree.map(lambda a: jnp.asarray(a, z.dtype), found)


def _trained(
    z: np.ndarray,
    codes: np.ndarray,
    hidden: int,
    training: IntegrationTraining,
    seed: int,
    step: Callable[..., Any],
    more: Callable[..., Net],
) -> tuple[Net, np.ndarray, dict[str, np.ndarray]]:
    if codes.min() < 0 or len(np.unique(codes)) < 2:
        raise ValueError("integration needs the batch of each cell, and at least two batches")
    rng = np.random.default_rng(seed)
    scale = np.asarray(max(float(z.std()), 1e-12), np.float32)
    x, batches = z / scale, int(codes.max()) + 1
    net = initial(rng, x.shape[1], batches, hidden) | more(rng, x.shape[1], batches)
    state = step(net, None, 0.0, None)
    sample = np.sort(rng.choice(len(x), min(_SAMPLE, len(x)), replace=False))
    key = jax.random.key(seed)
    checks: list[tuple[float, ...]] = []
    best, best_value, best_check = net, math.inf, 0
    bar = progress_bar(training.max_steps, "integration", training.progress)
    for i in range(training.max_steps + 1):
        if i % training.check_every == 0 or i == training.max_steps:
            cells, found = _checked(state[0], x, codes, sample, seed, i)
            value = found[0] + _CHECK_WEIGHT * found[1]
            if value < 0.99 * best_value:
                best, best_value, best_check = jax.tree.map(np.array, state[0]), value, len(checks)
            checks.append(found)
            if len(checks) - 1 - best_check >= training.patience:
                break
            bar.set_postfix({"mixing": f"{found[2]:.3f}", "kept": f"{found[3]:.3f}"}, refresh=False)
        if i < training.max_steps:
            few = len(x) > training.minibatch
            some = _taken(cells, rng.choice(len(x), training.minibatch, replace=False)) if few else cells
            rate = training.learning_rate * 0.5 * (1 + math.cos(math.pi * i / training.max_steps))
            state = step(state, some, np.float32(rate), jax.random.fold_in(key, i))
            bar.update()
    bar.close()
    kept = {name: value for name, value in best.items() if name.startswith(("encoder", "decoder"))}
    history = dict(zip(_CHECKED, np.asarray(checks).T, strict=True))
    return kept, scale, history | {"kept": np.asarray(best_check)}


def _checked(
    net: Net, x: np.ndarray, codes: np.ndarray, sample: np.ndarray, seed: int, i: int
) -> tuple[Cells, tuple[float, ...]]:
    """The cells in clusters found anew, and what `_CHECKED` names, on the sample."""
    h = np.asarray(encode(net, x, codes))
    if not np.isfinite(h).all():
        raise FloatingPointError(f"integration is not finite after {i} steps: lower the learning rate")
    member = memberships(h, codes, seed)
    cells = Cells(x, codes, member, np.float32(_spread(h, member)))
    batches = int(codes.max()) + 1
    error, apart = _judged(net, _taken(cells, sample), jax.random.key(0), batches=batches)
    mixing = _mixing(h[sample], codes[sample])
    return cells, (float(error), float(apart), mixing, _conservation(x[sample], h[sample], codes[sample]))


def _taken(cells: Cells, index: np.ndarray) -> Cells:
    return Cells(cells.x[index], cells.batch[index], cells.member[index], cells.spread)


@partial(jax.jit, static_argnames=("batches",))
def _judged(net: Net, cells: Cells, key: Array, *, batches: int) -> tuple[Array, Array]:
    h = encode(net, cells.x, cells.batch)
    return reconstruction(net, cells, h), discrepancy(cells, h, batches, *features(key, h.shape[1], cells.spread))
