"""The neighbour graph: which cells are neighbours is found once, how strongly they are joined is differentiable."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Matrix, dense
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern, columns_to_slots, flip, rows_to_slots, squared_distances
from scdiffx._core.knn import nearest
from scdiffx._core.random import as_seed
from scdiffx._core.section import Section

__all__ = ["DIFFERENTIABLE_METRICS", "KERNELS", "Neighbors", "NeighborsResult", "Replacements", "replacements"]

KERNELS = ("umap", "gauss")
DIFFERENTIABLE_METRICS = ("euclidean", "cosine", "correlation")
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_BISECTIONS = 64
_MIN_SCALE = 1e-3


class NeighborsResult(NamedTuple):
    """`indices` of and `distances` to the neighbours, nearest first, the cell excluded; `connectivities`: the graph."""

    indices: Int[Array, "cells k"]
    distances: Float[Array, "cells k"]
    connectivities: Graph


@operator
class Neighbors:
    """Nearest neighbours and their weights, by UMAP's fuzzy union or the adaptive Gaussian kernel of diffusion maps.

    `init` searches the neighbours (never differentiated). Calling recomputes their distances and weights from the
    representation, so derivatives follow distances, local scales and weights over the fixed pattern. `bandwidth`
    multiplies the local scale of every cell; 1 is the classical graph.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> z = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    >>> op = sd.ops.Neighbors(n_neighbors=8).init(z)
    >>> op(z).distances.shape  # a cell is one of its own eight neighbours
    (60, 7)
    """

    bandwidth: float | Array = learnable(default=1.0, constraint="positive")
    indices: Array | None = buffer(default=None, structure=True)
    pattern: Pattern | None = buffer(default=None, structure=True)
    n_neighbors: int = static(default=15)
    metric: str = static(default="euclidean")
    method: str = static(default="umap")
    search: Search | None = static(default=None)
    measured: Array | None = buffer(default=None, structure=True)

    def init(self, z: Matrix, key: Array | None = None) -> Neighbors:
        if self.method not in KERNELS:
            raise ValueError(f"method={self.method!r} is not available. Available: {list(KERNELS)}")
        if not 2 <= self.n_neighbors <= z.shape[0]:
            raise ValueError(f"n_neighbors={self.n_neighbors} must lie between 2 and the number of cells {z.shape[0]}")
        z = dense(z)
        if self.search is not None:
            indices, distances = self.search(np.asarray(z))
        else:
            seed = 0 if key is None else as_seed(key)
            indices, distances = nearest(np.asarray(z), self.n_neighbors, metric=self.metric, seed=seed)
        pattern = Pattern.from_neighbors(indices[:, 1:], like=self.pattern)
        # Distances of a metric without a derivative here are data: kept as the search measured them.
        keep = self.search is not None or self.metric not in DIFFERENTIABLE_METRICS
        return replace(
            self,
            indices=jnp.asarray(indices[:, 1:], jnp.int32),
            pattern=Pattern(*(jnp.asarray(a) for a in pattern)),
            measured=jnp.asarray(distances[:, 1:], z.dtype) if keep else None,
        )

    def reach(self, learned: Collection[str]) -> tuple[int, ...]:
        """The weights of a cell's edges rest on its neighbours, and by their scales on the neighbours of these."""
        return (2,)

    def within(self, section: Section) -> Neighbors:
        """The operator on the cells of a section; of structure on the host. Neighbours outside are left out."""
        if self.pattern is None or self.indices is None:
            raise ValueError("Neighbors needs the neighbour search: call `op = op.init(z)` first")
        return replace(
            self,
            indices=np.maximum(section.places(np.asarray(self.indices)[section.cells]), 0),
            pattern=section.pattern(self.pattern),
            measured=None if self.measured is None else self.measured[section.cells],
        )

    def __call__(self, z: Matrix) -> NeighborsResult:
        if self.pattern is None or self.indices is None:
            raise ValueError("Neighbors needs the neighbour search: call `op = op.init(z)` first")
        z = dense(z)
        k = self.indices.shape[1]
        if self.measured is None:
            squared = _edge_distances(self.pattern, z, self.metric)
            own = squared[: z.shape[0], :k]
        else:
            own = jax.lax.stop_gradient(self.measured) ** 2
            own = own * self.pattern.valid[: z.shape[0], :k]
            squared = jnp.zeros(self.pattern.indices.shape, own.dtype).at[: z.shape[0], :k].set(own)
            squared = jnp.maximum(squared, flip(self.pattern, squared))
        kernel = {"umap": _fuzzy_union, "gauss": _gauss}[self.method]
        values = kernel(self.pattern, squared, own, self.bandwidth)
        return NeighborsResult(self.indices, _safe_sqrt(own), Graph(self.pattern, values))


class Replacements(NamedTuple):
    """What neighbour lists become when a cell is left out: the next nearest takes its place, and scales adapt.

    `graph`: the graph, in which the next nearest have slots too, at 0. `indices` (cells, k): the neighbours;
    `directed`: strengths from a cell's own side, on the slots; `change` (cells, k, k + 1): by how much those of the
    neighbours and of the next nearest change when one is left out, 0 for itself.
    """

    graph: Graph
    indices: Int[Array, "cells k"]
    directed: Float[Array, "rows width"]
    change: Float[Array, "cells k k_and_one"]

    def effect(self, cotangent: Float[Array, "rows width"]) -> Float[Array, " cells"]:
        """The change, to first order, of what has this derivative in the graph's values, for each cell left out.

        By way of the edges between the others alone.
        """
        p, (n, k) = self.graph.pattern, self.indices.shape
        both = cotangent * p.valid
        slope = ((both + flip(p, both)) * (1 - flip(p, self.directed)))[:n, : k + 1]
        return jnp.zeros(n, slope.dtype).at[self.indices].add(jnp.einsum("jcb,jb->jc", self.change, slope))


def replacements(op: Neighbors, z: Matrix) -> Replacements | None:
    """The replacements of an operator after `init`; None if the next nearest is not known, or for other kernels."""
    if op.method != "umap" or op.search is not None or op.n_neighbors >= z.shape[0] or op.indices is None:
        return None
    z = dense(z)
    lists, k = np.asarray(op.indices), op.indices.shape[1]
    found, distances = nearest(np.asarray(z), op.n_neighbors + 1, metric=op.metric, seed=0)
    # A randomised search may find others: the nearest that is not among the neighbours.
    known = (found[:, 1:, None] == lists[:, None, :]).any(2)
    at = 1 + np.argmin(known, axis=1)
    rows = np.arange(len(lists))
    indices = np.concatenate([lists, found[rows, at][:, None]], 1)
    own = np.asarray(jax.jit(lambda op, z: op(z).distances)(op, z))
    distance = np.concatenate([own, distances[rows, at][:, None].astype(own.dtype)], 1)
    strengths = jax.jit(_strengths)
    strength = np.pad(np.asarray(strengths(distance[:, :k], op.bandwidth)), ((0, 0), (0, 1)))
    change = np.zeros((len(lists), k, k + 1), own.dtype)
    for gone in range(k):
        kept = np.delete(np.arange(k + 1), gone)
        change[:, gone, kept] = np.asarray(strengths(distance[:, kept], op.bandwidth)) - strength[:, kept]
    pattern = Pattern(*(jnp.asarray(a) for a in Pattern.from_neighbors(indices)))
    directed = np.zeros(pattern.indices.shape, own.dtype)
    directed[: len(lists), : k + 1] = strength
    graph = Graph(pattern, jax.jit(_union)(pattern, jnp.asarray(directed)))
    return Replacements(graph, jnp.asarray(lists), jnp.asarray(directed), jnp.asarray(change))


def _edge_distances(p: Pattern, z: Array, metric: str) -> Array:
    """Squares of the metric's distances along the edges."""
    if metric == "euclidean":
        return squared_distances(p, z)
    if metric == "correlation":
        z = z - z.mean(1, keepdims=True)
    if metric in ("cosine", "correlation"):
        squares = (z**2).sum(1, keepdims=True)
        unit = jnp.where(squares > 0, z / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        # 1 - cos = |u - v|^2 / 2 for unit vectors, which does not cancel for close cells.
        return (squared_distances(p, unit) / 2) ** 2
    raise ValueError(f"metric={metric!r} has no derivative here. Available: {list(DIFFERENTIABLE_METRICS)}")


def _safe_sqrt(squared: Array) -> Array:
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def _fuzzy_union(p: Pattern, squared: Array, own: Array, bandwidth: float | Array) -> Array:
    n, k = own.shape
    # All neighbours are there among all cells; in a section those outside of it are not.
    strength = _strengths(_safe_sqrt(own), bandwidth) * p.valid[:n, :k]
    return _union(p, jnp.zeros(squared.shape, squared.dtype).at[:n, :k].set(strength.astype(squared.dtype)))


def _union(p: Pattern, directed: Array) -> Array:
    other = flip(p, directed)
    return directed + other - directed * other


def _strengths(distance: Array, bandwidth: float | Array) -> Array:
    """How strongly each cell is joined to its neighbours, from its own side."""
    nearest_other, scale = _umap_scales(distance)
    excess = jnp.maximum(distance - nearest_other[:, None], 0)
    scale = scale * bandwidth
    # A cell all of whose neighbours sit on it has no scale: they are then joined with weight 1, as in UMAP.
    apart = (excess > 0) & (scale > 0)[:, None]
    scaled = jnp.where(apart, excess, 0) / jnp.where(apart, scale[:, None], 1)
    return jnp.where(apart, jnp.exp(-scaled), 1)


def _umap_scales(distance: Array) -> tuple[Array, Array]:
    """Distance to the nearest distinct neighbour, and the scale at which the weights of a cell sum to log2(k + 1)."""
    finite = jnp.where(distance > 0, distance, jnp.inf)
    nearest_other = jnp.where((distance > 0).any(1), finite.min(1), 0)
    excess = distance - nearest_other[:, None]
    target = jnp.log2(jnp.asarray(distance.shape[1] + 1, distance.dtype))
    fixed = jax.lax.stop_gradient(excess)
    scale = _bisect(fixed, target)
    scale = _newton_step(scale, fixed, excess, target)
    # UMAP's floors: a scale may not fall below a thousandth of the mean distance of the cell, or of all cells.
    own_mean = distance.sum(1) / (distance.shape[1] + 1)
    floor = _MIN_SCALE * jnp.where(nearest_other > 0, own_mean, own_mean.mean())
    return nearest_other, jnp.maximum(scale, floor)


def _total_weight(scale: Array, excess: Array) -> Array:
    return jnp.where(excess > 0, jnp.exp(-jnp.maximum(excess, 0) / scale[:, None]), 1).sum(1)


def _bisect(excess: Array, target: Array) -> Array:
    def halve(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, middle = state
        too_wide = _total_weight(middle, excess) > target
        high = jnp.where(too_wide, middle, high)
        low = jnp.where(too_wide, low, middle)
        middle = jnp.where(jnp.isinf(high), middle * 2, (low + high) / 2)
        return low, high, middle

    ones = jnp.ones(excess.shape[0], excess.dtype)
    return jax.lax.fori_loop(0, _BISECTIONS, halve, (0 * ones, jnp.inf * ones, ones))[2]


def _newton_step(scale: Array, fixed: Array, excess: Array, target: Array) -> Array:
    """Give the bisected scale the derivative of the implicit function, by one Newton step from it."""
    scale = jax.lax.stop_gradient(scale)
    away = fixed > 0
    slope = jnp.where(away, fixed / scale[:, None] ** 2 * jnp.exp(-jnp.maximum(fixed, 0) / scale[:, None]), 0).sum(1)
    residual = _total_weight(scale, excess) - target
    residual = residual - jax.lax.stop_gradient(residual)
    # Where the weights hardly depend on the scale the floor decides, and the derivative is that of the floor.
    usable = slope * scale > 1e-6
    return scale - jnp.where(usable, residual / jnp.where(usable, slope, 1), 0)


def _gauss(p: Pattern, squared: Array, own: Array, bandwidth: float | Array) -> Array:
    """exp(-d^2 / (s_i^2 + s_j^2)) with s_i^2 the median squared distance to the neighbours (Haghverdi et al. 2016)."""
    scale = jnp.median(own, axis=1) * jnp.asarray(bandwidth) ** 2
    left, right = rows_to_slots(p, scale), columns_to_slots(p, scale)
    total = left + right
    usable = p.valid & (total > 0)
    total = jnp.where(usable, total, 1)
    amplitude = _safe_sqrt(2 * _safe_sqrt(left * right) / total)
    # Duplicate cells have no scale; they are joined fully rather than by 0 / 0.
    weight = jnp.where(usable, amplitude * jnp.exp(-squared / total), 1)
    return jnp.where(p.valid, weight, 0)
