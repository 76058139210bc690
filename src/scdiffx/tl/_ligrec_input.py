"""What the test of ligand-receptor interactions is given: tables of pairs, and graphs of neighbouring cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse as sp

from scdiffx._core.spatial import neighbors_in_space
from scdiffx._slots import Edges, Obsp, available
from scdiffx._steps import Plan

__all__ = ["columns_of", "neighbour_slot", "pairs_of"]

_COLUMNS = (("ligand", "receptor"), ("source_genesymbol", "target_genesymbol"), ("source", "target"))
_GRAPH, _COORDINATES = "spatial_connectivities", "spatial"


def pairs_of(interactions: Any) -> list[tuple[str, str]]:
    """The names of ligands and receptors, each pair once."""
    if hasattr(interactions, "columns"):
        columns = next((pair for pair in _COLUMNS if set(pair) <= set(interactions.columns)), None)
        if columns is None:
            raise KeyError(
                f"interactions have columns {available(interactions.columns)}; "
                f"they need {' or '.join(str(list(pair)) for pair in _COLUMNS)}"
            )
        named = interactions[list(columns)].dropna().itertuples(index=False, name=None)
    elif isinstance(interactions, Iterable) and not isinstance(interactions, str | dict):
        named = iter(interactions)
    else:
        raise TypeError(f"interactions is a {type(interactions).__name__}: pass a data frame or a sequence of pairs")
    found: dict[tuple[str, str], None] = {}
    for pair in named:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise TypeError(f"interactions: {pair!r} is not a pair of names, a ligand and a receptor")
        found[tuple(pair)] = None
    if not found:
        raise ValueError("interactions: there is none")
    return list(found)


def columns_of(
    pairs: list[tuple[str, str]], data: Any, *, partial: bool
) -> tuple[tuple[int, ...], tuple[np.ndarray, np.ndarray], list[int]]:
    """The genes concerned, by position; the places of the members of each side among them; and the pairs that are kept.

    With `partial` a complex may miss some members.
    """
    if data.n_obs == 0 or data.n_vars == 0:
        raise ValueError(f"`adata` is empty: it has {data.n_obs} cells and {data.n_vars} genes")
    if not data.var_names.is_unique:
        raise ValueError("gene names are not unique; call `adata.var_names_make_unique()` first")
    position = {name: i for i, name in enumerate(data.var_names)}

    def members(name: str) -> list[int]:
        if name in position:
            return [position[name]]
        parts = [position.get(part, -1) for part in name.split("_")]
        there = [part for part in parts if part >= 0]
        return there if partial or len(there) == len(parts) else []

    sides = [(members(ligand), members(receptor)) for ligand, receptor in pairs]
    kept = [i for i, (ligand, receptor) in enumerate(sides) if ligand and receptor]
    if not kept:
        raise KeyError(
            f"interactions: none of {len(pairs)}, such as {pairs[0]}, has both sides in `adata.var_names`. "
            f"Available: {available(data.var_names)}"
        )
    genes = np.unique([gene for i in kept for side in sides[i] for gene in side])
    arrays = [_padded([np.searchsorted(genes, sides[i][side]) for i in kept]) for side in (0, 1)]
    return tuple(genes.tolist()), (arrays[0], arrays[1]), kept


def _padded(members: list[np.ndarray]) -> np.ndarray:
    """As many columns as the largest complex has members; others repeat their first."""
    width = max(len(m) for m in members)
    return np.asarray([[*m, *[m[0]] * (width - len(m))] for m in members], np.int32)


def neighbour_slot(adata: Any, neighbors: bool | str, strata: np.ndarray | None) -> Obsp | Edges | None:
    """The graph of neighbouring cells, which must not join strata."""
    data = adata.adata if isinstance(adata, Plan) else adata
    if neighbors is False:
        return None
    key = _GRAPH if neighbors is True else neighbors
    if key in data.obsp:
        if strata is not None:
            edges = sp.coo_matrix(data.obsp[key])
            across = int((strata[edges.row] != strata[edges.col]).sum())
            if across:
                raise ValueError(
                    f"`adata.obsp[{key!r}]` joins cells of different batches by {across} of {edges.nnz} edges: "
                    "build it for each batch (`library_key=` of `squidpy.gr.spatial_neighbors`)"
                )
        return Obsp(key)
    if neighbors is not True:
        raise KeyError(f"neighbors={neighbors!r} is not in `adata.obsp`. Available: {available(data.obsp.keys())}")
    if _COORDINATES not in data.obsm:
        raise KeyError(
            f"neighbors=True needs `adata.obsp[{_GRAPH!r}]` or `adata.obsm[{_COORDINATES!r}]`. "
            f"Available: {available(data.obsp.keys())} and {available(data.obsm.keys())}"
        )
    return Edges(neighbors_in_space(np.asarray(data.obsm[_COORDINATES], np.float64), batch=strata))
