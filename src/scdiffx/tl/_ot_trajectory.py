"""Couplings between time points."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._log import warn
from scdiffx._slots import Decoded, Genes, Obs, Obsm, Single, Slot, Uns, X, available, genes_at, preset
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

# The arrays of the entry in `uns` from which a coupling is applied.
COUPLING = ("f", "g", "scale", "epsilon")
GENE_SETS = ("proliferation", "apoptosis")
SCALES = ("mean", "median")


@public
def ot_trajectory(
    adata: AnnData | Plan,
    time_key: str,
    *,
    growth: str | Mapping[str, Sequence[str]] | None = None,
    epsilon: float = 0.05,
    tau: float | tuple[float, float] = (0.95, 1.0),
    growth_iters: int = 1,
    time_unit: float = 1.0,
    scale_cost: str | float = "mean",
    use_rep: str | None = None,
    layer: str | None = None,
    max_iter: int = 2000,
    key_added: str = "ot_trajectory",
    copy: bool = False,
) -> AnnData | None:
    """Couple the cells of each time point with those of the next by optimal transport.

    Waddington-OT's unbalanced entropic transport of squared Euclidean distances. `ot_pull` then tells what becomes of
    a cell, `ot_push` what it came from, and `ot_interpolate` how cells look between time points. Distances are computed
    where they are needed and not kept, so memory is linear in the cells.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan.
    time_key
        Column of `obs` with at least two time points: numbers, or labels. Labels that are numbers count as these;
        other labels are one unit apart, in the order of an ordered categorical or else in natural order (E9.5, E10.5).
    growth
        How many descendants a cell has per unit of time: None for the same number, a column of `obs` with numbers
        greater than 0, or lists of genes ``{"proliferation": [...], "apoptosis": [...]}``, whose scores Waddington-OT's
        logistic curves turn into rates of birth and death per day (`X` should hold logarithms of normalised values).
    epsilon
        Entropy of the coupling, in units of the scaled cost.
    tau
        How firmly the marginals are held, in (0, 1], those of the earlier and of the later time point: 1 exactly, less
        leaves growth to be found. It is ``lambda / (lambda + epsilon)`` in terms of Waddington-OT's lambda.
    growth_iters
        Number of rounds; each after the first takes the growth that the coupling of the one before implies.
    time_unit
        What `growth` counts as one unit of time: 24 for rates per day where `time_key` holds hours.
    scale_cost
        Squared distances are divided by their "mean", by their "median" (of at most 1,024 cells of either time point),
        or by a number.
    use_rep
        Key of `obsm` in which distances are measured; default: the principal components.
    layer
        With genes as `growth`, take them from this layer rather than `X`.
    max_iter
        Largest number of Sinkhorn iterations.
    key_added
        Key in `uns`; other than the default, the column of `obs` is ``f"{key_added}_growth_rate"``.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.uns["ot_trajectory" | key_added]` : dict
        The couplings as potentials `f` (towards the next time point) and `g` (towards the one before) of each cell,
        with `epsilon` and the `scale` of the cost of each pair: ``exp((f[i] + g[j] - |z[i] - z[j]|^2 / scale) /
        epsilon)``. For each pair also `cost`, the mean squared distance that mass moves, `iterations` and `error` (the
        L1 distance to what a solution fulfils); `times`, their `labels`, `params`, and a `fingerprint` of the cells.
    `adata.obs["growth_rate" | f"{key_added}_growth_rate"]` : float32 (cells,)
        Descendants per unit of time according to the coupling. Only ratios between cells of a time point can be
        inferred: the mean over a step is what `growth` says. At the last time point what `growth` says.

    Raises
    ------
    KeyError
        If a column, the representation or a gene does not exist.
    TypeError
        If `growth` is neither text nor a mapping, or its column is not numeric.
    ValueError
        If there are fewer than two time points or more than half as many as cells, a time is missing, growth is not
        greater than 0, or a setting is not usable.

    Warns
    -----
    UserWarning
        If `max_iter` iterations were not enough.

    Notes
    -----
    In a plan `epsilon` can be learned, and derivatives pass through couplings by implicit differentiation.

    References
    ----------
    Schiebinger et al. (2019), Optimal-transport analysis of single-cell gene expression identifies developmental
    trajectories in reprogramming. Chizat et al. (2018), Scaling algorithms for unbalanced optimal transport problems.

    Examples
    --------
    >>> import numpy as np
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> adata.obs["day"] = np.arange(700) % 2  # in place of real time points
    >>> sd.tl.ot_trajectory(adata, "day")
    >>> adata.uns["ot_trajectory"]["labels"].tolist()
    ['0', '1']
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    taus = (tau, tau) if isinstance(tau, int | float) else tuple(tau)
    _check_settings(epsilon, taus, growth_iters, time_unit, scale_cost, max_iter)
    time = time_slot(data, time_key, time_unit)
    z = representation(adata, use_rep)
    source, sets = _growth_slot(data, growth, layer)
    op = ops.OTTrajectory(
        epsilon=float(epsilon),
        tau=(float(taus[0]), float(taus[1])),
        scale=scale_cost if isinstance(scale_cost, str) else float(scale_cost),
        rounds=growth_iters,
        gene_sets=sets,
        max_iter=max_iter,
    )
    params = {
        "time_key": time_key,
        "time_unit": float(time_unit),
        "use_rep": z.key,
        "epsilon": float(epsilon),
        "tau_a": float(taus[0]),
        "tau_b": float(taus[1]),
        "growth_iters": growth_iters,
        "scale_cost": scale_cost,
        **({} if growth is None else {"growth": growth if isinstance(growth, str) else sorted(growth)}),
    }
    coupling = Uns(key_added, COUPLING)
    numbers = time_labels(data, time_key)
    there = set(data.obs[time_key].unique())
    labels = np.array([str(label) for label in sorted(numbers, key=lambda v: numbers[v]) if label in there], object)

    def notes(op: ops.OTTrajectory, result: ops.OTTrajectoryResult, args: Any) -> Mapping[Slot, Any]:
        arrays = {name: np.array(getattr(result, name)) for name in ("f", "g", "scale", "cost", "iterations", "error")}
        times = np.unique(np.asarray(args[1], np.float64)) * time_unit
        return {
            coupling: {
                "params": params,
                "times": times,
                "labels": labels,
                **{name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in arrays.items()},
                "epsilon": float(op.epsilon),
                "fingerprint": fingerprint(args[0], args[1]),
            }
        }

    def check(op: ops.OTTrajectory, result: ops.OTTrajectoryResult) -> None:
        short = ~(np.asarray(result.error) < op.threshold(result.f.dtype))
        if short.any():
            warn(
                f"{short.sum()} of {len(short)} couplings are not solved after {max_iter} iterations (errors up to "
                f"{np.asarray(result.error).max():.1e}): raise `max_iter` or `epsilon`, or lower `tau`"
            )

    growth_key = "growth_rate" if key_added == "ot_trajectory" else f"{key_added}_growth_rate"
    step = Step(
        "ot_trajectory",
        op,
        reads=(z, time, source),
        writes=(
            Write(Obs(growth_key), lambda op, result: result.growth, np.float32),
            Write(coupling, _coupling_of),
        ),
        message=f"coupling time points of {time_key!r}",
        notes=notes,
        check=check,
    )
    return apply(adata, step, copy=copy)


def _coupling_of(op: ops.OTTrajectory, result: ops.OTTrajectoryResult) -> dict[str, Any]:
    return {"f": result.f, "g": result.g, "scale": result.scale, "epsilon": op.epsilon}


def _check_settings(
    epsilon: float, tau: tuple[float, ...], growth_iters: int, time_unit: float, scale_cost: str | float, max_iter: int
) -> None:
    for name, value in (("epsilon", epsilon), ("time_unit", time_unit)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    if len(tau) != 2 or not all(0 < t <= 1 for t in tau):
        raise ValueError(f"tau={tau!r} must be a number or two, greater than 0 and at most 1")
    for name, count in (("growth_iters", growth_iters), ("max_iter", max_iter)):
        if count < 1:
            raise ValueError(f"{name}={count!r} must be at least 1")
    usable = scale_cost in SCALES if isinstance(scale_cost, str) else math.isfinite(scale_cost) and scale_cost > 0
    if not usable:
        raise ValueError(f"scale_cost={scale_cost!r} must be a number greater than 0 or one of {list(SCALES)}")


def representation(adata: AnnData | Plan, use_rep: str | None) -> Obsm:
    """The slot of the representation; the principal components by default."""
    data = adata.adata if isinstance(adata, Plan) else adata
    default = "pca" if preset() == "ScanpyV2Preview" else "X_pca"
    slot = Obsm(default if use_rep is None else use_rep)
    if not (adata.has(slot) if isinstance(adata, Plan) else slot.exists(data)):
        hint = "; run `sd.pp.pca` first" if use_rep is None else ""
        raise KeyError(f"use_rep={slot.key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}{hint}")
    return slot


def time_labels(data: AnnData, time_key: str) -> dict[Any, float]:
    """The number that each category of the column stands for, earliest first."""
    if time_key not in data.obs:
        raise KeyError(f"time_key={time_key!r} is not in `adata.obs`. Available: {available(data.obs)}")
    if data.n_obs == 0:
        raise ValueError("`adata` is empty: it has 0 cells")
    column = data.obs[time_key].astype("category")
    if column.isna().any():
        raise ValueError(f"time_key={time_key!r}: the time of {column.isna().sum()} cells is missing")
    labels = list(column.cat.categories)
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError):
        ranked = labels if column.cat.ordered else sorted(labels, key=_natural)
        numbers = [float(ranked.index(label)) for label in labels]
    present = {numbers[i] for i in np.unique(column.cat.codes)}
    if not 2 <= len(present) <= max(data.n_obs // 2, 2):
        raise ValueError(
            f"time_key={time_key!r} has {len(present)} different values for {data.n_obs} cells; at least two time "
            "points are needed, and at most half as many as cells: bin times that are continuous with `pandas.cut`"
        )
    return dict(zip(labels, numbers, strict=True))


def time_slot(data: AnnData, time_key: str, time_unit: float) -> Decoded:
    """The slot of the time of each cell as a number of units."""
    values = tuple(number / time_unit for number in time_labels(data, time_key).values())
    if not all(math.isfinite(value) for value in values) or len(np.unique(np.asarray(values, np.float32))) < len(
        values
    ):
        raise ValueError(f"time_key={time_key!r}: times must be finite and differ in single precision")
    return Decoded(Obs(time_key, codes=True), values)


def _natural(label: Any) -> list[Any]:
    parts = re.split(r"(\d+(?:\.\d+)?)", str(label))
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _growth_slot(
    data: AnnData, growth: str | Mapping[str, Sequence[str]] | None, layer: str | None
) -> tuple[Slot | None, tuple[int, int] | None]:
    """Where growth is read from, and the sizes of the sets where it comes from genes."""
    if isinstance(growth, Mapping):
        unknown = [name for name in growth if name not in GENE_SETS]
        if unknown or not any(len(genes) for genes in growth.values()):
            raise ValueError(f"growth={dict(growth)!r} must name genes for one or both of {list(GENE_SETS)}")
        given: list[Any] = [growth.get(name, ()) for name in GENE_SETS]
        sets = [[genes] if isinstance(genes, str) else list(genes) for genes in given]
        index = genes_at(data, [gene for genes in sets for gene in genes])
        return Genes(X(layer), index), (len(sets[0]), len(sets[1]))
    if layer is not None:
        raise ValueError(f"layer={layer!r} has no meaning unless `growth` names genes")
    if growth is None:
        return None, None
    if not isinstance(growth, str):
        raise TypeError(f"growth is a {type(growth).__name__}: pass None, a column of `obs` or a mapping to genes")
    if growth not in data.obs:
        raise KeyError(f"growth={growth!r} is not in `adata.obs`. Available: {available(data.obs)}")
    column = data.obs[growth]
    if column.dtype.kind not in "fiu":
        raise TypeError(f"growth={growth!r}: `adata.obs[{growth!r}]` has dtype {column.dtype} and should hold numbers")
    values = column.to_numpy(np.float64)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        first = data.obs_names[np.flatnonzero(bad)[0]]
        raise ValueError(f"growth={growth!r} must be finite and greater than 0, but is not for cell {first!r}")
    return Single(Obs(growth)), None


def fingerprint(z: Any, time: Any) -> int:
    """A number that changes when cells, their order, their representation or their times do."""
    return zlib.crc32(np.asarray(time, np.float32).tobytes(), zlib.crc32(np.asarray(z, np.float32).tobytes()))
