"""Containers of several AnnData: what of them a function may see, and where its results go."""

from __future__ import annotations

import sys
from typing import Any

from scdiffx._slots._matrix import available

# What a MuData has for all its cells together. The rest of an AnnData belongs to genes, which only a modality has.
_OF_CELLS = frozenset({"obs", "obsm", "obsp", "uns", "obs_names", "n_obs", "is_view"})
_OF_GENES = frozenset({"X", "layers", "raw", "var", "varm", "varp", "var_names", "n_vars", "shape", "T", "to_df"})


def is_mudata(obj: Any) -> bool:
    """Whether `obj` is a MuData, without importing mudata for objects that cannot be one."""
    mudata = sys.modules.get("mudata")
    return mudata is not None and isinstance(obj, mudata.MuData)


def is_spatialdata(obj: Any) -> bool:
    """Whether `obj` is a SpatialData, without importing spatialdata for objects that cannot be one."""
    spatialdata = sys.modules.get("spatialdata")
    return spatialdata is not None and isinstance(obj, spatialdata.SpatialData)


class Cells:
    """The cells of a MuData, in place of an AnnData: its own `obs`, `obsm`, `obsp` and `uns`, and no genes.

    Functions read and write the MuData through it. What they ask of genes is an error that names the modalities:
    a MuData's own `var` strings genes, proteins and peaks together, and no matrix goes with it.
    """

    __slots__ = ("function", "mdata")

    def __init__(self, mdata: Any, function: str) -> None:
        self.mdata = mdata
        self.function = function

    def __getattr__(self, name: str) -> Any:
        if name in _OF_CELLS:
            return getattr(self.mdata, name)
        if name in _OF_GENES:
            names = list(self.mdata.mod)
            example = f"mdata[{names[0]!r}]" if names else "a modality"
            raise TypeError(
                f"`{self.function}` called like this reads genes (`adata.{name}`), and a MuData has none of its own: "
                f"pass one of its modalities, such as {example}, or, where the function has `use_rep`, a key of "
                f"`mdata.obsm`. Available: modalities {available(names)}, obsm {available(self.mdata.obsm.keys())}"
            )
        raise AttributeError(f"the cells of a MuData have no attribute {name!r}")

    def copy(self) -> Cells:
        """The cells of a copy of the whole MuData."""
        return Cells(self.mdata.copy(), self.function)


def table_of(sdata: Any, table_key: str | None) -> tuple[str, Any]:
    """The name and the AnnData of a table of a SpatialData: the one asked for, or the only one."""
    names = list(sdata.tables)
    if table_key is not None:
        if table_key not in names:
            raise KeyError(f"table_key={table_key!r} is not in `sdata.tables`. Available: {available(names)}")
        return table_key, sdata.tables[table_key]
    if len(names) != 1:
        raise ValueError(
            f"the SpatialData has {len(names)} tables: say which one, with `table_key=` where the function has it, or "
            f"pass `sdata.tables[...]`. Available: {available(names)}"
        )
    return names[0], sdata.tables[names[0]]


def with_table(sdata: Any, name: str, table: Any) -> Any:
    """A SpatialData with another table of this name; all other elements are shared, not copied."""
    elements = {kind: dict(getattr(sdata, kind)) for kind in ("images", "labels", "points", "shapes", "tables")}
    elements["tables"][name] = table
    return type(sdata)(**elements, attrs=dict(sdata.attrs))
