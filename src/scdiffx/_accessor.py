"""`adata.sd`: the functions of the package with the AnnData filled in."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from anndata import AnnData, register_anndata_namespace

__all__ = ["Accessor", "Part"]

PARTS = ("pp", "tl", "pl")


@functools.cache
def _functions(part: str) -> dict[str, Callable[..., Any]]:
    """The functions of a part whose first argument can be an AnnData."""
    module = importlib.import_module(f"scdiffx.{part}")
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value) and _takes_anndata(value)}


def _takes_anndata(function: Callable[..., Any]) -> bool:
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and first.name == "adata" and "AnnData" in str(first.annotation)


class Part:
    """The functions of `sd.pp`, `sd.tl` or `sd.pl`, bound to an AnnData."""

    def __init__(self, adata: AnnData, part: str) -> None:
        self._adata, self._part = adata, part

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        functions = _functions(self._part)
        if name not in functions:
            raise AttributeError(f"`sd.{self._part}` has no {name!r} for an AnnData. Available: {sorted(functions)}")
        return MethodType(functions[name], self._adata)

    def __dir__(self) -> list[str]:
        return sorted(_functions(self._part))

    def __repr__(self) -> str:
        return f"sd.{self._part} on this AnnData: {', '.join(dir(self))}"


@register_anndata_namespace("sd")
class Accessor:
    """scdiffx on this AnnData: ``adata.sd.pp.pca(n_comps=10)`` is ``sd.pp.pca(adata, n_comps=10)``.

    Parameters
    ----------
    adata
        The AnnData.

    Attributes
    ----------
    pp, tl, pl
        The functions of `sd.pp`, `sd.tl` and `sd.pl` that take an AnnData, without this argument.
    """

    def __init__(self, adata: AnnData) -> None:
        self._adata = adata

    @property
    def pp(self) -> Part:
        return Part(self._adata, "pp")

    @property
    def tl(self) -> Part:
        return Part(self._adata, "tl")

    @property
    def pl(self) -> Part:
        return Part(self._adata, "pl")

    def __dir__(self) -> list[str]:
        return list(PARTS)

    def __repr__(self) -> str:
        return "\n".join(repr(getattr(self, part)) for part in PARTS)
