"""What every public function has in common: what it may be called on, and the record of the call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from scdiffx._core.runtime import ensure_cache
from scdiffx._signatures import enter, function_named
from scdiffx._slots import (
    Cells,
    check_history,
    is_anndata,
    is_mudata,
    is_spatialdata,
    record,
    table_of,
    with_table,
)
from scdiffx._steps import Plan

__all__ = ["analysis", "public", "repeat", "replay"]

F = TypeVar("F", bound=Callable[..., Any])


def public(function: F) -> F:
    """Make a function take an AnnData, what holds one, or a Plan: check which it got, and record the call on a plan."""
    signature = inspect.signature(function)
    name = _name(function)
    called = _remembered(function)

    @functools.wraps(function)
    def wrapper(adata: Any, *args: Any, **kwargs: Any) -> Any:
        ensure_cache()
        if isinstance(adata, Plan):
            given = signature.bind(adata, *args, **kwargs).arguments
            if given.get("copy"):
                raise ValueError("copy=True has no meaning on a plan: use `fitted.apply(adata, copy=True)`")
            _check_no_table(kwargs)
            result = function(adata, *args, **kwargs)
            adata.calls.append((name, dict(list(given.items())[1:])))
            return result
        return _run(called, adata, args, kwargs)

    enter(name, wrapper)
    return wrapper  # type: ignore[return-value]


def analysis(function: F) -> F:
    """Make a function that looks at an AnnData or a plan check which it got; it is no step of the plan."""
    called = _remembered(function)

    @functools.wraps(function)
    def wrapper(adata: Any, *args: Any, **kwargs: Any) -> Any:
        ensure_cache()
        return function(adata, *args, **kwargs) if isinstance(adata, Plan) else _run(called, adata, args, kwargs)

    return wrapper  # type: ignore[return-value]


def _name(function: Callable[..., Any]) -> str:
    part = function.__module__.split(".")[1]
    return function.__name__ if part.startswith("_") else f"{part}.{function.__name__}"


def _remembered(function: F) -> F:
    """The function, which enters its calls in the history of what it wrote to."""
    signature, name = inspect.signature(function), _name(function)

    @functools.wraps(function)
    def called(data: Any, *args: Any, **kwargs: Any) -> Any:
        check_history(data)
        result = function(data, *args, **kwargs)
        _enter(name, signature.bind(data, *args, **kwargs), data, result)
        return result

    return called  # type: ignore[return-value]


def _enter(name: str, call: inspect.BoundArguments, adata: Any, result: Any) -> None:
    """Enter a call that was made in the history of the AnnData that it wrote to."""
    call.apply_defaults()
    arguments = dict(list(call.arguments.items())[1:])
    # Functions without `copy` return what they make and write nothing.
    if "copy" in arguments:
        record(result if arguments.pop("copy") else adata, [(name, arguments)])


def _run(function: Callable[..., Any], data: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on an AnnData, on the cells of a MuData, or on a table of a SpatialData."""
    if is_mudata(data):
        _check_no_table(kwargs)
        result = function(Cells(data, function.__name__), *args, **kwargs)
        return result.mdata if isinstance(result, Cells) else result
    if is_spatialdata(data):
        return _run_on_table(function, data, args, kwargs)
    if not (is_anndata(data) or isinstance(data, Cells)):
        raise TypeError(
            f"`adata` must be an AnnData or a scdiffx plan, got {type(data).__name__} (a MuData or a SpatialData will "
            "do too)"
        )
    _check_no_table(kwargs)
    return function(data, *args, **kwargs)


def _run_on_table(function: Callable[..., Any], sdata: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on a table of a SpatialData; a copy is a SpatialData again."""
    takes_key = "table_key" in inspect.signature(function).parameters
    name, table = table_of(sdata, kwargs.get("table_key") if takes_key else None)
    rest = {key: value for key, value in kwargs.items() if not (takes_key and key == "table_key")}
    try:
        result = function(table, *args, **rest)
    except KeyError as error:
        place = kwargs.get("spatial_key", "spatial")
        if takes_key and place not in table.obsm:
            error.add_note(
                f"Of a SpatialData coordinates are read from `sdata.tables[{name!r}].obsm[{place!r}]`, and never from "
                "its shapes: put the centres of the cells there (`spatialdata.get_centroids`), in the table's order."
            )
        raise
    return with_table(sdata, name, result) if kwargs.get("copy") else result


def _check_no_table(kwargs: dict[str, Any]) -> None:
    if kwargs.get("table_key") is not None:
        raise ValueError(f"table_key={kwargs['table_key']!r} names a table of a SpatialData; this has no tables")


def repeat(plan: Plan, name: str, arguments: Mapping[str, Any]) -> None:
    """Record a call on a plan by its name; only the package's own functions can be named."""
    function_named(name)(plan, **arguments)


def replay(calls: list[tuple[str, dict[str, Any]]], adata: Any) -> Plan:
    """A plan on another AnnData from the recorded calls of one."""
    plan = Plan(adata)
    for name, arguments in calls:
        repeat(plan, name, arguments)
    return plan
