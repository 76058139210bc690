"""Graphs for the tests of eigenpairs: walks on neighbour graphs of points on a curve, and a plain sparse operator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "cols", "values"], meta_fields=["n"])
@dataclass
class Edges:
    """A sparse symmetric matrix by its undirected edges (rows <= cols)."""

    rows: Any
    cols: Any
    values: Any
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.n, self.n)

    def __matmul__(self, v: jax.Array) -> jax.Array:
        loops = (self.rows == self.cols)[:, None]
        w = self.values[:, None]
        out = jnp.zeros_like(v).at[self.rows].add(w * v[self.cols])
        return out.at[self.cols].add(jnp.where(loops, 0, w * v[self.rows]))

    def dense(self) -> np.ndarray:
        m = np.zeros(self.shape)
        m[self.rows, self.cols] = self.values
        m[self.cols, self.rows] = self.values
        return m


def edges_of(matrix: sp.spmatrix, dtype: Any = np.float64) -> Edges:
    upper = sp.triu(matrix).tocoo()
    # One length for all graphs of a size, so that compiled code is shared between tests.
    pad = (0, 8 * matrix.shape[0] - upper.nnz)
    rows, cols, values = (np.pad(a, pad) for a in (upper.row, upper.col, upper.data))
    return Edges(rows.astype(np.int32), cols.astype(np.int32), jnp.asarray(values, dtype), matrix.shape[0])


def random_walk(n: int, seed: int, k: int = 8) -> sp.csr_matrix:
    """The symmetrised random walk of a nearest-neighbour graph: eigenvalues in [-1, 1], the largest 1."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.random(n))
    x = np.c_[np.cos(4 * t), t**2, 0.3 * rng.standard_normal(n)]
    distance, index = cKDTree(x).query(x, k + 1)
    w = np.exp(-((distance[:, 1:] / distance[:, -1:]) ** 2))
    a = sp.csr_matrix((w.ravel(), (np.repeat(np.arange(n), k), index[:, 1:].ravel())), shape=(n, n))
    a = (a + a.T) / 2
    z = sp.diags(1 / np.sqrt(np.asarray(a.sum(0)).ravel()))
    return sp.csr_matrix(z @ a @ z)


def two_copies() -> sp.csr_matrix:
    return sp.block_diag([random_walk(160, 4)] * 2).tocsr()


def top(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:k], vectors[:, ::-1][:, :k]
