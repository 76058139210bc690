"""Losses: what a fit minimises. Each compares an output of the plan with a target; they add up and scale.

>>> import scdiffx as sd
>>> loss = sd.losses.correlation("dpt_pseudotime", "day") + 0.1 * sd.losses.l1("gene_weight")
>>> len(loss.terms)
2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from scdiffx.losses._groups import BatchMixing, Compactness, Entropy, Modularity
from scdiffx.losses._label_free import Budget, MaskedReconstruction, ReplicateConsistency
from scdiffx.losses._terms import (
    L1,
    SCALES,
    Correlation,
    CrossEntropy,
    MolecularCrossValidation,
    Reconstruction,
    TimeOrder,
)

__all__ = [
    "Loss",
    "batch_mixing",
    "budget",
    "compactness",
    "correlation",
    "cross_entropy",
    "entropy",
    "l1",
    "masked_reconstruction",
    "modularity",
    "molecular_cross_validation",
    "reconstruction",
    "replicate_consistency",
    "time_order",
]


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms."""

    terms: tuple[tuple[float, Any], ...]

    def __add__(self, other: Loss) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(self.terms + other.terms)

    def __mul__(self, factor: float) -> Loss:
        if not isinstance(factor, int | float | np.floating):
            return NotImplemented
        return Loss(tuple((float(factor) * weight, term) for weight, term in self.terms))

    __rmul__ = __mul__


def correlation(output: str, target: str) -> Loss:
    """1 - Pearson correlation between an output and a column of obs.

    Parameters
    ----------
    output
        Key of a numeric output with one value per cell, such as "dpt_pseudotime".
    target
        Column of obs: numbers, or ordered categories, whose ranks count. Cells where it is NaN, or where the output is
        infinite, do not count.
    """
    return Loss(((1.0, Correlation(output=output, target=target)),))


def time_order(output: str, target: str, *, temperature: float = 0.1) -> Loss:
    """How often pairs of cells are in the wrong order, softly.

    For pairs whose targets differ, ``softplus(-d / temperature) * temperature`` of the standardised difference `d` of
    the outputs in the direction of the target. Each cell meets a fixed sample of 64 others, so the cost is linear.

    Parameters
    ----------
    output
        Key of a numeric output with one value per cell.
    target
        Column of obs: numbers, or ordered categories. Cells where it is NaN do not count.
    temperature
        Softness, in standard deviations of the output; greater than 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be greater than 0")
    return Loss(((1.0, TimeOrder(output=output, target=target, temperature=float(temperature))),))


def cross_entropy(output: str, target: str) -> Loss:
    """Cross-entropy of a linear readout of an output against labels; the readout is learned with the plan.

    It starts at logistic regression on the standardised output of the unfitted plan, with scikit-learn's penalty.

    Parameters
    ----------
    output
        Key of an array with one row per cell, such as "X_pca".
    target
        Categorical column of obs; cells without a label (NaN) do not count.
    """
    return Loss(((1.0, CrossEntropy(output=output, target=target)),))


def l1(output: str) -> Loss:
    """Mean absolute value of an output, such as "gene_weight": few genes rather than many.

    Parameters
    ----------
    output
        Key of a numeric output.
    """
    return Loss(((1.0, L1(output=output)),))


def budget(output: str, size: float) -> Loss:
    """How far an output exceeds a budget: the square of ``sum(|value|) / size - 1`` where that is positive, else 0.

    With gene weights, about `size` genes remain in use, which ones is left to the other terms.

    Parameters
    ----------
    output
        Key of a numeric output, such as "gene_weight".
    size
        What the absolute values may sum to; greater than 0.
    """
    if not size > 0:
        raise ValueError(f"size={size!r} must be greater than 0")
    return Loss(((1.0, Budget(output=output, size=float(size))),))


def reconstruction(output: str, layer: str | None = None) -> Loss:
    """Mean squared difference between a matrix that the plan computes and one of the AnnData.

    Parameters
    ----------
    output
        Name of a layer that the plan writes (cells, genes), such as "magic".
    layer
        Layer to compare with; default `X` as it is in the AnnData before the plan.
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
    """
    _check_rate(scale, background)
    term = MaskedReconstruction(output=output, target=layer, scale=scale, background=float(background))
    return Loss(((1.0, term),))


def replicate_consistency(output: str, pairs: str = "replicate_of", *, n_neighbors: int = 15) -> Loss:
    """How hard it is to tell a cell's other half from other cells: 0 where it is nearest by far, 1 or more by chance.

    For cells measured twice (:func:`scdiffx.pp.replicates`): minus the logarithm of the weight of a cell's other half
    among it, the `n_neighbors` nearest and as many random cells of that half, relative to that of equal weights. A
    weight is ``1 / (1 + d / s)`` of the squared distance, with `s` a hundredth of the nearest cells'. So the size of
    the embedding does not matter; cells that are all in one place have a loss of 1, and noise a little more. Near cells
    are looked up anew at every refresh of a fit; random splits of a fit keep both halves together.

    Both halves share whatever is not counting noise, batch effects among it: a workflow that keeps these is rewarded.

    Parameters
    ----------
    output
        Key of an array with one row per cell, such as "X_pca".
    pairs
        Column of obs that is the same for two cells, those that belong together; others do not count.
    n_neighbors
        Near cells to tell the other half from.
    """
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors!r} must be at least 1")
    return Loss(((1.0, ReplicateConsistency(output=output, target=pairs, n_neighbors=n_neighbors)),))


def batch_mixing(output: str, batch: str, *, n_neighbors: int = 90) -> Loss:
    """How little the batches mix among near cells: 0 as well as they can, 1 not at all.

    ``1 - (LISI - 1) / (best - 1)`` with a soft local inverse Simpson's index of the batches (Korsunsky et al. 2019) and
    its value where every neighbourhood holds the batches as the data do. Two things differ from that index, which has
    no derivative where batches lie apart: each cell has neighbours in every batch, as many as the batch's share, and
    weights have long tails, ``1 / (1 + u^2)`` of the squared distance beyond that of the nearest neighbour, in units of
    what holds the neighbours in the cell's own batch. So the size of the embedding does not matter. Neighbours are
    looked up among the training cells, 20,000 at most, and anew at every refresh of a fit. The cost is linear in cells.

    Cells that are shuffled, or all in one place, mix perfectly: never minimise this alone, but with what must be kept.

    Parameters
    ----------
    output
        Key of an array with one row per cell, such as "X_pca".
    batch
        Categorical column of obs; cells without a batch (NaN) do not count.
    n_neighbors
        Neighbours of each cell in all batches together; at least 3 of each batch.
    """
    if n_neighbors < 2:
        raise ValueError(f"n_neighbors={n_neighbors!r} must be at least 2")
    return Loss(((1.0, BatchMixing(output=output, target=batch, n_neighbors=n_neighbors)),))


def compactness(output: str, groups: str) -> Loss:
    """The share of the variance that lies within groups: 0 where each is one point, 1 where they do not differ.

    It is blind to the size of the embedding, and to groups that coincide with others.

    Parameters
    ----------
    output
        Key of an array with one row per cell, such as "X_pca".
    groups
        Categorical column of obs, such as clusters found before; cells without a group (NaN) do not count.
    """
    return Loss(((1.0, Compactness(output=output, target=groups)),))


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
    """
    if of not in ("cells", "groups"):
        raise ValueError(f"of={of!r} is not available. Available: ['cells', 'groups']")
    return Loss(((1.0, Entropy(output=output, of=of)),))


def _check_rate(scale: str, background: float) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not available. Available: {list(SCALES)}")
    if not 0 < background < 1:
        raise ValueError(f"background={background!r} must lie between 0 and 1")
