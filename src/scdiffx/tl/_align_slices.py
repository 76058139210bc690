"""Slices of tissue in one coordinate system."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._log import warn
from scdiffx._slots import Obs, Obsm, Slot, Uns, X, available, check_batch
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

# Entries of a coupling below this share of the largest of their row are not written.
_LEAST = 1e-4
_KEPT = ("rotation", "shift", "objective", "steps", "error")


@public
def align_slices(
    adata: AnnData | SpatialData | Plan,
    batch_key: str,
    *,
    reference: str | None = None,
    overlap: float = 1.0,
    alpha: float = 0.1,
    epsilon: float = 0.002,
    reflection: bool = False,
    spatial_key: str = "spatial",
    layer: str | None = None,
    max_spots: int = 1000,
    max_iter: int = 500,
    key_added: str = "align_slices",
    copy: bool = False,
    table_key: str | None = None,
) -> AnnData | SpatialData | None:
    """Bring slices of tissue into one coordinate system by their expression and geometry.

    PASTE's pairwise alignment: a fused Gromov-Wasserstein coupling of each slice with the next, or of a reference with
    all others, or of a common centre with all, and the rotation and shift that it implies. Slices are not deformed.
    Every spot finds a partner unless `overlap` says that slices show only in part the same tissue.

    Parameters
    ----------
    adata
        Annotated data (spots x genes) with counts in `X`, or a plan.
    batch_key
        Column of `obs` with the slice of each spot. Slices follow each other as its categories do.
    reference
        The slice that stays where it is, onto which all others are aligned. By default each is aligned onto the one
        before it, and the first stays. With "center" (unless a slice has this name) all are aligned onto a centre
        that has the places of the first slice and expression in common with all (PASTE's `center_align`).
    overlap
        Share of the mass of either slice that is coupled (PASTE2's s), greater than 0 and at most 1; the same for all
        pairs. Of slices with n and m spots that have k in common, k over the larger of n and m. It has to be known, to
        about a tenth and rather less than more: it is not estimated.
    alpha
        Weight of geometry against expression, greater than 0 and at most 1.
    epsilon
        Entropy of a coupling, in units of the objective (nats). Less is sharper, and harder to solve.
    reflection
        Whether slices may be mirrored.
    spatial_key
        Key of `obsm` with two or three coordinates.
    layer
        Layer with the counts; default `X`.
    max_spots
        In slices with more spots than this, neighbours are pooled into this many groups of (nearly) equal size, and
        groups are coupled rather than spots: coarse, but for large slices as exact, because the motion is that of all.
    max_iter
        Largest number of steps of the solver for a coupling.
    key_added
        Key in `uns`; other than the default, coordinates are in ``obsm[f"{key_added}_aligned"]``.
    copy
        Return a copy instead of writing to `adata`: of a SpatialData, one that shares everything but the table.
    table_key
        Name of the table where `adata` is a SpatialData, which needs it if it has several. Coordinates are those of the
        table's `obsm`, not of shapes.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["spatial_aligned" | f"{key_added}_aligned"]` : float (spots, dims)
        Coordinates in the system of the slice that stays; float32 unless the input is float64.
    `adata.uns["align_slices" | key_added]` : dict
        `slices`, their names; `rotation` (slices, dims, dims) and `shift` (slices, dims): a spot at s has come to
        ``rotation @ s + shift``. `pairs` (pairs, 2), the numbers of the slices that were coupled; for each, the
        `objective` (fused Gromov-Wasserstein, entropy left out), the `steps` and the `error` of the solver. `plan`, the
        couplings as one sparse matrix (groups x groups; each coupling sums to 1 or `overlap`; entries below 1e-4 of the
        largest in their row, and of what is mean, are left out), and `group`, the row of each spot: its own number
        where nothing was pooled. `params`. With a centre, pairs are of the first slice's places with all slices, and
        `center` holds for each of these places the `expression` (places, genes), as shares of the genes with the
        pseudocount, the `spatial` coordinates, and the `group`, its row of `plan`.

    Raises
    ------
    KeyError
        If the column, the reference, the coordinates or the layer do not exist.
    ValueError
        If there are fewer than two slices, a slice has fewer than three spots, the slice of a spot is missing,
        expression is negative, or a setting is not usable.

    Warns
    -----
    UserWarning
        If `max_iter` steps were not enough.

    Notes
    -----
    Of PASTE's objective, distances within slices are replaced by squared ones, scaled such that small differences count
    the same. What is not linear in the coupling then passes through a matrix of dims x dims: several starts all around
    cost little, and the start with the lowest objective is taken. In a plan `alpha` and `epsilon` can be learned;
    derivatives in expression and coordinates are those of the stationary point, implicit, at fixed groups.

    PASTE takes the centre's expression from a factorisation of the mean that couplings bring to it; here it is the mean
    of shares itself, for which no rank has to be chosen.

    References
    ----------
    Zeira et al. (2022), Alignment and integration of spatial transcriptomics data. Liu, Zeira and Raphael (2023),
    Partial alignment of multislice spatially resolved transcriptomics data. Vayer et al. (2020), Fused
    Gromov-Wasserstein distance for structured objects.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> adata.obsm["spatial"] = np.random.default_rng(0).uniform(size=(150, 2))  # in place of a tissue
    >>> adata.obs["slice"] = np.where(np.arange(150) % 3 == 0, "first", "second")
    >>> sd.tl.align_slices(adata, "slice", epsilon=0.05)
    >>> adata.obsm["spatial_aligned"].shape
    (150, 2)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    names = _slices(data, batch_key)
    if reference not in (None, "center", *names):
        raise KeyError(f"reference={reference!r} is not a slice. Available: {available(names)}")
    _check_settings(overlap, alpha, epsilon, max_spots, max_iter)
    spatial = Obsm(spatial_key)
    if not (adata.has(spatial) if isinstance(adata, Plan) else spatial.exists(data)):
        raise KeyError(f"spatial_key={spatial_key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}")
    op = ops.AlignSlices(
        alpha=float(alpha),
        epsilon=float(epsilon),
        overlap=None if overlap == 1 else float(overlap),
        reference=names.index(reference) if reference in names else None if reference is None else "center",
        reflection=reflection,
        limits=ops.SliceLimits(max_spots=max_spots, max_iter=max_iter),
    )
    params = {
        "batch_key": batch_key,
        "spatial_key": spatial_key,
        "overlap": float(overlap),
        "alpha": float(alpha),
        "epsilon": float(epsilon),
        "reflection": reflection,
        "max_spots": max_spots,
        **({} if reference is None else {"reference": reference}),
    }

    def notes(op: ops.AlignSlices, result: ops.AlignSlicesResult, args: Any) -> Mapping[Slot, Any]:
        assert op.groups is not None
        plan, group = _coupled(op.groups, np.asarray(result.plan))
        arrays = {name: np.array(getattr(result, name)) for name in _KEPT}
        entry = {
            "params": params,
            "slices": np.array([str(name) for name in names], object),
            "pairs": np.array(op.groups.pairs),
            **{name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in arrays.items()},
            "plan": plan,
            "group": group,
        }
        if result.center is not None:
            entry["center"] = _center(op.groups, np.asarray(result.center), group, np.asarray(args[1]))
        return {Uns(key_added): entry}

    def check(op: ops.AlignSlices, result: ops.AlignSlicesResult) -> None:
        error = np.asarray(result.error)
        short = ~(error <= op.threshold(result.aligned.dtype))
        if short.any():
            warn(
                f"{short.sum()} of {len(short)} couplings are not solved after {max_iter} steps (errors up to "
                f"{error.max():.1e}): raise `epsilon` or `max_iter`"
            )

    step = Step(
        "align_slices",
        op,
        reads=(X(layer, counts=True), spatial, Obs(batch_key, codes=True)),
        writes=(
            Write(
                Obsm("spatial_aligned" if key_added == "align_slices" else f"{key_added}_aligned"),
                lambda op, result: result.aligned,
            ),
        ),
        message=f"aligning slices of {batch_key!r}",
        notes=notes,
        check=check,
        precise=True,
    )
    return apply(adata, step, copy=copy)


def _slices(data: AnnData, batch_key: str) -> list[Any]:
    """The slices that there are, in order."""
    check_batch(data, batch_key)
    if data.n_obs == 0:
        raise ValueError("`adata` is empty: it has 0 cells")
    column = data.obs[batch_key].astype("category").cat.remove_unused_categories()
    sizes = column.value_counts(sort=False)
    if len(sizes) < 2 or sizes.min() < 3:
        raise ValueError(
            f"batch_key={batch_key!r} must tell at least two slices with at least 3 spots each, and has "
            f"{len(sizes)} with {sizes.min()} or more"
        )
    return list(column.cat.categories)


def _check_settings(overlap: float, alpha: float, epsilon: float, max_spots: int, max_iter: int) -> None:
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap={overlap!r} must be greater than 0 and at most 1")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be greater than 0 and at most 1")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon={epsilon!r} must be greater than 0")
    for name, count, least in (("max_spots", max_spots, 3), ("max_iter", max_iter, 1)):
        if count < least:
            raise ValueError(f"{name}={count!r} must be at least {least}")


def _coupled(groups: ops.SliceGroups, plans: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """All couplings as one sparse matrix between groups, and the group of each spot, in the order of first members."""
    place = np.asarray(groups.group)
    used, first, inverse = np.unique(place, return_index=True, return_inverse=True)
    rank = np.empty(len(used), np.int32)
    rank[np.argsort(first)] = np.arange(len(used), dtype=np.int32)
    places = groups.log_weight.shape[1]
    at = np.full(groups.log_weight.size, -1, np.int64)
    at[used] = rank
    rows, columns, values = [], [], []
    for (a, b), plan in zip(np.asarray(groups.pairs), plans, strict=True):
        here, there = at[a * places : (a + 1) * places], at[b * places : (b + 1) * places]
        # Rows that are left out hold next to nothing, of which no entry counts.
        least = _LEAST * np.maximum(plan.max(axis=1, keepdims=True), plan.sum(axis=1).mean() / places)
        kept = (plan > least) & (here >= 0)[:, None] & (there >= 0)
        i, j = np.nonzero(kept)
        rows.append(here[i])
        columns.append(there[j])
        values.append(plan[kept])
    entries = (np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return sp.csr_matrix(entries, shape=(len(used), len(used))), rank[inverse]


def _center(groups: ops.SliceGroups, center: np.ndarray, group: np.ndarray, spatial: np.ndarray) -> dict[str, Any]:
    """The centre's expression and coordinates, where the first slice has spots."""
    place = np.asarray(groups.group)
    here = np.flatnonzero(place < groups.log_weight.shape[1])
    used, first, inverse = np.unique(place[here], return_index=True, return_inverse=True)
    where = np.stack([np.bincount(inverse, v) for v in spatial[here].T], axis=1) / np.bincount(inverse)[:, None]
    order = np.argsort(group[here[first]])
    return {
        "expression": center[used[order]].astype(np.float32),
        "spatial": where[order],
        "group": group[here[first]][order],
    }
