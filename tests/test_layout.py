"""The shape of the house: which part may import which, what `import scdiffx` loads, and who configures JAX."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "scdiffx"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import itself and the parts named here. What is not listed (the package itself, `__main__`, settings,
# doctor, datasets) is not below anything and may import all.
ALLOWED = {
    "_core": set(),
    "ops": {"_core"},
    "losses": {"_core", "ops"},
    "metrics": {"_core", "ops", "losses", "_slots", "_steps", "_program", "_fit"},
    "_slots": {"_core"},
    "_signatures": {"_slots"},
    "_steps": {"_core", "ops", "_signatures", "_slots"},
    "_calls": {"_core", "_signatures", "_slots", "_steps"},
    "_program": {"_core", "ops", "_slots", "_steps"},
    "_fitted": {"_calls", "_core", "_slots", "_steps"},
    "_fit": {"_calls", "_core", "ops", "losses", "_signatures", "_slots", "_steps", "_program", "_fitted"},
    "pp": {"_calls", "_core", "ops", "_slots", "_steps"},
    "tl": {"_calls", "_core", "ops", "_slots", "_steps", "_program"},
    "pl": set(),
}
EVERYWHERE = {"_log", "__version__"}
ARRAYS_ONLY = {"_core", "ops", "losses"}
ANNOTATED_DATA = {"anndata", "mudata", "muon", "spatialdata", "scanpy", "squidpy", "pandas"}
PLOTS = {"matplotlib", "seaborn"}
NOT_AT_IMPORT = ("scanpy", "ott", "flax", "muon", "matplotlib")
DISTRIBUTIONS = {"ott": "ott-jax", "sklearn": "scanpy", "jaxlib": "jax"}


class Import(NamedTuple):
    path: Path
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def part_of(path: Path) -> str:
    """Return the name under `scdiffx` that a file belongs to: a folder, or a module without its `.py`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def nodes(tree: ast.AST, types_too: bool) -> Iterator[ast.AST]:
    """Yield the nodes of a file, those under `if TYPE_CHECKING:` only where asked for."""
    if not types_too and isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from nodes(child, types_too)


def imports(path: Path, types_too: bool = True) -> Iterator[Import]:
    """Yield the absolute name of everything a file imports, at its top or inside functions."""
    package = ["scdiffx", *path.relative_to(PACKAGE).parent.parts]
    for node in nodes(ast.parse(path.read_text(), str(path)), types_too):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from scdiffx import ops` names a part, `from jax import grad` does not: keep both levels.
            yield from (Import(path, node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_parts_import_only_what_is_below_them() -> None:
    found = []
    for path in FILES:
        part = part_of(path)
        if part not in ALLOWED:
            continue
        # A name needed for an annotation alone makes no part depend on another.
        for item in imports(path, types_too=False):
            below = item.module.split(".")[1] if item.top == "scdiffx" and "." in item.module else part
            if below not in ALLOWED[part] | EVERYWHERE | {part}:
                found.append(str(item))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("parts", "forbidden"),
    [(ARRAYS_ONLY, ANNOTATED_DATA | PLOTS), ({"_slots", "_steps", "_program", "_fit", "pp", "tl", "metrics"}, PLOTS)],
    ids=["mathematics knows arrays only", "only pl draws"],
)
def test_parts_do_not_import(parts: set[str], forbidden: set[str]) -> None:
    found = [str(i) for path in FILES if part_of(path) in parts for i in imports(path) if i.top in forbidden]
    assert not found, "\n".join(found)


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[<>=!;~ ]", item)[0] for items in lists for item in items}
    known = sys.stdlib_module_names | {"scdiffx"}
    found = [
        str(i)
        for path in FILES
        for i in imports(path)
        if i.top not in known and DISTRIBUTIONS.get(i.top, i.top) not in declared
    ]
    assert not found, "\n".join(found)


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Parts load when they are first used, so the second case is the one that can find a heavy import in them.
@pytest.mark.parametrize("use", ["", "; scdiffx.ops, scdiffx.pp, scdiffx.tl, scdiffx.pl, scdiffx.fit, scdiffx.metrics"])
def test_import_is_light(use: str) -> None:
    code = f"import sys, scdiffx{use}; print([m for m in {NOT_AT_IMPORT} if m in sys.modules])"
    assert in_new_process(code) == "[]"


def test_import_leaves_jax_configuration_alone() -> None:
    code = (
        "import jax; before = dict(jax.config.values); import scdiffx; "
        "scdiffx.ops, scdiffx.pp, scdiffx.tl, scdiffx.pl, scdiffx.fit, scdiffx.metrics; "
        "print(before == dict(jax.config.values))"
    )
    assert in_new_process(code) == "True"


def test_only_runtime_configures_jax() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path != PACKAGE / "_core" / "runtime.py"
        and re.search(r"\bconfig\.update\(|\bjax\.config\.\w+\s*=[^=]", path.read_text())
    ]
    assert not found


def test_the_oldest_set_is_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(item.split(">=") for item in project["dependencies"])
    pins = [line.split("==") for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines() if "==" in line]
    pinned = {name: version.removesuffix(".*") for name, version in pins if name != "jaxlib"}
    assert pinned == bounds
