"""Hiding entries of a count matrix, to be predicted from what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import X, check_counts, matrix_of, write_all
from scdiffx._steps import Plan

if TYPE_CHECKING:
    from anndata import AnnData

_ROWS = 1024


@public
def mask_counts(
    adata: AnnData,
    fraction: float = 0.1,
    *,
    layer: str | None = None,
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Hide genes of each cell at random, so that they can be predicted from the others.

    Every entry of the matrix, zeros too, is hidden with the same probability, independently of all others. A plan that
    reads what is shown is judged on what is hidden by :func:`scdiffx.losses.masked_reconstruction`.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with counts.
    fraction
        Share of the entries to hide, between 0 and 1.
    layer
        Take the counts from this layer rather than `X`.
    random_state, rng
        Seed of the choice; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers["shown"]` : float32 (cells, genes), sparse CSR
        The counts, 0 where they are hidden.
    `adata.layers["hidden"]` : float32 (cells, genes), sparse CSR
        The counts that are hidden, and only these: its stored entries say which, and many of them are zeros.

    Raises
    ------
    TypeError
        If `adata` is a plan.
    ValueError
        If values are negative or not finite, or `fraction` does not lie between 0 and 1.

    References
    ----------
    Batson and Royer (2019), Noise2Self: blind denoising by self-supervision.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.mask_counts(adata, 0.1)
    >>> shown, hidden = adata.layers["shown"], adata.layers["hidden"]
    >>> abs(shown + hidden - adata.X).nnz, shown.multiply(hidden).nnz
    (0, 0)
    """
    if isinstance(adata, Plan):
        raise TypeError("mask_counts cannot be part of a plan: call it on the AnnData before `sd.plan(adata)`")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction!r} must lie between 0 and 1")
    generator = np.random.default_rng(as_seed(one_rng(rng, random_state)))
    matrix = matrix_of(adata, layer)
    check_counts(matrix, adata.obs_names, adata.var_names)
    csr = sp.csr_matrix(matrix)
    shown, hidden = [], []
    for start in range(0, csr.shape[0], _ROWS):
        block = csr[start : start + _ROWS].toarray().astype(np.float32)
        where = generator.random(block.shape) < fraction
        columns = np.nonzero(where)[1]
        starts = np.concatenate([[0], np.cumsum(where.sum(1))])
        hidden.append(sp.csr_matrix((block[where], columns, starts), shape=block.shape))
        shown.append(sp.csr_matrix(np.where(where, 0, block)))
    target = adata.copy() if copy else adata
    layers = {"shown": shown, "hidden": hidden}
    write_all(target, {X(name): sp.vstack(parts, format="csr") for name, parts in layers.items()})
    return target if copy else None
