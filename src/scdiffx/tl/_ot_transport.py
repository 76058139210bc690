"""What couplings between time points tell: fates, origins, and cells in between."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_key, one_rng
from scdiffx._slots import Decoded, Obs, Obsm, Slot, Uns, available
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._ot_trajectory import barycentric, between, interpolated, time_points
from scdiffx.tl._ot_trajectory import COUPLING, fingerprint, time_labels, time_slot

if TYPE_CHECKING:
    from anndata import AnnData

METHODS = ("sample", "barycentric")


@public
def ot_pull(
    adata: AnnData | Plan,
    groupby: str,
    *,
    time: Any = None,
    key: str = "ot_trajectory",
    key_added: str = "fate",
    copy: bool = False,
) -> AnnData | None:
    """Pull groups or numbers of a time point back along the couplings: what the descendants of each cell are.

    A cell gets the mean over its descendants, weighted by the coupling, step by step: for groups, the probability that
    its fate is the group.

    Parameters
    ----------
    adata
        Annotated data with couplings from `ot_trajectory`, or a plan.
    groupby
        Column of `obs`: groups, or numbers.
    time
        The time point whose cells count, as a value of the column of times; default: the last.
    key
        Key of `uns` with the couplings.
    key_added
        Key in `obsm`, or for numbers in `obs`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["fate" | key_added]` : DataFrame of float32, cells x groups
        For groups: probabilities, for the groups that the time point has; rows sum to 1, and those of later cells are
        NaN. A slash in the name of a group becomes a bar, as files hold no such columns. At the time point before, a
        column times the growth over the step, divided by its sum, is how the ancestors of the group are distributed.
    `adata.obs["fate" | key_added]` : float32 (cells,)
        For numbers: their mean over the descendants, NaN for later cells.

    Raises
    ------
    KeyError
        If `groupby` is not in `obs`, or there is no coupling `key`.
    ValueError
        If `time` is not a time point, the label or number of one of its cells is missing, or cells, their times or
        their representation are no longer those that were coupled.

    References
    ----------
    Schiebinger et al. (2019), Optimal-transport analysis of single-cell gene expression identifies developmental
    trajectories in reprogramming.

    Examples
    --------
    >>> import numpy as np
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obs["day"] = np.arange(700) % 2  # in place of real time points
    >>> sd.tl.ot_trajectory(adata, "day")
    >>> sd.tl.ot_pull(adata, "phase")
    >>> adata.obsm["fate"].columns.tolist()
    ['G1', 'G2M', 'S']
    """
    return _transport(adata, groupby, time, key, key_added, forth=False, copy=copy)


@public
def ot_push(
    adata: AnnData | Plan,
    groupby: str,
    *,
    time: Any = None,
    key: str = "ot_trajectory",
    key_added: str = "origin",
    copy: bool = False,
) -> AnnData | None:
    """Push groups or numbers of a time point forward along the couplings: what the ancestors of each cell were.

    A cell gets the mean over its ancestors, weighted by the coupling, step by step: for groups, the share of its
    ancestry that the group has.

    Parameters
    ----------
    adata
        Annotated data with couplings from `ot_trajectory`, or a plan.
    groupby
        Column of `obs`: groups, or numbers.
    time
        The time point whose cells count, as a value of the column of times; default: the first.
    key
        Key of `uns` with the couplings.
    key_added
        Key in `obsm`, or for numbers in `obs`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["origin" | key_added]` : DataFrame of float32, cells x groups
        For groups: shares, for the groups that the time point has; rows sum to 1, and those of earlier cells are NaN.
        A slash in the name of a group becomes a bar, as files hold no such columns. Where the
        later marginals are held exactly, a column divided by its sum over a time point is how the descendants of the
        group are distributed there.
    `adata.obs["origin" | key_added]` : float32 (cells,)
        For numbers: their mean over the ancestors, NaN for earlier cells.

    Raises
    ------
    KeyError
        If `groupby` is not in `obs`, or there is no coupling `key`.
    ValueError
        If `time` is not a time point, the label or number of one of its cells is missing, or cells, their times or
        their representation are no longer those that were coupled.

    References
    ----------
    Schiebinger et al. (2019), Optimal-transport analysis of single-cell gene expression identifies developmental
    trajectories in reprogramming.

    Examples
    --------
    >>> import numpy as np
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obs["day"] = np.arange(700) % 2  # in place of real time points
    >>> sd.tl.ot_trajectory(adata, "day")
    >>> sd.tl.ot_push(adata, "S_score")
    >>> adata.obs["origin"].shape
    (700,)
    """
    return _transport(adata, groupby, time, key, key_added, forth=True, copy=copy)


def _transport(
    adata: AnnData | Plan, groupby: str, time: Any, key: str, key_added: str, *, forth: bool, copy: bool
) -> AnnData | None:
    data = adata.adata if isinstance(adata, Plan) else adata
    z, at, time_key = _coupled(adata, key)
    if groupby not in data.obs:
        raise KeyError(f"groupby={groupby!r} is not in `adata.obs`. Available: {available(data.obs)}")
    moments = np.asarray(at.read(data))
    points = np.unique(moments)
    start = (0 if forth else len(points) - 1) if time is None else _index_of(data, time_key, time, at, points)
    there = data.obs[groupby][moments == points[start]]
    if there.isna().any():
        raise ValueError(f"groupby={groupby!r} is missing for {there.isna().sum()} cells of the time point")
    groups = None if there.dtype.kind in "fiu" else data.obs[groupby].astype("category").cat.categories
    columns = np.array([0]) if groups is None else np.flatnonzero(np.isin(groups, there.unique()))
    target: Slot = Obs(key_added) if groups is None else Obsm(key_added)

    def extract(op: ops.OTTransport, result: Any) -> Any:
        return result[:, 0] if groups is None else result[:, columns]

    def notes(op: ops.OTTransport, result: Any, args: Any) -> Mapping[Slot, Any]:
        if groups is None:
            return {}
        import pandas as pd

        values = np.array(extract(op, result), np.float32)
        names = [str(groups[i]).replace("/", "|") for i in columns]
        return {target: pd.DataFrame(values, index=data.obs_names, columns=names)}

    step = Step(
        "ot_push" if forth else "ot_pull",
        ops.OTTransport(forth=forth, start=start, n_groups=None if groups is None else len(groups)),
        reads=(z, at, Uns(key, COUPLING), Obs(groupby, codes=groups is not None)),
        writes=(Write(target, extract, np.float32),),
        message=f"carrying {groupby!r} {'forth' if forth else 'back'} in time",
        notes=notes,
    )
    return apply(adata, step, copy=copy)


def _coupled(adata: AnnData | Plan, key: str) -> tuple[Obsm, Decoded, str]:
    """What was coupled: the slots of the representation and of the times, and the column of these."""
    if isinstance(adata, Plan):
        steps = [s for s in adata.steps if any(w.slot == Uns(key, COUPLING) for w in s.writes)]
        if steps:
            z, time = steps[-1].reads[:2]
            return z, time, time.of.key  # type: ignore[return-value, union-attr]
    data = adata.adata if isinstance(adata, Plan) else adata
    if data.n_obs == 0:
        raise ValueError("`adata` is empty: it has 0 cells")
    if key not in data.uns:
        raise KeyError(
            f"key={key!r} is not in `adata.uns`. Available: {available(data.uns)}; run `ot_trajectory` first"
        )
    entry = data.uns[key]
    if not isinstance(entry, Mapping) or not {*COUPLING, "params", "fingerprint"} <= set(entry):
        raise ValueError(f"`adata.uns[{key!r}]` does not hold couplings of `ot_trajectory`")
    params = entry["params"]
    z, time = Obsm(str(params["use_rep"])), time_slot(data, str(params["time_key"]), float(params["time_unit"]))
    if int(entry["fingerprint"]) != fingerprint(z.read(data), time.read(data)):
        raise ValueError(
            f"cells, `adata.obs[{params['time_key']!r}]` or `adata.obsm[{z.key!r}]` are no longer those that were "
            "coupled: run `ot_trajectory` again"
        )
    if isinstance(adata, Plan) and adata.writes(z):
        raise ValueError(f"the plan changes `adata.obsm[{z.key!r}]`, which was coupled: record `ot_trajectory` too")
    return z, time, str(params["time_key"])


def _index_of(data: AnnData, time_key: str, time: Any, slot: Decoded, points: np.ndarray) -> int:
    labels = time_labels(data, time_key)
    known = dict(zip(labels, np.asarray(slot.values, np.float32), strict=True))
    if time not in known or known[time] not in points:
        present = [label for label, value in known.items() if value in points]
        raise ValueError(f"time={time!r} is not a time point of {time_key!r}. Available: {present}")
    return int(np.searchsorted(points, known[time]))


@public
def ot_interpolate(
    adata: AnnData,
    time: float,
    *,
    n_obs: int | None = None,
    method: str = "sample",
    key: str = "ot_trajectory",
    random_state: Any = None,
    rng: Any = None,
) -> np.ndarray:
    """Cells at a time between two time points, on the straight lines along which the coupling moves them.

    The displacement (McCann) interpolation of the coupling, as Waddington-OT draws it: pairs of an earlier and a later
    cell are drawn in proportion to the coupling, and each becomes a point at its share of the way. Growth is
    exponential: at the earlier end every cell counts the same, at the later end by its descendants.

    Parameters
    ----------
    adata
        Annotated data with couplings from `ot_trajectory`.
    time
        When, from the first to the last time point. Labels that are no numbers count 0, 1, 2 and so on.
    n_obs
        Number of points; default: between the numbers of cells of the two time points, in proportion.
    method
        "sample" draws pairs. "barycentric" moves each earlier cell towards the mean of its descendants: one point a
        cell, without chance and without growth, but less spread than there should be.
    key
        Key of `uns` with the couplings.
    random_state, rng
        Seed of the draws; give one of the two. Default 0.

    Returns
    -------
    Array (cells, dims) in the representation that was coupled, in its dtype.

    Raises
    ------
    KeyError
        If there is no coupling `key`.
    TypeError
        If `adata` is a plan, or `time` is not a number.
    ValueError
        If `time` lies outside of the time points, a setting is not usable, or cells, their times or their
        representation are no longer those that were coupled.

    References
    ----------
    Schiebinger et al. (2019), Optimal-transport analysis of single-cell gene expression identifies developmental
    trajectories in reprogramming. McCann (1997), A convexity principle for interacting gases.

    Examples
    --------
    >>> import numpy as np
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obs["day"] = np.arange(700) % 2  # in place of real time points
    >>> sd.tl.ot_trajectory(adata, "day")
    >>> sd.tl.ot_interpolate(adata, 0.5, n_obs=100).shape
    (100, 50)
    """
    if isinstance(adata, Plan):
        raise TypeError("`ot_interpolate` returns cells rather than recording a step: pass an AnnData")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known. Available: {list(METHODS)}")
    if n_obs is not None and (method == "barycentric" or n_obs < 1):
        raise ValueError(f"n_obs={n_obs!r} must be at least 1, and is for method='sample' only")
    if isinstance(time, bool) or not isinstance(time, int | float | np.integer | np.floating):
        raise TypeError(f"time={time!r} must be a number")
    seed = as_key(one_rng(rng, random_state))
    z_slot, at, _ = _coupled(adata, key)
    entry = adata.uns[key]
    times = np.asarray(entry["times"], np.float64)
    if not times[0] <= time <= times[-1]:
        raise ValueError(
            f"time={time!r} must lie between the first and the last time point, {times[0]:g} and {times[-1]:g}"
        )
    k = min(int(np.searchsorted(times, time, side="right")) - 1, len(times) - 2)
    share = (time - times[k]) / (times[k + 1] - times[k])
    with jax.enable_x64(True):
        z = z_slot.read(adata)
        cells = time_points(at.read(adata))
        f, g, scale, epsilon = (jnp.asarray(entry[name], z.dtype) for name in COUPLING)
        x, y, _ = between(z[cells[k]], z[cells[k + 1]], scale[k])
        centre = z[cells[k + 1]].mean(0)
        n = round((1 - share) * len(x) + share * len(y)) if n_obs is None else n_obs
        share = jnp.asarray(share, z.dtype)
        if method == "sample":
            made = _interpolated(x, y, f[cells[k]], g[cells[k + 1]], epsilon, share, seed, n)
        else:
            made = jax.jit(barycentric)(x, y, g[cells[k + 1]], epsilon, share)
        return np.array(made * jnp.sqrt(scale[k]) + centre)


_interpolated = partial(jax.jit, static_argnums=7)(interpolated)
