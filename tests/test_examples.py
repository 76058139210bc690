"""The examples in the docstrings: every public name has one, and they run and print what they say."""

from __future__ import annotations

import doctest
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import scdiffx as sd
from documented import section

# The operators of the classical workflow, and what new ones are made of.
OPERATORS = (
    "CellWeights",
    "Counts",
    "DiffusionMap",
    "FateProbabilities",
    "Graph",
    "HighlyVariable",
    "KMeans",
    "Log1p",
    "Neighbors",
    "NormalizeTotal",
    "PCA",
    "Pseudotime",
    "Scale",
    "operator",
)
PARTS = ("pp", "tl", "pl", "losses", "metrics", "datasets")
RETURNED = {"losses.Loss", "metrics.GradientFlow", "ops.Graph"}
# Those that take a fraction of a second; the others are slow tests.
QUICK = {
    *("doctor", "plan"),
    *("datasets.pbmc68k_counts", "losses.Loss", "losses.l1"),
    *("ops.Counts", "ops.Log1p", "ops.operator"),
    *("pl.attribution", "pl.spatial_domains"),
    *("pp.cell_weights", "pp.log1p", "pp.mask_counts", "pp.normalize_total", "pp.replicates", "pp.split_counts"),
    *("tl.attribution", "tl.leiden"),
}


def public() -> dict[str, Any]:
    """Everything that owes an example, by name."""
    top = {name: getattr(sd, name) for name in ("Fitted", "doctor", "fit", "grid", "plan")}
    named = {f"{part}.{name}": getattr(getattr(sd, part), name) for part in PARTS for name in getattr(sd, part).__all__}
    return top | named | {f"ops.{name}": getattr(sd.ops, name) for name in OPERATORS}


PUBLIC = public()
# A second name of a function has no second example.
RUN = {id(obj): name for name, obj in reversed(PUBLIC.items())}.values()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_an_example(name: str) -> None:
    text = section(PUBLIC[name], "Examples")
    calls = [line for line in text.split("\n") if line.startswith(">>> ")]
    assert any("import scdiffx as sd" in line for line in calls), "it has to stand on its own"
    # What other functions return is shown with them.
    assert name in RETURNED or any(f"sd.{other}" in text for other in PUBLIC if PUBLIC[other] is PUBLIC[name])
    assert "+SKIP" not in text


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Files are read once; what examples save goes to a temporary folder."""
    import scanpy as sc

    for part, name in ((sc.datasets, "pbmc68k_reduced"), (sd.datasets, "pbmc68k_counts")):
        if (part.__name__, name) not in READ:
            READ[part.__name__, name] = getattr(part, name)()
        monkeypatch.setattr(part, name, READ[part.__name__, name].copy)
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


READ: dict[tuple[str, str], Any] = {}


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(RUN)]
)
def test_example_prints_what_it_says(name: str) -> None:
    example = doctest.DocTestParser().get_doctest(section(PUBLIC[name], "Examples"), {}, name, None, None)
    printed: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        failed, tried = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=printed.append)
    assert tried > 0
    assert not failed, "".join(printed)


def test_examples_that_are_quick_exist() -> None:
    assert set(RUN) >= QUICK
    assert all(inspect.getdoc(PUBLIC[name]) for name in RUN)
