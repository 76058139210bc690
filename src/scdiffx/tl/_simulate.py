"""Cells simulated after the ones at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import Timer, warn
from scdiffx._slots import available, check_counts, matrix_of
from scdiffx._steps import Plan
from scdiffx.ops._simulate import drawn_counts
from scdiffx.ops._simulate_estimates import Estimates, estimated
from scdiffx.ops._splatter import new_genes

if TYPE_CHECKING:
    from anndata import AnnData


@public
def simulate(
    adata: AnnData,
    n_obs: int | None = None,
    *,
    groupby: str | None = None,
    batch_key: str | None = None,
    path_key: str | None = None,
    path_n_steps: int = 20,
    layer: str | None = None,
    n_vars: int | None = None,
    dropout: bool = False,
    random_state: Any = None,
    rng: Any = None,
) -> AnnData:
    """Simulate cells after the given ones with Splatter's model, with the truth that real cells lack.

    Parameters of the model are estimated from the counts. By default each gene keeps its own mean, variation and
    factors, so that data are matched gene by gene; with `n_vars`, new genes are drawn from the distributions that
    Splatter assumes, fitted to those of the data.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with counts. Nothing is written to it.
    n_obs
        Cells to simulate; default as many as there are.
    groupby
        Categorical or string column of `obs`, whose groups differ in their means. Default one group.
    batch_key
        Column of `obs` with batches, whose factors multiply those of the groups.
    path_key
        Numeric column of `obs`, a pseudotime, along which means change: groups are paths then.
    path_n_steps
        Steps of each path, which hold equal numbers of its cells.
    layer
        Layer with counts; default `X`.
    n_vars
        Draw so many new genes. Default None: the genes of the data. Not with paths.
    dropout
        Estimate a logistic dropout beside the negative binomial. Off by default: counts of molecules rarely need it.
    random_state, rng
        Seed of the simulation; give one of the two. Default 0.

    Returns
    -------
    A new AnnData, cells x genes, with

    `X` : csr_matrix float32
        Simulated counts.
    `obs[groupby]`, `obs[batch_key]` : categorical (cells,)
        Drawn in the joint proportions of the data.
    `obs[path_key]`, `obs["step"]` : float64, int64 (cells,)
        With paths: the pseudotime, and the step of the path from 1.
    `obs["expected_library_size"]` : float64 (cells,)
        Molecules expected in the cell, before dropout.
    `var["mean"]` : float64 (genes,)
        Mean count in a cell of median size, before factors.
    `var["bcv"]` : float64 (genes,)
        Biological coefficient of variation; with `n_vars`, the part that does not depend on the mean.
    `var["de_factor_<group>"]`, `var["batch_factor_<batch>"]` : float64 (genes,)
        Without paths: what the mean is multiplied by ("/" in names becomes "|").
    `varm["path_factor"]` : float32 (genes, steps of all paths)
        With paths: the same for each step, path by path; ``uns["simulate"]["path"]`` and ``["step"]`` say which.
    `var["base_mean"]`, `var["outlier_factor"]` : float64 (genes,)
        With `n_vars`: the mean before outliers, and the factor of outliers.
    `uns["simulate"]` : dict
        `params`; `groups` and `batches`; `splatter`, the fitted parameters by Splatter's names: `mean_shape`,
        `mean_rate`, `out_prob`, `out_fac_loc`, `out_fac_scale`, `lib_loc`, `lib_scale`, `bcv_common`, `bcv_trend` (1 in
        Splatter), `bcv_df`, and where there are any `group_prob`, `de_prob`, `de_down_prob`, `de_fac_loc`,
        `de_fac_scale`, `batch_prob`, `batch_fac_loc`, `batch_fac_scale`, `dropout_mid`, `dropout_shape`.

    Raises
    ------
    TypeError
        If `adata` is a plan.
    KeyError
        If `groupby`, `batch_key` or `layer` does not exist.
    ValueError
        If values are negative or not finite, labels are missing, a number is out of range, or fewer than two cells have
        molecules.

    Notes
    -----
    *Means*: shares of all molecules; factors by iterative proportional fitting, shrunk towards 1 by the weight of one
    cell. *Library sizes*: log-normal in each group and batch, less the noise of the counts. *Variation*: dispersions by
    moments given these, shrunk towards their trend over the mean, ``(bcv_common + bcv_trend / sqrt(mean))**2``, as far
    as they are uncertain. *Dropout*: the logistic curve under which genes of the observed means and variances come
    nearest to the observed zeros; none unless that halves the distance. *Gene means*: a gamma by maximum likelihood
    without outliers, those more than two median absolute deviations above the median logarithm. *Factors of groups*:
    genes that differ at a false discovery rate of 5 %.

    Genes are independent given group, batch and library size, so correlation within a group is not simulated: pass fine
    groups, a clustering, to come nearer to the data.

    References
    ----------
    Zappia et al. (2017), Splatter: simulation of single-cell RNA sequencing data. Robinson and Smyth (2007), Moderated
    statistical tests for assessing differences in tag abundance (dispersions that are shrunk).

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> simulated = sd.tl.simulate(adata, n_obs=50, groupby="bulk_labels")
    >>> simulated.shape
    (50, 120)
    """
    import anndata

    if isinstance(adata, Plan):
        raise TypeError("simulate cannot be part of a plan: it makes new cells; call it on an AnnData")
    seed = as_seed(one_rng(rng, random_state))
    for name, value in {"n_obs": n_obs, "n_vars": n_vars}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    matrix = matrix_of(adata, layer)
    check_counts(matrix, adata.obs_names, adata.var_names)
    values = matrix.data if sp.issparse(matrix) else matrix
    if np.issubdtype(values.dtype, np.floating) and (values % 1 != 0).any():
        warn("`simulate` expects raw count data, but non-integers were found.")
    (groups, group), (batches, batch) = (
        _labels(adata, key, name) for key, name in ((groupby, "groupby"), (batch_key, "batch_key"))
    )
    state, path, step = (group, None, None) if path_key is None else _steps(adata, path_key, group, path_n_steps)
    if path is not None and n_vars is not None:
        raise ValueError(
            f"n_vars={n_vars!r} cannot be combined with path_key={path_key!r}: paths are those of the genes"
        )
    timer = Timer("simulating cells")
    fitted = estimated(sp.csr_matrix(matrix), state, batch, dropout=dropout)
    if path is not None:
        fitted = _of_paths(fitted)
    generator = np.random.default_rng([seed, 1])
    if n_vars is None:
        op, truth = _same_genes(fitted, groups, batches)
    else:
        op, truth = new_genes(generator, n_vars, fitted.splatter, groups=groups, batches=batches)
    # A cell's group and batch are those of a random cell.
    source = generator.integers(0, adata.n_obs, adata.n_obs if n_obs is None else n_obs)
    counts, library = drawn_counts(op, state[source], batch[source], seed)
    made = anndata.AnnData(counts)
    made.obs["expected_library_size"] = library
    for key in (groupby, batch_key):
        if key is not None:
            labels = adata.obs[key].astype("category").cat.remove_unused_categories()
            made.obs[key] = labels.iloc[source].array
    made.var_names = adata.var_names.copy() if n_vars is None else [f"Gene{i + 1}" for i in range(n_vars)]
    for key, column in truth.items():
        made.var[key] = column
    made.uns["simulate"] = {
        "params": {
            "groupby": groupby or "",
            "batch_key": batch_key or "",
            "path_key": path_key or "",
            "new_genes": n_vars is not None,
            "dropout": dropout,
            "random_state": seed,
        },
        "groups": np.asarray(groups, dtype=object),
        "batches": np.asarray(batches, dtype=object),
        "splatter": fitted.splatter,
    }
    if path is not None and step is not None:
        made.obs[path_key] = adata.obs[path_key].to_numpy(np.float64)[source]
        made.obs["step"] = step[state[source]] + 1
        made.varm["path_factor"] = np.asarray(jnp.ones((1, made.n_vars)) if op.factor is None else op.factor).T.copy()
        made.uns["simulate"] |= {"path": np.asarray(groups or ["all"], dtype=object)[path], "step": step + 1}
    timer.done()
    return made


def _labels(adata: AnnData, key: str | None, argument: str) -> tuple[list[str], np.ndarray]:
    """Names of the groups, with "|" for "/", and the group of each cell."""
    if key is None:
        return [], np.zeros(adata.n_obs, np.int32)
    if key not in adata.obs:
        raise KeyError(f"{argument}={key!r} is not in `adata.obs`. Available: {available(adata.obs)}")
    labels = adata.obs[key].astype("category").cat.remove_unused_categories().cat
    codes = labels.codes.to_numpy()
    if (codes < 0).any():
        raise ValueError(f"{argument}={key!r} is missing for {(codes < 0).sum()} of {adata.n_obs} cells")
    return [str(name).replace("/", "|") for name in labels.categories], codes.astype(np.int32)


def _steps(adata: AnnData, key: str, group: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The state of each cell, a step of its path; and of each state the path and the step, from 0."""
    if n < 1:
        raise ValueError(f"path_n_steps={n!r} must be at least 1")
    if key not in adata.obs:
        raise KeyError(f"path_key={key!r} is not in `adata.obs`. Available: {available(adata.obs)}")
    if adata.obs[key].dtype.kind not in "fiu":
        raise ValueError(f"path_key={key!r} must be numeric, got {adata.obs[key].dtype}")
    time = adata.obs[key].to_numpy(np.float64)
    if not np.isfinite(time).all():
        raise ValueError(f"path_key={key!r} is not finite for {(~np.isfinite(time)).sum()} of {len(time)} cells")
    step = np.zeros(len(time), np.int64)
    for g in np.unique(group):
        here = group == g
        # Cells of one value share a step.
        ordered = np.sort(time[here])
        step[here] = np.searchsorted(ordered, time[here]) * n // here.sum()
    code, state = np.unique(group * n + step, return_inverse=True)
    return state.astype(np.int32), code // n, code % n


def _of_paths(e: Estimates) -> Estimates:
    """Without what says how groups differ from each other, which steps of a path are not."""
    kept = {k: v for k, v in e.splatter.items() if not k.startswith(("de_", "group_"))}
    return e._replace(splatter=kept)


def _same_genes(e: Estimates, groups: list[str], batches: list[str]) -> tuple[ops.Simulate, dict[str, np.ndarray]]:
    """The operator of the estimates, and the truth of each gene as columns."""
    values = {name: value for name, value in e._asdict().items() if name != "splatter" and value is not None}
    truth = {"mean": e.mean, "bcv": e.bcv}
    for prefix, names, table in (("de", groups, e.factor), ("batch", batches, e.batch_factor)):
        if table is not None and len(names) == len(table):
            truth |= {f"{prefix}_factor_{name}": row for name, row in zip(names, table, strict=True)}
    return ops.Simulate(**{name: jnp.asarray(value, jnp.float32) for name, value in values.items()}), truth
