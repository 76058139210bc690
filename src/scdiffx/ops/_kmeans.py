"""K-means: a hard partition whose centres are differentiable, and memberships at a temperature."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._log import warn

__all__ = ["KMeans", "KMeansResult"]


class KMeansResult(NamedTuple):
    """`labels` (cells,), `memberships` (cells, clusters), `centers` (clusters, dims), and `inertia`.

    Labels are the nearest centre of each cell, memberships are ``softmax(-distance^2 / temperature)``, inertia is the
    sum of squared distances to the nearest centres.
    """

    labels: Int[Array, " cells"]
    memberships: Float[Array, "cells clusters"]
    centers: Float[Array, "clusters dims"]
    inertia: Array


@operator
class KMeans:
    """Cluster by Lloyd's iterations (Lloyd 1982) from greedy k-means++ starts (Arthur and Vassilvitskii 2007).

    `init` finds the centres: the best of `n_init` starts, each iterated until no cell moves, scikit-learn's result from
    the same start; clusters are numbered by size. With `centers` given it iterates from them alone, in their order. The
    call iterates on from these centres: at once at its end for the same cells, and for others (of a representation
    that is being learned, or new ones) clusters keep their numbers. The partition is structure: its centres, the
    means of their cells, have the exact derivative of k-means, for away from ties no cell changes its cluster.

    `n_soft` further iterations weigh every cell by its memberships at the learnable `temperature` instead (soft
    k-means), rematerialised on the way back; as it falls to 0 they change nothing. `temperature` None is set at
    `init` to twice the mean variance within clusters and per dimension: memberships are then the posteriors of
    spherical Gaussians of equal weight, with that variance.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> z = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    >>> op = sd.ops.KMeans(n_clusters=3, n_init=1).init(z)
    >>> op(z).memberships.shape
    (60, 3)
    """

    temperature: float | Array | None = learnable(default=None, constraint="positive")
    centers: Array | None = buffer(default=None)
    n_clusters: int = static(default=8)
    n_init: int = static(default=10)
    max_iter: int = static(default=300)
    n_soft: int = static(default=0)

    def init(self, x: Float[Array, "cells dims"], key: Array | None = None) -> KMeans:
        n, dims = x.shape
        if not 1 <= self.n_clusters <= n:
            raise ValueError(f"n_clusters={self.n_clusters} must lie between 1 and the number of cells, {n}")
        middle = x.mean(0)
        x = x - middle
        if self.centers is None:
            keys = jax.random.split(jax.random.key(0) if key is None else key, self.n_init)
            runs = (_lloyd(x, _start(x, self.n_clusters, key), self.max_iter) for key in keys)
            best = min(runs, key=lambda run: float(run.inertia))
            order = jnp.argsort(-jnp.bincount(best.labels, length=self.n_clusters))
            best = best._replace(centers=best.centers[order])
        else:
            if self.centers.shape != (self.n_clusters, dims):
                raise ValueError(f"centers of shape {self.centers.shape} must be {(self.n_clusters, dims)}")
            best = _lloyd(x, jnp.asarray(self.centers, x.dtype) - middle, self.max_iter)
        if not bool(best.converged):
            warn(f"k-means still moves cells after max_iter={self.max_iter} iterations: raise it")
        temperature = self.temperature
        if temperature is None:
            within = 2 * best.inertia / (n * dims)
            # Clusters of copies of one cell have no spread but the rounding error of their centres.
            rounding = (8 * jnp.finfo(x.dtype).eps) ** 2 * (x**2).mean()
            temperature = jnp.where(within > rounding, within, 1)
        return replace(self, centers=best.centers + middle, temperature=temperature)

    def __call__(self, x: Float[Array, "cells dims"]) -> KMeansResult:
        if self.centers is None or self.temperature is None:
            raise ValueError("KMeans needs its centres: call `op = op.init(x)` first")
        # Distances do not depend on the origin; near the data they are most exact.
        known = jnp.asarray(self.centers, x.dtype)
        middle = known.mean(0)
        x, known = x - middle, known - middle
        temperature = jnp.asarray(self.temperature, x.dtype)
        held = _lloyd(lax.stop_gradient(x), known, self.max_iter, refill=False).labels
        centers = _means(x, jax.nn.one_hot(held, self.n_clusters, dtype=x.dtype), known)

        def soft(centers: Array, _: None) -> tuple[Array, None]:
            return _means(x, jax.nn.softmax(_nearness(x, centers) / temperature), centers), None

        centers, _ = lax.scan(jax.checkpoint(soft), centers, None, length=self.n_soft)
        nearness = _nearness(x, centers)
        labels = nearness.argmax(1).astype(jnp.int32)
        inertia = ((x - centers[labels]) ** 2).sum()
        return KMeansResult(labels, jax.nn.softmax(nearness / temperature), centers + middle, inertia)


class _Run(NamedTuple):
    centers: Array
    labels: Array
    inertia: Array
    converged: Array


def _product(a: Array, b: Array) -> Array:
    # The default precision of accelerators (TF32, bfloat16) would move cells.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _nearness(x: Float[Array, "cells dims"], centers: Float[Array, "clusters dims"]) -> Float[Array, "cells clusters"]:
    """Negative squared distances, up to a constant in each row."""
    return 2 * _product(x, centers.T) - (centers**2).sum(1)


def _means(x: Array, weight: Float[Array, "cells clusters"], otherwise: Array) -> Float[Array, "clusters dims"]:
    """Weighted means of the cells; clusters without any weight stay where they were."""
    total = weight.sum(0)[:, None]
    filled = total > jnp.finfo(x.dtype).tiny
    return jnp.where(filled, _product(weight.T, x) / jnp.where(filled, total, 1), otherwise)


@partial(jax.jit, static_argnames="n_clusters")
def _start(x: Float[Array, "cells dims"], n_clusters: int, key: Array) -> Float[Array, "clusters dims"]:
    """Greedy k-means++: of a few cells, drawn by squared distance, the one that lowers the sum of distances most."""
    n = x.shape[0]
    trials = 2 + int(math.log(n_clusters))
    size = (x**2).sum(1)

    def distances(cells: Array) -> Array:
        gap = jnp.maximum(size[:, None] - _nearness(x, x[cells]), 0)
        return gap.at[cells, jnp.arange(len(cells))].set(0)

    def add(i: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, closest = state
        sums = jnp.cumsum(closest)
        drawn = jax.random.uniform(jax.random.fold_in(key, i), (trials,), x.dtype) * sums[-1]
        cells = jnp.minimum(jnp.searchsorted(sums, drawn), n - 1)
        left = jnp.minimum(closest[:, None], distances(cells))
        best = left.sum(0).argmin()
        return chosen.at[i].set(cells[best].astype(chosen.dtype)), left[:, best]

    first = jax.random.randint(jax.random.fold_in(key, 0), (1,), 0, n)
    chosen = jnp.zeros(n_clusters, first.dtype).at[0].set(first[0])
    chosen, _ = lax.fori_loop(1, n_clusters, add, (chosen, distances(first)[:, 0]))
    return x[chosen]


@partial(jax.jit, static_argnames="refill")
def _lloyd(
    x: Float[Array, "cells dims"], start: Float[Array, "clusters dims"], max_iter: int, refill: bool = True
) -> _Run:
    """Assign and average until no cell moves; clusters without cells start anew elsewhere, or stay."""

    def going(state: tuple[Array, Array, Array, Array]) -> Array:
        return state[2] & (state[3] < max_iter)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        centers, before, _, i = state
        labels = _assigned(x, centers)
        return _averaged(x, labels, centers, refill), labels, (labels != before).any(), i + 1

    nowhere = jnp.full(x.shape[0], -1, jnp.int32)
    centers, labels, moving, _ = lax.while_loop(going, step, (start, nowhere, jnp.asarray(True), jnp.asarray(0)))
    labels = jnp.where(moving, _assigned(x, centers), labels)
    return _Run(centers, labels, ((x - centers[labels]) ** 2).sum(), ~moving)


def _assigned(x: Array, centers: Array) -> Int[Array, " cells"]:
    return _nearness(x, centers).argmax(1).astype(jnp.int32)


def _averaged(x: Array, labels: Array, centers: Array, refill: bool) -> Array:
    """The means of the clusters; empty ones start anew at the cells farthest from their centres, as in scikit-learn."""
    k = centers.shape[0]
    member = jax.nn.one_hot(labels, k, dtype=x.dtype)
    if not refill:
        return _means(x, member, centers)
    empty = member.sum(0) == 0

    def moved(member: Array) -> Array:
        distance = ((x - centers[labels]) ** 2).sum(1)
        cells = lax.top_k(distance, k)[1][jnp.cumsum(empty) - 1]
        usable = empty & (distance.max() > 0)
        # Clusters that are not empty point at cells too: only those of empty ones change hands.
        return member.at[jnp.where(usable, cells, x.shape[0])].set(jnp.eye(k, dtype=x.dtype), mode="drop")

    return _means(x, lax.cond(empty.any(), moved, lambda member: member, member), centers)
