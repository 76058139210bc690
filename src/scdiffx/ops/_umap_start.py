"""Where a layout starts: the curve of its similarities, and coordinates from the spectrum of the graph."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from scdiffx._core.eigsh import eigsh
from scdiffx._core.graph import Graph
from scdiffx._core.runtime import one_blas_thread

__all__ = ["curve", "log_radii", "random_start", "rescaled", "spectral_start"]

_EXTENT = 10.0  # layouts start in a box of this size
_DENSE = 256  # up to this size a component is decomposed densely


def curve(min_dist: float, spread: float) -> tuple[float, float]:
    """The a and b with which ``1 / (1 + a d^(2b))`` is nearest to 1 up to `min_dist` and decays over `spread` beyond.

    As umap-learn fits them.
    """
    from scipy.optimize import curve_fit

    distance = np.linspace(0, 3 * spread, 300)
    wanted = np.where(distance < min_dist, 1.0, np.exp(-(distance - min_dist) / spread))
    (a, b), _ = curve_fit(lambda d, a, b: 1 / (1 + a * d ** (2 * b)), distance, wanted)
    return float(a), float(b)


def random_start(n: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform coordinates (n, dims)."""
    return rng.uniform(-_EXTENT, _EXTENT, (n, dims))


def rescaled(start: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coordinates in the box [0, 10]; where some coincide, all are moved a little, for nothing parts equal cells."""
    if len(np.unique(start, axis=0)) < len(start):
        start = start + rng.normal(scale=1e-4 * (np.ptp(start) or 1.0), size=start.shape)
    low, extent = start.min(0), np.ptp(start, axis=0)
    return _EXTENT * (start - low) / np.where(extent > 0, extent, 1)


def spectral_start(weights: sp.csr_matrix, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvectors of the normalised Laplacian (n, dims), each component of the graph by itself.

    As in umap-learn, up to ``2 * dims`` components have their places on the axes. More of them have random places.
    """
    count, label = connected_components(weights, directed=False)
    if count == 1:
        found = _eigenvectors(weights, dims)
        found = found * (_EXTENT / np.abs(found).max())
        return found + rng.normal(scale=1e-4, size=found.shape)
    if count <= 2 * dims:
        half = np.eye(dims)[: -(-count // 2)]
        places = np.concatenate([half, -half])[:count]
    else:
        places = rng.uniform(0, 1, (count, dims))
    gap = np.sqrt(((places[:, None] - places) ** 2).sum(2)) + np.where(np.eye(count) > 0, np.inf, 0)
    room = gap.min(1) / 2
    start = np.empty((len(label), dims))
    for component, cells in enumerate(np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])):
        if len(cells) <= 2 * dims:
            inner = rng.uniform(-1, 1, (len(cells), dims))
        else:
            inner = _eigenvectors(weights[cells][:, cells], dims)
            inner = inner / np.abs(inner).max()
        start[cells] = places[component] + room[component] * inner
    return start * _EXTENT + rng.normal(scale=1e-4, size=start.shape)


def _eigenvectors(weights: sp.csr_matrix, dims: int) -> np.ndarray:
    """The eigenvectors of a connected graph that follow the constant one."""
    degree = np.asarray(weights.sum(1)).ravel()
    root = sp.diags(1 / np.sqrt(degree))
    normal = (root @ weights @ root).tocsr()
    if normal.shape[0] <= _DENSE:
        return np.asarray(np.linalg.eigh(normal.toarray())[1][:, ::-1][:, 1 : dims + 1])
    with one_blas_thread():
        found = eigsh(Graph.from_scipy(normal, np.float32), dims + 1, tol=1e-4)
    return np.asarray(found.vectors[:, 1:], np.float64)


def log_radii(weights: sp.csr_matrix, distances: sp.csr_matrix) -> np.ndarray:
    """The log of each cell's mean squared distance to its neighbours, weighed by the edges, as in densMAP."""
    apart = distances.astype(np.float64)
    apart = apart.maximum(apart.T)
    total = np.asarray(weights.sum(1)).ravel()
    mean = np.asarray(weights.multiply(apart.multiply(apart)).sum(1)).ravel() / np.where(total > 0, total, 1)
    return np.log(1e-8 + mean)
