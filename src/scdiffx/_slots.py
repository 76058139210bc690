"""Slots: names of places in an AnnData, and the only code that reads or writes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx._core.counts import Counts, map_rows, take_columns
from scdiffx._core.directed import Directed
from scdiffx._core.graph import Graph
from scdiffx._log import warn

__all__ = [
    "Connectivities",
    "Cosines",
    "Decoded",
    "Distances",
    "Genes",
    "Given",
    "Labels",
    "Leading",
    "Obs",
    "Obsm",
    "Obsp",
    "Part",
    "Single",
    "Slot",
    "Uns",
    "Var",
    "Varm",
    "X",
    "available",
    "categories",
    "check_counts",
    "genes_at",
    "is_anndata",
    "matrix_of",
    "preset",
    "write_all",
]


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


def categories(codes: np.ndarray) -> Any:
    """Cluster numbers as a categorical of strings in natural order, scanpy's form of a clustering."""
    import pandas as pd

    return pd.Categorical.from_codes(codes, categories=[str(i) for i in range(int(codes.max(initial=-1)) + 1)])


def _lookup(mapping: Any, key: str, where: str) -> Any:
    if key not in mapping:
        raise KeyError(f"{key!r} is not in `adata.{where}`. Available: {available(mapping.keys())}")
    return mapping[key]


def matrix_of(adata: Any, layer: str | None = None) -> Any:
    """The matrix in X or a layer, in memory, with at least one cell and gene; sparse ones in canonical CSR or CSC."""
    if getattr(adata, "isbacked", False):
        raise ValueError("`adata` is backed by a file; load it first with `adata = adata.to_memory()`")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`adata` is empty: it has {adata.n_obs} cells and {adata.n_vars} genes")
    matrix = adata.X if layer is None else _lookup(adata.layers, layer, "layers")
    if matrix is None:
        raise ValueError(f"`adata.X` is None; pass `layer=`. Available: {available(adata.layers.keys())}")
    if sp.issparse(matrix):
        if matrix.format not in ("csr", "csc"):
            raise TypeError(f"sparse format {matrix.format!r} is not supported. Available: ['csr', 'csc']")
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        return matrix
    if type(matrix).__module__.split(".")[0] == "dask":
        raise TypeError("a dask array is not supported yet; load it first with `adata = adata.to_memory()`")
    return np.asarray(matrix)


def check_finite(matrix: Any, names: Any, genes: Any) -> None:
    """Raise on the first NaN or infinite value, naming its cell and gene."""
    values = matrix.data if sp.issparse(matrix) else matrix
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values.sum(dtype=np.float64)):
        _raise_at(matrix, ~np.isfinite(values), names, genes, "not finite")


def check_counts(matrix: Any, names: Any, genes: Any) -> None:
    """Raise on the first value that cannot be a count: NaN, infinite or negative."""
    check_finite(matrix, names, genes)
    values = matrix.data if sp.issparse(matrix) else matrix
    if values.size and values.min() < 0:
        _raise_at(matrix, values < 0, names, genes, "negative")


def _raise_at(matrix: Any, bad: np.ndarray, names: Any, genes: Any, what: str) -> None:
    if not bad.any():
        return
    if sp.issparse(matrix):
        coo = matrix.tocoo()
        first = np.flatnonzero(bad)[0]
        row, column, value = coo.row[first], coo.col[first], matrix.data[first]
    else:
        row, column = np.argwhere(bad)[0]
        value = matrix[row, column]
    raise ValueError(f"the value {value} of cell {names[row]!r} and gene {genes[column]!r} is {what}")


def _as_float(array: np.ndarray) -> np.ndarray:
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)


class _Ordered:
    """JAX sorts the keys of dictionaries: slots are ordered by what they print."""

    def __lt__(self, other: object) -> bool:
        return repr(self) < repr(other)


@dataclass(frozen=True, eq=False)
class X(_Ordered):
    """The cells x genes matrix, or a layer of the same shape; a new layer has its non-zeros where `like` has them."""

    layer: str | None = None
    counts: bool = False
    like: X | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, X) and self.layer == other.layer

    def __hash__(self) -> int:
        return hash(("X", self.layer))

    def exists(self, adata: Any) -> bool:
        return adata.X is not None if self.layer is None else self.layer in adata.layers

    def read(self, adata: Any) -> Any:
        matrix = matrix_of(adata, self.layer)
        (check_counts if self.counts else check_finite)(matrix, adata.obs_names, adata.var_names)
        if sp.issparse(matrix):
            csr = matrix.tocsr()
            return Counts.from_scipy(csr, _as_float(csr.data[:0]).dtype)
        return jnp.asarray(_as_float(matrix))

    def host(self, adata: Any, value: Any) -> Any:
        if not isinstance(value, Counts):
            return np.asarray(value)
        here = self.layer if self.layer in adata.layers else None
        source = matrix_of(adata, here if self.like is None else self.like.layer)
        csr = source.tocsr()
        new = type(csr)((value.host_values(csr.indptr), csr.indices.copy(), csr.indptr.copy()), shape=csr.shape)
        return new.asformat(source.format)

    def write(self, adata: Any, value: Any) -> None:
        if self.layer is None:
            adata.X = value
        else:
            adata.layers[self.layer] = value


@dataclass(frozen=True, eq=False)
class _Column(_Ordered):
    """A column of a data frame: numbers as floats; others (or all, with `codes`) as category codes, -1 missing."""

    key: str
    codes: bool = False
    _where = ""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.key == other.key  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.key))

    def _frame(self, adata: Any) -> Any:
        return getattr(adata, self._where)

    def exists(self, adata: Any) -> bool:
        return self.key in self._frame(adata)

    def read(self, adata: Any) -> Any:
        column = _lookup(self._frame(adata), self.key, self._where)
        if column.dtype.kind in "fiub" and not self.codes:
            return jnp.asarray(_as_float(column.to_numpy()))
        return jnp.asarray(column.astype("category").cat.codes.to_numpy(), jnp.int32)

    def host(self, adata: Any, value: Any) -> Any:
        return np.asarray(value) if isinstance(value, jax.Array) else value

    def write(self, adata: Any, value: Any) -> None:
        self._frame(adata)[self.key] = value


@dataclass(frozen=True, eq=False)
class Obs(_Column):
    """A column of `obs`."""

    _where = "obs"


@dataclass(frozen=True, eq=False)
class Var(_Column):
    """A column of `var`."""

    _where = "var"


@dataclass(frozen=True)
class _Array(_Ordered):
    """An array along the cells or the genes."""

    key: str
    _where = ""

    def _mapping(self, adata: Any) -> Any:
        return getattr(adata, self._where)

    def exists(self, adata: Any) -> bool:
        return self.key in self._mapping(adata)

    def read(self, adata: Any) -> Any:
        value = _lookup(self._mapping(adata), self.key, self._where)
        value = value.toarray() if sp.issparse(value) else np.asarray(value)
        value = _as_float(value[:, None] if value.ndim == 1 else value)
        if not np.isfinite(value.sum(dtype=np.float64)):
            row = np.argwhere(~np.isfinite(value))[0][0]
            raise ValueError(f"`adata.{self._where}[{self.key!r}]` is not finite at row {row}")
        return jnp.asarray(value)

    def host(self, adata: Any, value: Any) -> Any:
        return np.asarray(value)

    def write(self, adata: Any, value: Any) -> None:
        self._mapping(adata)[self.key] = value


@dataclass(frozen=True)
class Obsm(_Array):
    """An array of `obsm` (cells, dims)."""

    _where = "obsm"


@dataclass(frozen=True)
class Varm(_Array):
    """An array of `varm` (genes, dims)."""

    _where = "varm"


def graph_key(adata: Any, neighbors_key: str, what: str) -> str:
    """The key in `obsp` of the "connectivities" or "distances" that `uns[neighbors_key]` describes."""
    if neighbors_key not in adata.uns:
        raise ValueError(f"Did not find `.uns[{neighbors_key!r}]`. Run `sc.pp.neighbors` first.")
    described = adata.uns[neighbors_key]
    key = described.get(f"{what}_key", what) if isinstance(described, Mapping) else what
    if key not in adata.obsp:
        raise KeyError(f"{key!r} is not in `adata.obsp`. Available: {available(adata.obsp.keys())}")
    return str(key)


@dataclass(frozen=True)
class _Pairs(_Ordered):
    """A sparse matrix of `obsp`, found through the neighbours' entry in `uns`."""

    neighbors_key: str = "neighbors"
    _what = ""

    @property
    def key(self) -> str:
        return self._what if self.neighbors_key == "neighbors" else f"{self.neighbors_key}_{self._what}"

    def exists(self, adata: Any) -> bool:
        return self.neighbors_key in adata.uns

    def read(self, adata: Any) -> Any:
        if adata.n_obs == 0:
            raise ValueError("`adata` is empty: it has 0 cells")
        matrix = adata.obsp[graph_key(adata, self.neighbors_key, self._what)]
        matrix = matrix if sp.issparse(matrix) else sp.csr_matrix(np.asarray(matrix))
        if matrix.nnz and not np.isfinite(matrix.data.sum(dtype=np.float64)):
            raise ValueError(f"the {self._what} of {self.neighbors_key!r} hold values that are not finite")
        return Graph.from_scipy(matrix, _as_float(matrix.data[:0]).dtype)

    def host(self, adata: Any, value: Any) -> Any:
        return value.to_scipy() if isinstance(value, Graph) else value

    def write(self, adata: Any, value: Any) -> None:
        adata.obsp[self.key] = value


@dataclass(frozen=True)
class Connectivities(_Pairs):
    """The weights of the neighbour graph."""

    _what = "connectivities"


@dataclass(frozen=True)
class Distances(_Pairs):
    """The distances to the nearest neighbours."""

    _what = "distances"


@dataclass(frozen=True)
class Obsp(_Ordered):
    """A sparse matrix of `obsp` whose entries are probabilities or weights: none may be negative; read-only."""

    key: str

    def exists(self, adata: Any) -> bool:
        return self.key in adata.obsp

    def read(self, adata: Any) -> Any:
        matrix = _lookup(adata.obsp, self.key, "obsp")
        matrix = matrix if sp.issparse(matrix) else sp.csr_matrix(np.asarray(matrix))
        if matrix.nnz and not (np.isfinite(matrix.data.sum(dtype=np.float64)) and matrix.data.min() >= 0):
            raise ValueError(f"`adata.obsp[{self.key!r}]` holds values that are negative or not finite")
        return Graph.from_scipy(matrix, _as_float(matrix.data[:0]).dtype)


@dataclass(frozen=True)
class Uns(_Ordered):
    """An entry of `uns`: bookkeeping on the host, an array, or the arrays of a dictionary named by `parts`."""

    key: str
    parts: tuple[str, ...] = ()

    def exists(self, adata: Any) -> bool:
        return self.key in adata.uns

    def read(self, adata: Any) -> Any:
        entry = _lookup(adata.uns, self.key, "uns")
        return {part: jnp.asarray(entry[part]) for part in self.parts} if self.parts else jnp.asarray(entry)

    def host(self, adata: Any, value: Any) -> Any:
        return np.asarray(value) if isinstance(value, jax.Array) else value

    def write(self, adata: Any, value: Any) -> None:
        adata.uns[self.key] = value


@dataclass(frozen=True)
class Cosines(_Ordered):
    """A velocity graph: ``uns[key]`` holds its positive cosines, ``uns[f"{key}_neg"]`` the negative ones."""

    key: str

    def exists(self, adata: Any) -> bool:
        return self.key in adata.uns

    def read(self, adata: Any) -> Any:
        matrix = sp.csr_matrix(_lookup(adata.uns, self.key, "uns"))
        if f"{self.key}_neg" in adata.uns:
            matrix = sp.csr_matrix(matrix + sp.csr_matrix(adata.uns[f"{self.key}_neg"]))
        if matrix.shape != (adata.n_obs, adata.n_obs):
            raise ValueError(f"`adata.uns[{self.key!r}]` is of shape {matrix.shape}, but there are {adata.n_obs} cells")
        if matrix.nnz and not np.isfinite(matrix.data.sum(dtype=np.float64)):
            raise ValueError(f"`adata.uns[{self.key!r}]` holds values that are not finite")
        return Directed.from_scipy(matrix, _as_float(matrix.data[:0]).dtype)

    def host(self, adata: Any, value: Any) -> Any:
        return value.to_scipy()

    def write(self, adata: Any, value: Any) -> None:
        for key, low, high in ((self.key, 0, 1), (f"{self.key}_neg", -1, 0)):
            part = value.copy()
            part.data = np.clip(part.data, low, high)
            part.eliminate_zeros()
            adata.uns[key] = part


@dataclass(frozen=True)
class Given(_Ordered):
    """A value passed by the caller rather than found in the AnnData; read-only."""

    value: int | float

    def exists(self, adata: Any) -> bool:
        return True

    def read(self, adata: Any) -> Any:
        return jnp.asarray(self.value, jnp.int32 if isinstance(self.value, int) else jnp.float32)


@dataclass(frozen=True, eq=False)
class Labels(Given):
    """A number for each cell, passed by the caller; read-only."""

    value: Any = field(repr=False)
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def read(self, adata: Any) -> Any:
        return jnp.asarray(self.value, jnp.int32)


class Part(_Ordered):
    """A part of another slot, `of`; read-only."""

    of: Any

    def take(self, value: Any) -> Any:
        raise NotImplementedError

    def exists(self, adata: Any) -> bool:
        return bool(self.of.exists(adata))

    def read(self, adata: Any) -> Any:
        return self.take(self.of.read(adata))


@dataclass(frozen=True)
class Leading(Part):
    """The first `n` columns of another slot."""

    of: Any
    n: int

    def take(self, value: Any) -> Any:
        if value.shape[1] < self.n:
            raise ValueError(f"{self.n} dimensions were asked for, but {self.of} has {value.shape[1]}")
        return value[:, : self.n]


@dataclass(frozen=True)
class Decoded(Part):
    """Category codes as the numbers that stand for them."""

    of: Any
    values: tuple[float, ...]

    def take(self, value: Any) -> Any:
        return jnp.asarray(np.asarray(self.values, np.float32))[value]


@dataclass(frozen=True)
class Single(Part):
    """Another slot in single precision, where its own is not to decide how a step computes."""

    of: Any

    def take(self, value: Any) -> Any:
        return value.astype(jnp.float32)


@dataclass(frozen=True)
class Genes(Part):
    """Some genes of a matrix as a dense array (cells, genes); the others are never made dense."""

    of: Any
    index: tuple[int, ...]
    # Whether the others must be finite too.
    check_others: bool = True

    def take(self, value: Any) -> Any:
        part = take_columns(value, jnp.asarray(self.index, jnp.int32))
        return map_rows(part, lambda block: block) if isinstance(part, Counts) else part

    def read(self, adata: Any) -> Any:
        matrix = matrix_of(adata, self.of.layer)
        part = matrix[:, list(self.index)]
        if self.check_others:
            check_finite(matrix, adata.obs_names, adata.var_names)
        else:
            check_finite(part, adata.obs_names, adata.var_names[list(self.index)])
        return jnp.asarray(_as_float(part.toarray() if sp.issparse(part) else part))


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


Slot = X | Obs | Var | Obsm | Varm | Connectivities | Distances | Obsp | Cosines | Uns | Part | Given


def write_all(adata: Any, values: Mapping[Any, Any]) -> None:
    """Write host values together. A view becomes an actual AnnData first, as in scanpy; its parent stays as it was."""
    if adata.is_view:
        warn("Received a view of an AnnData. Making a copy.")
        adata._init_as_actual(adata.copy())
    for slot, value in values.items():
        slot.write(adata, _writable(value))


def _writable(value: Any) -> Any:
    """The value with arrays that the user may change: those that come from a device are read-only."""
    if isinstance(value, np.ndarray):
        return value if value.flags.writeable else value.copy()
    if sp.issparse(value):
        for name in ("data", "indices", "indptr"):
            setattr(value, name, _writable(getattr(value, name)))
    elif isinstance(value, dict):
        return {key: _writable(part) for key, part in value.items()}
    return value
