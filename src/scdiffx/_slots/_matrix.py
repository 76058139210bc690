"""What is read from an AnnData, checked: matrices, values and names."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import scipy.sparse as sp

from scdiffx._log import warn
from scdiffx._slots._lazy import described, is_lazy


def is_anndata(obj: Any) -> bool:
    """Whether `obj` is an AnnData, without importing anndata for objects that cannot be one."""
    anndata = sys.modules.get("anndata")
    return anndata is not None and isinstance(obj, anndata.AnnData)


def preset() -> str | None:
    """The name of scanpy's preset, which decides some keys, where the installed scanpy has presets."""
    scanpy = sys.modules.get("scanpy")
    chosen = getattr(getattr(scanpy, "settings", None), "preset", None)
    return None if chosen is None else str(getattr(chosen, "name", chosen))


def available(mapping: Any) -> str:
    """The keys a user can choose from, for error messages."""
    keys = [str(k) for k in mapping if k is not None]
    shown = ", ".join(repr(k) for k in keys[:20])
    return f"[{shown}{', ...' if len(keys) > 20 else ''}]"


def lookup(mapping: Any, key: str, where: str) -> Any:
    if key not in mapping:
        raise KeyError(f"{key!r} is not in `adata.{where}`. Available: {available(mapping.keys())}")
    return mapping[key]


def stored_matrix(adata: Any, layer: str | None = None) -> Any:
    """The matrix in X or a layer as it is, with at least one cell and gene; it may be a dask array or in a file."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`adata` is empty: it has {adata.n_obs} cells and {adata.n_vars} genes")
    if layer is None and adata.is_view and adata.isbacked:
        # Its `X` would load all of it.
        raise TypeError("`adata` is a view of data in a file; load what it shows with `adata = adata.to_memory()`")
    matrix = adata.X if layer is None else lookup(adata.layers, layer, "layers")
    if matrix is None:
        raise ValueError(f"`adata.X` is None; pass `layer=`. Available: {available(adata.layers.keys())}")
    return matrix


def place(layer: str | None) -> str:
    """How a user writes the place of a matrix."""
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def matrix_of(adata: Any, layer: str | None = None) -> Any:
    """The matrix in X or a layer, in memory, with at least one cell and gene; sparse ones in canonical CSR or CSC."""
    matrix = stored_matrix(adata, layer)
    if is_lazy(matrix):
        raise TypeError(
            f"`{place(layer)}` is {described(matrix)}, and this function needs it in memory: load some genes or cells "
            "with `adata = adata[:, genes].to_memory()`, or all with `adata = adata.to_memory()`"
        )
    if sp.issparse(matrix):
        if matrix.format not in ("csr", "csc"):
            raise TypeError(f"sparse format {matrix.format!r} is not supported. Available: ['csr', 'csc']")
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        return matrix
    return np.asarray(matrix)


def check_finite(matrix: Any, names: Any, genes: Any, kind: str = "gene") -> None:
    """Raise on the first NaN or infinite value, naming its cell and gene, or what a column is."""
    values = matrix.data if sp.issparse(matrix) else matrix
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values.sum(dtype=np.float64)):
        _raise_at(matrix, ~np.isfinite(values), names, genes, kind, "not finite")


def check_counts(matrix: Any, names: Any, genes: Any, kind: str = "gene") -> None:
    """Raise on the first value that cannot be a count: NaN, infinite or negative."""
    check_finite(matrix, names, genes, kind)
    values = matrix.data if sp.issparse(matrix) else matrix
    if values.size and values.min() < 0:
        _raise_at(matrix, values < 0, names, genes, kind, "negative")


def warn_if_not_counts(matrix: Any, what: str) -> None:
    """scanpy's warning where a model of counts meets other numbers."""
    values = matrix.data if sp.issparse(matrix) else matrix
    part = values[:: max(1, values.shape[0] // 100_000)]
    if (np.trunc(part) != part).any():
        warn(f"`{what}` expects raw count data, but non-integers were found.")


def check_batch(data: Any, batch_key: str | None) -> None:
    """Raise where the batch of a cell is unknown."""
    if batch_key is None:
        return
    if batch_key not in data.obs:
        raise KeyError(f"batch_key={batch_key!r} is not in `adata.obs`. Available: {available(data.obs)}")
    missing = data.obs[batch_key].isna().to_numpy()
    if missing.any():
        raise ValueError(f"`adata.obs[{batch_key!r}]` is missing for {missing.sum()} of {len(missing)} cells")


def _raise_at(matrix: Any, bad: np.ndarray, names: Any, genes: Any, kind: str, what: str) -> None:
    if not bad.any():
        return
    if sp.issparse(matrix):
        coo = matrix.tocoo()
        first = np.flatnonzero(bad)[0]
        row, column, value = coo.row[first], coo.col[first], matrix.data[first]
    else:
        row, column = np.argwhere(bad)[0]
        value = matrix[row, column]
    raise ValueError(f"the value {value} of cell {names[row]!r} and {kind} {genes[column]!r} is {what}")


def as_float(array: np.ndarray) -> np.ndarray:
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)


def genes_at(adata: Any, names: list[str]) -> tuple[int, ...]:
    """Positions of genes by name."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`adata` is empty: it has {adata.n_obs} cells and {adata.n_vars} genes")
    index = adata.var_names.get_indexer_for(names) if adata.var_names.is_unique else None
    if index is None:
        raise ValueError("gene names are not unique; call `adata.var_names_make_unique()` first")
    missing = [name for name, at in zip(names, index, strict=True) if at < 0]
    if missing or not names:
        raise KeyError(f"genes {missing} are not in `adata.var_names`. Available: {available(adata.var_names)}")
    return tuple(int(at) for at in index)


def categories(codes: np.ndarray) -> Any:
    """Cluster numbers as a categorical of strings in natural order, scanpy's form of a clustering."""
    import pandas as pd

    return pd.Categorical.from_codes(codes, categories=[str(i) for i in range(int(codes.max(initial=-1)) + 1)])
