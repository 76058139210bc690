"""The terms of losses on groups of cells: batches, clusters, memberships."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.graph import Graph
from scdiffx._core.section import Section
from scdiffx.losses._terms import masked_mean

__all__ = ["MOST_REFERENCES", "BatchMixing", "Compactness", "Entropy", "Modularity", "nearest_others"]

# Cells among which neighbours are looked up, and the fewest that are taken of a batch.
MOST_REFERENCES = 20_000
_FEWEST = 3


def _matrix(value: Array, output: str) -> None:
    if value.ndim != 2:
        raise ValueError(f"{output!r} has shape {value.shape}: an array (cells, dims) is needed")


@operator
class BatchMixing:
    """See :func:`scdiffx.losses.batch_mixing`. `neighbors` (cells, n), whose columns are of `batches` (n,)."""

    neighbors: Array | None = buffer(default=None, structure=True)
    batches: Array | None = buffer(default=None, structure=True)
    output: str = static()
    target: str | None = static(default=None)
    n_neighbors: int = static(default=90)

    def init(self, value: Array, target: Array, keep: Array, key: Array | None = None) -> BatchMixing:
        _matrix(value, self.output)
        known = np.asarray(keep & (target >= 0)) & np.isfinite(np.asarray(value)).all(1)
        codes = np.asarray(target)
        names = np.unique(codes[known])
        if len(names) < 2:
            raise ValueError(f"{self.target!r} needs at least two batches among the training cells, found {len(names)}")
        shares = np.asarray([(codes[known] == name).mean() for name in names])
        lists, every = [], np.arange(len(codes))
        for name, share in zip(names, shares, strict=True):
            among = np.flatnonzero(known & (codes == name))
            most = max(int(MOST_REFERENCES * share), _FEWEST)
            if len(among) > most:
                among = np.sort(np.random.default_rng(0).choice(among, most, replace=False))
            count = min(max(round(self.n_neighbors * share), _FEWEST), len(among) - 1)
            if count < 1:
                raise ValueError(f"{self.target!r}: batch {name} has {len(among)} training cells; it needs at least 2")
            lists.append(nearest_others(np.asarray(value), every, among, every, count))
        batches = np.repeat(names, [found.shape[1] for found in lists])
        return replace(self, neighbors=jnp.asarray(np.concatenate(lists, 1), jnp.int32), batches=jnp.asarray(batches))

    def looked_at(self) -> np.ndarray:
        """The cells that each cell is compared with (cells, some)."""
        return np.asarray(self.neighbors)

    def within(self, section: Section) -> BatchMixing:
        """The term for a section's own cells; it takes values of all cells of the section."""
        return replace(self, neighbors=section.places(np.asarray(self.neighbors)[section.own]))

    def __call__(self, value: Float[Array, "cells dims"], target: Array, keep: Bool[Array, " cells"]) -> Array:
        if self.neighbors is None or self.batches is None:
            raise ValueError("BatchMixing needs its neighbours: call `term = term.init(value, target, keep)` first")
        # The cells that are judged are the first; those of a section that lie around them follow.
        here = value[: len(self.neighbors)]
        squared = jax.lax.map(lambda other: ((here - value[other]) ** 2).sum(1), self.neighbors.T).T
        own = target[:, None] == self.batches
        nearest = squared.min(1, keepdims=True)
        # The radius that holds a cell's share of neighbours of its own batch: that of all of them where batches mix.
        scale = jnp.where(own, squared, 0).max(1, keepdims=True) - nearest
        positive = scale > 0
        weight = 1 / (1 + jnp.where(positive, (squared - nearest) / jnp.where(positive, scale, 1), 0) ** 2)
        weight = weight / weight.sum(1, keepdims=True)
        same = (self.batches[:, None] == self.batches).astype(value.dtype)
        mixing = masked_mean(1 / (weight * (weight @ same)).sum(1), keep & own.any(1))
        return 1 - (mixing - 1) / (1 / same.mean() - 1)


def nearest_others(z: np.ndarray, at: np.ndarray, among: np.ndarray, but: np.ndarray, count: int) -> np.ndarray:
    """For each cell of `at`, the `count` nearest of the cells `among` other than its one in `but`."""
    from sklearn.neighbors import NearestNeighbors

    usable = np.where(np.isfinite(z), z, 0)
    found = among[NearestNeighbors(n_neighbors=count + 1).fit(usable[among]).kneighbors(usable[at])[1]]
    own = found == but[:, None]
    # Where that one is not in the list (it is of another batch, say), the farthest goes instead.
    own[:, -1] |= ~own.any(1)
    return np.asarray(found[~own].reshape(len(at), count))


@operator
class Compactness:
    """See :func:`scdiffx.losses.compactness`. `groups` (groups,) numbers them."""

    groups: Array | None = buffer(default=None)
    output: str = static()
    target: str | None = static(default=None)

    def init(self, value: Array, target: Array, keep: Array, key: Array | None = None) -> Compactness:
        _matrix(value, self.output)
        found = len(np.unique(np.asarray(target)[np.asarray(keep & (target >= 0))]))
        if found < 2:
            raise ValueError(f"{self.target!r} needs at least two groups among the training cells, found {found}")
        return replace(self, groups=jnp.arange(int(np.asarray(target).max()) + 1))

    def __call__(self, value: Float[Array, "cells dims"], target: Array, keep: Bool[Array, " cells"]) -> Array:
        if self.groups is None:
            raise ValueError("Compactness needs its groups: call `term = term.init(value, target, keep)` first")
        keep = keep & (target >= 0)
        count, group = keep.sum(), jnp.where(keep, target, 0)
        mean = jnp.where(keep[:, None], value, 0).sum(0) / jnp.maximum(count, 1)
        centred = jnp.where(keep[:, None], value - mean, 0)
        sizes = jax.ops.segment_sum(keep.astype(value.dtype), group, len(self.groups))
        centres = jax.ops.segment_sum(centred, group, len(self.groups)) / jnp.maximum(sizes, 1)[:, None]
        total = (centred**2).sum()
        # Cells that all coincide have no groups: their derivative is 0, not that of the rounding error of their mean.
        varies = total > count * (8 * jnp.finfo(value.dtype).eps * jnp.abs(mean).max()) ** 2
        between = (sizes[:, None] * centres**2).sum()
        return jnp.where(varies, 1 - between / jnp.where(varies, total, 1), 1)


@operator
class Modularity:
    """See :func:`scdiffx.losses.modularity`."""

    of_graph: ClassVar[bool] = True
    output: str = static()
    target: str | None = static(default="neighbors")
    resolution: float = static(default=1.0)

    def __call__(self, value: Float[Array, "cells groups"], target: Graph, keep: Bool[Array, " cells"]) -> Array:
        _matrix(value, self.output)
        kept = keep.astype(value.dtype)
        graph, memberships = target.scaled(kept, kept), value * kept[:, None]
        strength = graph.row_sums()
        total = strength.sum()
        positive = jnp.where(total > 0, total, 1)
        within = (memberships * (graph @ memberships)).sum() / positive
        expected = ((strength @ memberships / positive) ** 2).sum()
        return 1 - (within - self.resolution * expected)


@operator
class Entropy:
    """See :func:`scdiffx.losses.entropy`."""

    output: str = static()
    target: str | None = static(default=None)
    of: str = static(default="cells")

    def __call__(self, value: Float[Array, "cells groups"], target: Any, keep: Bool[Array, " cells"]) -> Array:
        _matrix(value, self.output)
        if self.of == "groups":
            shares = jnp.where(keep[:, None], value, 0).sum(0) / jnp.maximum(keep.sum(), 1)
            return _entropy(shares)
        return masked_mean(_entropy(value), keep)


def _entropy(p: Array) -> Array:
    """Of the last axis, relative to that of even shares; a share of 0 adds nothing and has no slope."""
    p = jnp.maximum(p, 0)
    there = p > 0
    terms = jnp.where(there, p * jnp.log(jnp.where(there, p, 1)), 0)
    return -terms.sum(-1) / np.log(max(p.shape[-1], 2))
