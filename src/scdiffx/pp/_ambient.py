"""Removal of ambient RNA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Obs, Slot, Uns, Var, X, available, check_counts, is_anndata, matrix_of, warn_if_not_counts
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

_KEY = "decontaminated"


@public
def remove_ambient(
    adata: AnnData | Plan,
    *,
    empty_profile: np.ndarray | AnnData | None = None,
    empty_max_counts: int = 100,
    groupby: str | None = None,
    contamination: float | None = None,
    integers: bool = False,
    layer: str | None = None,
    key_added: str | None = None,
    random_state: Any = None,
    rng: Any = None,
    copy: bool = False,
) -> AnnData | None:
    """Estimate each cell's share of ambient RNA, and take it out of the counts.

    A cell's molecules are a mixture of its cluster's and of the soup's that every droplet holds. How much soup there is
    in a cluster is read from genes that are specific to other clusters, as by SoupX; how a cell deviates from its
    cluster, from all genes at once; and which molecules of a cell are soup follows from the mixture. Native and
    removed counts add up to the observed ones exactly, none is negative, and what is 0 stays 0. Cells of one channel
    share a soup: call the function for each channel by itself.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts of cells, empty droplets taken out, or a plan.
    empty_profile
        The soup: counts or shares of all genes in empty droplets, or an AnnData of all droplets, of which those that
        are not in `adata` and have counts, but at most `empty_max_counts`, are taken as empty. By default the average
        of the cells, which is a fair guess of what leaked from them.
    empty_max_counts
        Most counts of an empty droplet.
    groupby
        Column of `adata.obs` with clusters or cell types; by default Leiden clusters are found for the purpose.
    contamination
        Average ambient fraction, if it is known; by default each cluster's is estimated.
    integers
        Whether corrected counts are whole numbers, rounded at random with the sums over cells kept within 1, instead
        of expectations.
    layer
        Layer with the counts, instead of `X`.
    key_added
        Name of the layer and of the entry of `uns`, and prefix of the others, instead of "decontaminated" and
        "ambient".
    random_state, rng
        Seed of the clusters and of the rounding.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers["decontaminated" | key_added]` : float32 (cells, genes), sparse if the counts are
        Native counts.
    `adata.obs["ambient_fraction" | f"{key_added}_fraction"]` : float32 (cells,)
        Ambient share of the cell's molecules, in [0, 1).
    `adata.var["ambient_profile" | f"{key_added}_profile"]` : float32 (genes,)
        The soup's composition, which sums to 1.
    `adata.uns["ambient" | key_added]` : dict
        `params`; the ambient fraction `level` of each cluster, with their names as `groups` if `groupby` is given; and
        `concentration`, how closely cells keep to it (the inverse of their squared relative deviation).

    Raises
    ------
    ValueError
        If `empty_profile` does not fit the genes or holds no counts, a number is out of range, a cell has no group,
        there are fewer than ten cells to cluster, `integers` is asked of other numbers, or values are negative or not
        finite.
    KeyError
        If `layer`, `groupby` or genes of the AnnData of droplets do not exist.
    TypeError
        If `empty_profile` is something else.

    Warns
    -----
    UserWarning
        If no gene is specific enough to a cluster to tell native from ambient; then nothing is removed.

    References
    ----------
    Young and Behjati (2020), SoupX removes ambient RNA contamination from droplet-based single-cell RNA sequencing
    data. Yang et al. (2020), Decontamination of ambient RNA in single-cell RNA-seq with DecontX.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.remove_ambient(adata, groupby="bulk_labels")
    >>> adata.layers["decontaminated"].shape, bool((adata.obs["ambient_fraction"] < 1).all())
    ((150, 120), True)
    """
    seed = as_seed(one_rng(rng, random_state))
    data = adata.adata if isinstance(adata, Plan) else adata
    if contamination is not None and not 0 <= contamination < 1:
        raise ValueError(f"contamination={contamination!r} must lie between 0 and 1")
    groups = _group_names(data, groupby)
    if not isinstance(adata, Plan):
        _check_counts(matrix_of(adata, layer), integers)
    soup = _soup(data, empty_profile, empty_max_counts)
    name, prefix = (_KEY, "ambient") if key_added is None else (key_added, key_added)
    params: dict[str, Any] = {"integers": integers, "random_state": seed, "empty_profile": _described(empty_profile)}
    given = {"groupby": groupby, "contamination": contamination, "layer": layer}
    params |= {key: value for key, value in given.items() if value is not None}

    def check(op: ops.RemoveAmbient, result: ops.RemoveAmbientResult) -> None:
        if contamination is None and not np.asarray(op.level).any():
            warn(
                "no ambient RNA was found: no gene shows it that is specific to some of the clusters. Nothing is "
                "removed. If there are better clusters pass `groupby=`; if the fraction is known, `contamination=`."
            )

    def notes(op: ops.RemoveAmbient, result: ops.RemoveAmbientResult, args: Any) -> Mapping[Slot, Any]:
        entry: dict[str, Any] = {"params": params, "level": np.asarray(op.level, np.float64)}
        entry["concentration"] = float(np.asarray(op.concentration))
        if groups is not None:
            entry["groups"] = groups
        return {Uns(prefix): entry}

    step = Step(
        "remove_ambient",
        ops.RemoveAmbient(ambient=soup, level=contamination, seed=seed if integers else None),
        reads=(X(layer, counts=True), None if groupby is None else Obs(groupby, codes=True)),
        writes=(
            Write(X(name, like=X(layer)), lambda op, result: result.corrected, np.float32),
            Write(Obs(f"{prefix}_fraction"), lambda op, result: result.fraction, np.float32),
            Write(Var(f"{prefix}_profile"), lambda op, result: op.ambient, np.float32),
        ),
        message="removing ambient RNA",
        notes=notes,
        check=check,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _check_counts(matrix: Any, integers: bool) -> None:
    if not integers:
        warn_if_not_counts(matrix, "remove_ambient")
        return
    values = matrix.data if sp.issparse(matrix) else matrix
    if not (np.trunc(values) == values).all() and np.isfinite(values).all():
        raise ValueError("integers=True needs counts that are integers, but others were found")


def _group_names(data: AnnData, groupby: str | None) -> np.ndarray | None:
    if groupby is None:
        return None
    if groupby not in data.obs:
        raise KeyError(f"groupby={groupby!r} is not in `adata.obs`. Available: {available(data.obs)}")
    missing = data.obs[groupby].isna().to_numpy()
    if missing.any():
        raise ValueError(f"`adata.obs[{groupby!r}]` is missing for {missing.sum()} of {len(missing)} cells")
    used = data.obs[groupby].astype("category").cat.categories
    return np.asarray([str(value) for value in used], dtype=object)


def _described(empty_profile: Any) -> str:
    if empty_profile is None:
        return "average cell"
    return "droplets" if is_anndata(empty_profile) else "given"


def _soup(data: AnnData, empty_profile: Any, most: int) -> Any:
    """Shares of the genes in the soup, or None for the average cell."""
    if empty_profile is None:
        return None
    if is_anndata(empty_profile):
        counts = _of_droplets(data, empty_profile, most)
    elif isinstance(empty_profile, str | bytes | Mapping):
        kind = type(empty_profile).__name__
        raise TypeError(f"empty_profile is a {kind}: pass an array (genes,) or an AnnData of droplets")
    else:
        counts = np.asarray(empty_profile, np.float64)
        if counts.shape != (data.n_vars,):
            raise ValueError(f"empty_profile has shape {counts.shape}, but `adata` has {data.n_vars} genes")
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum() > 0:
        raise ValueError("empty_profile must hold numbers of at least 0, with a sum above 0")
    return np.asarray(counts / counts.sum(), np.float64)


def _of_droplets(data: AnnData, droplets: AnnData, most: int) -> np.ndarray:
    if most < 1:
        raise ValueError(f"empty_max_counts={most!r} must be at least 1")
    if not (data.var_names.is_unique and droplets.var_names.is_unique):
        raise ValueError("gene names are not unique; call `var_names_make_unique()` on both AnnData objects first")
    index = droplets.var_names.get_indexer(data.var_names)
    if (index < 0).any():
        names = list(data.var_names[index < 0][:5])
        raise KeyError(f"{(index < 0).sum()} genes of `adata` are not among the droplets' genes, such as {names}")
    matrix = matrix_of(droplets)
    check_counts(matrix, droplets.obs_names, droplets.var_names)
    total = np.asarray(matrix.sum(1), np.float64).ravel()
    empty = (total > 0) & (total <= most) & ~droplets.obs_names.isin(data.obs_names)
    if not empty.any():
        raise ValueError(f"empty_profile has no droplet with 1 to {most} counts that is not in `adata`")
    return np.asarray(matrix[np.flatnonzero(empty)].sum(0), np.float64).ravel()[index]
