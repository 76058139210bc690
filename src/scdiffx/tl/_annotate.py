"""Cell types from labelled cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Labels, Obs, Slot, Uns, X, available, matrix_of
from scdiffx._steps import Plan, Step, apply
from scdiffx.tl._annotate_markers import marker_step
from scdiffx.tl._annotate_scanvi import scanvi_step
from scdiffx.tl._annotation_model import (
    SUSPICIOUS,
    AnnotationModel,
    check_fit,
    known_labels,
    named_types,
    reference_model,
    type_writes,
    warn_if_counts,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

MODES = ("celltypist", "cellassign", "scanvi")
# Parameters that only some modes have.
_ONLY = {
    "penalty": ("celltypist",),
    "labels_key": ("celltypist", "scanvi"),
    "markers": ("cellassign",),
    "size_factors": ("cellassign",),
    "batch_key": ("cellassign", "scanvi"),
    "n_folds": ("celltypist", "scanvi"),
    "n_latent": ("scanvi",),
    "max_epochs": ("scanvi",),
}
_FOLDS = 3
# CellTypist's resolutions of clusters for the vote: for up to so many cells.
_RESOLUTIONS = ((5_000, 5), (20_000, 10), (40_000, 15), (100_000, 20), (200_000, 25))


@public
def annotate(
    adata: AnnData | Plan,
    mode: str = "celltypist",
    *,
    labels_key: str | None = None,
    reference: AnnData | AnnotationModel | str | Path | None = None,
    layer: str | None = None,
    markers: Mapping[str, Sequence[str]] | DataFrame | None = None,
    batch_key: str | None = None,
    size_factors: str | None = None,
    penalty: float | None = None,
    n_latent: int | None = None,
    max_epochs: int | None = None,
    threshold: float = 0.5,
    majority_voting: bool = False,
    over_clustering: str | None = None,
    neighbors_key: str = "neighbors",
    n_folds: int = _FOLDS,
    random_state: Any = None,
    key_added: str = "annotation",
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Name the types of cells, after those of labelled cells or by marker genes.

    ``mode="celltypist"``: CellTypist's logistic regression on standardised logarithms, as one multinomial model. Its
    probabilities are calibrated on labelled cells that were held out, and a cell unlike those of its most probable type
    is unassigned, however probable that type is among the others. Where many cells are labelled it is the first choice.

    ``mode="scanvi"``: scANVI, a variational autoencoder of counts in which the type is a latent variable, known for the
    cells with a label; the cells without one are trained on as well. It is for few labels and for several batches, and
    takes minutes: the autoencoder of :func:`scdiffx.pp.vae` is trained first, without labels, then all of it with them,
    and, to calibrate probabilities, anew without the labels of each fold.

    ``mode="cellassign"``: CellAssign's negative binomial mixture of the counts of marker genes; needs no labelled cell.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with logarithms of normalised values, as :func:`scdiffx.pp.normalize_total` with
        ``target_sum=1e4`` and :func:`scdiffx.pp.log1p` leave them; for the other modes with raw counts, for "scanvi" of
        variable genes at best; or a plan.
    mode
        "celltypist", "cellassign" or "scanvi".
    labels_key
        Column of `obs` with the known types. Without a `reference`, cells where it is missing are annotated from the
        others, which keep their labels. Not with a model as `reference`.
    reference
        Cells with labels, normalised alike: all cells of `adata` are annotated from these, by the genes of both. Their
        cells without a label do not count. Or a model of :func:`annotation_model`, or the folder it was saved to. For
        "cellassign" cells with counts, to which the parameters are fitted in place of those of `adata`; labels are not
        needed. For "scanvi" an AnnData: it is trained on the labelled cells of the reference and all of `adata`
        together, where no batch of one is a batch of the other. Then not in a plan.
    layer
        Layer with the values, here and in the reference, instead of `X`.
    markers
        For "cellassign": the marker genes of each type, as a dictionary of lists, or as a table of 0 and 1, genes (its
        index) x types. A dictionary stands for its types and, as in the R package, cells of no type, which raise no
        gene and are "unassigned"; a table has these only where one of its columns is empty.
    batch_key
        Column of `obs` with batches. For "cellassign", the level of each marker differs between them; not with a
        reference. For "scanvi", the latent space is free to ignore them; in the reference too.
    size_factors
        For "cellassign": column of `obs`, here and in the reference, with what to multiply means of cells by. By
        default total counts over all genes, divided by their mean among the fitted cells.
    penalty
        For "celltypist": strength of the data against the ridge, scikit-learn's and CellTypist's `C` (1 in CellTypist).
        By default that of 0.001, 0.01, 0.1 and 1 which predicts held-out cells best.
    n_latent
        For "scanvi": dimensions of the latent space, 10 by default.
    max_epochs
        For "scanvi": passes over the cells without labels, by default as many as 5,000 gradient steps take, but from 10
        to 400; a tenth as many with labels follow.
    threshold
        Cells are "unassigned" where the confidence is lower, in [0, 1].
    majority_voting
        Give all cells of a cluster the type that is the most frequent among them ("unassigned" is one too).
    over_clustering
        Column of `obs` with the clusters for the vote. By default Leiden clusters of the neighbour graph at
        CellTypist's resolutions, from 5 to 30 by the number of cells; in a plan, run :func:`leiden` and give its
        column.
    neighbors_key
        Where these clusters find the graph.
    n_folds
        Into so many parts labelled cells are dealt, each to be held out once. For "celltypist".
    random_state, rng
        Seed of folds and training, or of the starts of the fit to the markers: an integer, a numpy generator or a JAX
        key; give one of the two. Default 0.
    key_added
        Name of the results.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["annotation" | key_added]` : categorical of str (cells,)
        The type, or "unassigned".
    `adata.obs["annotation_confidence" | f"{key_added}_confidence"]` : float32 (cells,)
        Probability of the most probable type, lowered for cells unlike those of that type: in [0, 1]. For cells with a
        label 1. For "cellassign" the posterior of the most probable type, which is not calibrated.
    `adata.obsm["annotation_probabilities" | f"{key_added}_probabilities"]` : DataFrame of float32 (cells, types)
        Calibrated probabilities, one column for each type; "/" in its name is written "|", for files cannot hold it.
        For "cellassign" posteriors, with a last column "unassigned" where cells may be of no type.
    `adata.obsm["X_scanvi" | f"X_{key_added}"]` : float32 (cells, n_latent), with ``mode="scanvi"``
        Means of the approximate posterior of the latent vectors, which labels have drawn apart by type.
    `adata.uns["annotation" | key_added]` : dict
        `params`; the `names` of the types; the `penalty` and `temperature` used; `accuracy` and `calibration_error`
        (expected, over 15 bins) of labelled cells held out; the shares `unlike` (of 2 % expected) and
        `unassigned` of the annotated cells. For "cellassign" `params`, `names` and `unassigned`; the `log_folds`, a
        DataFrame (genes, types) with natural logarithms of the folds of the markers used, 0 elsewhere; the
        `proportions` of the types, in the order of its columns; the `log_likelihood` of the cells; whether the fit
        `converged`; and, with a reference, `unlike`. For "scanvi" no `penalty`, but the `history`: of each epoch with
        labels the negative `bound` in nats per cell and the `classification` loss, and of those before, with ``vae_``
        in front, what :func:`scdiffx.pp.vae` keeps. Below 20 labelled cells that can be held out, the temperature is 1,
        no cell is unlike, and accuracy and calibration error are NaN.

    Raises
    ------
    KeyError
        If a column or layer does not exist.
    ValueError
        If there are fewer than two types, no cell to annotate, no gene in common, or a setting is not usable or has no
        meaning in this mode; if no marker of a type is there, or two types have the same; or, for "cellassign" and
        "scanvi", if values are negative.

    Warns
    -----
    UserWarning
        If the values look like counts, or, for "cellassign" and "scanvi", do not; if markers are missing; if there are
        too few labels to calibrate probabilities; if the reference is normalised to other totals or shares few genes;
        or if many more cells than the expected 2 % are unlike those of their type, as where the reference lacks a type
        or another batch looks different.

    Notes
    -----
    A type that the reference lacks, but that is much like one it has, is given the name of that: on real blood cells a
    third of the cells of such types were unassigned on average, from none to all (see the documentation's figures).

    The parameters of "cellassign" maximise the likelihood of the marker counts times the priors of both
    implementations (Dirichlet with concentration 0.01 on the proportions; normal on the logarithms of log folds, which
    are at least 2). Where expectation and maximisation climb in turns, L-BFGS climbs in all parameters at once, until
    no slope is above 1e-5 nats per cell. The standard deviation of the normal, which is fitted too, is at least 0.1,
    for without a bound the priors have no maximum. With a reference, cells are unlike where their counts are less
    likely than those of 98 % of the reference's cells of like depth.

    "scanvi" knows a cell that is unlike the labelled ones by its distance from them in the latent space alone, where
    few labels say little of what is alike and a type without labels can lie among the others: do not rely on it to find
    unseen types.

    In a plan, weights, bias and temperature ("celltypist"), baseline, log folds, dispersion and proportions
    ("cellassign"), or the networks ("scanvi") are learnable and start at the fit; derivatives reach the expression.

    References
    ----------
    Dominguez Conde et al. (2022), Cross-tissue immune cell analysis reveals tissue-specific features in humans. Guo et
    al. (2017), On calibration of modern neural networks. Zhang et al. (2019), Probabilistic cell-type assignment of
    single-cell RNA-seq for tumor microenvironment profiling. Xu et al. (2021), Probabilistic harmonization and
    annotation of single-cell transcriptomics data with deep generative models. Kingma et al. (2014), Semi-supervised
    learning with deep generative models.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> labels = adata.obs["bulk_labels"]
    >>> adata.obs["known"] = labels.where(labels.isin(["CD19+ B", "CD14+ Monocyte"]))
    >>> sd.tl.annotate(adata, labels_key="known", penalty=0.1, n_folds=2)
    >>> list(adata.obsm["annotation_probabilities"])
    ['CD14+ Monocyte', 'CD19+ B']
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not available. Available: {list(MODES)}")
    own = {"labels_key": labels_key, "markers": markers, "batch_key": batch_key, "size_factors": size_factors}
    own |= {"penalty": penalty, "n_folds": n_folds if n_folds != _FOLDS else None}
    _refuse(mode, own | {"n_latent": n_latent, "max_epochs": max_epochs})
    check_fit(penalty, n_folds)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r} must lie between 0 and 1")
    seed = as_seed(one_rng(rng, random_state))
    if over_clustering is not None and not majority_voting:
        raise ValueError(f"over_clustering={over_clustering!r} has no meaning without majority_voting=True")
    clusters = _clusters(adata, over_clustering, neighbors_key, seed) if majority_voting else None
    params = {
        "mode": mode,
        **({} if labels_key is None else {"labels_key": labels_key}),
        "threshold": float(threshold),
        "majority_voting": majority_voting,
        **({} if over_clustering is None else {"over_clustering": over_clustering}),
        **({"n_folds": n_folds} if mode in _ONLY["n_folds"] else {}),
        "random_state": seed,
    }
    shared: dict[str, Any] = {"reference": reference, "layer": layer, "clusters": clusters, "key_added": key_added}
    shared |= {"threshold": float(threshold), "seed": seed, "params": params}
    labelled: dict[str, Any] = {"labels_key": labels_key, "n_folds": n_folds}
    if mode == "cellassign":
        step = marker_step(adata, markers=markers, batch_key=batch_key, size_factors=size_factors, **shared)
    elif mode == "scanvi":
        settings: dict[str, Any] = {"batch_key": batch_key, "n_latent": n_latent, "max_epochs": max_epochs}
        step = scanvi_step(adata, **settings, **labelled, **shared)
    else:
        step = _celltypist_step(adata, penalty=penalty, **labelled, **shared)
    return apply(adata, step, copy=copy)


def _refuse(mode: str, given: Mapping[str, Any]) -> None:
    """Raise on parameters that have no meaning in the mode; None is not given."""
    for name, value in given.items():
        if value is not None and mode not in _ONLY[name]:
            raise ValueError(f"{name}={value!r} has no meaning with mode={mode!r}, only with {list(_ONLY[name])}")


def _celltypist_step(
    adata: AnnData | Plan,
    *,
    labels_key: str | None,
    reference: Any,
    layer: str | None,
    penalty: float | None,
    threshold: float,
    n_folds: int,
    clusters: Slot | None,
    key_added: str,
    seed: int,
    params: dict[str, Any],
) -> Step:
    data = adata.adata if isinstance(adata, Plan) else adata
    op = ops.LogisticAnnotation(penalty=penalty, n_folds=n_folds, threshold=threshold)
    if reference is None:
        names, labels = known_labels(data, labels_key)
    else:
        op, names = reference_model(op, reference, labels_key, layer, adata, seed)
        labels = None
    if not isinstance(adata, Plan):
        warn_if_counts(matrix_of(data, layer), "adata")
    return Step(
        "annotate",
        op,
        reads=(X(layer), labels, clusters),
        writes=type_writes(key_added, names),
        message="annotating cells",
        notes=_notes(key_added, names, params),
        rng=seed,
    )


def _clusters(adata: AnnData | Plan, over_clustering: str | None, neighbors_key: str, seed: int) -> Slot:
    if over_clustering is not None:
        slot = Obs(over_clustering, codes=True)
        data = adata.adata if isinstance(adata, Plan) else adata
        if not (adata.has(slot) if isinstance(adata, Plan) else slot.exists(data)):
            raise KeyError(
                f"over_clustering={over_clustering!r} is not in `adata.obs`. Available: {available(data.obs)}"
            )
        if over_clustering in data.obs and data.obs[over_clustering].isna().any():
            raise ValueError(f"over_clustering={over_clustering!r} is missing for some cells")
        return slot
    if isinstance(adata, Plan):
        raise ValueError("in a plan the clusters for the vote are a step: run `sd.tl.leiden`, pass over_clustering=")
    graph = Connectivities(neighbors_key).read(adata)
    resolution = next((r for most, r in _RESOLUTIONS if adata.n_obs < most), 30)
    membership = ops.Leiden(resolution=float(resolution), n_iterations=2, seed=seed).init(graph).membership
    return Labels(np.asarray(membership))


def _notes(key: str, names: list[str], params: dict[str, Any]) -> Any:
    def notes(op: ops.LogisticAnnotation, result: ops.LogisticAnnotationResult, args: Any) -> Mapping[Slot, Any]:
        assert op.standards is not None
        types = np.asarray(result.types)
        query = np.ones(len(types), bool) if args[1] is None else np.asarray(args[1]) < 0
        unlike = float((np.asarray(result.distance)[query] > 1).mean())
        expected = 1 - ops.LogisticAnnotation.INSIDE
        if unlike > SUSPICIOUS * expected:
            warn(
                f"{unlike:.0%} of the cells are unlike the labelled cells of their type, where {expected:.0%} are "
                "expected: the reference may lack a type, or be of another batch or normalisation"
            )
        entry = {
            "params": params,
            "names": np.asarray(names, dtype=object),
            "penalty": float(op.penalty or 0),
            "temperature": float(np.asarray(op.temperature)),
            "accuracy": float(op.standards.accuracy),
            "calibration_error": float(op.standards.calibration_error),
            "unlike": unlike,
            "unassigned": float((types[query] < 0).mean()),
        }
        return {Obs(key): named_types(types, names), Uns(key): entry}

    return notes
