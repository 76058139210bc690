from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._slots import Connectivities, Cosines, Obsp, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def transition_matrix(
    adata: AnnData | Plan,
    vkey: str = "velocity",
    *,
    scale: float = 10.0,
    self_transitions: bool = True,
    weight_connectivities: float = 0.0,
    neighbors_key: str = "neighbors",
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compute transition probabilities between cells from the velocity graph.

    A walk steps to other cells in proportion to ``exp(scale * cosine)``. By default equal to scVelo's
    ``scv.utils.get_transition_matrix``. ``sd.tl.fate_probabilities(transition_key="velocity_transitions")`` tells
    where such walks end.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a velocity graph, or a plan.
    vkey
        Name of the velocities.
    scale
        Sharpness of the probabilities.
    self_transitions
        Whether cells whose velocity points nowhere stay: with the weight ``exp(scale * p)``, where p is by how much the
        best cosine falls short of the 98th percentile of all cells'. Without `weight_connectivities` this makes walks
        slower, and does not change where they end.
    weight_connectivities
        Share of the steps that follow the weights of the neighbour graph instead, divided by their sums. 0 leaves the
        graph out; CellRank's tutorials use 0.2, which keeps walks from being caught where velocities lead nowhere.
    neighbors_key
        Key of `adata.uns` that describes the graph; read if `weight_connectivities` is above 0.
    key_added
        Key of `obsp` to write to.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsp["velocity_transitions" | f"{vkey}_transitions" | key_added]` : float32 CSR matrix (cells, cells)
        Transition probabilities from the cell of the row; rows sum to 1, or are empty where a cell has no edge.

    Raises
    ------
    KeyError
        If the velocity graph does not exist.
    ValueError
        If there is no neighbour graph to mix with, or a number is out of range.

    Notes
    -----
    scVelo's `use_negative_cosines`, which makes some entries negative, has no counterpart: these are probabilities.
    Its `weight_diffusion` mixes with distances in an embedding, and by default with nothing. The mixture here is
    CellRank's of a velocity and a connectivity kernel, but that CellRank estimates the former differently and divides
    the latter by densities first.

    In a plan `scale` can be learned, and `weight_connectivities` where it is above 0; derivatives reach the cosines,
    with them velocities and counts, and the graph.

    References
    ----------
    La Manno et al. (2018), RNA velocity of single cells. Bergen et al. (2020), Generalizing RNA velocity to transient
    cell states through dynamical modeling. Lange et al. (2022), CellRank for directed single-cell fate mapping.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.split_counts(adata, {"spliced": 0.75, "unspliced": 0.25})  # in place of measured layers
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.neighbors(adata, n_neighbors=9)
    >>> sd.tl.velocity(adata, mode="deterministic", min_r2=-1)
    >>> sd.tl.velocity_graph(adata)
    >>> sd.tl.transition_matrix(adata)
    >>> adata.obsp["velocity_transitions"].shape
    (150, 150)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    graph = Cosines(f"{vkey}_graph")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale!r} must be greater than 0")
    if not 0 <= weight_connectivities <= 1:
        raise ValueError(f"weight_connectivities={weight_connectivities!r} must lie between 0 and 1")
    if not (adata.has(graph) if isinstance(adata, Plan) else graph.exists(adata)):
        raise KeyError(
            f"{graph.key!r} is not in `adata.uns`. Available: {available(data.uns)}; run `sd.tl.velocity_graph` first"
        )
    mixed = weight_connectivities > 0
    target = Obsp(f"{vkey}_transitions" if key_added is None else key_added)
    op = ops.TransitionMatrix(
        scale=float(scale),
        weight_connectivities=float(weight_connectivities) if mixed else None,
        self_transitions=self_transitions,
    )
    step = Step(
        "transition_matrix",
        op,
        reads=(graph, Connectivities(neighbors_key) if mixed else None),
        writes=(Write(target, lambda op, result: result, np.float32),),
        message="computing transition matrix",
    )
    return apply(adata, step, copy=copy)
