"""One time for each cell from the times of its genes, and where development starts and ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigs, eigsh

from scdiffx._core.directed import Directed
from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx.ops._diffusion import STATIONARY
from scdiffx.ops._moments import averaged, neighbour_mean

__all__ = ["LatentTime", "LatentTimeResult", "Terminal", "terminal_states"]

_STATIONARY = 1e-3
_N_EIGENVALUES = 10
_N_ROOTS = 4
_SCALE = 10.0
_PERCENTILES = (15.0, 20.0, 25.0, 30.0, 35.0)


class Terminal(NamedTuple):
    """How much a cell is a root or an end (cells,), in [0, 1], and the pseudotime between them (cells,), in [0, 1]."""

    root_cells: Float[Array, " cells"]
    end_points: Float[Array, " cells"]
    pseudotime: Float[Array, " cells"]


class LatentTimeResult(NamedTuple):
    """`latent_time` (cells,) in [0, t_max], and what `init` found of roots and ends."""

    latent_time: Float[Array, " cells"]
    terminal: Terminal


def _scaled(x: Any) -> Any:
    x = x - x.min()
    largest = x.max()
    return x / (np.where(largest > 0, largest, 1) if isinstance(x, np.ndarray) else jnp.where(largest > 0, largest, 1))


def _stationary(transitions: sp.csr_matrix, start: np.ndarray) -> np.ndarray:
    """Sizes of the left eigenvectors of eigenvalue 1, between their 2nd and 98th percentiles (cells, states)."""
    n = transitions.shape[0]
    if n <= _N_EIGENVALUES + 2:
        values, vectors = np.linalg.eig(transitions.T.toarray())
    else:
        values, vectors = eigs(transitions.T.astype(np.float32), k=_N_EIGENVALUES, which="LR", v0=start)
    order = np.argsort(-values.real)
    order = order[values.real[order] >= 1 - _STATIONARY]
    size = np.abs(vectors.real[:, order])
    low, high = np.percentile(size, (2, 98), axis=0)
    size = np.clip(np.where(size < low, 0, size), 0, high)
    largest = size.max(0)
    return size / np.where(largest > 0, largest, 1)


def _start(n: int) -> np.ndarray:
    """scVelo's start of the iterations, so that they end at the same vectors."""
    return np.random.RandomState(0).rand(n)


def terminal_states(cosines: Directed, near: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Roots and ends: stationary states of the transitions backwards and forwards, averaged over neighbours (host)."""
    kernel = cosines.to_scipy()
    kernel.data = np.exp(_SCALE * kernel.data)
    n = cosines.n_cells
    start = _start(n)
    one = sp.csr_matrix((np.ones(near.nnz), near.indices, near.indptr), near.shape) + sp.identity(n)
    mean = sp.diags(1 / np.asarray(one.sum(1)).ravel()) @ one
    found = []
    for matrix in (kernel.T.tocsr(), kernel):
        total = np.asarray(matrix.sum(1)).ravel()
        p = sp.diags(1 / np.where(total > 0, total, 1)) @ matrix
        states = np.asarray((mean @ _stationary(sp.csr_matrix(p), start)).sum(1)).ravel()
        found.append(_scaled(np.clip(states, 0, np.percentile(states, 98))))
    return found[0], found[1]


def _pseudotime(cosines: Directed, root: int, end: int, start: np.ndarray) -> np.ndarray:
    """Diffusion pseudotime on the sizes of the cosines, from the root and towards the end; nan out of reach of both."""
    matrix = abs(cosines.to_scipy()).astype(np.float64)
    matrix = matrix + matrix.T
    density, scale = np.asarray(matrix.sum(0)).ravel(), None
    for power in (1.0, 0.5):
        scale = np.where(density > 0, density, 1) ** -power
        matrix = sp.diags(scale) @ matrix @ sp.diags(scale)
        density = np.asarray(matrix.sum(0)).ravel()
    n_comps = min(_N_EIGENVALUES, matrix.shape[0] - 1)
    values, vectors = eigsh(matrix, k=n_comps, which="LM", v0=start)
    moving = values < STATIONARY
    weights = np.where(moving, values / np.where(moving, 1 - values, 1), 1)
    part = connected_components(matrix, directed=False)[1]
    times = []
    for cell in (root, end):
        distance = np.sqrt((((vectors[cell] - vectors) * weights) ** 2).sum(1))
        near = part == part[cell]
        longest = distance[near].max()
        times.append(np.where(near, distance / (longest if longest > 0 else 1), np.nan))
    later, sooner = times[0], 1 - times[1]
    time = np.where(np.isnan(sooner), later, np.where(np.isnan(later), sooner, (later + sooner) / 2))
    known = np.isfinite(time)
    time[known] = _scaled(time[known])
    return time


@operator
class LatentTime:
    """A time for each cell that its genes share (Bergen 2020; scVelo).

    Times of the genes are counted from a root cell, and a low percentile over the genes is what they share; the two
    percentiles that spread the cells most evenly are taken, for up to four roots. Cells far off the mean of their
    neighbours, whose confidence is below `min_confidence`, take that mean's time. `init` finds roots and ends of the
    velocity graph; with `root` its cells are the roots. The longest time is `t_max`.
    The time is differentiable in the times of the genes.
    """

    roots: Int[Array, " roots"] | None = buffer(default=None, structure=True)
    columns: Int[Array, " likely"] | None = buffer(default=None, structure=True)
    mean: tuple[Graph, Array] | None = buffer(default=None, structure=True)
    terminal: Terminal | None = buffer(default=None, structure=True)
    min_likelihood: float = static(default=0.1)
    min_confidence: float = static(default=0.75)
    t_max: float = static(default=1.0)

    def init(
        self,
        t: Array,
        likelihood: Array | None = None,
        cosines: Directed | None = None,
        graph: Graph | None = None,
        distances: Graph | None = None,
        root: Array | None = None,
        key: Array | None = None,
    ) -> LatentTime:
        if cosines is None or graph is None or distances is None:
            raise ValueError("LatentTime needs the velocity graph, and connectivities and distances of the neighbours")
        times = np.asarray(t, np.float64)
        genes = np.isfinite(times.sum(0))
        if likelihood is not None:
            genes &= np.nan_to_num(np.asarray(likelihood)) >= self.min_likelihood
        if not genes.any():
            raise ValueError(f"no gene has a likelihood of at least min_likelihood={self.min_likelihood}")
        found = terminal_states(cosines, distances.to_scipy())
        roots, ends = (np.asarray(root, np.float64), found[1]) if root is not None else found
        order = np.argsort(times[:, genes].sum(1), kind="stable")
        certain = order[roots[order] > 1 - 1e-3]
        chosen = (certain if len(certain) else order)[:_N_ROOTS] if len(certain) else order[:1]
        mean = neighbour_mean(graph)
        end = int(np.argmax(mean[0].to_scipy() @ ends + np.asarray(mean[1]) * ends))
        pseudotime = _pseudotime(cosines, int(chosen[0]), end, _start(cosines.n_cells))
        terminal = Terminal(*(jnp.asarray(x, t.dtype) for x in (roots, ends, pseudotime)))
        columns = jnp.asarray(np.flatnonzero(genes), jnp.int32)
        return replace(self, roots=jnp.asarray(chosen, jnp.int32), columns=columns, mean=mean, terminal=terminal)

    def __call__(
        self,
        t: Float[Array, "cells genes"],
        likelihood: Float[Array, " genes"] | None = None,
        cosines: Directed | None = None,
        graph: Graph | None = None,
        distances: Graph | None = None,
        root: Float[Array, " cells"] | None = None,
    ) -> LatentTimeResult:
        if self.roots is None or self.columns is None or self.mean is None or self.terminal is None:
            raise ValueError("LatentTime needs its roots: call `op = op.init(...)` first")
        shared, t = [], t[:, self.columns]
        for at in self.roots:
            t = _from_root(t, at)
            shared.append(_shared(t))
        time = _scaled(jnp.stack(shared).mean(0))
        around = averaged(self.mean, time[:, None])[:, 0]
        level = (time @ around) / (around @ around)
        confident = jax.lax.stop_gradient((1 - jnp.abs(time - around * level) / time.max()) ** 2) >= self.min_confidence
        kept = jnp.where(confident, time, 0)
        return LatentTimeResult(self.t_max * _scaled(averaged(self.mean, kept[:, None])[:, 0]), self.terminal)


def _from_root(t: Array, root: Array) -> Array:
    """Times since that of the root; earlier times follow the latest ones."""
    after = t >= t[root]
    since = jnp.where(after, t - t[root], 0)
    return jnp.where(after, since, t + since.max(0))


def _shared(t: Array) -> Array:
    """The mean of the two percentiles over the genes that spread the cells most evenly."""
    t = t - t.min()
    low = jnp.percentile(t, jnp.asarray(_PERCENTILES), axis=1)
    largest = low.max(1, keepdims=True)
    low = low / jnp.where(largest > 0, largest, 1)
    uneven = ((jnp.sort(low, axis=1) - jnp.linspace(0, 1, low.shape[1])) ** 2).sum(1)
    best = jnp.argsort(jax.lax.stop_gradient(uneven))[:2]
    total = low[best].sum(0)
    return total / jnp.where(total.max() > 0, total.max(), 1)
