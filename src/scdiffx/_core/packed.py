"""Sparse matrices of cells x genes in row blocks of equal length, as they are on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from scdiffx._core.devices import divisible, n_parts, place, readable

__all__ = ["BLOCK_ROWS", "Counts", "Matrix", "Packer"]

BLOCK_ROWS = 1024
_ALIGNMENT = 64


@partial(jax.tree_util.register_dataclass, data_fields=["data", "position"], meta_fields=["shape", "block_rows"])
class Counts:
    """A sparse cells x genes matrix in row blocks of equal, padded length.

    ``position`` is the place of a value in its flattened dense block; pads lie past its end and are dropped.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> import scdiffx as sd
    >>> counts = sd.ops.Counts.from_scipy(sp.random(60, 20, 0.2, format="csr", dtype="float32"))
    >>> counts.shape, sd.ops.Log1p()(counts).to_scipy().shape
    ((60, 20), (60, 20))
    """

    def __init__(
        self,
        data: Float[Array, "blocks nnz"],
        position: Int[Array, "blocks nnz"],
        shape: tuple[int, int],
        block_rows: int,
    ) -> None:
        self.data = data
        self.position = position
        self.shape = shape
        self.block_rows = block_rows

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def row(self) -> Int[Array, "blocks nnz"]:
        """Row within the block; `block_rows` for pads."""
        return self.position // self.shape[1]

    @property
    def column(self) -> Int[Array, "blocks nnz"]:
        return self.position % self.shape[1]

    def with_data(self, data: Float[Array, "blocks nnz"]) -> Counts:
        return Counts(data, self.position, self.shape, self.block_rows)

    @classmethod
    def from_scipy(cls, matrix: Any, dtype: Any = None, longest: int | None = None) -> Counts:
        """A scipy sparse matrix or array; block lengths are rounded up so that similar data share compiled code.

        `longest` sets the length of all blocks instead.
        """
        csr = sp.csr_matrix(matrix)
        n, genes = csr.shape
        rows = min(BLOCK_ROWS, max(-(-n // n_parts()), 1))
        blocks = divisible(-(-n // rows))
        starts = csr.indptr[np.minimum(np.arange(0, (blocks + 1) * rows, rows), n)]
        longest = _bucket(int(np.diff(starts).max(initial=1))) if longest is None else longest
        data = _aligned((blocks, longest), np.dtype(dtype or csr.dtype))
        position = _aligned((blocks, longest), np.dtype(np.int32))
        degree = np.diff(csr.indptr)
        offset = ((np.arange(n) % rows) * genes).astype(np.int32)
        for b in range(blocks):
            lo, hi = starts[b], starts[b + 1]
            data[b, : hi - lo] = csr.data[lo:hi]
            cells = slice(b * rows, (b + 1) * rows)
            np.add(
                np.repeat(offset[cells], degree[cells]),
                csr.indices[lo:hi],
                out=position[b, : hi - lo],
                casting="unsafe",
            )
            data[b, hi - lo :], position[b, hi - lo :] = 0, rows * genes
        # Nobody else holds these arrays, so the device may take them as they are.
        data_there, position_there = (
            jax.device_put(a, may_alias=True) if n_parts() == 1 else place(a) for a in (data, position)
        )
        return cls(data_there, position_there, (n, genes), rows)

    def host_values(self, indptr: np.ndarray) -> np.ndarray:
        """The values in CSR order, given the row pointers of the matrix this was made from."""
        data = np.asarray(readable(self.data))
        starts = indptr[np.minimum(np.arange(len(data) + 1) * self.block_rows, self.shape[0])]
        return np.concatenate([data[b, : starts[b + 1] - starts[b]] for b in range(len(data))])

    def to_scipy(self) -> sp.csr_matrix:
        """The matrix on the host."""
        data, position = (np.asarray(readable(a)) for a in (self.data, self.position))
        rows, genes = self.block_rows, self.shape[1]
        keep = position < rows * genes
        row = position // genes + rows * np.arange(len(data))[:, None]
        return sp.csr_matrix((data[keep], (row[keep], position[keep] % genes)), shape=self.shape)


Matrix = Counts | Array


class Packer:
    """Makes matrices of one shape from rows on the host: missing rows are empty, and blocks only grow longer."""

    def __init__(self, rows: int, dtype: Any) -> None:
        self.rows = rows
        self.dtype = np.dtype(dtype)
        self.length = 0

    def __call__(self, block: Any) -> Matrix:
        missing = self.rows - block.shape[0]
        if not sp.issparse(block):
            return jnp.asarray(np.pad(np.asarray(block, self.dtype), ((0, missing), (0, 0))))
        indptr = np.pad(block.indptr, (0, missing), mode="edge")
        step = min(BLOCK_ROWS, self.rows)
        needed = int(np.diff(indptr[np.minimum(np.arange(0, self.rows + step, step), self.rows)]).max())
        if needed > self.length:
            # Some more, so that what comes has room: every other length is compiled anew.
            self.length = _bucket(needed + needed // 8 + 1)
        padded = sp.csr_matrix((block.data, block.indices, indptr), shape=(self.rows, block.shape[1]))
        return Counts.from_scipy(padded, self.dtype, self.length)


def _aligned(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """An empty host array that starts where JAX on a CPU wants it to, which saves a copy."""
    size = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _bucket(length: int) -> int:
    step = max(1, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
