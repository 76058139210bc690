"""Leiden communities of the neighbour graph, by igraph, and how firmly each cell belongs to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx._log import settings

__all__ = ["Leiden", "LeidenResult"]

# Beyond these memberships are not formed: graphs of many isolated cells would make a matrix of cells x cells.
_MOST_COMMUNITIES = 1_000
# The largest weight where `settings.deterministic` rounds them to whole numbers.
_LEVELS = 4096


class LeidenResult(NamedTuple):
    """`membership` (cells,): communities numbered from 0, largest first. `modularity` of the partition.

    `probabilities` (cells, communities): soft memberships; None where there are more than 1,000 communities.
    """

    membership: Int[Array, " cells"]
    modularity: Array
    probabilities: Float[Array, "cells communities"] | None


class _Generator:
    """numpy's legacy generator under the names that igraph asks for; the global one stays untouched."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def getrandbits(self, k: int) -> int:
        return int(self._state.tomaxint()) & ((1 << k) - 1)

    def randint(self, low: int, high: int) -> int:
        return int(self._state.randint(low, high + 1))

    def gauss(self, mean: float, deviation: float) -> float:
        return float(self._state.normal(mean, deviation))

    def random(self) -> float:
        return float(self._state.random_sample())


@operator
class Leiden:
    """The partition that igraph's Leiden algorithm finds (Traag et al. 2019), with memberships by relaxed modularity.

    The partition is discrete: no derivative passes through it. Memberships are differentiable in the weights of the
    graph: the softmax, at a `temperature`, of what a cell would add to the modularity in each community, per unit of
    its strength, while all others stay. Where no move of a single cell improves the partition the largest membership is
    that of the cell's own community, and as the temperature falls to 0 the memberships become the partition. igraph 1.0
    gets there with ``n_iterations=-1``; earlier versions leave up to 2 % of the cells where a move would improve it.
    """

    temperature: float | Array = learnable(default=0.1, constraint="positive")
    membership: Array | None = buffer(default=None, structure=True)
    modularity: Array | None = buffer(default=None, structure=True)
    communities: Array | None = buffer(default=None, structure=True)
    resolution: float = static(default=1.0)
    n_iterations: int = static(default=-1)
    use_weights: bool = static(default=True)
    seed: int = static(default=0)

    def init(self, graph: Graph, key: Array | None = None) -> Leiden:
        membership, modularity = _partition(graph, self)
        found = int(membership.max(initial=-1)) + 1
        return replace(
            self,
            membership=jnp.asarray(membership, jnp.int32),
            modularity=jnp.asarray(modularity, graph.dtype),
            communities=jnp.arange(found) if found <= _MOST_COMMUNITIES else None,
        )

    def __call__(self, graph: Graph) -> LeidenResult:
        if self.membership is None:
            raise ValueError("Leiden needs the partition: call `op = op.init(graph)` first")
        modularity = jax.lax.stop_gradient(jnp.asarray(self.modularity))
        if self.communities is None:
            return LeidenResult(self.membership, modularity, None)
        return LeidenResult(self.membership, modularity, jax.nn.softmax(self._gains(graph) / self.temperature))

    def _gains(self, graph: Graph) -> Array:
        """What each cell would add to the modularity in each community, per unit of its strength."""
        assert self.membership is not None
        assert self.communities is not None
        own = (self.membership[:, None] == self.communities).astype(graph.dtype)
        if not self.use_weights:
            graph = graph.with_values(jax.lax.stop_gradient((graph.values > 0).astype(graph.dtype)))
        strength = graph.row_sums()[:, None]
        there = jnp.where(strength > 0, graph @ own / jnp.where(strength > 0, strength, 1), 0)
        others = (strength * own).sum(0) - strength * own
        total = strength.sum()
        return there - self.resolution * others / jnp.where(total > 0, total, 1)


def _rounded(weights: np.ndarray) -> np.ndarray:
    """The weights as whole numbers: their last digits are gone, and so is the order in which igraph adds them up.

    The unit is a power of two, so that noise of the largest weight, which is 1 in most graphs, does not move it.
    """
    unit = 2.0 ** np.round(np.log2(weights.max())) / _LEVELS
    return np.round(weights / unit)


def _partition(graph: Graph, op: Leiden) -> tuple[np.ndarray, float]:
    import random

    import igraph

    adjacency = graph.to_scipy().tocoo()
    n = adjacency.shape[0]
    if not adjacency.data.any():  # modularity is 0/0: igraph 0.11 would search forever
        return np.arange(n), float("nan")
    weights = adjacency.data.astype(np.float64) if op.use_weights else None
    if weights is not None and settings.deterministic:
        weights = _rounded(weights)
    edges = np.column_stack([adjacency.row, adjacency.col])
    del adjacency
    # Edges given to the constructor pass through Python objects, at three times the memory.
    g: Any = igraph.Graph(n=n, directed=False)
    g.add_edges(edges)
    del edges
    igraph.set_random_number_generator(_Generator(op.seed))
    try:
        part = g.community_leiden(
            objective_function="modularity", weights=weights, resolution=op.resolution, n_iterations=op.n_iterations
        )
    finally:
        igraph.set_random_number_generator(random)
    membership = np.asarray(part.membership)
    sizes = np.bincount(membership)
    rank = np.empty(len(sizes), int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return rank[membership], float(part.modularity)
