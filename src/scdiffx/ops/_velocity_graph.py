"""How well velocities point from each cell towards the cells around it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from scdiffx._core.directed import Directed, within_steps
from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.graph import Graph

__all__ = ["VelocityGraph", "VelocityGraphResult", "self_transition"]

# Rows of slots at a time: their differences between cells stay in the cache.
_ROWS = 16


class VelocityGraphResult(NamedTuple):
    """`cosines` in [-1, 1] along the edges; `self_transition` (cells,) in [0, 1]: how likely a cell is to stay."""

    cosines: Directed
    self_transition: Float[Array, " cells"]


def _signed_root(x: Array) -> Array:
    """The root of the size with the sign of x; its derivative at 0, which is infinite, counts as 0."""
    other = x != 0
    return jnp.where(other, jnp.sign(x) * jnp.sqrt(jnp.abs(jnp.where(other, x, 1))), 0)


def _row_cosines(target: Array, own: Array, v: Array, weight: Array, root: bool) -> Array:
    """Cosines (rows, slots) of `v` (rows, genes), centred, with the centred differences to the targets."""
    step = target - own[:, None]
    step = _signed_root(step) if root else step
    dot = jnp.einsum("rsg,rg->rs", step, weight * v)
    mean = (step @ weight) / weight.sum()
    size = (step * step) @ weight - weight.sum() * mean**2
    squared = size * ((weight * v * v).sum(1))[:, None]
    usable = squared > 0
    return jnp.where(usable, dot / jnp.sqrt(jnp.where(usable, squared, 1)), 0)


def _in_rows(lists: Directed) -> tuple[Array, Array, Array]:
    """Targets, owners and validity in blocks of rows."""
    owner = jnp.minimum(lists.owner, lists.n_cells - 1)
    parts = (lists.indices, owner, lists.valid)
    return tuple(a.reshape(-1, _ROWS, *a.shape[1:]) for a in parts)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cosines(lists: Directed, x: Array, v: Array, weight: Array, root: bool) -> Array:
    def block(part: Any) -> Array:
        index, owner, valid = part
        return jnp.where(valid, _row_cosines(x[index], x[owner], v[owner], weight, root), 0)

    return jax.lax.map(block, _in_rows(lists)).reshape(lists.values.shape)


def _cosines_fwd(lists: Directed, x: Array, v: Array, weight: Array, root: bool) -> tuple[Array, Any]:
    return _cosines(lists, x, v, weight, root), (lists, x, v, weight)


def _cosines_bwd(root: bool, saved: Any, g: Array) -> tuple[None, Array, Array, Array]:
    lists, x, v, weight = saved

    def block(carry: Any, part: Any) -> tuple[Any, None]:
        by_x, by_v, by_weight = carry
        (index, owner, valid), bar = part
        pull = jax.vjp(partial(_row_cosines, root=root), x[index], x[owner], v[owner], weight)[1]
        target, own, velocity, scale = pull(jnp.where(valid, bar, 0))
        by_x = by_x.at[index].add(target).at[owner].add(own)
        return (by_x, by_v.at[owner].add(velocity), by_weight + scale), None

    start = tuple(jnp.zeros_like(a) for a in (x, v, weight))
    bars = g.reshape(-1, _ROWS, g.shape[1])
    by_x, by_v, by_weight = jax.lax.scan(block, start, (_in_rows(lists), bars))[0]
    return None, by_x, by_v, by_weight


_cosines.defvjp(_cosines_fwd, _cosines_bwd)


def self_transition(cosines: Directed) -> Float[Array, " cells"]:
    """How far the best cosine of a cell falls short of the 98th percentile of all cells', at least 0."""
    best = jnp.where(cosines.valid, jnp.maximum(cosines.values, 0), 0).max(1)
    best = jnp.zeros(cosines.n_cells, best.dtype).at[cosines.owner].max(best, mode="drop")
    return jnp.clip(jnp.percentile(best, 98) - best, 0, 1)


@operator
class VelocityGraph:
    """Cosines between a cell's velocity and the differences to the cells within reach (La Manno 2018; scVelo).

    Within reach are the cells that `n_recurse_neighbors` steps along the lists of nearest neighbours lead to, of which
    the first `n_neighbors` count (None for all); `init` finds them. ``sqrt_transform=True`` takes roots of velocities
    and differences, signs kept, which stabilises their variance. Genes weigh by `genes`, and those of weight 0 may
    hold anything.
    """

    lists: Directed | None = buffer(default=None, structure=True)
    n_neighbors: int | None = static(default=None)
    n_recurse_neighbors: int = static(default=2)
    sqrt_transform: bool = static(default=False)

    def init(
        self,
        x: Array,
        velocity: Array,
        genes: Array | None = None,
        distances: Graph | None = None,
        key: Array | None = None,
    ) -> VelocityGraph:
        if distances is None:
            raise ValueError("VelocityGraph needs the graph of `distances` to the nearest neighbours")
        near = distances.to_scipy()
        if np.diff(near.indptr).min(initial=1) == 0:
            raise ValueError("the neighbour graph has cells without neighbours; compute it anew")
        if self.n_neighbors is not None:
            near = _nearest(near, self.n_neighbors)
        return replace(self, lists=Directed.from_scipy(within_steps(near, self.n_recurse_neighbors), x.dtype))

    def __call__(
        self,
        x: Float[Array, "cells genes"],
        velocity: Float[Array, "cells genes"],
        genes: Float[Array, " genes"] | None = None,
        distances: Graph | None = None,
    ) -> VelocityGraphResult:
        if self.lists is None:
            raise ValueError("VelocityGraph needs its lists: call `op = op.init(x, velocity, genes, distances)` first")
        weight = jnp.ones(x.shape[1], x.dtype) if genes is None else genes.astype(x.dtype)
        x, v = (jnp.where(weight > 0, a, 0) for a in (x, velocity.astype(x.dtype)))
        v = _signed_root(v) if self.sqrt_transform else v
        v = v - ((v @ weight) / weight.sum())[:, None]
        cosines = self.lists.with_values(_cosines(self.lists, x, v, weight, self.sqrt_transform))
        return VelocityGraphResult(cosines, self_transition(cosines))


def _nearest(distances: sp.csr_matrix, k: int) -> sp.csr_matrix:
    """The `k` smallest entries of each row."""
    rows = np.repeat(np.arange(distances.shape[0]), np.diff(distances.indptr))
    order = np.lexsort((distances.data, rows))
    rank = np.arange(distances.nnz) - distances.indptr[rows]
    keep = order[rank < k]
    return sp.csr_matrix((distances.data[keep], (rows[keep], distances.indices[keep])), shape=distances.shape)
