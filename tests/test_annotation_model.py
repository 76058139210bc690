"""Models of annotation: made once, saved, loaded, and used for cells with other genes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

import scdiffx as sd
from helpers import pbmc_counts

KNOWN = np.arange(300) % 2 == 0


@pytest.fixture(scope="module")
def blood() -> ad.AnnData:
    adata = pbmc_counts(300, 200)
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    return adata


@pytest.fixture(scope="module")
def model(blood: ad.AnnData) -> sd.tl.AnnotationModel:
    return sd.tl.annotation_model(blood[KNOWN].copy(), "cell_type", penalty=0.01, n_folds=2)


@pytest.fixture
def folder(model: sd.tl.AnnotationModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


def annotated(query: ad.AnnData, reference: Any, **settings: Any) -> ad.AnnData:
    return sd.tl.annotate(query, reference=reference, copy=True, **settings)


def test_a_loaded_model_annotates_as_its_reference_does(
    blood: ad.AnnData, model: sd.tl.AnnotationModel, folder: Path
) -> None:
    query = blood[~KNOWN][:, blood.var_names[::-1]].copy()
    settings = {"labels_key": "cell_type", "penalty": 0.01, "n_folds": 2}
    straight = annotated(query, blood[KNOWN].copy(), **settings)
    for reference in (model, folder, str(folder), sd.tl.AnnotationModel.load(folder)):
        found = annotated(query, reference)
        assert (found.obs["annotation"] == straight.obs["annotation"]).all()
        tables = (a.obsm["annotation_probabilities"].to_numpy() for a in (found, straight))
        np.testing.assert_allclose(*tables, atol=1e-5)
        assert found.uns["annotation"]["accuracy"] == pytest.approx(straight.uns["annotation"]["accuracy"])
    assert "CD4+/CD45RO+ Memory" in sd.tl.AnnotationModel.load(folder).names
    assert straight.obs["annotation"].isin(["unassigned"]).mean() < 0.6


def test_genes_that_a_query_lacks_count_as_average(blood: ad.AnnData, model: sd.tl.AnnotationModel) -> None:
    query = blood[~KNOWN].copy()
    without = annotated(query[:, 30:].copy(), model)
    mean = np.asarray(model.op.standards.mean)[:30]
    query.X = query.X.toarray()
    query.X[:, :30] = mean
    average = annotated(query, model)
    tables = (a.obsm["annotation_probabilities"].to_numpy() for a in (without, average))
    np.testing.assert_allclose(*tables, atol=1e-4)
    confidences = (a.obs["annotation_confidence"] for a in (without, average))
    np.testing.assert_allclose(*confidences, atol=1e-4)
    with pytest.warns(UserWarning, match="has 80 of the 200 genes of the model"):
        annotated(query[:, :80].copy(), model)


def rewritten(folder: Path, **arrays: Any) -> None:
    with np.load(folder / "arrays.npz") as stored:
        held = {key: stored[key] for key in stored.files}
    changes = {key: held[key] if value is None else value(held[key]) for key, value in arrays.items()}
    np.savez(folder / "arrays.npz", **{**held, **changes})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": lambda v: v[:-1]}, r"'weights' has shape \(199, 10\).*200 genes"),
        ({"bias": lambda v: v.astype(str)}, "'bias' has shape .*dtype <U"),
        ({"mean": lambda v: v * np.nan}, "'mean' is not finite"),
        ({"sd": lambda v: -v}, "'sd' and 'temperature' must be greater"),
        ({"spread_genes": lambda v: v + 10}, "'spread_genes' are no places among 200 genes"),
        ({"spread_centres": lambda v: v[:, :-1]}, "'spread_centres' has shape"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any], match: str) -> None:
    rewritten(folder, **change)
    with pytest.raises(ValueError, match=match):
        sd.tl.AnnotationModel.load(folder)


def test_files_that_are_no_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotation.json is missing"):
        sd.tl.AnnotationModel.load(tmp_path)
    record = json.loads((folder / "annotation.json").read_text())
    (folder / "annotation.json").write_text(json.dumps(record | {"format": 7}))
    with pytest.raises(ValueError, match="has format 7"):
        sd.tl.AnnotationModel.load(folder)
    # What would run code when read is never read.
    (folder / "annotation.json").write_text(json.dumps(record))
    np.savez(folder / "arrays.npz", genes=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        sd.tl.AnnotationModel.load(folder)


def test_wrong_references_name_themselves(blood: ad.AnnData, model: sd.tl.AnnotationModel) -> None:
    with pytest.raises(TypeError, match="reference is a int"):
        annotated(blood, 3)
    with pytest.raises(ValueError, match="no meaning beside a model"):
        annotated(blood, model, labels_key="cell_type")
    with pytest.raises(KeyError, match=r"'absent' is not in `reference\.obs`"):
        annotated(blood, blood, labels_key="absent")
    with pytest.raises(TypeError, match="must be an AnnData, got Plan"):
        sd.tl.annotation_model(sd.plan(blood), "cell_type")


@pytest.mark.slow
def test_a_plan_with_a_saved_model_is_saved_too(blood: ad.AnnData, folder: Path, tmp_path: Path) -> None:
    raw = pbmc_counts(300, 200)
    plan = sd.plan(raw)
    sd.pp.normalize_total(plan, target_sum=1e4)
    sd.pp.log1p(plan)
    sd.tl.annotate(plan, reference=str(folder))
    loss = sd.losses.cross_entropy("annotation_probabilities", "cell_type")
    fitted = sd.fit(plan, loss, n_steps=2, progress=False)
    fitted.save(tmp_path / "fit")
    found = sd.Fitted.load(tmp_path / "fit").apply(raw[::2].copy(), copy=True)
    straight = fitted.apply(raw, copy=True)[::2]
    assert (found.obs["annotation"].astype(str) == straight.obs["annotation"].astype(str)).all()
