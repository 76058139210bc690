"""Parts of other slots, and values that a caller passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx._core.counts import Counts, dense, take_columns
from scdiffx._core.graph import Graph
from scdiffx._slots._matrix import as_float, check_finite, matrix_of
from scdiffx._slots._places import Ordered


@dataclass(frozen=True)
class Given(Ordered):
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


@dataclass(frozen=True, eq=False)
class Weights(Labels):
    """A number for each cell in double precision, passed by the caller; read-only."""

    def read(self, adata: Any) -> Any:
        return jnp.asarray(self.value, jnp.float64)


@dataclass(frozen=True, eq=False)
class Edges(Labels):
    """A sparse matrix of cells x cells, passed by the caller; read-only."""

    def read(self, adata: Any) -> Any:
        return Graph.from_scipy(self.value, np.float32)


class Part(Ordered):
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
    """Some genes of a matrix as a dense array (cells, genes), or sparse as it is; others are never made dense."""

    of: Any
    index: tuple[int, ...]
    # Whether the others must be finite too.
    check_others: bool = True
    dense: bool = True

    def take(self, value: Any) -> Any:
        part = take_columns(value, jnp.asarray(self.index, jnp.int32))
        return dense(part) if self.dense else part

    def read(self, adata: Any) -> Any:
        if self.of.is_lazy(adata):
            return self._streamed(adata)
        matrix = matrix_of(adata, self.of.layer)
        part = matrix[:, list(self.index)]
        if self.check_others:
            check_finite(matrix, adata.obs_names, adata.var_names)
        else:
            check_finite(part, adata.obs_names, adata.var_names[list(self.index)])
        if sp.issparse(part) and not self.dense:
            return Counts.from_scipy(part, as_float(part.data[:0]).dtype)
        return jnp.asarray(as_float(part.toarray() if sp.issparse(part) else part))

    def _streamed(self, adata: Any) -> Any:
        """The genes of a matrix that is not in memory; the others are checked in any case, as they have to be read."""
        parts = [block[:, list(self.index)] for _, block in self.of.streamed(adata).stored()]
        if not sp.issparse(parts[0]):
            return jnp.asarray(as_float(np.concatenate(parts)))
        part = sp.vstack(parts, format="csr")
        return (
            Counts.from_scipy(part, as_float(part.data[:0]).dtype)
            if not self.dense
            else jnp.asarray(as_float(part.toarray()))
        )


@dataclass(frozen=True)
class Modality(Ordered):
    """A slot, `of`, of one modality of a MuData, its cells in the order of the MuData."""

    name: str
    of: Any

    @property
    def key(self) -> str:
        return f"{self.name}:{getattr(self.of, 'key', self.of.layer)}"

    def exists(self, adata: Any) -> bool:
        return bool(self.of.exists(adata.mdata.mod[self.name]))

    def read(self, adata: Any) -> Any:
        part = adata.mdata.mod[self.name]
        try:
            return self.of.read(part if part.obs_names.equals(adata.obs_names) else part[adata.obs_names])
        except (KeyError, ValueError) as error:
            error.add_note(f"`adata` is `mdata[{self.name!r}]` here.")
            raise

    def host(self, adata: Any, value: Any) -> Any:
        part = adata.mdata.mod[self.name]
        return self.of.host(part, np.asarray(value)[adata.obs_names.get_indexer(part.obs_names)])

    def write(self, adata: Any, value: Any) -> None:
        self.of.write(adata.mdata.mod[self.name], value)
