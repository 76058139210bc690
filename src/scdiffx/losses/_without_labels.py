"""Losses that compare outputs with matrices and graphs rather than with columns of obs."""

from __future__ import annotations

from scdiffx.losses._groups import Entropy, Modularity
from scdiffx.losses._label_free import MaskedReconstruction
from scdiffx.losses._loss import Loss
from scdiffx.losses._terms import SCALES, MolecularCrossValidation, Reconstruction

__all__ = ["entropy", "masked_reconstruction", "modularity", "molecular_cross_validation", "reconstruction"]


def reconstruction(output: str, layer: str | None = None) -> Loss:
    """Mean squared difference between a matrix that the plan computes and one of the AnnData.

    Parameters
    ----------
    output
        Name of a layer that the plan writes (cells, genes), such as "magic".
    layer
        Layer to compare with; default `X` as it is in the AnnData before the plan.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()[:, :100].copy()
    >>> adata.X = sd.datasets.pbmc68k_counts().X[:, :100]
    >>> plan = sd.plan(adata)
    >>> sd.pp.magic(plan, neighbors_key="neighbors")
    >>> loss = sd.losses.reconstruction("magic")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["test"] > 0
    True
    """
    return Loss(((1.0, Reconstruction(output=output, target=layer)),))


def molecular_cross_validation(output: str, layer: str, *, scale: str = "linear", background: float = 0.01) -> Loss:
    """How well a denoised matrix predicts molecules that it has not seen (Batson et al. 2019).

    The deviance of a Poisson model per held-out molecule: rows of the output are brought to the linear scale, cut at
    0, made proportions, mixed with a share of the mean profile, and multiplied with the cell's held-out molecules. The
    plan must read the other molecules only: :func:`scdiffx.pp.split_counts` splits them.

    Parameters
    ----------
    output
        Name of a layer that the plan writes (cells, genes), such as "magic".
    layer
        Layer with the counts held out.
    scale
        What the output is: "linear" (proportional to expression), "sqrt" or "log1p" of that.
    background
        Share of the mean profile, in (0, 1): without it one molecule of a gene predicted to be absent costs infinity.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()[:, :100].copy()
    >>> adata.X = sd.datasets.pbmc68k_counts().X[:, :100]
    >>> sd.pp.split_counts(adata)
    >>> plan = sd.plan(adata)
    >>> sd.pp.magic(plan, layer="fit", neighbors_key="neighbors")
    >>> loss = sd.losses.molecular_cross_validation("magic", "choose")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["test"] > 0
    True
    """
    _check_rate(scale, background)
    term = MolecularCrossValidation(output=output, target=layer, scale=scale, background=float(background))
    return Loss(((1.0, term),))


def masked_reconstruction(
    output: str, layer: str = "hidden", *, scale: str = "linear", background: float = 0.01
) -> Loss:
    """How well entries that a plan was not shown are predicted from those that it was (Batson and Royer 2019).

    The deviance, per molecule, of a multinomial model for the hidden entries of each cell given their total: what
    counts are the shares of the hidden genes among each other. The plan must read what is shown:
    :func:`scdiffx.pp.mask_counts` makes both layers. A prediction that is the same for all cells gains nothing.

    Parameters
    ----------
    output
        Name of a layer that the plan writes (cells, genes), such as "magic".
    layer
        Sparse layer whose stored entries, zeros too, are those that are hidden.
    scale
        What the output is: "linear" (proportional to expression), "sqrt" or "log1p" of that.
    background
        Share of the genes' means that is mixed in, in (0, 1).

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()[:, :100].copy()
    >>> adata.X = sd.datasets.pbmc68k_counts().X[:, :100]
    >>> sd.pp.mask_counts(adata)
    >>> plan = sd.plan(adata)
    >>> sd.pp.magic(plan, layer="shown", neighbors_key="neighbors")
    >>> loss = sd.losses.masked_reconstruction("magic")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["test"] > 0
    True
    """
    _check_rate(scale, background)
    term = MaskedReconstruction(output=output, target=layer, scale=scale, background=float(background))
    return Loss(((1.0, term),))


def modularity(output: str, neighbors_key: str = "neighbors", *, resolution: float = 1.0) -> Loss:
    """1 - the modularity of soft memberships on the neighbour graph (Newman and Girvan 2004).

    An edge counts for a group by the product of its ends' memberships; for memberships of 0 and 1 this is the
    modularity that Leiden maximises. Edges between training and held-out cells count for neither.

    Parameters
    ----------
    output
        Key of an array of memberships (cells, groups), such as "leiden_probabilities".
    neighbors_key
        Key of `adata.uns` that describes the graph: that of the plan, where it computes one under this key.
    resolution
        How much weight is expected between cells, relative to a random graph of the same degrees.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> plan = sd.plan(adata)
    >>> sd.tl.leiden(plan)
    >>> loss = sd.losses.modularity("leiden_probabilities")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> 0 < found.losses["test"] < 1
    True
    """
    if not resolution >= 0:
        raise ValueError(f"resolution={resolution!r} must not be negative")
    return Loss(((1.0, Modularity(output=output, target=neighbors_key, resolution=float(resolution))),))


def entropy(output: str, *, of: str = "cells") -> Loss:
    """Mean entropy of memberships, or the entropy of the mean, between 0 and 1.

    Alone, the first is least where all cells are in one group and the second where none is in any other; their
    difference, ``entropy(p) + -1.0 * entropy(p, of="groups")``, asks for decided cells in groups of equal size.

    Parameters
    ----------
    output
        Key of an array of probabilities (cells, groups), such as "kmeans_probabilities".
    of
        "cells": how undecided cells are on average; "groups": how even the groups are in total.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> plan = sd.plan(adata)
    >>> sd.tl.kmeans(plan, n_clusters=4, n_init=1)
    >>> loss = sd.losses.entropy("kmeans_probabilities")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> 0 < found.losses["test"] < 1
    True
    """
    if of not in ("cells", "groups"):
        raise ValueError(f"of={of!r} is not available. Available: ['cells', 'groups']")
    return Loss(((1.0, Entropy(output=output, of=of)),))


def _check_rate(scale: str, background: float) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not available. Available: {list(SCALES)}")
    if not 0 < background < 1:
        raise ValueError(f"background={background!r} must lie between 0 and 1")
