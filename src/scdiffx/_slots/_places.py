"""Matrices, columns, arrays along an axis, and `uns`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx._core.counts import Counts, Streamed
from scdiffx._slots._lazy import HOW_TO_OPEN, is_lazy, is_stored, rewritten, streamed
from scdiffx._slots._matrix import as_float, check_counts, check_finite, lookup, matrix_of, place, stored_matrix


class Ordered:
    """JAX sorts the keys of dictionaries: slots are ordered by what they print."""

    def __lt__(self, other: object) -> bool:
        return repr(self) < repr(other)


@dataclass(frozen=True, eq=False)
class X(Ordered):
    """The cells x genes matrix, or a layer of the same shape; a new layer has its non-zeros where `like` has them.

    With `streams`, who reads it takes a matrix that is not in memory as :class:`Streamed`.
    """

    layer: str | None = None
    counts: bool = False
    like: X | None = None
    streams: bool = field(default=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, X) and self.layer == other.layer

    def __hash__(self) -> int:
        return hash(("X", self.layer))

    def exists(self, adata: Any) -> bool:
        return adata.X is not None if self.layer is None else self.layer in adata.layers

    def is_lazy(self, adata: Any) -> bool:
        """Whether the matrix is a dask array or in a file."""
        return self.exists(adata) and is_lazy(stored_matrix(adata, self.layer))

    def streamed(self, adata: Any) -> Streamed:
        """A matrix that is not in memory; its values are checked as they pass."""
        check, names, genes = check_counts if self.counts else check_finite, adata.obs_names, adata.var_names
        return streamed(stored_matrix(adata, self.layer), lambda block, at: check(block, names[at], genes))

    def check_writable(self, adata: Any) -> None:
        """Raise where the values are in a file, which stays as it is."""
        if self.exists(adata) and is_stored(stored_matrix(adata, self.layer)):
            raise TypeError(
                f"`{place(self.layer)}` is in a file, and this function would change it. Open it lazily, and it "
                f"becomes a recipe for the new values: {HOW_TO_OPEN}"
            )

    def read(self, adata: Any) -> Any:
        if self.streams and self.is_lazy(adata):
            return self.streamed(adata)
        matrix = matrix_of(adata, self.layer)
        (check_counts if self.counts else check_finite)(matrix, adata.obs_names, adata.var_names)
        if sp.issparse(matrix):
            csr = matrix.tocsr()
            return Counts.from_scipy(csr, as_float(csr.data[:0]).dtype)
        return jnp.asarray(as_float(matrix))

    def host(self, adata: Any, value: Any) -> Any:
        if isinstance(value, Streamed):
            return rewritten(stored_matrix(adata, self.layer), value)
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
class _Column(Ordered):
    """A column of a data frame: numbers as floats; others (or all, with `codes`) as category codes, -1 missing."""

    key: str
    codes: bool = False
    columns: ClassVar[tuple[str, ...]] = ()
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
        column = lookup(self._frame(adata), self.key, self._where)
        if column.dtype.kind in "fiub" and not self.codes:
            return jnp.asarray(as_float(column.to_numpy()))
        return jnp.asarray(column.astype("category").cat.codes.to_numpy(), jnp.int32)

    def numbers(self, adata: Any) -> Any:
        """The column as numbers, such as times; the ranks of ordered categories. NaN where missing."""
        column = lookup(self._frame(adata), self.key, self._where)
        if column.dtype.name == "category" and column.cat.categories.dtype.kind in "fiu":
            column = column.astype(float)
        if column.dtype.kind in "fiub":
            return jnp.asarray(as_float(column.to_numpy()))
        if column.dtype.name != "category" or not column.cat.ordered:
            raise ValueError(
                f"{self._where}[{self.key!r}] holds {column.dtype}, which has no order: numbers are needed, or an "
                "ordered categorical (`pandas.Categorical(values, categories=[...], ordered=True)`)"
            )
        codes = column.cat.codes.to_numpy()
        return jnp.asarray(np.where(codes < 0, np.nan, codes), jnp.float32)

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
class _Array(Ordered):
    """An array along the cells or the genes; `columns` are names for its columns, where these have any.

    With `frame` it is written as a data frame of these columns.
    """

    key: str
    columns: tuple[str, ...] = field(default=(), compare=False, repr=False)
    frame: bool = field(default=False, compare=False, repr=False)
    _where = ""

    def _mapping(self, adata: Any) -> Any:
        return getattr(adata, self._where)

    def exists(self, adata: Any) -> bool:
        return self.key in self._mapping(adata)

    def read(self, adata: Any) -> Any:
        value = lookup(self._mapping(adata), self.key, self._where)
        value = value.toarray() if sp.issparse(value) else np.asarray(value)
        value = as_float(value[:, None] if value.ndim == 1 else value)
        if not np.isfinite(value.sum(dtype=np.float64)):
            row = np.argwhere(~np.isfinite(value))[0][0]
            raise ValueError(f"`adata.{self._where}[{self.key!r}]` is not finite at row {row}")
        return jnp.asarray(value)

    def host(self, adata: Any, value: Any) -> Any:
        if not self.frame:
            return np.asarray(value)
        import pandas as pd

        index = adata.obs_names if self._where == "obsm" else adata.var_names
        return pd.DataFrame(np.array(value), index=index, columns=list(self.columns))

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


@dataclass(frozen=True)
class Uns(Ordered):
    """An entry of `uns`: bookkeeping on the host, an array, or the arrays of a dictionary named by `parts`."""

    key: str
    parts: tuple[str, ...] = ()

    def exists(self, adata: Any) -> bool:
        return self.key in adata.uns

    def read(self, adata: Any) -> Any:
        entry = lookup(adata.uns, self.key, "uns")
        return {part: jnp.asarray(entry[part]) for part in self.parts} if self.parts else jnp.asarray(entry)

    def host(self, adata: Any, value: Any) -> Any:
        return np.asarray(value) if isinstance(value, jax.Array) else value

    def write(self, adata: Any, value: Any) -> None:
        adata.uns[self.key] = value
