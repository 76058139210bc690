"""Domains of a tissue: a mixture of Gaussians on expression averaged over the neighbours in space."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.graph import Graph, Pattern, columns_to_slots, rows_to_slots
from scdiffx._core.random import as_seed
from scdiffx._log import warn
from scdiffx.ops._spatial_graph import (
    SpatialDomainsResult,
    SpatialSettings,
    divided,
    domains,
    near_in_space,
    neighborhood,
    walk_of,
)
from scdiffx.ops._tied_mixture import TiedMixture

__all__ = ["SpatialDomains", "SpatialDomainsResult", "SpatialProjection", "SpatialSettings"]

_NO_HOP = 1e-3  # hops are positive; so few change nothing to speak of


class SpatialProjection(NamedTuple):
    """The centre and the principal axes of averaged expression; `errors`: mean squared held-out error after each hop.

    Errors are a share of the variance, for 0, 1, ... hops; empty where the number of hops was given.
    """

    mean: Float[Array, " features"]
    components: Float[Array, "features dims"]
    errors: Float[Array, " hops"]


@operator
class SpatialDomains:
    """Average each cell's expression over its surroundings and divide the tissue by a mixture with tied covariance.

    A hop replaces a cell's representation by the mean of its own and its neighbours'. `hops` of them (between whole
    numbers results are interpolated) are followed by a projection on principal components and a `TiedMixture`.
    With `gradient` the sizes of the slopes of the averages in space are features too, times that weight (BANKSY,
    Singhal et al. 2024, has them of the first neighbours). `hops` None is chosen at `init` without labels: the number
    after which expression at held-out cells is predicted best from the other cells around them.

    Neighbours are structure: those of a graph that is given, or of `coordinates`, within each `batch`. Axes and the
    start of the mixture stay what they were at `init`; the mixture is fitted anew to any cells, with its exact
    derivative. Memberships are averaged over neighbours at the end, a soft vote of the majority.
    """

    hops: float | Array | None = learnable(default=None, constraint="positive")
    gradient: float | Array | None = learnable(default=None, constraint="positive")
    pattern: Pattern | None = buffer(default=None, structure=True)
    projection: SpatialProjection | None = buffer(default=None)
    mixture: TiedMixture = buffer(default=TiedMixture())
    n_domains: int | None = static(default=None)
    n_hops: int | None = static(default=None)
    settings: SpatialSettings = static(default=SpatialSettings())

    def init(
        self,
        x: Float[Array, "cells dims"],
        coordinates: Float[Array, "cells space"] | None = None,
        graph: Graph | None = None,
        batch: Int[Array, " cells"] | None = None,
        key: Array | None = None,
    ) -> SpatialDomains:
        s = self.settings
        key = jax.random.key(0) if key is None else key
        op = self
        if graph is None:
            op = replace(self, pattern=near_in_space(coordinates, batch, s, as_seed(key)))
        errors = jnp.zeros(0, x.dtype)
        if op.hops is None:
            errors = op._held_out_errors(x, graph, batch, key)
            chosen = int(np.asarray(errors).argmin())
            if chosen == 0:
                warn("neighbours in space do not predict expression: nothing is averaged, unless `hops` is given")
            op = replace(op, hops=jnp.asarray(max(chosen, _NO_HOP), x.dtype))
        if op.n_hops is None:
            op = replace(op, n_hops=max(math.ceil(float(np.asarray(op.hops))), 1))
        if op.projection is None or op.mixture.means is None:
            features = _features(op, x, coordinates, graph, batch)
            if op.projection is None:
                mean, axes = _principal_axes(np.asarray(features), s.n_comps)
                projection = SpatialProjection(jnp.asarray(mean, x.dtype), jnp.asarray(axes, x.dtype), errors)
                op = replace(op, projection=projection)
            if op.mixture.means is None:
                mixture = divided(op.mixture, op._projected(features), op.n_domains, s.resolution, key)
                op = replace(op, mixture=mixture, n_domains=mixture.n_components)
        return op

    def _held_out_errors(self, x: Array, graph: Graph | None, batch: Array | None, key: Array) -> Array:
        """Squared errors of predicting each cell from cells of other folds after 0, 1, ... hops, relative to none."""
        count = self.settings.n_folds
        fold = jax.random.permutation(key, np.arange(x.shape[0]) % count)
        parts = [np.asarray(_held_out_error(self, x, graph, batch, fold, i)) for i in range(count)]
        return jnp.asarray(np.sum(parts, 0))

    def _averages(self, x: Array, coordinates: Array | None, near: Graph, walk: Graph, stay: Array) -> Array:
        """Averaged expression, beside the sizes of its slopes where these are wanted."""
        if self.n_hops is None or self.hops is None:
            raise ValueError("SpatialDomains needs the number of hops: call `op = op.init(x, coordinates)` first")
        t = jnp.minimum(jnp.asarray(self.hops, x.dtype), self.n_hops)
        weights = jnp.maximum(1 - jnp.abs(jnp.arange(self.n_hops + 1) - t), 0)

        def step(carry: tuple[Array, Array], weight: Array) -> tuple[tuple[Array, Array], None]:
            value, total = carry
            value = walk @ value + stay[:, None] * value
            return (value, total + weight * value), None

        (_, total), _ = jax.lax.scan(step, (x, weights[0] * x), weights[1:])
        if self.gradient is None:
            return total
        if coordinates is None:
            raise ValueError("gradients in space need coordinates")
        slopes = jnp.asarray(self.gradient, x.dtype) * _slopes(near, jnp.asarray(coordinates, x.dtype), total)
        return jnp.concatenate([total, slopes], 1)

    def _projected(self, averages: Array) -> Array:
        if self.projection is None:
            raise ValueError("SpatialDomains needs its axes: call `op = op.init(x, coordinates)` first")
        mean, axes = (jnp.asarray(a, averages.dtype) for a in self.projection[:2])
        return jnp.matmul(averages - mean, axes, precision=jax.lax.Precision.HIGHEST)

    def __call__(
        self,
        x: Float[Array, "cells dims"],
        coordinates: Float[Array, "cells space"] | None = None,
        graph: Graph | None = None,
        batch: Int[Array, " cells"] | None = None,
    ) -> SpatialDomainsResult:
        near = neighborhood(self.pattern, x, graph, batch)
        walk, stay = walk_of(near, x)
        embedding = self._projected(self._averages(x, coordinates, near, walk, stay))
        return domains(self.mixture, embedding, walk, stay, self.settings.n_refine)


def _slopes(graph: Graph, coordinates: Array, value: Float[Array, "cells dims"]) -> Float[Array, "cells dims"]:
    """Sizes of the mean over the neighbours of the change along the direction towards each."""
    p = graph.pattern
    apart = jnp.stack([columns_to_slots(p, c) - rows_to_slots(p, c) for c in coordinates.T])
    square = (apart**2).sum(0)
    degree = graph.row_sums()
    share = graph.values * rows_to_slots(p, 1 / jnp.where(degree > 0, degree, 1))
    weights = jnp.where(square > 0, share / jnp.sqrt(jnp.where(square > 0, square, 1)), 0) * apart

    def add(total: Array, weight: Array) -> tuple[Array, None]:
        along = graph.with_values(weight)
        return total + (along @ value - along.row_sums()[:, None] * value) ** 2, None

    total, _ = jax.lax.scan(add, jnp.zeros_like(value), weights)
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)


@jax.jit
def _held_out_error(
    op: SpatialDomains, x: Array, graph: Graph | None, batch: Array | None, fold: Array, number: int
) -> Float[Array, " max_hops_plus_1"]:
    """Squared errors of predicting a fold of the cells from the others after each hop, as a share of all squares.

    Held-out cells take no part in any mean. Where none of the others is near, the mean of all is the prediction.
    """
    walk, stay = walk_of(neighborhood(op.pattern, x, graph, batch), x)
    held = fold == number
    x = x - x.mean(0)
    total = (x**2).sum()
    value = jnp.concatenate([jnp.where(held[:, None], 0, x), jnp.where(held, 0, 1).astype(x.dtype)[:, None]], 1)

    def error(value: Array) -> Array:
        reached = value[:, -1:] > 0
        predicted = jnp.where(reached, value[:, :-1] / jnp.where(reached, value[:, -1:], 1), 0)
        return jnp.where(held[:, None], (x - predicted) ** 2, 0).sum() / jnp.where(total > 0, total, 1)

    def step(value: Array, _: None) -> tuple[Array, Array]:
        value = walk @ value + stay[:, None] * value
        return value, error(value)

    _, errors = jax.lax.scan(step, value, None, length=op.settings.max_hops)
    return jnp.concatenate([error(value)[None], errors])


def _principal_axes(features: np.ndarray, n_comps: int) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean.astype(features.dtype)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = axes[:, ::-1][:, :n_comps]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    return mean, axes * np.where(largest < 0, -1, 1)


@jax.jit
def _features(
    op: SpatialDomains, x: Array, coordinates: Array | None, graph: Graph | None, batch: Array | None
) -> Array:
    near = neighborhood(op.pattern, x, graph, batch)
    return op._averages(x, coordinates, near, *walk_of(near, x))
