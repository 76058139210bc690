"""Which cells train, which choose, and which take part in neither."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from scdiffx._fit._objective import labels_of
from scdiffx._slots import Obs
from scdiffx.losses import Loss

__all__ = ["Split", "blind", "three_ways"]


class Split(NamedTuple):
    """Boolean masks of the cells; `holdout` and `test` may also be losses, which then are judged on `train`."""

    train: np.ndarray
    holdout: np.ndarray | Loss | None
    test: np.ndarray | Loss | None


def three_ways(adata: Any, loss: Loss, holdout: Any, test: Any, seed: int) -> Split:
    """Random shares are drawn among the cells that no mask takes, label by label where the loss has labels."""
    rng = np.random.default_rng(seed)
    given = {name: _given(adata, name, value) for name, value in (("holdout", holdout), ("test", test))}
    masks = [mask for mask in given.values() if isinstance(mask, np.ndarray)]
    if len(masks) == 2 and (masks[0] & masks[1]).any():
        raise ValueError(f"holdout and test share {(masks[0] & masks[1]).sum()} cells: no cell can be in both")
    free = ~np.any(masks, axis=0) if masks else np.ones(adata.n_obs, bool)
    unit, groups = _units(loss, adata), _groups(loss, adata)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, float):
            value = _drawn(free, groups, unit, value * adata.n_obs / max(free.sum(), 1), rng)
            if not value.any():
                raise ValueError(f"{name}={given[name]!r} of {adata.n_obs} cells is less than one cell")
            free = free & ~value
        found[name] = value
    labels = labels_of(loss, adata)
    if labels is not None and isinstance(found["holdout"], np.ndarray) and not known(labels[1])[found["holdout"]].any():
        raise ValueError(f"no held-out cell has a value in {labels[0].target!r}: nothing can be chosen by them")
    if not free.any():
        raise ValueError("no cell is left to train on: holdout and test take all")
    return Split(free, found["holdout"], found["test"])


def _given(adata: Any, name: str, value: Any) -> np.ndarray | Loss | float | None:
    if value is None or isinstance(value, Loss):
        return value
    if isinstance(value, str):
        if value not in adata.obs:
            raise KeyError(f"{name}={value!r} is not in `adata.obs`. Available: {list(adata.obs)[:20]}")
        value = adata.obs[value].to_numpy()
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r} must lie between 0 and 1")
        return value
    mask = np.asarray(value)
    if mask.shape != (adata.n_obs,) or mask.dtype != bool:
        raise ValueError(f"{name} must be a fraction, a boolean column or array of {adata.n_obs} cells, or a loss")
    if mask.all() or not mask.any():
        raise ValueError(f"{name} keeps out {mask.sum()} of {adata.n_obs} cells; both groups need cells")
    return mask


def known(labels: np.ndarray) -> np.ndarray:
    """Which cells have a label or a number."""
    return labels >= 0 if labels.dtype.kind in "iu" else np.isfinite(labels)


def blind(split: Split, loss: Loss, adata: Any) -> bool:
    """Whether there are test cells and none of them has a label: they would seem to have no error."""
    labels = labels_of(loss, adata)
    return labels is not None and isinstance(split.test, np.ndarray) and not known(labels[1])[split.test].any()


def _units(loss: Loss, adata: Any) -> np.ndarray:
    """A number for each cell, the same for cells that belong together and must not be parted."""
    for _, term in loss.terms:
        if getattr(term, "of_pairs", False) and Obs(term.target).exists(adata):
            codes = np.asarray(Obs(term.target, codes=True).read(adata))
            return np.where(codes < 0, codes.max() + 1 + np.arange(len(codes)), codes)
    return np.arange(adata.n_obs)


def _groups(loss: Loss, adata: Any) -> np.ndarray:
    """A number for each cell: its label where there are labels, whether it has a value where there are numbers."""
    found = labels_of(loss, adata)
    if found is None:
        return np.zeros(adata.n_obs, int)
    values = found[1]
    return values.astype(int) if values.dtype.kind in "iu" else np.isfinite(values).astype(int)


def _drawn(
    free: np.ndarray, groups: np.ndarray, unit: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """About that share of the free cells, of each group as of all."""
    cells = np.flatnonzero(free)
    cells = rng.permutation(cells[np.unique(unit[cells], return_index=True)[1]])
    cells = cells[np.argsort(groups[cells], kind="stable")]
    # One in 1/share, counted through the groups from a random start.
    reached = np.floor(np.arange(len(cells) + 1) * share + rng.random())
    return free & np.isin(unit, unit[cells[np.diff(reached) > 0]])
