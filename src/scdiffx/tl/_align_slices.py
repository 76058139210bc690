"""Slices of tissue in one coordinate system."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiffx import ops
from scdiffx._log import warn
from scdiffx._slots import Obs, Obsm, Slot, Uns, X, available, check_batch
from scdiffx._steps import Plan, Step, Write, apply, public

if TYPE_CHECKING:
    from anndata import AnnData

# Entries of a coupling below this share of the largest of their row are not written.
_LEAST = 1e-4
_KEPT = ("rotation", "shift", "objective", "steps", "error")


@public
def align_slices(
    adata: AnnData | Plan,
    batch_key: str,
    *,
    reference: str | None = None,
    alpha: float = 0.1,
    epsilon: float = 0.002,
    reflection: bool = False,
    spatial_key: str = "spatial",
    layer: str | None = None,
    max_spots: int = 1000,
    max_iter: int = 500,
    key_added: str = "align_slices",
    copy: bool = False,
) -> AnnData | None:
    """Bring slices of tissue into one coordinate system by their expression and geometry.

    PASTE's pairwise alignment: a fused Gromov-Wasserstein coupling of each slice with the next, or of a reference with
    all others, and the rotation and shift that it implies. Slices are not deformed. Every spot finds a partner, so
    slices should show the same part of the tissue: partial overlap is not modelled, and there is no joint centre slice.

    Parameters
    ----------
    adata
        Annotated data (spots x genes) with counts in `X`, or a plan.
    batch_key
        Column of `obs` with the slice of each spot. Slices follow each other as its categories do.
    reference
        The slice that stays where it is, onto which all others are aligned. By default each is aligned onto the one
        before it, and the first stays.
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
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["spatial_aligned" | f"{key_added}_aligned"]` : float (spots, dims)
        Coordinates in the system of the slice that stays; float32 unless the input is float64.
    `adata.uns["align_slices" | key_added]` : dict
        `slices`, their names; `rotation` (slices, dims, dims) and `shift` (slices, dims): a spot at s has come to
        ``rotation @ s + shift``. `pairs` (pairs, 2), the numbers of the slices that were coupled; for each, the
        `objective` (fused Gromov-Wasserstein, entropy left out), the `steps` and the `error` of the solver. `plan`, the
        couplings as one sparse matrix (groups x groups; each coupling sums to 1; entries below 1e-4 of the largest in
        their row are left out), and `group`, the row of each spot: its own number where nothing was pooled. `params`.

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

    References
    ----------
    Zeira et al. (2022), Alignment and integration of spatial transcriptomics data. Vayer et al. (2020), Fused
    Gromov-Wasserstein distance for structured objects.
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    names = _slices(data, batch_key)
    if reference is not None and reference not in names:
        raise KeyError(f"reference={reference!r} is not a slice. Available: {available(names)}")
    _check_settings(alpha, epsilon, max_spots, max_iter)
    spatial = Obsm(spatial_key)
    if not (adata.has(spatial) if isinstance(adata, Plan) else spatial.exists(data)):
        raise KeyError(f"spatial_key={spatial_key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}")
    op = ops.AlignSlices(
        alpha=float(alpha),
        epsilon=float(epsilon),
        reference=None if reference is None else names.index(reference),
        reflection=reflection,
        max_spots=max_spots,
        max_iter=max_iter,
    )
    params = {
        "batch_key": batch_key,
        "spatial_key": spatial_key,
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


def _check_settings(alpha: float, epsilon: float, max_spots: int, max_iter: int) -> None:
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
        kept = (plan > _LEAST * plan.max(axis=1, keepdims=True)) & (here >= 0)[:, None] & (there >= 0)
        i, j = np.nonzero(kept)
        rows.append(here[i])
        columns.append(there[j])
        values.append(plan[kept])
    entries = (np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return sp.csr_matrix(entries, shape=(len(used), len(used))), rank[inverse]
