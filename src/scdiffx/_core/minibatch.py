"""Minibatches of a sparse matrix for training: rows are drawn on the host and stay sparse until a step uses them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core.counts import Counts, Matrix
from scdiffx._core.devices import n_parts, place

__all__ = ["SparseRows", "densify", "draw", "host_csr", "shared_size", "widest"]


class SparseRows(NamedTuple):
    """Rows in the form of :class:`Counts`: values and their places in the flattened dense block, pads past its end.

    Where several devices share a minibatch there is a leading axis, with the rows of each.
    """

    data: Float[Array | np.ndarray, "*parts nnz"]
    position: Int[Array | np.ndarray, "*parts nnz"]


def shared_size(size: int) -> int:
    """The size of minibatches: rounded down, where there are several devices, to as many rows for each."""
    return max(size // n_parts(), 1) * n_parts() if size >= n_parts() else size


def _parts(size: int) -> int:
    return 1 if size % n_parts() else n_parts()


def host_csr(x: Matrix) -> Any:
    """The matrix as float32 CSR on the host, without stored zeros."""
    if not isinstance(x, Counts):
        return sp.csr_matrix(np.asarray(x, np.float32))
    csr = x.to_scipy().astype(np.float32)
    csr.eliminate_zeros()
    return csr


def widest(csr: Any, size: int) -> int:
    """The most values that a device's part of `size` rows can hold, rounded up: similar data share compiled code."""
    size //= _parts(size)
    degree = np.diff(csr.indptr)
    most = max(1, int(np.partition(degree, -size)[-size:].sum()))
    step = max(1, 1 << max(0, most.bit_length() - 3))
    return -(-most // step) * step


def draw(csr: Any, cells: np.ndarray, width: int) -> list[SparseRows]:
    """The rows `cells` (steps, size) of the matrix as minibatches; each device's part holds up to `width` values."""
    parts = _parts(cells.shape[1])
    drawn = _drawn(csr, cells.reshape(len(cells) * parts, -1), width)
    if parts == 1:
        return drawn
    together = (drawn[i : i + parts] for i in range(0, len(drawn), parts))
    return [SparseRows(*(place(np.stack(field)) for field in zip(*rows, strict=True))) for rows in together]


def _drawn(csr: Any, cells: np.ndarray, width: int) -> list[SparseRows]:
    size = cells.shape[1]
    genes = csr.shape[1]
    picked = csr[cells.ravel()]
    starts = picked.indptr[::size]
    row = np.repeat(np.arange(cells.size, dtype=np.int32) % size, np.diff(picked.indptr))
    place = row * np.int32(genes) + picked.indices.astype(np.int32)
    found = []
    for lo, hi in itertools.pairwise(starts):
        data, position = np.zeros(width, np.float32), np.full(width, size * genes, np.int32)
        data[: hi - lo], position[: hi - lo] = picked.data[lo:hi], place[lo:hi]
        found.append(SparseRows(data, position))
    return found


def densify(rows: SparseRows, size: int, genes: int) -> Float[Array, "size genes"]:
    """One minibatch as a dense block."""
    if rows.data.ndim == 2:
        each = size // len(rows.data)
        return jax.vmap(lambda *part: densify(SparseRows(*part), each, genes))(*rows).reshape(size, genes)
    flat = jnp.zeros(size * genes, rows.data.dtype)
    return flat.at[rows.position].set(rows.data, mode="drop", unique_indices=True).reshape(size, genes)
