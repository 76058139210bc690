"""Directed sparse graphs: the targets of each cell in rows of slots, as many as it needs.

Unlike :class:`~scdiffx._core.graph.Graph` the pattern is not completed to a symmetric one, and rows may be of very
different lengths. Transposes are scatters: what sums over edges in large numbers brings its own derivative.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Directed", "within_steps"]

_WIDTH = 32
_ROWS = 64


@partial(jax.tree_util.register_dataclass, data_fields=["indices", "owner", "valid", "values"], meta_fields=["n_cells"])
class Directed:
    """A sparse matrix (cells, cells). Each row of slots belongs to the cell `owner`; pad rows to the cell `n_cells`."""

    def __init__(
        self,
        indices: Int[Array, "rows width"],
        owner: Int[Array, " rows"],
        valid: Bool[Array, "rows width"],
        values: Float[Array, "rows width"],
        n_cells: int,
    ) -> None:
        self.indices = indices
        self.owner = owner
        self.valid = valid
        self.values = values
        self.n_cells = n_cells

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return (self.n_cells, self.n_cells)

    def with_values(self, values: Float[Array, "rows width"]) -> Directed:
        return Directed(self.indices, self.owner, self.valid, values, self.n_cells)

    def row_sums(self, values: Float[Array, "rows width"] | None = None) -> Float[Array, " cells"]:
        x = self.values if values is None else values
        return self.gathered(jnp.where(self.valid, x, 0).sum(1))

    def gathered(self, x: Float[Array, "rows ..."]) -> Float[Array, "cells ..."]:
        """Sum over the rows of each cell."""
        start = jnp.zeros((self.n_cells, *x.shape[1:]), x.dtype)
        return start.at[self.owner].add(x, mode="drop", indices_are_sorted=True)

    def spread(self, v: Float[Array, "cells ..."]) -> Float[Array, "rows ..."]:
        """The value of the owner of each row; 0 at pad rows."""
        return v.at[self.owner].get(mode="fill", fill_value=0, indices_are_sorted=True)

    @classmethod
    def from_scipy(cls, matrix: Any, dtype: Any = None) -> Directed:
        """Any square scipy sparse matrix; the number of rows is rounded up, so that similar graphs share code."""
        csr = sp.csr_matrix(matrix)
        n = csr.shape[0]
        degree = np.diff(csr.indptr)
        per_cell = -(-degree // _WIDTH)
        first = np.concatenate([[0], np.cumsum(per_cell)])
        step = max(_ROWS, 1 << max(0, int(first[-1]).bit_length() - 4))
        rows = -(-max(int(first[-1]), 1) // step) * step
        rank = np.arange(csr.nnz) - np.repeat(csr.indptr[:-1], degree)
        slot = np.repeat(first[:-1], degree) * _WIDTH + rank
        indices, valid = np.zeros(rows * _WIDTH, np.int32), np.zeros(rows * _WIDTH, bool)
        values = np.zeros(rows * _WIDTH, dtype or csr.dtype)
        indices[slot], valid[slot], values[slot] = csr.indices, True, csr.data
        owner = np.full(rows, n, np.int32)
        owner[: first[-1]] = np.repeat(np.arange(n), per_cell)
        parts = (a.reshape(rows, _WIDTH) for a in (indices, valid, values))
        where, real, data = (jnp.asarray(a) for a in parts)
        return cls(where, jnp.asarray(owner), real, data, n)

    def to_scipy(self) -> sp.csr_matrix:
        """The matrix on the host, explicit zeros dropped, indices sorted."""
        values = np.asarray(self.values)
        keep = np.asarray(self.valid) & (values != 0)
        rows = np.broadcast_to(np.asarray(self.owner)[:, None], keep.shape)[keep]
        csr = sp.csr_matrix((values[keep], (rows, np.asarray(self.indices)[keep])), shape=self.shape)
        csr.sort_indices()
        return csr


def within_steps(neighbors: sp.csr_matrix, steps: int) -> sp.csr_matrix:
    """The cells that at most so many steps lead to, the cell itself excluded; ones at their places (host)."""
    one = sp.csr_matrix((np.ones(neighbors.nnz, np.float32), neighbors.indices, neighbors.indptr), neighbors.shape)
    reach = one
    for _ in range(steps - 1):
        reach = reach + reach @ one
    coo = reach.tocoo()
    other = coo.row != coo.col
    return sp.csr_matrix((np.ones(other.sum(), np.float32), (coo.row[other], coo.col[other])), shape=reach.shape)
