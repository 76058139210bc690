"""What a matrix holds: counts, normalised values, logarithms or scaled values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from scdiffx._slots import check_finite, matrix_of

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Source", "kind_of", "prepared"]

# Logarithms of normalised data stay below this: log1p of a million is 13.8, its log2 is 19.9.
_LARGEST_LOG = 20.0
_HELD = {
    "counts": "raw counts (integers from 0 up)",
    "fractional": "values that are neither integers, nor normalised, nor logarithms: taken for estimated counts",
    "normalised": "normalised values (all cells have the same total), not logarithms",
    "log": "logarithms of normalised values",
    "scaled": "scaled values (some are negative)",
}


class Source(NamedTuple):
    """The data to analyse, with counts or normalised values in X; what they are, and a sentence that says so."""

    adata: AnnData
    kind: str
    held: str


def kind_of(matrix: Any, *, logged: bool = False) -> str:
    """What a matrix (cells x genes) of finite values holds; `logged` says that it is known to hold no raw values.

    In this order: with negative values "scaled"; integers "counts"; if `logged` "log"; equal totals of the cells
    "normalised"; equal totals of exp(value) - 1, or no value above 20, "log"; else "fractional".
    """
    values = matrix.data if sp.issparse(matrix) else np.ravel(matrix)
    largest = values.max(initial=0)
    if values.min(initial=0) < 0:
        return "scaled"
    if not np.issubdtype(values.dtype, np.floating) or (values % 1 == 0).all():
        return "counts"
    if logged:
        return "log"
    if _equal_totals(matrix):
        return "normalised"
    if largest <= _LARGEST_LOG or (largest < 50 and _equal_totals(np.expm1(matrix))):
        return "log"
    return "fractional"


def _equal_totals(matrix: Any) -> bool:
    total = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    total = total[total > 0]
    return bool(total.size > 1 and total.std() < 1e-3 * total.mean())


def prepared(adata: AnnData, layer: str | None) -> Source:
    """The AnnData with the values to analyse in X: those of the layer, of X, or where X is scaled those of `.raw`.

    Raises ValueError or KeyError where there is nothing to analyse.
    """
    where = "X" if layer is None else f"layers[{layer!r}]"
    matrix = _checked(adata, layer)
    kind = kind_of(matrix, logged=layer is None and "log1p" in adata.uns)
    held = f"{where} held {_HELD[kind]}"
    if kind == "scaled":
        if layer is not None or adata.raw is None:
            raise ValueError(
                f"{where} holds scaled values (some are negative), from which neither counts nor their logarithms can "
                "be recovered. Pass a layer with counts (--layer NAME), or put them into `.raw`; layers: "
                f"{[name for name in list(adata.layers) if name is not None]}"
            )
        adata = adata.raw.to_adata()
        matrix = _checked(adata, None)
        kind = kind_of(matrix, logged="log1p" in adata.uns)
        if kind == "scaled":
            raise ValueError("both X and .raw hold scaled values (some are negative): counts or logarithms are needed")
        held += f"; so .raw was used, which held {_HELD[kind]}"
    if kind == "counts" and not sp.issparse(matrix):
        matrix = sp.csr_matrix(matrix)
    adata.X = matrix.astype(np.float32) if kind == "counts" else matrix
    return Source(adata, kind, held)


def _checked(adata: AnnData, layer: str | None) -> Any:
    matrix = matrix_of(adata, layer)
    check_finite(matrix, adata.obs_names, adata.var_names)
    if not (matrix.nnz if sp.issparse(matrix) else np.any(matrix)):
        raise ValueError("all values are 0: there is nothing to analyse")
    return matrix
