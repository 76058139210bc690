from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._slots import Cosines, Distances, Genes, Obs, Slot, Uns, Var, X, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def velocity_graph(
    adata: AnnData | Plan,
    vkey: str = "velocity",
    xkey: str = "Ms",
    *,
    n_neighbors: int | None = None,
    n_recurse_neighbors: int | None = None,
    sqrt_transform: bool | None = None,
    neighbors_key: str = "neighbors",
    copy: bool = False,
) -> AnnData | None:
    """Compute how well each cell's velocity points towards the cells around it.

    For each cell and the cells that two steps along the lists of nearest neighbours lead to, the cosine between the
    velocity and the difference of the spliced counts, both centred over the velocity genes. Equal to scVelo's.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with velocities and a neighbour graph, or a plan.
    vkey
        Layer of the velocities.
    xkey
        Layer of the spliced counts.
    n_neighbors
        Only so many nearest neighbours of each cell count; default all that the graph has.
    n_recurse_neighbors
        How many steps; default 2, or 1 with `n_neighbors`.
    sqrt_transform
        Whether to take roots of differences and velocities (signs kept), which stabilises their variance; by default
        for velocities of the stochastic model.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.uns["velocity_graph" | f"{vkey}_graph"]` : float32 CSR matrix (cells, cells)
        The positive cosines, in (0, 1].
    `adata.uns["velocity_graph_neg" | f"{vkey}_graph_neg"]` : float32 CSR matrix (cells, cells)
        The negative cosines, in [-1, 0).
    `adata.obs["velocity_self_transition" | f"{vkey}_self_transition"]` : float32 (cells,)
        How likely a cell is to stay, in [0, 1]: by how much its best cosine falls short of the 98th percentile.
    `adata.uns["velocity_params" | f"{vkey}_params"]` : dict
        `mode_neighbors` and `n_recurse_neighbors` are added.

    Raises
    ------
    KeyError
        If a layer does not exist.
    ValueError
        If there is no neighbour graph or a number is not usable.

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
    >>> adata.uns["velocity_graph"].shape
    (150, 150)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    plan = adata if isinstance(adata, Plan) else Plan(data)
    recurse = (2 if n_neighbors is None else 1) if n_recurse_neighbors is None else n_recurse_neighbors
    for name, value in (("n_neighbors", n_neighbors), ("n_recurse_neighbors", recurse)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    for key, what in ((vkey, "; run `sd.tl.velocity` first"), (xkey, "")):
        if not plan.has(X(key)):
            raise KeyError(f"{key!r} is not in `adata.layers`. Available: {available(data.layers.keys())}{what}")
    params = velocity_parameters(plan, vkey)
    params.pop("embeddings", None)
    params |= {"mode_neighbors": "distances", "n_recurse_neighbors": recurse}
    root = params.get("mode") == "stochastic" if sqrt_transform is None else bool(sqrt_transform)

    def notes(op: ops.VelocityGraph, result: ops.VelocityGraphResult, args: Any) -> Mapping[Slot, Any]:
        return {Uns(f"{vkey}_params"): params}

    step = Step(
        "velocity_graph",
        ops.VelocityGraph(n_neighbors=n_neighbors, n_recurse_neighbors=recurse, sqrt_transform=root),
        reads=(*_of_velocity_genes(plan, vkey, xkey), Distances(neighbors_key)),
        writes=(
            Write(Cosines(f"{vkey}_graph"), lambda op, result: result.cosines, np.float32),
            Write(Obs(f"{vkey}_self_transition"), lambda op, result: result.self_transition, np.float32),
        ),
        message="computing velocity graph",
        notes=notes,
    )
    return apply(adata, step, copy=copy)


def _of_velocity_genes(plan: Plan, vkey: str, xkey: str) -> tuple[Slot | None, ...]:
    """Counts, velocities and weights of the genes: only velocity genes where it is known which these are."""
    chosen = Var(f"{vkey}_genes")
    if plan.writes(X(vkey)) or plan.writes(X(xkey)) or not chosen.exists(plan.adata):
        return X(xkey), X(vkey), chosen if plan.has(chosen) else None
    index = tuple(int(i) for i in np.flatnonzero(plan.adata.var[chosen.key].to_numpy(bool)))
    if plan.adata.n_obs and not index:
        raise ValueError(f"`adata.var[{chosen.key!r}]` selects no gene; run `sd.tl.velocity` with a lower `min_r2`")
    return Genes(X(xkey), index, check_others=False), Genes(X(vkey), index, check_others=False), None


def velocity_parameters(plan: Plan, vkey: str) -> dict[str, Any]:
    """What is known of how velocities were computed, by a step of the plan or before it."""
    slot = Uns(f"{vkey}_params")
    for step in reversed(plan.steps):
        if step.name.startswith("velocity") and slot in (found := step.notes(None, None, ())):
            return dict(found[slot])
    return dict(plan.adata.uns.get(slot.key, {}))
