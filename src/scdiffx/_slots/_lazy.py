"""Matrices that are not in memory: dask arrays, and matrices in a file. They are read as blocks of rows, in order."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import scipy.sparse as sp

from scdiffx._core.counts import Streamed
from scdiffx._core.packed import Counts, Packer
from scdiffx._core.streamed import PIECE_ROWS

HOW_TO_OPEN = (
    "`anndata.AnnData(anndata.experimental.read_elem_lazy(file['X']), obs=adata.obs, var=adata.var)` "
    "with `file = h5py.File(path)` or `zarr.open(path)`"
)


def _is_a(matrix: Any, module: str, *names: str) -> bool:
    """Whether it is of a class of a module, which is not imported for objects that cannot be of it."""
    found = sys.modules.get(module)
    return found is not None and isinstance(matrix, tuple(getattr(found, name) for name in names))


def is_dask(matrix: Any) -> bool:
    return _is_a(matrix, "dask.array", "Array")


def is_stored(matrix: Any) -> bool:
    """Whether it is a matrix in a file."""
    sparse = _is_a(matrix, "anndata.abc", "CSRDataset", "CSCDataset")
    return sparse or _is_a(matrix, "h5py", "Dataset") or _is_a(matrix, "zarr", "Array")


def is_lazy(matrix: Any) -> bool:
    return is_dask(matrix) or is_stored(matrix)


def described(matrix: Any) -> str:
    return "a dask array" if is_dask(matrix) else "in a file"


def streamed(matrix: Any, check: Callable[[Any, slice], None]) -> Streamed:
    """A lazy matrix as rows in CSR or dense blocks, each checked whenever it is read."""
    longest, blocks = _dask_blocks(matrix) if is_dask(matrix) else _stored_blocks(matrix)
    dtype = matrix.dtype if np.issubdtype(matrix.dtype, np.floating) else np.float32

    def read() -> Iterator[Any]:
        start = 0
        for block in blocks():
            canonical = _canonical(block)
            check(canonical, slice(start, start + canonical.shape[0]))
            start += canonical.shape[0]
            yield canonical

    return Streamed(tuple(matrix.shape), dtype, longest, read)


def _canonical(block: Any) -> Any:
    if not sp.issparse(block):
        return np.asarray(block)
    csr = block.tocsr()
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _dask_blocks(matrix: Any) -> tuple[int, Callable[[], Iterator[Any]]]:
    """The largest number of rows in a block, and the blocks: chunks, or several where these are small."""
    import dask

    rows = np.asarray(matrix.chunks[0])
    if matrix.numblocks[1] > 1:
        raise ValueError(
            f"the dask array is cut into {matrix.numblocks[1]} chunks along the genes; rows are read as a whole: "
            "use `.rechunk({1: -1})`"
        )
    ends = np.cumsum(rows)
    cuts = [0]
    while cuts[-1] < len(ends):
        done = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, done + PIECE_ROWS, side="right"))))
    groups = list(itertools.pairwise(cuts))

    def blocks() -> Iterator[Any]:
        for first, last in groups:
            chunks = dask.compute(*(matrix.blocks[i] for i in range(first, last)))
            if len(chunks) == 1:
                yield chunks[0]
            else:
                yield sp.vstack(chunks, format="csr") if sp.issparse(chunks[0]) else np.concatenate(chunks)

    longest = max(int(rows[first:last].sum()) for first, last in groups)
    return longest, blocks


def _stored_blocks(matrix: Any) -> tuple[int, Callable[[], Iterator[Any]]]:
    if _is_a(matrix, "anndata.abc", "CSCDataset"):
        raise TypeError("the matrix is stored by columns (CSC), and rows cannot be read from it; write it as CSR first")
    n = matrix.shape[0]

    def blocks() -> Iterator[Any]:
        for low in range(0, n, PIECE_ROWS):
            yield matrix[low : min(low + PIECE_ROWS, n)]

    return min(n, PIECE_ROWS), blocks


def rewritten(matrix: Any, value: Streamed) -> Any:
    """The dask array that holds the values of a streamed matrix made from `matrix`, computed where they are needed."""
    import dask.array as da

    if value.change is None:
        return matrix
    run = jax.jit(value.change)
    pack = Packer(max(matrix.chunks[0]), value.dtype)

    def change(block: Any, *by_row: np.ndarray) -> Any:
        block = _canonical(block)
        n = block.shape[0]
        with jax.enable_x64(value.dtype == np.float64):
            changed = run(pack(block), *(np.pad(v[:, 0], (0, pack.rows - n)) for v in by_row))
            if not isinstance(changed, Counts):
                return np.array(changed[:n])
            data = changed.host_values(np.pad(block.indptr, (0, pack.rows - n), mode="edge"))
        return type(block)((data, block.indices, block.indptr), shape=block.shape)

    by_row = [da.from_array(v[:, None], chunks=(matrix.chunks[0], 1)) for v in value.by_row]
    meta = matrix._meta.astype(value.dtype)
    return da.map_blocks(change, matrix, *by_row, chunks=matrix.chunks, dtype=value.dtype, meta=meta)
