"""Slots: names of places in an AnnData, and the only code that reads or writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from scdiffx._log import warn
from scdiffx._slots._containers import Cells, is_mudata, is_spatialdata, table_of, with_table
from scdiffx._slots._derived import Decoded, Edges, Genes, Given, Labels, Leading, Modality, Part, Single, Weights
from scdiffx._slots._graphs import Connectivities, Cosines, Distances, Obsp
from scdiffx._slots._history import check_history, history_of, left_out, record, restored, tabulated, written
from scdiffx._slots._matrix import (
    available,
    categories,
    check_batch,
    check_counts,
    check_finite,
    genes_at,
    is_anndata,
    matrix_of,
    preset,
    warn_if_not_counts,
)
from scdiffx._slots._named import check_shape, slot_at
from scdiffx._slots._places import Obs, Obsm, Uns, Var, Varm, X

__all__ = [
    "Cells",
    "Connectivities",
    "Cosines",
    "Decoded",
    "Distances",
    "Edges",
    "Genes",
    "Given",
    "Labels",
    "Leading",
    "Modality",
    "Obs",
    "Obsm",
    "Obsp",
    "Part",
    "Single",
    "Slot",
    "Uns",
    "Var",
    "Varm",
    "Weights",
    "X",
    "available",
    "categories",
    "check_batch",
    "check_counts",
    "check_finite",
    "check_history",
    "check_shape",
    "genes_at",
    "history_of",
    "is_anndata",
    "is_mudata",
    "is_spatialdata",
    "left_out",
    "matrix_of",
    "preset",
    "record",
    "restored",
    "slot_at",
    "table_of",
    "tabulated",
    "warn_if_not_counts",
    "with_table",
    "write_all",
    "written",
]

Slot = X | Obs | Var | Obsm | Varm | Connectivities | Distances | Obsp | Cosines | Uns | Part | Given | Modality


def write_all(adata: Any, values: Mapping[Any, Any]) -> None:
    """Write host values together. A view becomes an actual AnnData first, as in scanpy; its parent stays as it was."""
    held = adata.mdata if isinstance(adata, Cells) else adata
    if held.is_view:
        warn(f"Received a view of {'a MuData' if isinstance(adata, Cells) else 'an AnnData'}. Making a copy.")
        held._init_as_actual(held.copy())
    for slot, value in values.items():
        slot.write(adata, _writable(value))


def _writable(value: Any) -> Any:
    """The value with arrays that the user may change: those that come from a device are read-only."""
    if isinstance(value, np.ndarray):
        return value if value.flags.writeable else value.copy()
    if sp.issparse(value):
        for name in ("data", "indices", "indptr"):
            setattr(value, name, _writable(getattr(value, name)))
    elif isinstance(value, dict):
        return {key: _writable(part) for key, part in value.items()}
    return value
