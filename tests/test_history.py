"""The history of calls that an AnnData keeps, and plans rebuilt from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import numpy as np
import pandas as pd
import pytest

import scdiffx as sd
from helpers import changed, contents, pbmc_counts, same
from scdiffx._slots import left_out, written

CALLS = ["pp.normalize_total", "pp.log1p", "pp.highly_variable_genes", "pp.pca", "pp.neighbors", "tl.pseudotime"]


def analysed(counts: ad.AnnData) -> ad.AnnData:
    adata = counts.copy()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=200)
    sd.pp.pca(adata, n_comps=10)
    sd.pp.neighbors(adata, 12)
    sd.tl.pseudotime(adata, root=3)
    return adata


def entries(adata: ad.AnnData) -> list[dict[str, Any]]:
    return [json.loads(line) for line in adata.uns["scdiffx"]["history"]]


@pytest.fixture(scope="module")
def _analysed() -> ad.AnnData:
    return analysed(pbmc_counts(300))


@pytest.fixture
def adata(_analysed: ad.AnnData) -> ad.AnnData:
    return _analysed.copy()


def test_each_call_is_an_entry_with_all_its_parameters(adata: ad.AnnData) -> None:
    found = entries(adata)
    assert [entry["function"] for entry in found] == CALLS
    assert {entry["version"] for entry in found} == {sd.__version__}
    assert found[4]["parameters"]["n_neighbors"] == 12
    assert found[4]["parameters"]["metric"] == "euclidean"
    assert not any("copy" in entry["parameters"] or "adata" in entry["parameters"] for entry in found)
    session = {"scdiffx": sd.__version__, "jax": jax.__version__, "platform": jax.default_backend()}
    assert adata.uns["scdiffx"]["session"] == session


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_a_plan_from_a_history_gives_the_same(adata: ad.AnnData, form: str, tmp_path: Path) -> None:
    getattr(adata, f"write_{form}")(tmp_path / "analysed")
    back = getattr(ad, f"read_{form}")(tmp_path / "analysed")
    assert list(back.uns["scdiffx"]["history"]) == list(adata.uns["scdiffx"]["history"])
    raw = pbmc_counts(300)
    plan = sd.plan.from_history(back, on=raw)
    assert plan.calls[4] == ("pp.neighbors", {"n_neighbors": 12})
    assert "scdiffx" not in raw.uns
    plan.apply()
    found, expected = contents(raw), contents(adata)
    assert set(found) == set(expected)
    # A plan and a call are two programs, whose sums are rounded differently.
    different = [path for path in expected if not same(found[path], expected[path], rtol=1e-5, atol=1e-4)]
    assert not different


def test_what_is_not_called_on_the_anndata_leaves_no_entry(adata: ad.AnnData) -> None:
    before = contents(adata)
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=5)
    with pytest.raises(ValueError, match="n_comps=0"):
        sd.pp.pca(adata, n_comps=0)
    copied = sd.pp.pca(adata, n_comps=5, copy=True)
    assert not changed(before, contents(adata))
    assert [entry["function"] for entry in entries(copied)] == [*CALLS, "pp.pca"]


def test_a_fit_is_one_entry_and_no_plan(adata: ad.AnnData) -> None:
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=4)
    loss = sd.losses.cross_entropy("X_pca", "cell_type")
    fitted = sd.fit(plan, loss, n_steps=1, progress=False)
    fitted.apply()
    last = entries(adata)[-1]
    assert last["function"] == "Fitted.apply"
    assert last["parameters"] == {"calls": [["pp.pca", {"n_comps": 4}]], "adopted": fitted.adopted}
    with pytest.raises(ValueError, match=r"call 7.*'Fitted.apply'.*parameters are not in"):
        sd.plan.from_history(adata, on=pbmc_counts(300))
    again = sd.plan.from_history(adata, on=pbmc_counts(300), skip="Fitted.apply")
    assert [name for name, _ in again.calls] == CALLS


def test_arguments_that_are_data_are_named(adata: ad.AnnData) -> None:
    raw = adata.copy()
    sd.pp.neighbors(adata, rng=np.random.default_rng(0))
    assert entries(adata)[-1]["parameters"]["rng"] == {"left out": "Generator"}
    with pytest.raises(ValueError, match=r"call 7.*'pp.neighbors'.*rng \(Generator\)"):
        sd.plan.from_history(adata, on=raw)


def test_small_tables_and_arrays_are_kept() -> None:
    adata = pbmc_counts(100, 80)
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    names = list(adata.var_names)
    prior = pd.DataFrame({"tf": names[:2], "target": names[2:4], "weight": [1.0, -1.0]})
    raw = adata.copy()
    sd.tl.grn(adata, np.array(names[:2]), prior=prior)
    plan = sd.plan.from_history(adata, on=raw, skip={"pp.normalize_total", "pp.log1p"})
    (_, arguments) = plan.calls[0]
    assert arguments["tfs"] == names[:2]
    pd.testing.assert_frame_equal(arguments["prior"], prior, check_dtype=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((0.5, None, "a"), [0.5, None, "a"]),
        (np.float32(0.5), 0.5),
        (Path("folder/model"), "folder/model"),
        ({"B": ("CD79A", np.str_("MS4A1"))}, {"B": ["CD79A", "MS4A1"]}),
        (pd.Index(["a", "b"]), ["a", "b"]),
        (list(range(10_001)), {"left out": "list of shape (10001,)"}),
        (np.zeros((200, 100)), {"left out": "ndarray of shape (200, 100)"}),
        (np.array([object()]), {"left out": "ndarray of shape (1,)"}),
        (jax.random.key(0), {"left out": "PRNGKeyArray of shape ()"}),
        ({1: "a"}, {"left out": "dict"}),
        (print, {"left out": "builtin_function_or_method"}),
        (pbmc_counts(5, 6), {"left out": "AnnData of shape (5, 6)"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arguments_become_json_or_a_word_on_them(value: Any, expected: Any) -> None:
    assert json.loads(json.dumps(written(value))) == expected
    assert (left_out([0, {"part": written(value)}]) is not None) == (
        isinstance(expected, dict) and "left out" in expected
    )


def test_what_cannot_be_in_a_plan_has_to_be_skipped(adata: ad.AnnData) -> None:
    sd.tl.umap(adata, maxiter=5)
    with pytest.raises(ValueError, match=r"call 7.*'tl.umap'.*cannot be part.*skip=\['tl.umap'\]"):
        sd.plan.from_history(adata, on=pbmc_counts(300))
    assert len(sd.plan.from_history(adata, on=pbmc_counts(300), skip=["tl.umap"]).calls) == 6
    with pytest.raises(ValueError, match=r"skip=\['tl.unap'\].*'tl.umap'"):
        sd.plan.from_history(adata, on=pbmc_counts(300), skip=["tl.unap"])


def test_data_that_were_written_over_are_refused(adata: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"'normalize_total' reads X.*on="):
        sd.plan.from_history(adata)
    later = sd.plan.from_history(adata, skip=["pp.normalize_total", "pp.log1p"])
    assert [name for name, _ in later.calls] == CALLS[2:]


def test_histories_that_are_none(adata: ad.AnnData) -> None:
    with pytest.raises(KeyError, match="no history"):
        sd.plan.from_history(pbmc_counts(20, 30))
    with pytest.raises(TypeError, match="`on` must be an AnnData"):
        sd.plan.from_history(adata, on=3)
    adata.uns["scdiffx"]["history"] = np.array(["{}"], dtype=object)
    with pytest.raises(ValueError, match="entry 1 of the history"):
        sd.plan.from_history(adata)
    adata.uns["scdiffx"]["history"] = np.array(['{"function": "os.system", "parameters": {}}'], dtype=object)
    with pytest.raises(ValueError, match=r"'os.system' is no step"):
        sd.plan.from_history(adata)
    adata.uns["scdiffx"] = "mine"
    before = contents(adata)
    with pytest.raises(ValueError, match=r"uns\['scdiffx'\]` is a str"):
        sd.pp.pca(adata)
    assert not changed(before, contents(adata))


def test_an_anndata_among_the_arguments_is_named_and_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad.AnnData, "__getitem__", lambda *_: pytest.fail("looked into"))
    assert written(ad.AnnData(np.ones((3, 2), np.float32))) == {"left out": "AnnData of shape (3, 2)"}
