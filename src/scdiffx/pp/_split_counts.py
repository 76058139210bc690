"""Splitting the molecules of each cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import X, check_counts, matrix_of, write_all
from scdiffx._steps import Plan

if TYPE_CHECKING:
    from anndata import AnnData


@public
def split_counts(
    adata: AnnData,
    fractions: Mapping[str, float] | None = None,
    *,
    layer: str | None = None,
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
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
    random_state, rng
        Seed of the split; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers["fit"]`, `adata.layers["choose"]`, `adata.layers["test"]` : float32 (cells, genes), sparse if `X` is
        Counts; together they sum to the input. The names are those of `fractions`.

    Raises
    ------
    TypeError
        If `adata` is a plan.
    ValueError
        If values are not whole numbers of at least 0, or the shares do not sum to 1.

    References
    ----------
    Batson et al. (2019), Molecular cross-validation for single-cell RNA-seq; Neufeld et al. (2024), Inference after
    latent variable estimation for single-cell RNA sequencing data.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.split_counts(adata)
    >>> abs(adata.layers["fit"] + adata.layers["choose"] + adata.layers["test"] - adata.X).nnz
    0
    """
    if isinstance(adata, Plan):
        raise TypeError("split_counts cannot be part of a plan: call it on the AnnData before `sd.plan(adata)`")
    seed = as_seed(one_rng(rng, random_state))
    shares = {"fit": 0.6, "choose": 0.2, "test": 0.2} if fractions is None else dict(fractions)
    values = np.array(list(shares.values()), dtype=np.float64)
    if len(values) < 2 or not (values > 0).all() or abs(values.sum() - 1) > 1e-6:
        raise ValueError(f"fractions={shares!r} must be at least two shares greater than 0 that sum to 1")
    matrix = matrix_of(adata, layer)
    check_counts(matrix, adata.obs_names, adata.var_names)
    csr = sp.csr_matrix(matrix)
    rest = np.rint(csr.data).astype(np.int64)
    if not np.array_equal(rest, csr.data):
        raise ValueError("only whole molecules can be split, but `X` or the layer has fractions of counts")
    # Drawn cell by cell, whatever the format: the same seed gives the same molecules.
    generator = np.random.default_rng(seed)
    parts = {}
    left = 1.0
    for name, share in list(shares.items())[:-1]:
        parts[name] = generator.binomial(rest, min(share / left, 1.0))
        rest, left = rest - parts[name], left - share
    parts[list(shares)[-1]] = rest
    target = adata.copy() if copy else adata
    write_all(target, {X(name): _shaped(csr, part, matrix) for name, part in parts.items()})
    return target if copy else None


def _shaped(csr: sp.csr_matrix, values: np.ndarray, like: Any) -> Any:
    part = sp.csr_matrix((values.astype(np.float32), csr.indices.copy(), csr.indptr.copy()), shape=csr.shape)
    part.eliminate_zeros()
    return type(like)(part.asformat(like.format)) if sp.issparse(like) else part.toarray()
