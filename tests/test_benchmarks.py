"""Benchmarks without a clock: how much a core function holds for a cell, and what the harness reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pytest

from helpers import enlarged, largest_array
from test_contract import CASES, CELLS, GENES, LARGE, MANY_GENES, outputs, ready

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# Numbers in the largest array of a result at 50,000 cells x 2,000 genes, for each cell: the non-zero values of the
# matrices that the contract's operators are given (a third of the genes), rows of the graph, or rows of components.
LARGEST = {
    "normalize_total": 700,
    "log1p": 700,
    "highly_variable_seurat": 700,
    "pca": 700,
    "pca_anchored": 700,
    "neighbors_umap": 30,
    "harmony": 12,
    "diffusion_map": 45,
    "pseudotime": 45,
    "leiden": 10,
    "magic": 45,
    "fate_probabilities": 22,
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_array_of_a_core_function_is_so_many_numbers_a_cell(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    sizes = {CELLS // 2: LARGE // 2, CELLS: LARGE, 2 * CELLS: 2 * LARGE, GENES: MANY_GENES}
    op, args = enlarged(ready(name), sizes)
    assert largest_array(lambda *given: outputs(case, *given), op, args) <= LARGEST[name] * LARGE


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is not beside the tests")
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import cases
    import run

    yield SimpleNamespace(run=run, cases=cases)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


FIELDS = {"function", "cells", "tool", "version", "status", "n_obs", "n_vars", "cpu_first", "cpu_warm", "wall_first",
          "wall_warm", "peak_mib", "quality"}  # fmt: skip


def measured(harness: Any, folder: Path, *only: str) -> tuple[dict[str, Any], list[str]]:
    """The result and the rows of the table of a run on 120 cells that are made up."""
    out, text = folder / "out.json", folder / "out.md"
    given = ["--cells", "120", "--data", str(folder / "nothing"), "--json", str(out), "--markdown", str(text)]
    assert harness.run.main([*given, "--only", *only]) == 0
    result = json.loads(out.read_text())
    assert {"commit", "date", "machine", "versions", "settings", "results"} == result.keys()
    assert set(result["settings"]["data"].values()) == {"gamma-Poisson model"}
    for row in result["results"]:
        assert row["status"] == "ok", row
        assert set(row) >= FIELDS
        assert min(row["cpu_first"], row["cpu_warm"], row["wall_first"], row["wall_warm"]) > 0
        assert row["n_obs"] == row["cells"] == 120
    return result, text.read_text().splitlines()[2:]


def test_a_function_is_measured_in_a_process_of_its_own(harness: Any, tmp_path: Path) -> None:
    result, lines = measured(harness, tmp_path, "split_counts")
    assert [row["tool"] for row in result["results"]] == ["scdiffx"]
    assert len(lines) == 1
    assert lines[0].startswith("| `pp.split_counts` | 120 | none |")


def test_two_functions_are_reported_beside_their_peers(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(case: Any, place: int, cells: int, source: Path, args: Any) -> dict[str, Any]:
        """The same without a process, whose imports take most of the time."""
        return harness.run.measure(harness.run.sides(case)[place], str(source))

    monkeypatch.setattr(harness.run, "measured", here)
    result, lines = measured(harness, tmp_path, "log1p", "pp.mask_counts")
    found = {(row["function"], row["tool"]): row for row in result["results"]}
    assert list(found) == [("pp.log1p", "scdiffx"), ("pp.log1p", "scanpy"), ("pp.mask_counts", "scdiffx")]
    assert found["pp.log1p", "scanpy"]["agreement"]["largest difference"] < 1e-6
    assert lines[0].startswith("| `pp.log1p` | 120 | scanpy")
    assert lines[1].startswith("| `pp.mask_counts` | 120 | none |")


def test_a_peer_that_is_not_there_has_no_figures(harness: Any, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    ad.AnnData(np.ones((3, 2), np.float32)).write_h5ad(path)
    side = harness.cases.Side("nobody", ("no_such_module",), lambda adata: {"x": adata.X})
    row = harness.run.measure(side, str(path))
    assert row["status"] == "not installed"
    assert not {"cpu_first", "cpu_warm", "peak_mib"} & row.keys()
    ours = {"function": "pp.f", "cells": 3, "tool": "scdiffx", "status": "ok", "cpu_warm": 1.0}
    theirs = {"function": "pp.f", "cells": 3, "tool": "nobody", "version": None, **row}
    line = harness.run.table({"results": [ours, theirs]}).splitlines()[-1]
    assert "nobody: not installed" in line
    assert "| 1 / - | - |" in line


def result(**changes: Any) -> dict[str, Any]:
    row = {"function": "pp.pca", "cells": 3000, "tool": "scdiffx", "version": "1", "status": "ok", "cpu_warm": 2.0,
           "peak_mib": 100.0, "quality": {"explained variance": 0.5, "error left": 0.5}, **changes}  # fmt: skip
    return {"commit": "abc", "results": [row, {**row, "tool": "scanpy", "cpu_warm": 9.0}]}


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({}, 0, "no difference"),
        ({"cpu_warm": 2.4}, 0, "no difference"),
        ({"cpu_warm": 2.6}, 1, "| `pp.pca` | 3000 | cpu_warm | 2 | 2.6 | worse |"),
        ({"cpu_warm": 1.4}, 0, "| `pp.pca` | 3000 | cpu_warm | 2 | 1.4 | better |"),
        ({"peak_mib": 150.0}, 1, "| `pp.pca` | 3000 | peak_mib | 100 | 150 | worse |"),
        ({"quality": {"explained variance": 0.4}}, 1, "explained variance | 0.5 | 0.4 | worse |"),
        ({"quality": {"error left": 0.4}}, 0, "error left | 0.5 | 0.4 | better |"),
        ({"status": "failed"}, 1, "status | ok | failed | worse |"),
        ({"function": "pp.other"}, 0, "| `pp.other` | 3000 | measured | no | yes | |"),
    ],
)
def test_compare_tells_what_differs(
    harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, code: int, said: str
) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, content in zip(files, (result(), result(**changes)), strict=True):
        Path(path).write_text(json.dumps(content))
    assert harness.run.main(["--compare", *files]) == code
    assert said in capsys.readouterr().out


def test_the_latest_results_are_shown_and_what_is_slower_is_named(
    harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours takes 2 s beside 9, later 10 s beside 9: 1.1 times, which is not told from noise; then 18 s."""
    path = [tmp_path / f"{i}.json" for i in range(3)]
    for i, ours in enumerate((2.0, 10.0, 18.0)):
        path[i].write_text(json.dumps({**result(cpu_warm=ours), "date": f"day {i}"}))
    for last, said, mean in ((2, "slower", 0.9), (3, "pp.pca 3000: 2 times scanpy", 0.5)):
        assert harness.run.main(["--show", *map(str, path[:last]), "--sections"]) == 0
        out = capsys.readouterr().out
        assert out.count("| `pp.pca` |") == 1
        assert f"# date: day {last - 1}" in out
        assert "## 3,000 cells" in out
        assert (said in out) == (last == 3)
        assert f"3,000 cells: peer / ours {mean} in the geometric mean of 1" in out


def test_a_network_is_scored_against_its_edges(harness: Any, tmp_path: Path) -> None:
    import inputs
    import scores

    adata = inputs.network(50, tmp_path / "nothing")
    truth = np.zeros((20, 100))
    truth[adata.uns["edges"][:, 0], adata.uns["edges"][:, 1]] = 1
    worth = [scores.edges(adata, {"x": x})["precision over chance"] for x in (truth, np.ones_like(truth))]
    assert worth == pytest.approx([20 * 99 / 80, 1])


def test_pairs_of_groups_are_compared_where_both_have_tested_them(harness: Any) -> None:
    import pandas as pd
    import scores

    def found(names: list[str], mean: list[float], p: list[float]) -> dict[str, Any]:
        at = pd.MultiIndex.from_tuples([(name, "B", "one", "two") for name in names])
        return {"x": pd.Series(mean, at), "p": pd.Series(p, at)}

    got = scores.pairs(found(["a", "b"], [1.0, 2.0], [0.5, 0.1]), found(["B", "C"], [2.5, 9.0], [0.4, 1.0]))
    assert list(got.values()) == pytest.approx([1 / 3, 0.5, 0.3])


def test_a_function_that_no_case_has_is_refused_with_the_names_of_all(harness: Any) -> None:
    assert [case.name for case in harness.cases.chosen(["pca", "tl.umap"])] == ["pp.pca", "tl.umap"]
    assert len(harness.cases.chosen(["annotate"])) == 3
    with pytest.raises(SystemExit, match=r"no case is called pcaa.*pp\.pca"):
        harness.cases.chosen(["pcaa"])


def test_every_public_function_has_a_case(harness: Any) -> None:
    import scdiffx as sd

    measured = {case.name.split(" ")[0] for case in harness.cases.CASES}
    every = {f"{part}.{name}" for part in ("pp", "tl") for name in getattr(sd, part).__all__}
    assert every - measured == harness.cases.WITH_ANOTHER
    assert measured <= every
