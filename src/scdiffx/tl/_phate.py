from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obsm, Slot, Uns, preset
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._phate import MDS
from scdiffx.tl._ot_trajectory import representation

if TYPE_CHECKING:
    from anndata import AnnData


@public
def phate(
    adata: AnnData | Plan,
    n_components: int = 2,
    *,
    use_rep: str | None = None,
    k: int = 5,
    decay: float = 40.0,
    n_landmark: int = 2000,
    t: int | str = "auto",
    gamma: float = 1.0,
    mds: str = "metric",
    random_state: Any = None,
    key_added: str | None = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Lay out the cells by PHATE, which shows trajectories and branches.

    phate's kernel, landmarks, choice of `t` and potential; the metric scaling is at the minimum of its stress, which
    phate's stochastic steps approach. Distances in the layout are phate's up to a scale (docs/measured.md).

    Parameters
    ----------
    adata
        Annotated data (cells x genes).
    n_components
        Dimensions of the layout.
    use_rep
        Key of `obsm` with the coordinates; default: the principal components.
    k
        Neighbour whose distance is the scale of a cell (phate's `knn`, the cell itself not counted).
    decay
        Power in the kernel: the higher, the sharper its edge.
    n_landmark
        Largest number of landmarks. With more cells than that, cost and memory are linear in cells.
    t
        Steps of the diffusion, or "auto": the knee of the von Neumann entropy over the steps.
    gamma
        Between -1 and 1: the potential is the negative log of probabilities at 1, the probabilities at -1, and
        ``2 / (1 - gamma)`` times their power ``(1 - gamma) / 2`` between.
    mds
        "metric": from the classic scaling, by SMACOF. "classic": principal components of the potential.
    random_state, rng
        Seed of the landmarks: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Key of both `obsm` and `uns` instead of "X_phate" and "phate".
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_phate" | key_added]` : float32 (cells, n_components)
        Coordinates, in units of the potential distance (phate scales them to norm 1).
    `adata.uns["phate" | key_added]` : dict
        `params`; `t`, the steps used; `entropy` (100,), the von Neumann entropy of 1 to 100 steps; `stress`, the root
        of the squared errors of the landmarks' distances over the squared distances.

    Raises
    ------
    KeyError
        If the representation does not exist.
    ValueError
        If there are too few cells, a setting is not usable, or `adata` is a plan and `mds` is "classic", which has no
        derivative.

    Notes
    -----
    In a plan, `decay` and `bandwidth` are learnable, and derivatives reach the coordinates. Neighbours, landmarks and
    `t` are structure and have none; neighbours and landmarks are found anew when a fit refreshes, `t` stays. The metric
    layout is differentiated implicitly, modulo rigid motions: a loss should depend on distances in it. Where new
    neighbours change the shape of the kernel, a fit compiles anew, which takes longer than many of its steps; new
    cells are laid out by themselves.

    At most ``36 (k + 1)`` neighbours of each cell are searched; phate searches on where more are within the reach of
    the kernel.

    References
    ----------
    Moon et al. (2019), Visualizing structure and transitions in high-dimensional biological data.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.phate(adata, t=5)
    >>> adata.obsm["X_phate"].shape
    (700, 2)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if isinstance(adata, Plan) and mds == "classic":
        raise ValueError("mds='classic' has no derivative: in a plan use mds='metric'")
    _check(data.n_obs, n_components, k, decay, n_landmark, t, gamma, mds)
    z = representation(adata, use_rep)
    seed = as_seed(one_rng(rng, random_state))
    key = key_added or ("phate" if preset() == "ScanpyV2Preview" else "X_phate")
    entry = key_added or "phate"
    params = {
        "n_components": n_components,
        "use_rep": z.key,
        "k": k,
        "decay": float(decay),
        "n_landmark": n_landmark,
        "t": t,
        "gamma": float(gamma),
        "mds": mds,
        "random_state": seed,
    }

    def notes(op: ops.PHATE, result: ops.PHATEResult, args: Any) -> Mapping[Slot, Any]:
        assert op.structure is not None
        assert op.t is not None
        found = {"entropy": np.asarray(op.structure.entropy, np.float32), "stress": float(result.stress)}
        return {Uns(entry): {"params": params, "t": op.t, **found}}

    step = Step(
        "phate",
        ops.PHATE(
            decay=float(decay),
            n_components=n_components,
            knn=k,
            n_landmark=n_landmark,
            t=None if isinstance(t, str) else t,
            settings=ops.PHATESettings(gamma=float(gamma), mds=mds),
        ),
        reads=(z,),
        writes=(Write(Obsm(key), lambda op, result: result.embedding, np.float32),),
        message="computing PHATE",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _check(
    n: int, n_components: int, k: int, decay: float, n_landmark: int, t: int | str, gamma: float, mds: str
) -> None:
    if n_components < 1:
        raise ValueError(f"n_components={n_components!r} must be at least 1")
    for name, count in (("n_obs", n), ("n_landmark", n_landmark)):
        if count < n_components + 1:
            raise ValueError(f"{name}={count!r} is too small for n_components={n_components!r}")
    if not 1 <= k < n:
        raise ValueError(f"k={k!r} must lie between 1 and the number of other cells, {n - 1}")
    if not (math.isfinite(decay) and decay > 0):
        raise ValueError(f"decay={decay!r} must be greater than 0")
    if t != "auto" and (isinstance(t, str) or t < 1 or int(t) != t):
        raise ValueError(f"t={t!r} must be 'auto' or a whole number of at least 1")
    if not -1 <= gamma <= 1:
        raise ValueError(f"gamma={gamma!r} must lie between -1 and 1")
    if mds not in MDS:
        raise ValueError(f"mds={mds!r} is unknown. Available: {list(MDS)}")
