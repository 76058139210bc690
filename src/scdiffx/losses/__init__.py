"""Losses: what a fit minimises. Each compares an output of the plan with a target; they add up and scale.

>>> import scdiffx as sd
>>> loss = sd.losses.correlation("dpt_pseudotime", "day") + 0.1 * sd.losses.l1("gene_weight")
>>> len(loss.terms)
2
"""

from __future__ import annotations

from scdiffx.losses._groups import BatchMixing, Compactness
from scdiffx.losses._label_free import Budget, ReplicateConsistency
from scdiffx.losses._loss import Loss
from scdiffx.losses._terms import L1, Correlation, CrossEntropy, TimeOrder
from scdiffx.losses._without_labels import (
    entropy,
    masked_reconstruction,
    modularity,
    molecular_cross_validation,
    reconstruction,
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


def correlation(output: str, target: str) -> Loss:
    """1 - Pearson correlation between an output and a column of obs.

    Parameters
    ----------
    output
        Key of a numeric output with one value per cell, such as "dpt_pseudotime".
    target
        Column of obs: numbers, or ordered categories, whose ranks count. Cells where it is NaN, or where the output is
        infinite, do not count.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> plan = sd.plan(adata)
    >>> sd.pp.cell_weights(plan, {"percent_mito": (None, 0.03)})
    >>> loss = sd.losses.correlation("cell_weight", "n_genes")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> 0 < found.losses["test"] < 2
    True
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

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> plan = sd.plan(adata)
    >>> sd.pp.cell_weights(plan, {"percent_mito": (None, 0.03)})
    >>> loss = sd.losses.time_order("cell_weight", "n_genes")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["test"] > 0
    True
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

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.cross_entropy("X_pca", "bulk_labels")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["train"] < found.losses["test"]
    True
    """
    return Loss(((1.0, CrossEntropy(output=output, target=target)),))


def l1(output: str) -> Loss:
    """Mean absolute value of an output, such as "gene_weight": few genes rather than many.

    Parameters
    ----------
    output
        Key of a numeric output.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.highly_variable_genes(plan, n_top_genes=100, soft=True)
    >>> loss = sd.losses.l1("gene_weight")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> 0 < found.losses["test"] < 1
    True
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

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.highly_variable_genes(plan, n_top_genes=100, soft=True)
    >>> loss = sd.losses.budget("gene_weight", 50)
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["test"] > 0
    True
    """
    if not size > 0:
        raise ValueError(f"size={size!r} must be greater than 0")
    return Loss(((1.0, Budget(output=output, size=float(size))),))


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

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.pp.replicates(sd.datasets.pbmc68k_counts()[:150, :120])
    >>> plan = sd.plan(adata)
    >>> sd.pp.log1p(plan)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.replicate_consistency("X_pca")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> found.losses["test"] > 0
    True
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

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.batch_mixing("X_pca", "phase")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> 0 < found.losses["test"] < 1
    True
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

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> plan = sd.plan(adata)
    >>> sd.pp.pca(plan, n_comps=5)
    >>> loss = sd.losses.compactness("X_pca", "bulk_labels")
    >>> found = sd.grid(plan, loss, {}, progress=False)
    >>> 0 < found.losses["test"] < 1
    True
    """
    return Loss(((1.0, Compactness(output=output, target=groups)),))
