from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._slots import Cosines, Obsm, Slot, Uns, available
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.tl._velocity_graph import velocity_parameters

if TYPE_CHECKING:
    from anndata import AnnData


@public
def velocity_embedding(
    adata: AnnData | Plan,
    basis: str | None = None,
    vkey: str = "velocity",
    *,
    scale: float = 10,
    self_transitions: bool = True,
    use_negative_cosines: bool = True,
    autoscale: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Project velocities into an embedding.

    Each cell moves by the mean of the unit vectors to the cells around it, weighed by transition probabilities from the
    velocity graph. Equal to scVelo's.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a velocity graph and an embedding, or a plan.
    basis
        Name of the embedding without ``"X_"``; by default the last of "pca", "tsne" and "umap" that exists.
    vkey
        Name of the velocities.
    scale
        Sharpness of the transition probabilities, ``exp(scale * cosine)``.
    self_transitions
        Whether cells whose velocity points nowhere stay.
    use_negative_cosines
        Whether cells push away what their velocity points away from.
    autoscale
        Whether to scale all vectors by one number such that arrows in a plot have a suitable length.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["velocity_pca", "velocity_umap", ... | f"{vkey}_{basis}"]` : float64 (cells, dims)
        The velocities, on all components of the embedding.
    `adata.uns["velocity_params" | f"{vkey}_params"]` : dict
        The basis is added to `embeddings`.

    Raises
    ------
    KeyError
        If the embedding or the velocity graph does not exist.
    ValueError
        If `scale` is not above 0.

    Notes
    -----
    In a plan `scale` can be learned.

    References
    ----------
    La Manno et al. (2018), RNA velocity of single cells. Bergen et al. (2020), Generalizing RNA velocity to transient
    cell states through dynamical modeling.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.split_counts(adata, {"spliced": 0.75, "unspliced": 0.25})  # in place of measured layers
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.neighbors(adata, n_neighbors=9)
    >>> sd.tl.velocity(adata, mode="deterministic", min_r2=-1)
    >>> sd.tl.velocity_graph(adata)
    >>> sd.tl.velocity_embedding(adata, basis="pca")
    >>> adata.obsm["velocity_pca"].shape
    (150, 9)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    plan = adata if isinstance(adata, Plan) else Plan(data)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale!r} must be greater than 0")
    graph = Cosines(f"{vkey}_graph")
    if not plan.has(graph):
        raise KeyError(
            f"{graph.key!r} is not in `adata.uns`. Available: {available(data.uns)}; run `sd.tl.velocity_graph` first"
        )
    if basis is None:
        found = [name for name in ("pca", "tsne", "umap") if plan.has(Obsm(f"X_{name}"))]
        basis = found[-1] if found else "umap"
    name = basis.removeprefix("X_")
    slot = Obsm(f"X_{name}")
    if not plan.has(slot):
        raise KeyError(
            f"basis={basis!r}: {slot.key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}"
        )
    params = velocity_parameters(plan, vkey)
    params["embeddings"] = [str(e) for e in params.get("embeddings", ())] + [name]

    def notes(op: ops.VelocityEmbedding, result: Any, args: Any) -> Mapping[Slot, Any]:
        return {Uns(f"{vkey}_params"): params}

    step = Step(
        "velocity_embedding",
        ops.VelocityEmbedding(
            scale=float(scale),
            self_transitions=self_transitions,
            use_negative_cosines=use_negative_cosines,
            autoscale=autoscale,
        ),
        reads=(graph, slot),
        writes=(Write(Obsm(f"{vkey}_{name}"), lambda op, result: result, np.float64),),
        message="computing velocity embedding",
        notes=notes,
    )
    return apply(adata, step, copy=copy)
