"""Our functions as a backend of scanpy, for hosts that dispatch through `scverse-backends`; found by an entry point."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from scdiffx._slots import preset

__all__ = ["Backend", "scanpy"]

# What has scanpy's parameters, keys and results, and the part it is in.
SCANPY = {
    **dict.fromkeys(("normalize_total", "log1p", "highly_variable_genes", "scale", "pca", "neighbors"), "pp"),
    **dict.fromkeys(("scrublet", "harmony_integrate"), "pp"),
    **dict.fromkeys(("umap", "leiden", "diffmap", "dpt"), "tl"),
}
# Parameters of the host that ours has under another name: ours are harmonypy's.
RENAMED = {
    "harmony_integrate": {
        "n_clusters": "nclust",
        "max_iter_clustering": "max_iter_kmeans",
        "tol_harmony": "epsilon_harmony",
        "batch_prune_threshold": "batch_prop_cutoff",
        "block_proportion": "block_size",
    }
}
# Parameters of the host that ours lacks because it does one of the things that they choose between.
FIXED = {"leiden": {"flavor": (None, "igraph"), "directed": (None, False)}}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Backend:
    """An object with a name and functions named and called as those of the host, each made when it is first asked for.

    A dispatcher drops arguments that a backend does not know with a warning. So each function takes all parameters of
    the host's, and raises where one that ours lacks is given another value than the host's default.
    """

    name = "jax"
    aliases = ("scdiffx",)

    def __init__(self, host: str, functions: dict[str, str], places: tuple[str, ...]) -> None:
        self._host, self._functions, self._places = host, functions, places

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(name)
        made = _adapter(name, self._functions[name], self._theirs(name))
        setattr(self, name, made)
        return made

    def __dir__(self) -> list[str]:
        return ["aliases", "name", *self._functions]

    def _theirs(self, name: str) -> Callable[..., Any]:
        host = importlib.import_module(self._host)
        for place in self._places:
            part = functools.reduce(getattr, place.split("."), host)
            found = getattr(part, name, None)
            if found is not None:
                return inspect.unwrap(found)
        raise AttributeError(f"{self._host} has no function {name!r}")


def _adapter(name: str, part: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Our function under the parameters of the host's and its own."""
    function = getattr(importlib.import_module(f"scdiffx.{part}"), name)
    first, *rest = [p for p in inspect.signature(theirs).parameters.values() if p.kind not in _VARIADIC]
    ours = list(inspect.signature(function).parameters.values())[1:]
    known = {p.name for p in ours}
    defaults = {p.name: p.default for p in rest}
    lacking = [p for p in rest if p.name not in known and p.name != "backend"]
    renamed, fixed = RENAMED.get(name, {}), FIXED.get(name, {})
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*ours, *lacking]]
    signature = inspect.Signature([first.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD), *keywords])

    @functools.wraps(function)
    def adapter(*args: Any, **kwargs: Any) -> Any:
        _check_preset()
        given = dict(signature.bind(*args, **kwargs).arguments)
        data, passed = given.pop(first.name), {}
        for key, value in given.items():
            if key in fixed:
                _refuse_unless(value in fixed[key], name, key, value)
            elif key in defaults and _is_default(value, defaults[key]):
                continue
            else:
                _refuse_unless(key in known or key in renamed, name, key, value)
                passed[renamed.get(key, key)] = value
        return function(data, **passed)

    # Not the signature of what is wrapped: the dispatcher asks this one for names.
    adapter.__signature__ = signature  # type: ignore[attr-defined]
    return adapter


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    try:
        return bool(value == default)
    except (TypeError, ValueError):  # arrays have no truth
        return False


def _refuse_unless(possible: bool, name: str, key: str, value: Any) -> None:
    if not possible:
        raise ValueError(
            f"{key}={value!r} of {name!r} is not offered by the backend {Backend.name!r}: leave it out, or call with "
            "backend='cpu'"
        )


def _check_preset() -> None:
    """Our defaults are those of scanpy 1."""
    chosen = preset()
    if chosen is not None and not chosen.startswith("ScanpyV1"):
        raise ValueError(
            f"the backend {Backend.name!r} has the defaults of scanpy's preset 'ScanpyV1', not of {chosen!r}: call the "
            "functions of scdiffx themselves, or choose that preset"
        )


scanpy = Backend("scanpy", SCANPY, ("pp", "tl", "external.pp"))
