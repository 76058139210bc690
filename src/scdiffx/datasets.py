"""Data sets that are installed along with a dependency: nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k_counts"]

_TARGET = 1e4
_OBS = ["bulk_labels", "n_counts", "n_genes", "percent_mito"]


def pbmc68k_counts() -> AnnData:
    """Raw counts of 700 human blood cells, recovered from the data set that scanpy ships.

    ``scanpy.datasets.pbmc68k_reduced()`` holds scaled values in `X`; its `.raw` holds ``log1p(1e4 * count / total)``
    rounded to three decimals, where `total` is the cell's number of molecules over all genes measured, kept in
    ``obs["n_counts"]``. So ``count = round(expm1(raw) * total / 1e4)``. This is exact: the rounding of the logarithm
    moves a count by at most 0.15, and every value found lies within 0.09 of a positive integer. The function checks
    the values, in case the file changes.

    Returns
    -------
    AnnData
        700 cells x 765 genes, `X` csr_matrix float32 of integers, with

        `obs["bulk_labels"]` : categorical (cells,)
            Cell types, assigned by the authors from sorted populations; colours in ``uns["bulk_labels_colors"]``.
        `obs["n_counts"]` : float32 (cells,)
            Molecules over all genes measured. The 765 genes are a selection, and hold a fifth of them.
        `obs["n_genes"]`, `obs["percent_mito"]` : (cells,)
            Genes detected and the mitochondrial share, over all genes.

    Raises
    ------
    RuntimeError
        If scanpy's file no longer holds what is described above.

    References
    ----------
    Zheng et al. (2017), Massively parallel digital transcriptional profiling of single cells.

    Examples
    --------
    >>> import scdiffx as sd
    >>> sd.datasets.pbmc68k_counts().X[:3, :5].toarray()  # doctest: +SKIP
    """
    import anndata
    import scanpy

    shipped = scanpy.datasets.pbmc68k_reduced()
    logged = sp.csr_matrix(shipped.raw.X, dtype=np.float64)
    total = shipped.obs["n_counts"].to_numpy(np.float64)
    values = np.expm1(logged.data) * np.repeat(total, np.diff(logged.indptr)) / _TARGET
    counts = np.round(values)
    if np.abs(values - counts).max() > 0.15 or counts.min() < 1:
        raise RuntimeError(
            f"the counts of pbmc68k_reduced cannot be recovered from scanpy {scanpy.__version__}: its file has changed"
        )
    matrix = sp.csr_matrix((counts.astype(np.float32), logged.indices, logged.indptr), shape=logged.shape)
    matrix.sort_indices()
    return anndata.AnnData(
        matrix,
        obs=shipped.obs[_OBS].copy(),
        var=shipped.raw.var[[]].copy(),
        uns={"bulk_labels_colors": [str(color) for color in shipped.uns["bulk_labels_colors"]]},
    )
