"""Slots by the names that users write: "X", "layers/counts", "obsm/X_pca"."""

from __future__ import annotations

from typing import Any

from scdiffx._slots._graphs import Obsp
from scdiffx._slots._matrix import available
from scdiffx._slots._places import Obs, Obsm, Var, Varm, X

__all__ = ["check_shape", "slot_at"]

_PLACES: dict[str, Any] = {"layers": X, "obs": Obs, "var": Var, "obsm": Obsm, "varm": Varm, "obsp": Obsp}


def slot_at(place: str, argument: str) -> Any:
    """The slot of a place such as "X" or "obsm/X_pca"."""
    if place == "X":
        return X()
    where, _, key = place.partition("/") if isinstance(place, str) else ("", "", "")
    if where not in _PLACES or not key:
        raise ValueError(f"{argument}: {place!r} is no place. It is 'X', or one of {available(_PLACES)} with '/key'")
    return _PLACES[where](key)


def check_shape(adata: Any, slot: Any, value: Any) -> None:
    """Raise where the AnnData could not hold the value in the slot."""
    shape = tuple(value.shape)
    if isinstance(slot, X):
        fits, needed = shape == adata.shape, f"{adata.shape}"
    elif isinstance(slot, Obsp):
        fits, needed = shape == (adata.n_obs, adata.n_obs), f"({adata.n_obs}, {adata.n_obs})"
    else:
        n = adata.n_obs if isinstance(slot, Obs | Obsm) else adata.n_vars
        one = isinstance(slot, Obs | Var)
        fits, needed = shape[:1] == (n,) and (len(shape) == 1) == one, f"({n},)" if one else f"({n}, any)"
    if not fits:
        raise ValueError(f"the result for {slot} has shape {shape}, and {needed} is needed")
