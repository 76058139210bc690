"""Doublet scores by simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Obs, Slot, Uns, X, available, write_all
from scdiffx._steps import Plan, Step, Write, apply, public
from scdiffx.ops._scrublet import threshold_between_modes

if TYPE_CHECKING:
    from anndata import AnnData


@public
def scrublet(
    adata: AnnData | Plan,
    *,
    batch_key: str | None = None,
    sim_doublet_ratio: float = 2.0,
    expected_doublet_rate: float = 0.05,
    n_prin_comps: int = 30,
    n_neighbors: int | None = None,
    threshold: float | None = None,
    temperature: float = 0.0,
    layer: str | None = None,
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Score cells by the simulated doublets in their neighbourhood (Scrublet).

    Doublets are simulated as sums of the counts of two cells. Cells and doublets are projected on the principal
    components of the z-scored, depth-normalised variable genes of the cells, and the share of doublets among the
    nearest neighbours becomes a score. The same workflow as ``sc.pp.scrublet`` with its defaults.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts, or a plan.
    batch_key
        Column of `adata.obs`: each batch is scored by itself, as doublets form within one. Not in a plan.
    sim_doublet_ratio
        Simulated doublets for each cell.
    expected_doublet_rate
        Expected share of doublets, between 0 and 1. Scales the scores, and hardly changes their order.
    n_prin_comps
        Number of principal components.
    n_neighbors
        Neighbours among the cells alone; default half the square root of the number of cells.
    threshold
        Score above which a cell is called a doublet; default the minimum between the two modes of the scores of the
        simulated doublets. Without two modes there is a warning, and no cell is called.
    temperature
        0 counts neighbours, as the paper does. Above 0 (0.1, say), votes fade over this share of the distance to the
        last neighbour, and in a plan the scores are differentiable.
    layer
        Layer with the counts, instead of `X`.
    random_state, rng
        Seed of the simulation; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["doublet_score"]` : float64 (cells,)
        Score in [0, 1].
    `adata.obs["predicted_doublet"]` : bool (cells,)
        Whether it is above the threshold.
    `adata.uns["scrublet"]` : dict
        `doublet_scores_sim` (doublets,), `doublet_parents` (doublets, 2), `parameters`, and `threshold` if there is
        one; with `batch_key` one such entry for each batch under `batches`, and `batched_by`.

    Raises
    ------
    ValueError
        If a number is out of range, values are negative or not finite, or too few genes vary.
    KeyError
        If `batch_key` or `layer` does not exist.

    References
    ----------
    Wolock et al. (2019), Scrublet: computational identification of cell doublets in single-cell transcriptomic data.
    """
    if not 0 < expected_doublet_rate < 1:
        raise ValueError(f"expected_doublet_rate={expected_doublet_rate!r} must lie between 0 and 1")
    for name, value in {"sim_doublet_ratio": sim_doublet_ratio, "n_prin_comps": n_prin_comps}.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be greater than 0")
    if n_neighbors is not None and n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors!r} must be at least 1")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature!r} must not be negative")
    seed = as_seed(one_rng(rng, random_state))
    data = adata.adata if isinstance(adata, Plan) else adata
    if data.n_obs == 1:
        raise ValueError("`adata` has one cell: doublets are sums of two")
    parameters = {
        "expected_doublet_rate": expected_doublet_rate,
        "sim_doublet_ratio": sim_doublet_ratio,
        "n_neighbors": n_neighbors,
        "random_state": seed,
    }

    def called(scores: np.ndarray, simulated: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        limit = threshold_between_modes(simulated) if threshold is None else float(threshold)
        if limit is None:
            warn("the scores of simulated doublets have no two modes: no cell is called; pass `threshold=`")
            return np.zeros(len(scores), bool), {}
        return scores > limit, {"threshold": limit}

    def notes(op: ops.Scrublet, result: ops.ScrubletResult, args: Any) -> Mapping[Slot, Any]:
        scores, simulated = (np.asarray(s, np.float64) for s in (result.score, result.simulated))
        doublets, found = called(scores, simulated)
        used = parameters | {"n_neighbors": round(0.5 * np.sqrt(len(scores))) if n_neighbors is None else n_neighbors}
        entry = {
            "doublet_scores_sim": simulated,
            "doublet_parents": np.asarray(op.parents, np.int64),
            "parameters": used,
        }
        return {Obs("predicted_doublet"): doublets, Uns("scrublet"): entry | found}

    step = Step(
        "scrublet",
        ops.Scrublet(
            n_comps=n_prin_comps,
            n_neighbors=n_neighbors,
            doublet_ratio=float(sim_doublet_ratio),
            rate=float(expected_doublet_rate),
            temperature=float(temperature),
        ),
        reads=(X(layer, counts=True),),
        writes=(Write(Obs("doublet_score"), lambda op, result: result.score, np.float64),),
        message="Running Scrublet",
        notes=notes,
        rng=seed,
    )
    if batch_key is None:
        return apply(adata, step, copy=copy)
    if isinstance(adata, Plan):
        raise ValueError("batch_key= cannot be used on a plan: plan one batch at a time")
    return _by_batch(adata, step, batch_key, copy)


def _by_batch(adata: AnnData, step: Step, batch_key: str, copy: bool) -> AnnData | None:
    """Each batch by itself; everything is written at the end."""
    if batch_key not in adata.obs:
        raise KeyError(f"batch_key={batch_key!r} is not in `adata.obs`. Available: {available(adata.obs)}")
    batches = adata.obs[batch_key]
    if batches.isna().any():
        raise ValueError(f"`adata.obs[{batch_key!r}]` has cells without a batch")
    score, doublet, entries = np.zeros(adata.n_obs), np.zeros(adata.n_obs, bool), {}
    for batch in np.unique(batches):
        mask = (batches == batch).to_numpy()
        if mask.sum() < 2:
            raise ValueError(f"batch {batch!r} of `adata.obs[{batch_key!r}]` has one cell: doublets are sums of two")
        part = adata[mask].copy()
        apply(part, step)
        score[mask], doublet[mask] = part.obs["doublet_score"], part.obs["predicted_doublet"]
        entries[str(batch).replace("/", "|")] = part.uns["scrublet"]
    target = adata.copy() if copy else adata
    entry = {"batches": entries, "batched_by": batch_key}
    write_all(target, {Obs("doublet_score"): score, Obs("predicted_doublet"): doublet, Uns("scrublet"): entry})
    return target if copy else None
