"""Where the counts of genes and of proteins are, for `vae` on two modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from scdiffx._slots import Cells, Modality, Obsm, X, available, check_counts, matrix_of, warn_if_not_counts
from scdiffx._steps import Plan


class Sources(NamedTuple):
    """What `vae` reads: the AnnData with the genes, the slots with counts, and the names of proteins, if there are any.

    `modality` is the name of the modality with the genes, of a MuData.
    """

    genes: Any
    slots: tuple[Any, ...]
    proteins: tuple[str, ...] | None = None
    modality: str | None = None


def found(adata: Any, layer: str | None, protein_key: str | None, modalities: Sequence[str] | None) -> Sources:
    """Find the counts and check them, but for those of genes that a step of a plan may still write."""
    data = adata.adata if isinstance(adata, Plan) else adata
    if protein_key is not None and modalities is not None:
        raise ValueError(
            f"either modalities={modalities!r}, of a MuData, or protein_key={protein_key!r}, of an AnnData"
        )
    if modalities is not None:
        return _in_modalities(data, layer, modalities)
    try:
        matrix = None if isinstance(adata, Plan) else matrix_of(data, layer)
    except TypeError as error:
        if isinstance(data, Cells):
            error.add_note("A joint model of genes and proteins is made with `modalities=`, both by name.")
        raise
    if matrix is not None:
        warn_if_not_counts(matrix, "vae")
    genes = X(layer, counts=True)
    if protein_key is None:
        return Sources(data, (genes,))
    return Sources(data, (genes, Obsm(protein_key)), _in_obsm(data, protein_key))


def _in_obsm(data: Any, protein_key: str) -> tuple[str, ...]:
    if protein_key not in data.obsm:
        raise KeyError(f"protein_key={protein_key!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}")
    table = data.obsm[protein_key]
    names = getattr(table, "columns", range(table.shape[1] if table.ndim > 1 else 1))
    values = table if sp.issparse(table) else np.asarray(table)
    check_counts(values, data.obs_names, names, "protein")
    warn_if_not_counts(values, "vae")
    return tuple(str(name) for name in names)


def _in_modalities(data: Any, layer: str | None, modalities: Sequence[str]) -> Sources:
    if not isinstance(data, Cells):
        raise ValueError(
            f"modalities={modalities!r} names parts of a MuData, and this is an AnnData: where it has the counts of "
            f"proteins in `obsm`, pass protein_key=. Available: {available(data.obsm.keys())}"
        )
    parts = data.mdata.mod
    if isinstance(modalities, str) or len(modalities) != 2:
        raise ValueError(
            f"modalities={modalities!r} must be two names, that of the genes and that of the proteins. Available: "
            f"{available(parts)}"
        )
    for name in modalities:
        _check_modality(data, name, layer)
    genes, proteins = modalities
    slots = tuple(Modality(name, X(layer, counts=True)) for name in modalities)
    return Sources(parts[genes], slots, tuple(map(str, parts[proteins].var_names)), genes)


def _check_modality(data: Any, name: str, layer: str | None) -> None:
    """Raise unless the modality has all cells, and counts."""
    parts = data.mdata.mod
    if name not in parts:
        raise KeyError(f"modalities: {name!r} is not in the MuData. Available: {available(parts)}")
    part = parts[name]
    there = int((part.obs_names.get_indexer(data.obs_names) >= 0).sum())
    if there < data.n_obs:
        raise ValueError(
            f"modality {name!r} has {there} of the {data.n_obs} cells, and the joint model needs all in both: keep "
            "those with `muon.pp.intersect_obs(mdata)`"
        )
    if layer is not None and layer not in part.layers:
        raise KeyError(
            f"layer={layer!r} is not in `mdata[{name!r}].layers`, and is read from both modalities. Available: "
            f"{available(part.layers.keys())}"
        )
    warn_if_not_counts(matrix_of(part, layer), "vae")
