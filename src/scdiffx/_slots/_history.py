"""The calls that made an AnnData what it is, in `uns["scdiffx"]`, and their arguments as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scdiffx._slots._places import Uns

__all__ = ["check_history", "history_of", "left_out", "record", "restored", "tabulated", "written"]

KEY = "scdiffx"
# Lists of genes are kept; what is larger is data.
LARGEST = 10_000
_TABLE = "pandas.DataFrame"
_LEFT_OUT = "left out"


def check_history(adata: Any) -> None:
    """Raise where `uns["scdiffx"]` is something else than what is written there."""
    entry = adata.uns.get(KEY, {})
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"`adata.uns[{KEY!r}]` is a {type(entry).__name__}, but this key is for the history of calls: "
            "keep yours under another one"
        )


def record(adata: Any, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Append calls (name, arguments) to the history, and say which versions and device made the last of them."""
    from scdiffx import __version__

    entry = dict(adata.uns.get(KEY, {}))
    lines = [
        json.dumps({"function": name, "parameters": written(dict(arguments)), "version": __version__})
        for name, arguments in calls
    ]
    if not lines:
        return
    entry["history"] = np.asarray([*_lines(entry), *lines], dtype=object)
    entry["session"] = {"scdiffx": __version__, "jax": jax.__version__, "platform": jax.default_backend()}
    Uns(KEY).write(adata, entry)


def history_of(adata: Any) -> list[tuple[str, dict[str, Any]]]:
    """The calls in the history, by name with their arguments; tables are restored."""
    check_history(adata)
    lines = _lines(adata.uns.get(KEY, {}))
    if not lines:
        raise KeyError(
            f"`adata.uns[{KEY!r}]` holds no history: no function of `sd.pp` or `sd.tl` has written to `adata`"
        )
    calls = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line, object_hook=restored)
            calls.append((str(found["function"]), dict(found["parameters"])))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"entry {number} of the history in `adata.uns[{KEY!r}]` cannot be read: {error}") from None
    return calls


def _lines(entry: Mapping[str, Any]) -> list[str]:
    return [str(line) for line in np.ravel(entry.get("history", []))]


def written(value: Any) -> Any:
    """The argument in the vocabulary of JSON; data, code and what is large are replaced by a word on what they were."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple) and len(value) <= LARGEST:
        return [written(part) for part in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: written(part) for key, part in value.items()}
    try:
        # An AnnData has no size, and NumPy would make an array of its cells, one by one.
        if getattr(value, "size", LARGEST + 1) > LARGEST or isinstance(value, jax.Array):
            raise TypeError
        plain = tabulated(value)
        json.dumps(plain)
        return plain
    except (TypeError, ValueError):
        shape = (len(value),) if isinstance(value, list | tuple) else getattr(value, "shape", None)
        return {_LEFT_OUT: type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")}


def left_out(value: Any) -> str | None:
    """What an argument, or a part of it, was, where it is not in the history; None where all of it is."""
    if isinstance(value, Mapping):
        if set(value) == {_LEFT_OUT}:
            return str(value[_LEFT_OUT])
        value = list(value.values())
    found = (left_out(part) for part in value) if isinstance(value, list) else ()
    return next((part for part in found if part is not None), None)


def tabulated(value: Any) -> Any:
    """An argument of a call that JSON does not know: a table, or names and numbers in an array."""
    import pandas as pd

    if isinstance(value, pd.DataFrame):
        return {_TABLE: value.astype(object).to_dict("split")}
    if isinstance(value, np.ndarray | np.generic | pd.Index | pd.Series):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")


def restored(found: dict[str, Any]) -> Any:
    """What `tabulated` made of a table, as a table again; to be passed to `json.loads`."""
    import pandas as pd

    return pd.DataFrame(**found[_TABLE]) if set(found) == {_TABLE} else found
