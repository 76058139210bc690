"""Splitting the molecules of each cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx._core.random import as_seed
from scdiffx._slots import X, check_counts, is_anndata, matrix_of, write_all

if TYPE_CHECKING:
    from anndata import AnnData


def split_counts(
    adata: AnnData,
    fractions: Mapping[str, float] | None = None,
    *,
    layer: str | None = None,
    rng: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Deal each cell's molecules at random into layers, so that one can be predicted from another.

    Each molecule goes to one layer, independently of all others, with the given probabilities. If counts are Poisson
    about each cell's expression, the layers are independent given that expression (Neufeld et al. 2024); whatever a
    method learns from one layer can then be judged on another, without labels.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with counts.
    fractions
        Name and share of each layer; shares sum to 1. Default ``{"fit": 0.6, "choose": 0.2, "test": 0.2}``.
    layer
        Split this layer rather than `X`.
    rng
        Seed of the split.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers[name]` for each name : float32 (cells, genes), sparse if the counts are
        Counts; together they sum to the input.

    Raises
    ------
    ValueError
        If values are not whole numbers of at least 0, or the shares do not sum to 1.

    References
    ----------
    Batson et al. (2019), Molecular cross-validation for single-cell RNA-seq; Neufeld et al. (2024), Inference after
    latent variable estimation for single-cell RNA sequencing data.
    """
    if not is_anndata(adata):
        raise TypeError(f"`adata` must be an AnnData, got {type(adata).__name__}")
    shares = {"fit": 0.6, "choose": 0.2, "test": 0.2} if fractions is None else dict(fractions)
    values = np.array(list(shares.values()), dtype=np.float64)
    if len(values) < 2 or not (values > 0).all() or abs(values.sum() - 1) > 1e-6:
        raise ValueError(f"fractions={shares!r} must be at least two shares greater than 0 that sum to 1")
    matrix = matrix_of(adata, layer)
    check_counts(matrix, adata.obs_names, adata.var_names)
    counts = matrix.data if sp.issparse(matrix) else matrix
    rest = np.rint(counts).astype(np.int64)
    if not np.array_equal(rest, counts):
        raise ValueError("only whole molecules can be split, but `X` or the layer has fractions of counts")
    generator = np.random.default_rng(as_seed(rng))
    parts = {}
    left = 1.0
    for name, share in list(shares.items())[:-1]:
        taken = generator.binomial(rest, min(share / left, 1.0))
        parts[name] = taken
        rest, left = rest - taken, left - share
    parts[list(shares)[-1]] = rest
    target = adata.copy() if copy else adata
    write_all(target, {X(name): _shaped(matrix, part) for name, part in parts.items()})
    return target if copy else None


def _shaped(matrix: Any, values: np.ndarray) -> Any:
    values = values.astype(np.float32)
    if not sp.issparse(matrix):
        return values
    part = type(matrix)((values, matrix.indices.copy(), matrix.indptr.copy()), shape=matrix.shape)
    part.eliminate_zeros()
    return part
