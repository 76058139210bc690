"""Sparse matrices of cells x cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from scdiffx._core.directed import Directed
from scdiffx._core.graph import Graph
from scdiffx._slots._matrix import as_float, available, lookup
from scdiffx._slots._places import Ordered


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
class _Pairs(Ordered):
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
        return Graph.from_scipy(matrix, as_float(matrix.data[:0]).dtype)

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
class Obsp(Ordered):
    """A sparse matrix of `obsp` whose entries are probabilities or weights: none may be negative."""

    key: str

    def exists(self, adata: Any) -> bool:
        return self.key in adata.obsp

    def read(self, adata: Any) -> Any:
        matrix = lookup(adata.obsp, self.key, "obsp")
        matrix = matrix if sp.issparse(matrix) else sp.csr_matrix(np.asarray(matrix))
        if matrix.nnz and not (np.isfinite(matrix.data.sum(dtype=np.float64)) and matrix.data.min() >= 0):
            raise ValueError(f"`adata.obsp[{self.key!r}]` holds values that are negative or not finite")
        return Graph.from_scipy(matrix, as_float(matrix.data[:0]).dtype)

    def host(self, adata: Any, value: Any) -> Any:
        return value.to_scipy()

    def write(self, adata: Any, value: Any) -> None:
        adata.obsp[self.key] = value


@dataclass(frozen=True)
class Cosines(Ordered):
    """A velocity graph: ``uns[key]`` holds its positive cosines, ``uns[f"{key}_neg"]`` the negative ones."""

    key: str

    def exists(self, adata: Any) -> bool:
        return self.key in adata.uns

    def read(self, adata: Any) -> Any:
        matrix = sp.csr_matrix(lookup(adata.uns, self.key, "uns"))
        if f"{self.key}_neg" in adata.uns:
            matrix = sp.csr_matrix(matrix + sp.csr_matrix(adata.uns[f"{self.key}_neg"]))
        if matrix.shape != (adata.n_obs, adata.n_obs):
            raise ValueError(f"`adata.uns[{self.key!r}]` is of shape {matrix.shape}, but there are {adata.n_obs} cells")
        if matrix.nnz and not np.isfinite(matrix.data.sum(dtype=np.float64)):
            raise ValueError(f"`adata.uns[{self.key!r}]` holds values that are not finite")
        return Directed.from_scipy(matrix, as_float(matrix.data[:0]).dtype)

    def host(self, adata: Any, value: Any) -> Any:
        return value.to_scipy()

    def write(self, adata: Any, value: Any) -> None:
        for key, low, high in ((self.key, 0, 1), (f"{self.key}_neg", -1, 0)):
            part = value.copy()
            part.data = np.clip(part.data, low, high)
            part.eliminate_zeros()
            adata.uns[key] = part
