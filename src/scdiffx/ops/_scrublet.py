"""Doublets by Scrublet: how many simulated doublets are among the nearest neighbours of a cell."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.knn import nearest
from scdiffx._core.random import as_seed
from scdiffx.ops._highly_variable import HighlyVariable
from scdiffx.ops._normalize import Log1p, NormalizeTotal
from scdiffx.ops._pca import PCA

__all__ = ["Scrublet", "ScrubletResult"]

_TARGET = 1e6
_MIN_CELLS = 3  # a gene that fewer cells have is not looked at
CHUNK = 1024  # points whose neighbours are looked at together


class ScrubletResult(NamedTuple):
    """`score` of the cells (cells,) and of the simulated doublets (doublets,), in [0, 1]; `coordinates` of both."""

    score: Float[Array, " cells"]
    simulated: Float[Array, " doublets"]
    coordinates: Float[Array, "cells_and_doublets comps"]


class Projection(NamedTuple):
    """A gene's contribution to the totals (0 or 1), its loadings over its standard deviation, and the centre."""

    counted: Float[Array, " genes"]
    loadings: Float[Array, "genes comps"]
    centre: Float[Array, " comps"]


@operator
class Scrublet:
    """The share of simulated doublets around a cell, as the probability of being one (Wolock et al. 2019).

    `init` chooses variable genes, fits the projection (z-scores and principal components of the cells) and draws the
    pairs of cells whose sums are the doublets. A doublet's coordinates follow from its parents' by linearity, so no
    matrix of doublets is ever made, and derivatives reach the counts. Who the neighbours are is discrete:
    with ``temperature=0`` they are counted, as in the paper, and no derivative passes; above 0 a neighbour's vote
    fades over that share of the distance to the last neighbour, and scores are differentiable.

    `rate` is the expected share of doublets among the cells.
    """

    projection: Projection | None = buffer(default=None)
    parents: Int[Array, "doublets 2"] | None = buffer(default=None, structure=True)
    indices: Int[Array, "all k"] | None = buffer(default=None, structure=True)
    n_comps: int = static(default=30)
    n_neighbors: int | None = static(default=None)
    doublet_ratio: float = static(default=2.0)
    rate: float = static(default=0.05)
    temperature: float = static(default=0.0)

    def init(self, x: C.Matrix, key: Array | None = None) -> Scrublet:
        n = x.shape[0]
        doublets = int(n * self.doublet_ratio)
        if doublets < 1:
            raise ValueError(f"doublet_ratio={self.doublet_ratio} of {n} cells is no doublet at all")
        seed = 0 if key is None else as_seed(key)
        parents = np.random.default_rng(seed).integers(0, n, (doublets, 2))
        op = replace(self, parents=jnp.asarray(parents, jnp.int32))
        if op.projection is None:
            op = replace(op, projection=op._fitted(x))
        z = np.asarray(_coordinates(op, x))
        candidates = op.votes(n) if self.temperature == 0 else min(2 * op.votes(n), len(z))
        return replace(op, indices=jnp.asarray(nearest(z, candidates, seed=seed)[0], jnp.int32))

    def votes(self, n: int) -> int:
        """Neighbours that vote on each of `n` cells, counted among cells and doublets together."""
        return n_voters(n, int(n * self.doublet_ratio), self.n_neighbors)

    def _fitted(self, x: C.Matrix) -> Projection:
        frequent = np.asarray(C.detections(x)) >= _MIN_CELLS
        present = np.flatnonzero(frequent)
        if not len(present):
            raise ValueError(f"no gene is found in {_MIN_CELLS} cells")
        part = C.take_columns(x, jnp.asarray(present, jnp.int32))
        log = Log1p()(NormalizeTotal().init(part)(part).x)
        genes = present[HighlyVariable().table(log)["highly_variable"]]
        n_comps = min(self.n_comps, len(genes) - 1, x.shape[0] - 1)
        if n_comps < 1:
            raise ValueError(f"there are {len(genes)} variable genes: too few for principal components")
        scaled, std, centre = _scaled(C.take_columns(x, jnp.asarray(genes, jnp.int32)))
        pca = PCA(n_comps=n_comps).init(scaled)
        if pca.components is None or pca.mean is None:
            raise RuntimeError("the projection has no components")
        loadings = jnp.zeros((x.shape[1], n_comps), x.dtype).at[genes].set(pca.components / std[:, None])
        counted = jnp.zeros(x.shape[1], x.dtype).at[genes].set(1)
        return Projection(counted, loadings, centre @ pca.components)

    def _coordinates(self, x: C.Matrix) -> Float[Array, "cells_and_doublets comps"]:
        """Principal coordinates of the cells, then of the doublets."""
        if self.projection is None or self.parents is None:
            raise ValueError("Scrublet needs its projection: call `op = op.init(x)` first")
        counted, loadings, centre = self.projection
        both = C.matmul(x, jnp.concatenate([counted[:, None], loadings], 1).astype(x.dtype))
        both = jnp.concatenate([both, both[self.parents[:, 0]] + both[self.parents[:, 1]]])
        total, position = both[:, :1], both[:, 1:]
        return _TARGET * position / jnp.where(total > 0, total, 1) - centre

    def __call__(self, x: C.Matrix) -> ScrubletResult:
        if self.indices is None:
            raise ValueError("Scrublet needs its neighbours: call `op = op.init(x)` first")
        n = x.shape[0]
        z = self._coordinates(x)
        doublets, voters = self._count(z, n)
        share = (doublets + 1) / (voters + 2)
        ratio = (z.shape[0] - n) / n
        score = share * self.rate / ratio / (1 - self.rate - share * (1 - self.rate - self.rate / ratio))
        return ScrubletResult(score[:n], score[n:], z)

    def _count(self, z: Array, n: int) -> tuple[Array, Array]:
        """Weight of the doublets among the neighbours, and of all: the point itself votes, and not as a doublet."""
        indices = jnp.asarray(self.indices)
        if self.temperature == 0:
            return (indices[:, 1:] >= n).sum(1).astype(z.dtype), jnp.full(len(indices), indices.shape[1], z.dtype)
        last = self.votes(n) - 1

        def one(args: tuple[Array, Array]) -> tuple[Array, Array]:
            own, near = args
            vote = soft_votes(distances(own, z[near]), last, self.temperature)
            return jnp.where(near >= n, vote, 0)[1:].sum(), vote.sum()

        return jax.lax.map(jax.checkpoint(one), (z, indices), batch_size=CHUNK)


def n_voters(n: int, doublets: int, n_neighbors: int | None) -> int:
    """Neighbours among cells and doublets that correspond to `n_neighbors` among `n` cells, the point itself too."""
    k = round(0.5 * np.sqrt(n)) if n_neighbors is None else n_neighbors
    return int(min(max(round(k * (1 + doublets / n)), 2), n + doublets))


def distances(own: Float[Array, " comps"], near: Float[Array, "k comps"]) -> Float[Array, " k"]:
    """Distances from one point, with finite derivatives where they are 0."""
    squared = ((near - own) ** 2).sum(1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def soft_votes(distance: Float[Array, " k"], last: int, temperature: float) -> Float[Array, " k"]:
    """Votes of neighbours in order of distance that fade where the one at place `last` is."""
    # The boundary runs between the last voter and the next, so that a small temperature counts exactly.
    bound = (distance[last] + distance[jnp.minimum(last + 1, len(distance) - 1)]) / 2
    width = temperature * jnp.where(bound > 0, bound, 1)
    return jax.nn.sigmoid((bound - distance) / width)


@jax.jit
def _coordinates(op: Scrublet, x: C.Matrix) -> Array:
    return op._coordinates(x)


@jax.jit
def _scaled(x: C.Matrix) -> tuple[C.Matrix, Array, Array]:
    """Normalised counts over their standard deviations; these, and the means in their units."""
    total = C.row_sums(x)
    normalised = C.scale_rows(x, jnp.where(total > 0, _TARGET / jnp.where(total > 0, total, 1), 0))
    mean, variance = C.column_moments(normalised)
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)
    return C.scale_columns(normalised, 1 / std), std, mean / std


def threshold_between_modes(scores: Any) -> float | None:
    """The minimum between the two modes of a smoothed histogram (Prewitt and Mendelsohn 1966); None if there is none.

    The histogram of 256 bins is smoothed by running means of three until two maxima are left.
    """
    from scipy.ndimage import uniform_filter1d

    scores = np.asarray(scores, np.float64)
    if scores.max() == scores.min():
        return None
    counts, edges = np.histogram(scores, bins=256)
    smooth = counts.astype(np.float64)
    for _ in range(10_000):
        smooth = uniform_filter1d(smooth, 3)
        maxima = _maxima(smooth)
        if len(maxima) < 3:
            break
    if len(maxima) != 2:
        return None
    between = smooth[maxima[0] : maxima[1] + 1]
    at = maxima[0] + int(np.argmin(between))
    return float((edges[at] + edges[at + 1]) / 2)


def _maxima(values: np.ndarray) -> list[int]:
    """Where values stop rising and start to fall."""
    found, rising = [], True
    for i in range(len(values) - 1):
        if rising and values[i + 1] < values[i]:
            rising = False
            found.append(i)
        elif not rising and values[i + 1] > values[i]:
            rising = True
    return found
