"""What methods for domains of a tissue share: the neighbours in space, the mixture, the vote, their settings."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import replace
from scdiffx._core.graph import Graph, Pattern, columns_to_slots, rows_to_slots
from scdiffx._core.random import as_seed
from scdiffx._core.runtime import one_blas_thread
from scdiffx._core.spatial import neighbors_in_space
from scdiffx.ops._leiden import Leiden
from scdiffx.ops._neighbors import Neighbors
from scdiffx.ops._tied_mixture import TiedMixture

__all__ = [
    "SpatialDomainsResult",
    "SpatialSettings",
    "communities",
    "divided",
    "domains",
    "near_in_space",
    "neighborhood",
    "walk_of",
]

_LEIDEN_NEIGHBORS = 15


class SpatialDomainsResult(NamedTuple):
    """`labels` (cells,), `memberships` (cells, domains), `embedding` (cells, dims), `log_likelihood` of the mixture.

    The embedding holds the principal components of averaged expression, or what an autoencoder makes of it; labels are
    the largest memberships.
    """

    labels: Int[Array, " cells"]
    memberships: Float[Array, "cells domains"]
    embedding: Float[Array, "cells dims"]
    log_likelihood: Array


class SpatialSettings(NamedTuple):
    """How space is searched and domains are found.

    `n_neighbors` nearest cells, or all within `radius`, are neighbours where no graph is given. The embedding has
    `n_comps` dimensions. Of averages, up to `max_hops` hops are tried on `n_folds` held-out parts of the cells.
    `n_refine` times memberships are averaged over a cell and its neighbours. Leiden's `resolution` sets the number of
    domains where none is given.
    """

    n_neighbors: int = 6
    radius: float | None = None
    n_comps: int = 20
    max_hops: int = 30
    n_folds: int = 5
    n_refine: int = 1
    resolution: float = 1.0


def near_in_space(coordinates: Array | None, batch: Array | None, settings: SpatialSettings, seed: int) -> Pattern:
    """Which cells are near each other, within each batch."""
    if coordinates is None:
        raise ValueError("domains in space need coordinates or a graph")
    where = None if batch is None else np.asarray(batch)
    near = neighbors_in_space(
        np.asarray(coordinates), n_neighbors=settings.n_neighbors, radius=settings.radius, batch=where, seed=seed
    )
    return Pattern(*(jnp.asarray(a) for a in Pattern.from_csr(near.indptr, near.indices)))


def neighborhood(pattern: Pattern | None, x: Array, graph: Graph | None, batch: Array | None) -> Graph:
    """The graph that is given, or the one that was searched, without edges between batches."""
    if graph is None:
        if pattern is None:
            raise ValueError("the neighbours have not been searched: call `op = op.init(x, coordinates)` first")
        graph = Graph(pattern, jnp.asarray(pattern.valid, x.dtype))
    if batch is None:
        return graph
    p, slice_of = graph.pattern, jax.lax.stop_gradient(jnp.asarray(batch, x.dtype))
    same = rows_to_slots(p, slice_of) == columns_to_slots(p, slice_of)
    return graph.with_values(jnp.where(same, graph.values, 0))


def walk_of(graph: Graph, like: Array) -> tuple[Graph, Array]:
    """One hop: the weights of the neighbours, and that of the cell itself, the same as of a neighbour."""
    total = graph.row_sums() + 1
    return graph.scaled((1 / total).astype(like.dtype), jnp.ones_like(total)), 1 / total


def communities(x: Float[Array, "cells dims"], resolution: float, key: Array) -> Array:
    """Leiden communities of the nearest neighbours in `x`."""
    near = Neighbors(n_neighbors=min(_LEIDEN_NEIGHBORS, len(x))).init(x, key=key)
    graph = jax.jit(lambda op, z: op(z).connectivities)(near, x)
    found = Leiden(resolution=resolution, seed=as_seed(key)).init(graph)
    return jnp.asarray(found.membership)


def divided(
    mixture: TiedMixture, embedding: Float[Array, "cells dims"], count: int | None, resolution: float, key: Array
) -> TiedMixture:
    """The mixture from k-means starts, or from a Leiden partition where the number of domains is not given."""
    with one_blas_thread():
        if count is not None:
            return replace(mixture, n_components=count).init(embedding, key=key)
        return mixture.from_labels(embedding, communities(embedding, resolution, key))


def domains(
    mixture: TiedMixture, embedding: Float[Array, "cells dims"], walk: Graph, stay: Array, n_refine: int
) -> SpatialDomainsResult:
    """The mixture's memberships, averaged over neighbours: a soft vote of the majority."""
    found = mixture(embedding)

    def vote(memberships: Array, _: None) -> tuple[Array, None]:
        return walk @ memberships + stay[:, None] * memberships, None

    memberships, _ = jax.lax.scan(vote, found.memberships, None, length=n_refine)
    labels = memberships.argmax(1).astype(jnp.int32)
    return SpatialDomainsResult(labels, memberships, embedding, found.log_likelihood)
