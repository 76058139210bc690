"""Data sets that are simulated or installed along with a dependency: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k_counts", "splatter"]

_TARGET = 1e4
_OBS = ["bulk_labels", "n_counts", "n_genes", "percent_mito"]
# What Splatter's parameters may be: the lowest and the highest value, and whether the lowest itself is allowed.
_RANGES = {
    "mean_shape": (0, np.inf, False),
    "mean_rate": (0, np.inf, False),
    "lib_loc": (-np.inf, 40, False),
    "lib_scale": (0, 20, True),
    "out_prob": (0, 1, True),
    "out_fac_loc": (-np.inf, 40, False),
    "out_fac_scale": (0, 20, True),
    "de_prob": (0, 1, True),
    "de_down_prob": (0, 1, True),
    "de_fac_loc": (-np.inf, 40, False),
    "de_fac_scale": (0, 20, True),
    "batch_fac_loc": (-np.inf, 40, False),
    "batch_fac_scale": (0, 20, True),
    "bcv_common": (0, 1e3, True),
    "bcv_df": (0, np.inf, False),
    "dropout_mid": (-np.inf, 1e3, False),
    "dropout_shape": (-np.inf, 1e3, False),
    "path_n_steps": (1, 1e5, True),
    "path_skew": (0, 1, True),
    "path_nonlinear_prob": (0, 1, True),
    "path_sigma_fac": (0, np.inf, True),
}


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
    >>> adata = sd.datasets.pbmc68k_counts()
    >>> adata.shape, int(adata.X.max())
    ((700, 765), 259)
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


def splatter(  # noqa: PLR0913, as many as Splatter has
    n_obs: int | None = None,
    n_vars: int = 10_000,
    *,
    batch_cells: Sequence[int] = (100,),
    mean_shape: float = 0.6,
    mean_rate: float = 0.3,
    lib_loc: float = 11.0,
    lib_scale: float = 0.2,
    out_prob: float = 0.05,
    out_fac_loc: float = 4.0,
    out_fac_scale: float = 0.5,
    group_prob: Sequence[float] = (1.0,),
    de_prob: float | Sequence[float] = 0.1,
    de_down_prob: float | Sequence[float] = 0.5,
    de_fac_loc: float | Sequence[float] = 0.1,
    de_fac_scale: float | Sequence[float] = 0.4,
    batch_fac_loc: float | Sequence[float] = 0.1,
    batch_fac_scale: float | Sequence[float] = 0.1,
    bcv_common: float = 0.1,
    bcv_df: float = 60.0,
    dropout_mid: float | None = None,
    dropout_shape: float = -1.0,
    path_from: Sequence[int] | None = None,
    path_n_steps: int | Sequence[int] = 100,
    path_skew: float | Sequence[float] = 0.5,
    path_nonlinear_prob: float | Sequence[float] = 0.1,
    path_sigma_fac: float | Sequence[float] = 0.8,
    rng: Any = 0,
) -> AnnData:
    """Counts of cells and genes that do not exist, by Splatter's model, with the truth.

    Parameters have Splatter's names and default values. Where several are allowed there is one for each group (path) or
    batch; a number is for all.

    Parameters
    ----------
    n_obs
        Cells; default the sum of `batch_cells`. If given, they are dealt to the batches in proportion to `batch_cells`.
    n_vars
        Genes.
    batch_cells
        Cells of each batch. Default one batch of 100.
    mean_shape, mean_rate
        Gamma distribution of the mean counts.
    lib_loc, lib_scale
        Log-normal distribution of the molecules expected in a cell.
    out_prob, out_fac_loc, out_fac_scale
        Share of genes that are outliers, whose mean is the median mean times a log-normal factor.
    group_prob
        Probability of each group (path); sums to 1. Default one group.
    de_prob, de_down_prob, de_fac_loc, de_fac_scale
        Share of genes with another mean in a group, share of those whose factor is below 1, and log-normal distribution
        of the factors.
    batch_fac_loc, batch_fac_scale
        Log-normal distribution of the factors of each gene in a batch, half of them below 1.
    bcv_common, bcv_df
        The biological coefficient of variation is ``bcv_common + 1 / sqrt(expected count)``, times the root of
        `bcv_df` over a chi-squared number of `bcv_df` degrees of freedom for each gene; without that where it is inf.
    dropout_mid, dropout_shape
        A count whose rate is r is lost with probability ``sigmoid(dropout_shape * (log(r) - dropout_mid))``. Default
        None: no dropout.
    path_from
        Makes the groups paths: for each, 0 to begin at the origin, or the number (from 1) of the path at whose end it
        begins.
    path_n_steps, path_skew
        Steps of a path; where on it cells are (towards 1 near its beginning, towards 0 near its end).
    path_nonlinear_prob, path_sigma_fac
        Share of genes whose factor follows a random bridge rather than a line, and how far it strays.
    rng
        Seed.

    Returns
    -------
    AnnData
        `n_obs` cells x `n_vars` genes, `X` csr_matrix float32 of counts, with

        `obs["batch"]`, `obs["group"]` : categorical (cells,)
            "Batch1", ...; "Group1", ... or "Path1", ...
        `obs["step"]` : int64 (cells,)
            With paths: the step on the path, from 1.
        `obs["expected_library_size"]` : float64 (cells,)
            Molecules expected in the cell, before dropout.
        `var["base_mean"]`, `var["outlier_factor"]`, `var["mean"]` : float64 (genes,)
            Gamma mean, factor of outliers (1 for others), and the mean with outliers.
        `var["bcv"]` : float64 (genes,)
            `bcv_common` times the factor of the gene.
        `var["de_factor_<group>"]`, `var["batch_factor_<batch>"]` : float64 (genes,)
            With several: factors of groups, or of ends of paths relative to the origin, and of batches.
        `var["sigma_factor_<path>"]` : float64 (genes,)
            With paths: `path_sigma_fac` for genes that follow a bridge, else 0.

    Raises
    ------
    ValueError
        If a parameter is out of range or there are too few or too many of one, naming it.

    References
    ----------
    Zappia et al. (2017), Splatter: simulation of single-cell RNA sequencing data.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.splatter(60, 100, group_prob=[0.6, 0.4], rng=1)
    >>> adata.shape, list(adata.obs["group"].cat.categories)
    ((60, 100), ['Group1', 'Group2'])
    >>> branching = sd.datasets.splatter(60, 100, group_prob=[0.4, 0.3, 0.3], path_from=[0, 1, 1])
    >>> list(branching.obs["group"].cat.categories)
    ['Path1', 'Path2', 'Path3']
    """
    given = dict(locals())
    parameters = {name: given[name] for name in _RANGES} | {"bcv_trend": 1.0}
    import anndata
    import pandas as pd

    from scdiffx._core.random import as_seed
    from scdiffx.ops._simulate import drawn_counts
    from scdiffx.ops._splatter import new_genes, path_order, per, step_probabilities

    seed = as_seed(rng)
    _check_splatter(parameters, n_obs=n_obs, n_vars=n_vars, batch_cells=batch_cells, group_prob=group_prob)
    probability = np.asarray(group_prob, dtype=np.float64)
    if path_from is not None:
        if len(path_from) != len(probability):
            raise ValueError(
                f"path_from={path_from!r} must be {len(probability)} numbers, as group_prob={group_prob!r}"
            )
        path_order(path_from)
    generator = np.random.default_rng([seed, 1])
    groups = [f"{'Group' if path_from is None else 'Path'}{i + 1}" for i in range(len(probability))]
    batches = [f"Batch{i + 1}" for i in range(len(batch_cells))]
    op, truth = new_genes(generator, n_vars, parameters, groups=groups, batches=batches, path_from=path_from)
    cells = np.asarray(batch_cells)
    n = int(cells.sum()) if n_obs is None else n_obs
    batch = np.searchsorted(np.cumsum(cells), (np.arange(n) + 0.5) * cells.sum() / n).astype(np.int32)
    group = generator.choice(len(probability), n, p=probability).astype(np.int32)
    state, steps = group, None
    if path_from is not None:
        counts = per(path_n_steps, len(groups), "path_n_steps").astype(int)
        skew = per(path_skew, len(groups), "path_skew")
        steps = np.zeros(n, np.int64)
        for i in range(len(groups)):
            here = group == i
            steps[here] = generator.choice(counts[i], here.sum(), p=step_probabilities(counts[i], skew[i]))
        state = (np.concatenate([[0], np.cumsum(counts)])[group] + steps).astype(np.int32)
    counts, library = drawn_counts(op, state, batch, seed)
    adata = anndata.AnnData(counts)
    adata.obs_names = [f"Cell{i + 1}" for i in range(n)]
    adata.var_names = [f"Gene{i + 1}" for i in range(n_vars)]
    adata.obs["batch"] = pd.Categorical.from_codes(batch, batches)
    adata.obs["group"] = pd.Categorical.from_codes(group, groups)
    if steps is not None:
        adata.obs["step"] = steps + 1
    adata.obs["expected_library_size"] = library
    for name, column in truth.items():
        adata.var[name] = column
    return adata


def _check_splatter(parameters: dict[str, Any], **sizes: Any) -> None:
    for name, (low, high, inclusive) in _RANGES.items():
        if name == "dropout_mid" and parameters[name] is None:
            continue
        values = np.asarray(parameters[name], dtype=np.float64)
        if not ((values >= low if inclusive else values > low) & (values <= high)).all():
            bound = "at least" if inclusive else "greater than"
            raise ValueError(f"{name}={parameters[name]!r} must be {bound} {low} and at most {high}")
    for name in ("n_obs", "n_vars"):
        if sizes[name] is not None and sizes[name] < 1:
            raise ValueError(f"{name}={sizes[name]!r} must be at least 1")
    cells = np.asarray(sizes["batch_cells"])
    if cells.ndim != 1 or not len(cells) or (cells < 1).any():
        raise ValueError(
            f"batch_cells={sizes['batch_cells']!r} must be numbers of cells of at least 1, one for each batch"
        )
    probability = np.asarray(sizes["group_prob"], dtype=np.float64)
    if probability.ndim != 1 or not (probability >= 0).all() or abs(probability.sum() - 1) > 1e-6:
        raise ValueError(f"group_prob={sizes['group_prob']!r} must be numbers of at least 0 that sum to 1")
