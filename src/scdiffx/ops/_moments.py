"""Moments of spliced and unspliced counts over the neighbours of each cell."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scdiffx._core.counts import Matrix, dense
from scdiffx._core.fields import learnable, operator
from scdiffx._core.graph import Graph

__all__ = ["Moments", "MomentsResult", "averaged", "by_genes", "dense", "neighbour_mean"]

# Genes at a time: what lies between inputs and results is only so wide.
_WIDTH = 64


class MomentsResult(NamedTuple):
    """Means over each cell and its neighbours (cells, genes): `ms` of spliced, `mu` of unspliced counts."""

    ms: Float[Array, "cells genes"]
    mu: Float[Array, "cells genes"]


@jax.jit
def neighbour_mean(graph: Graph, power: float | Array = 0.0) -> tuple[Graph, Float[Array, " cells"]]:
    """The weights of the mean over a cell and its neighbours: the graph's, and the cell's own.

    A neighbour counts ``weight**power`` against 1 for the cell itself; at power 0 all count alike.
    """
    near = graph.pattern.valid & (graph.values > 0)
    weight = jnp.where(near, jnp.exp(power * jnp.log(jnp.where(near, graph.values, 1))), 0).astype(graph.dtype)
    kernel = graph.with_values(weight)
    own = 1 / (kernel.row_sums() + 1)
    return kernel.scaled(own, jnp.ones_like(own)), own


def averaged(mean: tuple[Graph, Array], x: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """Apply :func:`neighbour_mean`."""
    kernel, own = mean
    return kernel @ x + own[:, None] * x


def by_genes(f: Callable[..., Any], *parts: Array | None) -> Any:
    """Apply `f` to blocks of genes, the last axis of parts and results; they are computed anew on the way back."""
    arrays = [x for x in parts if x is not None]
    genes = arrays[0].shape[-1]
    width = min(_WIDTH, genes)
    blocks = -(-genes // width)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - genes)])
        return jnp.moveaxis(padded.reshape(*x.shape[:-1], blocks, width), -2, 0)

    def join(x: Array) -> Array:
        whole = jnp.moveaxis(x, 0, -2)
        return whole.reshape(*whole.shape[:-2], blocks * width)[..., :genes]

    def body(blocks_of: list[Array]) -> Any:
        rest = iter(blocks_of)
        return f(*(None if x is None else next(rest) for x in parts))

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(body), [split(x) for x in arrays]))


@operator
class Moments:
    """Average spliced and unspliced counts over each cell and its neighbours (La Manno 2018, as in scVelo).

    At the learnable `power` 0 all neighbours count alike, as in scVelo; at 1 by the weight of their edge.
    """

    power: float | Array = learnable(default=0.0)

    def reach(self, learned: Collection[str]) -> tuple[int, ...]:
        """Values come from the neighbours, by the weights of a cell's own edges."""
        return (1, 1, 0)

    def __call__(self, spliced: Matrix, unspliced: Matrix, graph: Graph) -> MomentsResult:
        mean = neighbour_mean(graph, self.power)

        def block(s: Array, u: Array) -> MomentsResult:
            return MomentsResult(averaged(mean, s), averaged(mean, u))

        return by_genes(block, dense(spliced), dense(unspliced))
