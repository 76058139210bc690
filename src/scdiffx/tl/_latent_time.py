from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Cosines, Distances, Genes, Obs, Slot, Var, X, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def latent_time(
    adata: AnnData | Plan,
    vkey: str = "velocity",
    *,
    min_likelihood: float = 0.1,
    min_confidence: float = 0.75,
    root_key: str | None = None,
    t_max: float | None = None,
    neighbors_key: str = "neighbors",
    copy: bool = False,
) -> AnnData | None:
    """Compute a time for each cell that its genes share, from the dynamical model.

    Times of the genes are counted from root cells: stationary states of the velocity graph's transitions backwards. A
    low percentile over the genes is their common time. scVelo's method.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) after `sd.tl.velocity` with ``mode="dynamical"`` and `sd.tl.velocity_graph`, or a
        plan.
    vkey
        Name of the velocities.
    min_likelihood
        Only genes of at least this likelihood count.
    min_confidence
        A cell whose time differs so much from its neighbours' that its confidence is below this does not count.
    root_key
        Column of `obs` that is 1 for root cells; by default these are found.
    t_max
        The largest time; default 1.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["latent_time"]` : float64 (cells,)
        Time, from 0 to `t_max` or 1.
    `adata.obs["velocity_pseudotime" | f"{vkey}_pseudotime"]` : float64 (cells,)
        Diffusion pseudotime on the velocity graph between root and end, in [0, 1]; nan where neither reaches.
    `adata.obs["root_cells", "end_points"]` : float64 (cells,)
        How much a cell is a root (those of `root_key`, where given) or an end, in [0, 1].

    Raises
    ------
    KeyError
        If the dynamical model, the velocity graph, or `root_key` is missing.
    ValueError
        If no gene is likely enough, there is no neighbour graph, or a number is not usable.

    Notes
    -----
    In a plan, the time is differentiable in the times of the genes; roots and ends are structure.

    References
    ----------
    Bergen et al. (2020), Generalizing RNA velocity to transient cell states through dynamical modeling.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :20].copy()
    >>> sd.pp.split_counts(adata, {"spliced": 0.75, "unspliced": 0.25})  # in place of measured layers
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.neighbors(adata, n_neighbors=9)
    >>> sd.tl.velocity(adata, mode="dynamical", min_r2=-1)
    >>> sd.tl.velocity_graph(adata)
    >>> sd.tl.latent_time(adata, min_likelihood=0)
    >>> bool(adata.obs["latent_time"].between(0, 1).all())
    True
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    plan = adata if isinstance(adata, Plan) else Plan(data)
    if t_max is not None and not (math.isfinite(t_max) and t_max > 0):
        raise ValueError(f"t_max={t_max!r} must be None or greater than 0")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence!r} must lie between 0 and 1")
    if not plan.has(X("fit_t")):
        hint = 'run `sd.tl.velocity(adata, mode="dynamical")` first'
        raise KeyError(f"'fit_t' is not in `adata.layers`. Available: {available(data.layers.keys())}; {hint}")
    graph = Cosines(f"{vkey}_graph")
    if not plan.has(graph):
        hint = "run `sd.tl.velocity_graph` first"
        raise KeyError(f"{graph.key!r} is not in `adata.uns`. Available: {available(data.uns)}; {hint}")
    if root_key is not None and not plan.has(Obs(root_key)):
        raise KeyError(f"root_key={root_key!r} is not in `adata.obs`. Available: {available(data.obs)}")
    step = Step(
        "latent_time",
        ops.LatentTime(
            min_likelihood=float(min_likelihood),
            min_confidence=float(min_confidence),
            t_max=1.0 if t_max is None else float(t_max),
        ),
        reads=(
            *_likely(plan, float(min_likelihood)),
            graph,
            Connectivities(neighbors_key),
            Distances(neighbors_key),
            None if root_key is None else Obs(root_key),
        ),
        writes=(
            Write(Obs("latent_time"), lambda op, result: result.latent_time, np.float64),
            Write(Obs(f"{vkey}_pseudotime"), lambda op, result: result.terminal.pseudotime, np.float64),
            Write(Obs("root_cells"), lambda op, result: result.terminal.root_cells, np.float64),
            Write(Obs("end_points"), lambda op, result: result.terminal.end_points, np.float64),
        ),
        message="computing latent time",
        check=_warn_without_root,
    )
    return apply(adata, step, copy=copy)


def _likely(plan: Plan, least: float) -> tuple[Slot, Slot | None]:
    """Times of the genes that are likely enough; in a plan that fits them, of all genes, with their likelihoods."""
    data = plan.adata
    if plan.writes(X("fit_t")) or "fit_likelihood" not in data.var:
        return X("fit_t"), Var("fit_likelihood") if plan.has(Var("fit_likelihood")) else None
    index = np.flatnonzero(np.nan_to_num(data.var["fit_likelihood"].to_numpy(np.float64), nan=-1) >= least)
    if not len(index):
        raise ValueError(f"no gene has a likelihood of at least min_likelihood={least}")
    return Genes(X("fit_t"), tuple(int(i) for i in index), check_others=False), None


def _warn_without_root(op: ops.LatentTime, result: ops.LatentTimeResult) -> None:
    if not (np.asarray(result.terminal.root_cells) > 1 - 1e-3).any():
        warn("No root cells were found. Consider `root_key=`, which improves the time.")
