"""What ambient removal estimates once from the data, on the host: clusters, contamination levels, weights of genes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float
from scipy.special import gammaln

from scdiffx._core import counts as C
from scdiffx._core.fields import called
from scdiffx._core.random import as_seed
from scdiffx.ops._highly_variable import HighlyVariable
from scdiffx.ops._leiden import Leiden
from scdiffx.ops._neighbors import Neighbors
from scdiffx.ops._normalize import Log1p, NormalizeTotal
from scdiffx.ops._pca import PCA

__all__ = [
    "Clusters",
    "clustered",
    "gene_weights",
    "indicator",
    "levels",
    "likeliest",
    "plausible",
    "prior_strength",
    "seed_of",
    "shares",
    "without_bursts",
]

# Clusters: genes found in so many cells, neighbours, components; fewer cells are not clustered.
_MIN_CELLS_OF_GENE = 3
_NEIGHBORS = 15
_COMPS = 30
_MIN_CELLS = 10
# Coarse, for finer clusters divide the cells of a type by their contamination.
_RESOLUTION = 0.4
# A gene tells native from ambient if some cluster has so many times the soup's share of it ...
_SPECIFIC = 3.0
# ... and a cluster's count is looked at if so much is expected of pure soup (and a little less where it is specific).
_EXPECTED = 10.0
_EXPECTED_OWN = 5.0
_MIN_PAIRS = 10
_MIN_PAIRS_OF_CLUSTER = 20
# The relative deviation of a soup's composition from what was measured of it, and the lower end of the ratios.
_MISMATCH = 0.15
_TAIL = 0.05
_RATIOS = np.concatenate([[1e-4], np.geomspace(3e-3, 1, 80)])
_EM_STEPS = 200
_ROUNDS = 2
# Pairs of all clusters together count as this many pairs of each.
_PRIOR_PAIRS = 100
# Weights: the most abundant genes; natural variation is correlated between genes, so it counts several-fold.
_GENES = 3_000
_LEAST_DISPERSION = 0.1
_CORRELATED = 20.0
_LEAST_LEVEL = 0.005
# The relative spread of the cells' fractions around their cluster's level.
_SPREAD = (0.1, 0.7)


class Clusters(NamedTuple):
    """`mean` (clusters, genes): shares of the genes in the counts of a cluster, native and ambient together.

    `weights` (clusters, genes): how much an excess of the gene says about a cell's ambient fraction. `noise`
    (clusters, 2): the variance of what they say, per inverse depth and constant.
    """

    mean: Float[Array | np.ndarray, "clusters genes"]
    weights: Float[Array | np.ndarray, "clusters genes"]
    noise: Float[Array | np.ndarray, "clusters 2"]


def clustered(x: C.Matrix, seed: int) -> np.ndarray:
    """Coarse Leiden communities of the cells, by scanpy's recipe."""
    n = x.shape[0]
    if n < _MIN_CELLS:
        raise ValueError(f"finding clusters needs at least {_MIN_CELLS} cells, got {n}; pass groups instead")
    frequent = np.asarray(C.detections(x)) >= _MIN_CELLS_OF_GENE
    if not frequent.any():
        raise ValueError(f"no gene is found in {_MIN_CELLS_OF_GENE} cells")
    part = C.take_columns(x, jnp.asarray(np.flatnonzero(frequent), jnp.int32))
    log = Log1p()(called(NormalizeTotal().init(part), part).x)
    genes = np.flatnonzero(HighlyVariable().table(log)["highly_variable"])
    n_comps = min(_COMPS, len(genes) - 1, n - 1)
    if n_comps < 1:
        raise ValueError(f"there are {len(genes)} variable genes: too few to find clusters; pass groups instead")
    chosen = C.take_columns(log, jnp.asarray(genes, jnp.int32))
    pca = PCA(n_comps=n_comps, anchored=False).init(chosen, jnp.ones(len(genes), x.dtype))
    z = called(pca, chosen, jnp.ones(len(genes), x.dtype)).scores
    near = Neighbors(n_neighbors=min(_NEIGHBORS, n - 1)).init(z)
    graph = called(near, z).connectivities
    return np.asarray(Leiden(resolution=_RESOLUTION, seed=seed).init(graph).membership)


def likeliest(csr: Any, mean: np.ndarray) -> np.ndarray:
    """The cluster under whose shares a cell's counts are likeliest."""
    log = np.log(mean + 1e-2 * mean.mean(0) + 1e-9)
    return np.asarray(csr @ log.T).argmax(1)


def indicator(codes: np.ndarray, clusters: int) -> Any:
    """Which cell belongs to which cluster (clusters, cells): its product with counts sums them up."""
    n = len(codes)
    return sp.csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(clusters, n))


def plausible(expected: Any, xp: Any = jnp) -> Any:
    """The most that is likely of a gene with this expectation; beyond lie doublets and bursts of single cells."""
    positive = expected > 0
    return 3 * expected + 3 * xp.where(positive, xp.sqrt(xp.where(positive, expected, 1)), 0) + 2


def without_bursts(csr: Any, codes: np.ndarray, clusters: int) -> tuple[np.ndarray, Any]:
    """Shares of the genes in each cluster (clusters, genes), and the counts, both cut at what is plausible of them."""
    member = indicator(codes, clusters)
    depth = np.asarray(csr.sum(1), np.float64).ravel()
    size = (member @ depth)[:, None]
    size = np.where(size > 0, size, 1)
    row = np.repeat(np.arange(len(depth)), np.diff(csr.indptr))
    cut = csr
    for _ in range(_ROUNDS):
        mean = np.asarray((member @ cut).todense()) / size
        cut = csr.copy()
        cut.data = np.minimum(csr.data, plausible(depth[row] * mean[codes[row], csr.indices], np))
    return np.asarray((member @ cut).todense()) / size, cut


def shares(totals: np.ndarray) -> np.ndarray:
    """Rows over their sums; a row of zeros stays."""
    size = totals.sum(-1, keepdims=True)
    return totals / np.where(size > 0, size, 1)


def levels(mean: np.ndarray, size: np.ndarray, ambient: np.ndarray) -> np.ndarray:
    """The ambient fraction of each cluster, from genes that are specific to other clusters.

    Where a gene is not expressed, the ratio of its share in the cluster to that in the soup is the fraction itself, and
    elsewhere it is higher. So the fraction is the lower end of the ratios' distribution, with the noise of counts and
    of the soup's measured composition deconvolved. 0 where no gene is specific enough to tell.
    """
    expected, totals = size[:, None] * ambient, size[:, None] * mean
    ratio = totals / np.where(expected > 0, expected, 1)
    specific = np.where(expected > _EXPECTED_OWN, ratio, 0).max(0) >= _SPECIFIC
    pairs = specific & (expected > _EXPECTED) & (ratio < 1)
    if pairs.sum() < _MIN_PAIRS:
        return np.zeros(len(totals))
    together = _lower_end(totals[pairs], expected[pairs])
    found = np.full(len(totals), together)
    for c, mine in enumerate(pairs):
        n = mine.sum()
        if n >= _MIN_PAIRS_OF_CLUSTER:
            own = _lower_end(totals[c, mine], expected[c, mine])
            found[c] = (n * own + _PRIOR_PAIRS * together) / (n + _PRIOR_PAIRS)
    return found


def _lower_end(counts: np.ndarray, expected: np.ndarray) -> float:
    """Where the distribution of the true ratios starts: its quantile function, extrapolated linearly to 0."""
    # A negative binomial with the relative deviation of the soup; its mixture over the ratios by maximum likelihood.
    shape, mu = 1 / _MISMATCH**2, expected[:, None] * _RATIOS
    log_p = counts[:, None] * np.log(mu / (shape + mu)) - shape * np.log1p(mu / shape)
    log_p += (gammaln(counts + shape) - gammaln(counts + 1))[:, None]
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    weight = np.full(len(_RATIOS), 1 / len(_RATIOS))
    for _ in range(_EM_STEPS):
        posterior = p * weight
        weight = (posterior / posterior.sum(1, keepdims=True)).mean(0)
    edges = np.concatenate([[0], np.sqrt(_RATIOS[1:] * _RATIOS[:-1]), [1]])
    low, high = np.interp([_TAIL, 2 * _TAIL], np.concatenate([[0], np.cumsum(weight)]), edges)
    return float(max(0, 2 * low - high))


def _dispersion(csr: Any, member: Any, depth: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Variance beyond Poisson's over the squared mean, of each gene within the clusters."""
    squares = csr.copy()
    squares.data = squares.data**2
    length = (member @ depth**2)[:, None]
    cross = np.asarray((member @ sp.diags(depth) @ csr).todense())
    square, total = (np.asarray((member @ m).todense()) for m in (squares, csr))
    excess = (square - 2 * cross * mean + length * mean**2 - total).sum(0)
    scale = (length * mean**2).sum(0)
    return np.clip(excess / np.where(scale > 0, scale, 1), 0.01, 10)


def gene_weights(
    csr: Any, codes: np.ndarray, depth: np.ndarray, mean: np.ndarray, ambient: np.ndarray, level: np.ndarray
) -> Clusters:
    """The weights of a generalised least-squares estimate of a cell's fraction, given its cluster's composition."""
    k, level = len(mean), np.maximum(level, _LEAST_LEVEL)[:, None]
    dispersion = _dispersion(csr, indicator(codes, k), depth, mean)
    typical = np.array([np.median(depth[codes == c]) if (codes == c).any() else 1 for c in range(k)])[:, None]
    native = np.clip(mean - level * ambient, 0, None)
    molecules = np.maximum(mean, level * ambient)
    natural = _CORRELATED * (dispersion + _LEAST_DISPERSION) * native**2
    variance = molecules / np.maximum(typical, 1) + natural
    direction = ambient - native / (1 - level)
    # The share of a rare gene in the soup is known too badly to be compared with.
    used = np.zeros(len(ambient), bool)
    used[np.argsort(-(ambient + mean.mean(0)), kind="stable")[:_GENES]] = True
    weights = np.where(used & (variance > 0), direction / np.where(variance > 0, variance, 1), 0)
    gain = (weights * direction).sum(1, keepdims=True)
    weights = weights / np.where(gain > 0, gain, 1)
    noise = np.stack([(weights**2 * molecules).sum(1), (weights**2 * natural).sum(1)], 1)
    return Clusters(mean, weights, noise)


def prior_strength(deviation: np.ndarray, variance: Any, level: np.ndarray) -> float:
    """How closely the cells' fractions keep to their levels: the inverse of their squared relative deviation."""
    scale = float((level**2).sum())
    low, high = _SPREAD
    spread = float((deviation**2 - variance).sum()) / scale if scale > 0 else low**2
    return float(1 / np.clip(spread, low**2, high**2))


def seed_of(key: Array | None) -> int:
    """The integer in a key; 0 without one."""
    return 0 if key is None else as_seed(key)
