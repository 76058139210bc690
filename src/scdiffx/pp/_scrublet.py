"""Doublet scores by simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Obs, Slot, Uns, X, available, write_all
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._scrublet import threshold_between_modes

if TYPE_CHECKING:
    from anndata import AnnData

METHODS: dict[str, Any] = {"knn": ops.Scrublet, "classifier": ops.DoubletClassifier}
_MORE_LIKELY_THAN_NOT = 0.5


@public
def scrublet(
    adata: AnnData | Plan,
    *,
    method: str = "knn",
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
    """Score cells by the simulated doublets in their neighbourhood (Scrublet), or by a classifier.

    Doublets are simulated as sums of the counts of two cells. With ``method="knn"``, cells and doublets are projected
    on the principal components of the z-scored, depth-normalised variable genes of the cells, and the share of doublets
    among the nearest neighbours becomes a score. The same workflow as ``sc.pp.scrublet`` with its defaults.

    With ``method="classifier"``, as in scDblFinder, logistic regression tells cells from simulated doublets, of which
    every other is thinned to the depth of a single cell. It sees depth, number of genes, the co-expression of genes
    that mostly exclude each other, the share of doublets in neighbourhoods of several sizes and principal components of
    the log-normalised genes. It is fitted three times, each time without the cells that looked most like doublets
    before. On planted doublets it finds clearly more than the neighbours alone.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts, or a plan.
    method
        "knn" or "classifier".
    batch_key
        Column of `adata.obs`: each batch is scored by itself, as doublets form within one. Not in a plan.
    sim_doublet_ratio
        Simulated doublets for each cell.
    expected_doublet_rate
        Expected share of doublets, between 0 and 1. Scales the scores, and hardly changes their order. For the
        classifier it is also the share of cells that are left out of the later fits.
    n_prin_comps
        Number of principal components.
    n_neighbors
        Neighbours among the cells alone; default half the square root of the number of cells. The classifier looks at
        an eighth, a quarter and half of them too.
    threshold
        Score above which a cell is called a doublet. By default, for neighbours the minimum between the two modes of
        the scores of the simulated doublets (without two modes there is a warning, and no cell is called); for the
        classifier 0.5, as its scores are probabilities: cells that are more likely doublets than not.
    temperature
        0 counts neighbours, as the papers do. Above 0 (0.1, say), votes fade over this share of the distance to the
        last neighbour, and in a plan the scores are differentiable. The classifier's are so in part at 0 too: through
        depth, components and the weights of the distances.
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
        Score in [0, 1]; the classifier's is the probability of a doublet.
    `adata.obs["predicted_doublet"]` : bool (cells,)
        Whether it is above the threshold.
    `adata.uns["scrublet"]` : dict
        `doublet_scores_sim` (doublets,), `doublet_parents` (doublets, 2), `parameters` (the classifier's with
        `method`), and `threshold` if there is one; with `batch_key` one such entry for each batch under `batches`, and
        `batched_by`.

    Raises
    ------
    ValueError
        If `method` is unknown, a number is out of range, values are negative or not finite, or too few genes vary.
    KeyError
        If `batch_key` or `layer` does not exist.

    References
    ----------
    Wolock et al. (2019), Scrublet: computational identification of cell doublets in single-cell transcriptomic data.
    Germain et al. (2022), Doublet identification in single-cell sequencing data using scDblFinder.
    Bais and Kostka (2020), scds: computational annotation of doublets in single-cell RNA sequencing data.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.scrublet(adata, threshold=0.2)
    >>> adata.uns["scrublet"]["doublet_scores_sim"].shape
    (300,)
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Available: {sorted(METHODS)}")
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
    parameters: dict[str, Any] = {
        "expected_doublet_rate": expected_doublet_rate,
        "sim_doublet_ratio": sim_doublet_ratio,
        "n_neighbors": n_neighbors,
        "random_state": seed,
    }
    parameters |= {} if method == "knn" else {"method": method}

    def notes(op: Any, result: Any, args: Any) -> Mapping[Slot, Any]:
        scores, simulated = (np.asarray(s, np.float64) for s in (result.score, result.simulated))
        doublets, found = _called(scores, simulated, method, threshold)
        used = parameters | {"n_neighbors": round(0.5 * np.sqrt(len(scores))) if n_neighbors is None else n_neighbors}
        entry = {
            "doublet_scores_sim": simulated,
            "doublet_parents": np.asarray(op.parents, np.int64),
            "parameters": used,
        }
        return {Obs("predicted_doublet"): doublets, Uns("scrublet"): entry | found}

    step = Step(
        "scrublet",
        METHODS[method](
            n_comps=n_prin_comps,
            n_neighbors=n_neighbors,
            doublet_ratio=float(sim_doublet_ratio),
            rate=float(expected_doublet_rate),
            temperature=float(temperature),
        ),
        reads=(X(layer, counts=True),),
        writes=(Write(Obs("doublet_score"), lambda op, result: result.score, np.float64),),
        message="Running Scrublet" if method == "knn" else "classifying doublets",
        notes=notes,
        rng=seed,
    )
    if batch_key is None:
        return apply(adata, step, copy=copy)
    if isinstance(adata, Plan):
        raise ValueError("batch_key= cannot be used on a plan: plan one batch at a time")
    return _by_batch(adata, step, batch_key, copy)


def _called(
    scores: np.ndarray, simulated: np.ndarray, method: str, threshold: float | None
) -> tuple[np.ndarray, dict[str, float]]:
    """Which cells are doublets, and the threshold if there is one."""
    if threshold is None:
        threshold = threshold_between_modes(simulated) if method == "knn" else _MORE_LIKELY_THAN_NOT
    if threshold is None:
        warn("the scores of simulated doublets have no two modes: no cell is called; pass `threshold=`")
        return np.zeros(len(scores), bool), {}
    return scores > threshold, {"threshold": float(threshold)}


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
