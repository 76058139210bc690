"""Domains of a tissue by an autoencoder with graph attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern
from scdiffx._core.random import as_seed
from scdiffx.ops._spatial_gat_net import Net, SpatialTraining, encoded, errors, trained
from scdiffx.ops._spatial_graph import (
    SpatialDomainsResult,
    SpatialSettings,
    communities,
    divided,
    domains,
    near_in_space,
    neighborhood,
    walk_of,
)
from scdiffx.ops._tied_mixture import TiedMixture

__all__ = ["SpatialAutoencoder"]

_MIN_CELLS = 10


@operator
class SpatialAutoencoder:
    """Embed each cell by attention to its neighbours in space, and divide the tissue by a mixture with tied covariance.

    Layers of graph attention (GATv2) lead to an embedding of few dimensions, from which features are decoded linearly,
    in the manner of STAGATE (Dong and Zhang 2022). `init` trains both on the squared error, at cells that are hidden
    from the network: an embedding has to foretell a cell from those around it, or else attention would learn to heed
    the cell alone. Being decoded linearly it is what the mixture expects, which knows no linear map of its dimensions.

    Experimental: on one of two labelled tissues averages (:class:`SpatialDomains`) do better.

    `init` does nothing to a `net` that exists. Neighbours (and with `training.prune` clusters of expression) are
    structure: edges are those of a graph that is given, whatever their weights, or of `coordinates`, within each
    `batch`. The mixture starts where it was at `init` and is fitted anew to any cells, with its exact derivative.
    """

    net: Net | None = learnable(default=None)
    history: dict[str, Array] | None = buffer(default=None, structure=True)
    pattern: Pattern | None = buffer(default=None, structure=True)
    clusters: Int[Array, " cells"] | None = buffer(default=None, structure=True)
    mixture: TiedMixture = buffer(default=TiedMixture())
    n_domains: int | None = static(default=None)
    settings: SpatialSettings = static(default=SpatialSettings())
    training: SpatialTraining = static(default=SpatialTraining())

    def init(
        self,
        x: Float[Array, "cells dims"],
        coordinates: Float[Array, "cells space"] | None = None,
        graph: Graph | None = None,
        batch: Int[Array, " cells"] | None = None,
        key: Array | None = None,
    ) -> SpatialAutoencoder:
        self._check(x)
        s, t = self.settings, self.training
        key = jax.random.key(0) if key is None else key
        op = self
        if graph is None:
            op = replace(op, pattern=near_in_space(coordinates, batch, s, as_seed(key)))
        if t.prune is not None:
            op = replace(op, clusters=communities(x, t.prune, key).astype(jnp.int32))
        if op.net is None:
            near = neighborhood(op.pattern, x, graph, batch)
            # Training is in float32 whatever the precision of the input: its noise is that of what is hidden.
            with jax.enable_x64(False):
                near = near.with_values(jnp.asarray(np.asarray(near.values), jnp.float32))
                clusters = None if op.clusters is None else np.asarray(op.clusters)
                found = trained(np.asarray(x, np.float32), near, clusters, t, s.n_comps, as_seed(key))
            net, history = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), found)
            op = replace(op, net=net, history=history)
        if op.mixture.means is None:
            mixture = divided(op.mixture, _embedded(op, x, graph, batch), op.n_domains, s.resolution, key)
            op = replace(op, mixture=mixture, n_domains=mixture.n_components)
        return op

    def _check(self, x: Array) -> None:
        t = self.training
        if x.shape[0] < _MIN_CELLS:
            raise ValueError(f"training needs at least {_MIN_CELLS} cells, got {x.shape[0]}")
        if t.n_heads < 1 or t.n_hidden < t.n_heads or t.n_hidden % t.n_heads:
            raise ValueError(f"n_hidden={t.n_hidden} must be a multiple of n_heads={t.n_heads}")
        for name in ("n_layers", "max_steps", "patience", "max_cells"):
            if getattr(t, name) < 1:
                raise ValueError(f"{name}={getattr(t, name)} must be at least 1")
        for name in ("masked", "validation"):
            if not 0 < getattr(t, name) < 1:
                raise ValueError(f"{name}={getattr(t, name)} must be between 0 and 1")
        if not 0 <= t.alpha <= 1:
            raise ValueError(f"alpha={t.alpha} must lie between 0 and 1")

    def __call__(
        self,
        x: Float[Array, "cells dims"],
        coordinates: Float[Array, "cells space"] | None = None,
        graph: Graph | None = None,
        batch: Int[Array, " cells"] | None = None,
    ) -> SpatialDomainsResult:
        near = neighborhood(self.pattern, x, graph, batch)
        return domains(self.mixture, self._embedding(x, near), *walk_of(near, x), self.settings.n_refine)

    def loss(
        self,
        x: Float[Array, "cells dims"],
        coordinates: Float[Array, "cells space"] | None = None,
        graph: Graph | None = None,
        batch: Int[Array, " cells"] | None = None,
        key: Array | None = None,
    ) -> Array:
        """What training lowers: the mean squared error at the share `masked` of the cells, drawn from `key`."""
        near = neighborhood(self.pattern, x, graph, batch)
        key = jax.random.key(0) if key is None else key
        hidden = jax.random.uniform(key, x.shape[:1]) < self.training.masked
        z = self._embedding(x, near, ~hidden)
        return jnp.where(hidden, errors(self._net(x), z, x), 0).sum() / jnp.maximum(hidden.sum(), 1)

    def _embedding(self, x: Array, near: Graph, shown: Array | None = None) -> Array:
        return encoded(self._net(x), near, x, self.clusters, self.training.alpha, shown)

    def _net(self, like: Any) -> Net:
        if self.net is None:
            raise ValueError("SpatialAutoencoder needs its network: call `op = op.init(x, coordinates)` first")
        if like.shape[1] != self.net["mean"].shape[0]:
            raise ValueError(f"the network takes {self.net['mean'].shape[0]} features, got {like.shape[1]}")
        return {name: jnp.asarray(value, like.dtype) for name, value in self.net.items()}


@jax.jit
def _embedded(op: SpatialAutoencoder, x: Array, graph: Graph | None, batch: Array | None) -> Array:
    return op._embedding(x, neighborhood(op.pattern, x, graph, batch))
