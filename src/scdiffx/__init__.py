"""scdiffx: single-cell analysis on AnnData in which every step is a differentiable JAX operator."""

from __future__ import annotations

import importlib
from typing import Any

from scdiffx import _register

__version__ = "0.1.0"

__all__ = [
    "Fitted",
    "KNeighborsTransformer",
    "datasets",
    "doctor",
    "fit",
    "grid",
    "losses",
    "metrics",
    "ops",
    "pl",
    "plan",
    "pp",
    "settings",
    "step",
    "tl",
]

# Names that live in private modules; everything is loaded when it is first used.
_HOMES = {
    "Fitted": "scdiffx._fitted",
    "KNeighborsTransformer": "scdiffx._transformer",
    "fit": "scdiffx._fit",
    "grid": "scdiffx._fit",
    "plan": "scdiffx._fit",
    "settings": "scdiffx._log",
    "step": "scdiffx._own_step",
    "doctor": "scdiffx._doctor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"scdiffx.{name}")
    else:
        raise AttributeError(f"module 'scdiffx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_register.register()
