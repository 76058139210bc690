"""Leiden communities of the neighbour graph, by igraph."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.graph import Graph

__all__ = ["Leiden", "LeidenResult"]


class LeidenResult(NamedTuple):
    """`membership` (cells,): communities numbered from 0, largest first. `modularity` of the partition."""

    membership: Int[Array, " cells"]
    modularity: Array


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
    """The partition that igraph's Leiden algorithm finds (Traag et al. 2019). It is discrete: no derivative passes."""

    membership: Array | None = buffer(default=None, structure=True)
    modularity: Array | None = buffer(default=None, structure=True)
    resolution: float = static(default=1.0)
    n_iterations: int = static(default=-1)
    use_weights: bool = static(default=True)
    seed: int = static(default=0)

    def init(self, graph: Graph, key: Array | None = None) -> Leiden:
        membership, modularity = _partition(graph, self)
        return replace(
            self, membership=jnp.asarray(membership, jnp.int32), modularity=jnp.asarray(modularity, graph.dtype)
        )

    def __call__(self, graph: Graph) -> LeidenResult:
        if self.membership is None:
            raise ValueError("Leiden needs the partition: call `op = op.init(graph)` first")
        return LeidenResult(self.membership, jax.lax.stop_gradient(jnp.asarray(self.modularity)))


def _partition(graph: Graph, op: Leiden) -> tuple[np.ndarray, float]:
    import random

    import igraph

    adjacency = graph.to_scipy().tocoo()
    if not adjacency.data.any():  # modularity is 0/0: igraph 0.11 would search forever
        return np.arange(adjacency.shape[0]), float("nan")
    g: Any = igraph.Graph(n=adjacency.shape[0], edges=np.column_stack([adjacency.row, adjacency.col]), directed=False)
    weights = adjacency.data.astype(np.float64).tolist() if op.use_weights else None
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
