"""What the "Returns" section of a docstring says is written: keys, dtypes, shapes and the names inside of dicts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

# `adata.obs["a" | key_added]`, `adata.layers["Ms", "Mu"]`, `adata.X`
HEAD = re.compile(r"`adata\.(\w+)(?:\[(.*?)\])?`")
STRING = re.compile(r'(f?)"([^"]*)"')
# What a word in a shape has to be equal to; other words are sizes of their own.
AXES = {"cells": 0, "spots": 0, "genes": 1}


class Documented(NamedTuple):
    """One entry: where it is, the names it can have, what it is said to be, and all of its text."""

    where: str
    names: tuple[str, ...]
    kind: str
    text: str

    def matches(self, path: str) -> bool:
        """Whether the path ("obs/leiden", "uns/pca/params") is this entry or lies within it."""
        where, _, rest = path.partition("/")
        if where != self.where:
            return False
        return where == "X" or any(re.fullmatch(name, rest.split("/")[0]) for name in self.names)


def section(function: Callable[..., Any], title: str) -> str:
    """The text of a section of the docstring, or nothing."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^[A-Z]\w+\n---|\Z)", inspect.getdoc(function) or "", re.M | re.S)
    return found[1] if found else ""


def entries(function: Callable[..., Any], arguments: Mapping[str, str]) -> list[Documented]:
    """What the function says it writes when it is called with `arguments`, such as ``{"key_added": "mine"}``."""
    found = []
    for block in re.findall(r"^`adata\..*?(?=^\S|\Z)", section(function, "Returns"), re.M | re.S):
        head, text = block.split("\n", 1)
        for match in HEAD.finditer(head):
            names = tuple(patterns(match[2] or "", arguments))
            found.append(Documented(match[1], names, head.partition("` : ")[2], head + text))
    return found


def patterns(inside: str, arguments: Mapping[str, str]) -> Iterator[str]:
    """Regular expressions for what stands in the brackets: strings, f-strings, and names of parameters."""
    for part in (part.strip() for choice in inside.split("|") for part in choice.split(",")):
        if part in arguments:
            yield re.escape(arguments[part])
        elif text := STRING.fullmatch(part):
            filled = re.sub(r"\{(\w+)\}", lambda m: arguments.get(m[1], m[0]), text[2])
            if text[1] and "{" in filled:
                continue  # what it is with a parameter that was not given
            yield re.sub("<.*?>", ".+", re.sub(r"([.+*?()\[\]])", r"\\\1", filled))


def assert_documented(function: Callable[..., Any], written: Mapping[str, str], **arguments: str) -> None:
    """Every path that was written stands in the docstring, with its dtype, and dicts with the names inside of them."""
    known = entries(function, arguments)
    for path, kind in written.items():
        entry = next((entry for entry in known if entry.matches(path)), None)
        assert entry is not None, f"{path} is not in the Returns section"
        inner = path.split("/")[2:]
        if inner:
            # Weights of networks are described as a whole.
            assert inner[0] == "net" or f"`{inner[0]}`" in entry.text, f"{path} is not described"
        else:
            assert says(entry.kind, kind), f"{path} is {kind}, documented is {entry.kind!r}"


def says(documented: str, kind: str) -> bool:
    """Whether the words allow the dtype or type: "float" stands for all of them, "the input" for what came."""
    words = {"category": "categorical", "mapping": "dict", "DataFrame": "DataFrame", "object": "of str"}
    allowed = [words.get(kind, kind)] + (["float "] if kind.startswith("float") else [])
    return any(word in documented for word in (*allowed, "same kind", "of the input", "of the embedding"))


def assert_shapes(function: Callable[..., Any], adata: Any, written: Mapping[str, str], **arguments: str) -> None:
    """The shapes that the docstring gives in parentheses are those that were written."""
    for entry in entries(function, arguments):
        shape = re.search(r"\(((?:[\w ]+|len\(genes\)), ?(?:[\w ]+|len\(genes\))?)\)", entry.kind)
        for path in written if shape else ():
            if entry.matches(path) and path.count("/") == 1:
                value = getattr(adata, entry.where)[path.split("/")[1]]
                sizes = [size.strip() for size in shape[1].split(",") if size.strip()]
                assert len(np.shape(value)) == len(sizes), f"{path}: {np.shape(value)}, documented is {sizes}"
                for length, name in zip(np.shape(value), sizes, strict=True):
                    assert length == adata.shape[AXES[name]] if name in AXES else True, f"{path}: {sizes}"
