"""The public functions that are steps of plans, by name, and the arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from scdiffx._slots import written

__all__ = ["changed_arguments", "complete", "enter", "function_named"]

_public: dict[str, Callable[..., Any]] = {}


def enter(name: str, function: Callable[..., Any]) -> None:
    """Make a public function known by its name."""
    _public[name] = function


def function_named(name: str) -> Callable[..., Any]:
    if name not in _public:
        raise ValueError(f"{name!r} is no step of plans in this version. Available: {sorted(_public)}")
    return _public[name]


def complete(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with the defaults of those that were not given, but for `adata` and `copy`."""
    parameters = list(inspect.signature(function_named(name)).parameters.values())[1:]
    return {p.name: arguments.get(p.name, p.default) for p in parameters if p.name != "copy"}


def changed_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, as the history has them, that differ from today's defaults."""
    defaults = {key: written(p.default) for key, p in inspect.signature(function_named(name)).parameters.items()}
    return {
        key: value
        for key, value in arguments.items()
        if key not in defaults or type(value) is not type(defaults[key]) or value != defaults[key]
    }
