"""Standard errors of a plan's output from counting noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx._calls import analysis, replay
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import Timer, progress_bar
from scdiffx._slots import Obs, Obsm, X, check_counts, matrix_of, write_all
from scdiffx._steps import Plan
from scdiffx.tl._attribution import column_of

if TYPE_CHECKING:
    from anndata import AnnData

_METHODS = ("thinning",)


@analysis
def uncertainty(
    adata: Plan,
    target: str,
    *,
    column: int | str | None = None,
    method: str = "thinning",
    n_replicates: int = 20,
    layer: str | None = None,
    key_added: str | None = None,
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
    progress: bool = True,
) -> AnnData | None:
    """Say how far an output of a plan would move if the molecules were counted again.

    The whole plan is run on replicates that keep each molecule with probability 1/2, one after another.

    Parameters
    ----------
    adata
        A plan that computes the target from counts. The results are written to its AnnData; nothing else is.
    target
        Column of `obs`, or key of `obsm`, that the plan writes.
    column
        Which column of an `obsm` entry: a number, or the name of a fate.
    method
        "thinning" is the only one.
    n_replicates
        Number of thinned replicates, at least 2. The standard error of a standard error from n replicates is about
        1 / sqrt(2 n) of it: a sixth with the default.
    layer
        Layer of the counts that the plan starts from, rather than `X`.
    key_added
        Column of `obs` to write.
    random_state, rng
        Seed of the thinning; give one of the two. Default 0.
    copy
        Return a copy instead of writing to the plan's AnnData.
    progress
        Whether to show a progress bar.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["<target>_se" | key_added]` : float32 (cells,)
        Standard error, in units of the target; "<target>_<column>_se" with a column. NaN for cells where fewer than two
        replicates have a finite target.

    Raises
    ------
    TypeError
        If `adata` is not a plan.
    KeyError
        If the plan does not write the target, or a layer or column does not exist.
    ValueError
        If the plan does not read the counts, they are not whole numbers of at least 0, or a setting is not usable.

    Notes
    -----
    If the counts are Poisson about a cell's expression and the output is one that more depth makes more precise, not
    larger, its variance V is inversely proportional to depth as long as the noise is small. Given the counts, an output
    of a share f of the molecules then varies by V (1 / f - 1), which at f = 1/2 is V itself: the standard error is the
    standard deviation over the replicates. Larger shares need a factor, and failed when tried: at f = 0.8, nine of ten
    cells lay within one standard error, since the graph does not change in proportion to what is removed.

    Counting noise alone: neither the choice of cells nor of settings. Outputs whose sign or order is arbitrary
    (components, numbered clusters) vary for that reason as well, and totals are halved with the counts.

    References
    ----------
    Neufeld et al. (2024), Inference after latent variable estimation for single-cell RNA sequencing data (thinning).

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> plan = sd.plan(adata)
    >>> for step in (sd.pp.normalize_total, sd.pp.log1p, sd.pp.pca):
    ...     step(plan)
    >>> sd.tl.uncertainty(plan, "X_pca", column=0, n_replicates=2, progress=False)
    >>> bool((adata.obs["X_pca_0_se"] >= 0).all())
    True
    """
    if not isinstance(adata, Plan):
        raise TypeError("uncertainty runs a whole plan anew: pass one from `sd.plan(adata)`, not an AnnData")
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown. Available: {list(_METHODS)}")
    if n_replicates < 2:
        raise ValueError(f"n_replicates={n_replicates!r} must be at least 2")
    seed = as_seed(one_rng(rng, random_state))
    slot = adata.slot(target)
    if not isinstance(slot, Obs | Obsm) or not adata.writes(slot):
        raise KeyError(f"target={target!r} is not written by the plan to `obs` or `obsm`")
    if not any(s == X(layer) for step in adata.steps for s in step.reads):
        raise ValueError(f"the plan does not read {X(layer)}, so its molecules cannot be thinned")
    counts = _whole_counts(adata.adata, layer)
    timer = Timer(f"computing standard errors of {target}")
    values = []
    bar = progress_bar(n_replicates, "uncertainty", progress)
    for data in _thinned(adata.adata, counts, layer, n_replicates, seed):
        found: np.ndarray = np.asarray(replay(adata.calls, data).run()[2][slot], np.float64)
        values.append(found[:, column_of(target, column, found.shape[1], slot.columns)] if found.ndim == 2 else found)
        bar.update(1)
    bar.close()
    key = key_added if key_added is not None else f"{target}{'' if column is None else f'_{column}'}_se"
    written = adata.adata.copy() if copy else adata.adata
    write_all(written, {Obs(key): _spread(np.stack(values)).astype(np.float32)})
    timer.done(f"{key!r} (adata.obs)")
    return written if copy else None


def _whole_counts(data: AnnData, layer: str | None) -> sp.csr_matrix:
    matrix = matrix_of(data, layer)
    check_counts(matrix, data.obs_names, data.var_names)
    csr = sp.csr_matrix(matrix)
    if not np.array_equal(np.rint(csr.data), csr.data):
        raise ValueError(f"only whole molecules can be thinned, but {X(layer)} has fractions of counts")
    return csr


def _thinned(data: AnnData, counts: sp.csr_matrix, layer: str | None, n: int, seed: int) -> Iterator[AnnData]:
    """The AnnData with half of the molecules, n times."""
    generator = np.random.default_rng(seed)
    whole = counts.data.astype(np.int64)
    one = data.copy()
    for _ in range(n):
        kept = generator.binomial(whole, 0.5).astype(np.float32)
        X(layer).write(one, sp.csr_matrix((kept, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape))
        yield one


def _spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over the replicates that are finite; NaN where there are fewer than two."""
    finite = np.isfinite(values)
    n = finite.sum(0)
    mean = np.where(finite, values, 0).sum(0) / np.maximum(n, 1)
    squares = np.where(finite, np.where(finite, values, 0) - mean, 0) ** 2
    return np.where(n > 1, np.sqrt(squares.sum(0) / np.maximum(n - 1, 1)), np.nan)
