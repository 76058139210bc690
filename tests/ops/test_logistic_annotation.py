"""Annotation by logistic regression against scikit-learn's; cells of no known type, votes, references."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops
from scdiffx._core.runtime import one_blas_thread
from scdiffx.ops._logistic_annotation import calibration_error

N_GENES = 400
LABELLED = np.arange(700) % 2 == 0


def logarithms(adata: ad.AnnData) -> ad.AnnData:
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    return adata


@pytest.fixture(scope="module")
def blood() -> ad.AnnData:
    adata = logarithms(pbmc_counts(n_genes=N_GENES))
    adata.obs["known"] = adata.obs["cell_type"].where(LABELLED)
    return adata


@pytest.fixture(scope="module")
def annotated(blood: ad.AnnData) -> ad.AnnData:
    return sd.tl.annotate(blood, labels_key="known", penalty=0.1, n_folds=2, copy=True)


def standardised(x: np.ndarray, labelled: np.ndarray = LABELLED) -> np.ndarray:
    mean, sd = x[labelled].mean(0), x[labelled].std(0)
    return np.minimum((x - mean) / np.where(sd > 0, sd, 1), 10)


def types(adata: ad.AnnData, key: str = "annotation") -> np.ndarray:
    return adata.obs[key].astype(str).to_numpy()


# A quarter of the cells is less than half as many as genes: the fit then has as many directions as cells.
@pytest.mark.parametrize(("penalty", "every"), [(0.1, 2), (0.1, 4), pytest.param(1.0, 2, marks=pytest.mark.slow)])
def test_scikit_learn_finds_the_same_model(blood: ad.AnnData, penalty: float, every: int) -> None:
    labelled, adata = np.arange(700) % every == 0, blood.copy()
    adata.obs["known"] = adata.obs["cell_type"].where(labelled)
    sd.tl.annotate(adata, labels_key="known", penalty=penalty, n_folds=2)
    x, truth = standardised(adata.X.toarray().astype(np.float64), labelled), types(blood, "cell_type")
    with one_blas_thread():
        reference = LogisticRegression(C=penalty, max_iter=3000, tol=1e-6).fit(x[labelled], truth[labelled])
    names, heat = adata.uns["annotation"]["names"], adata.uns["annotation"]["temperature"]
    table = adata.obsm["annotation_probabilities"].to_numpy().astype(np.float64)
    assert list(names) == list(reference.classes_)
    plain = softmax(np.log(np.maximum(table, 1e-30)) * heat, axis=1)
    # scikit-learn ends where the loss hardly falls, which a weak ridge lets it do early.
    np.testing.assert_allclose(plain, reference.predict_proba(x), atol=1e-3 if penalty < 1 else 5e-3)
    assert (names[table.argmax(1)] == reference.predict(x))[~labelled].mean() >= 0.99


def test_keys_by_their_definitions(blood: ad.AnnData, annotated: ad.AnnData) -> None:
    obs, entry, table = annotated.obs, annotated.uns["annotation"], annotated.obsm["annotation_probabilities"]
    assert [name.replace("/", "|") for name in entry["names"]] == list(table)
    assert "CD4+/CD45RO+ Memory" in obs["annotation"].cat.categories
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-5)
    assert (types(annotated) == types(blood, "cell_type"))[LABELLED].all()
    assert (obs["annotation_confidence"][LABELLED] == 1).all()
    confidence = obs["annotation_confidence"].to_numpy()[~LABELLED]
    assert (confidence <= table.to_numpy()[~LABELLED].max(1)).all()
    unassigned = types(annotated)[~LABELLED] == "unassigned"
    np.testing.assert_array_equal(unassigned, confidence < 0.5)
    assert entry["unassigned"] == pytest.approx(unassigned.mean())
    best = entry["names"][table.to_numpy().argmax(1)][~LABELLED]
    np.testing.assert_array_equal(types(annotated)[~LABELLED][~unassigned], best[~unassigned])
    assert 0.7 < entry["accuracy"] < (best == types(blood, "cell_type")[~LABELLED]).mean() + 0.05
    strict = sd.tl.annotate(blood, labels_key="known", penalty=0.1, n_folds=2, threshold=0.9, copy=True)
    assert strict.uns["annotation"]["unassigned"] > entry["unassigned"] + 0.1


@pytest.mark.slow
def test_the_ridge_that_predicts_best_is_chosen(blood: ad.AnnData) -> None:
    x, codes = jnp.asarray(blood.X.toarray()), jnp.asarray(blood.obs["cell_type"].cat.codes.to_numpy(), jnp.int32)
    chosen = ops.LogisticAnnotation(n_folds=2).init(x[::2], codes[::2])
    right = np.asarray(codes[1::2])

    def loss(op: ops.LogisticAnnotation) -> float:
        table = np.asarray(called(op, x[1::2]).probabilities)
        return -np.log(table[np.arange(len(right)), right]).mean()

    weakest = ops.LogisticAnnotation(penalty=0.001, n_folds=2).init(x[::2], codes[::2])
    assert loss(chosen) < loss(weakest) - 0.02
    # Dividing log odds makes probabilities of cells that were not seen more likely.
    assert loss(chosen) < loss(ops.replace(chosen, temperature=3.0))


def test_a_type_that_the_reference_lacks_is_not_assigned(blood: ad.AnnData) -> None:
    # Monocytes and dendritic cells are neighbours; B cells have none.
    truth = types(blood, "cell_type")
    reference = blood[LABELLED & (truth != "CD19+ B")].copy()
    query = blood[~LABELLED].copy()
    with pytest.warns(UserWarning, match="unlike the labelled cells.*may lack a type") as caught:
        sd.tl.annotate(query, labels_key="cell_type", reference=reference, penalty=0.1, n_folds=2)
    assert caught[0].filename == __file__
    unseen, unassigned = types(query, "cell_type") == "CD19+ B", types(query) == "unassigned"
    assert unassigned[unseen].mean() > 0.5
    assert unassigned[~unseen].mean() < 0.2
    assert query.obs["annotation_confidence"][unseen].mean() < 0.5
    table = query.obsm["annotation_probabilities"].to_numpy()
    # Probabilities alone would have assigned them.
    assert (table.max(1) >= 0.5)[unseen].mean() > 0.5


def test_a_reference_is_matched_by_the_names_of_genes(blood: ad.AnnData, annotated: ad.AnnData) -> None:
    reference, query = blood[LABELLED].copy(), blood[~LABELLED][:, blood.var_names[::-1]].copy()
    settings = {"labels_key": "cell_type", "penalty": 0.1, "n_folds": 2}
    sd.tl.annotate(query, reference=reference, **settings)
    np.testing.assert_array_equal(types(query), types(annotated)[~LABELLED])
    tables = (a.obsm["annotation_probabilities"].to_numpy() for a in (query, annotated[~LABELLED]))
    np.testing.assert_allclose(*tables, atol=1e-5)
    other = query[:, :150].copy()
    other.X = other.X / 4
    with pytest.warns(UserWarning, match="genes of the reference|same `target_sum`") as caught:
        sd.tl.annotate(other, reference=reference, **settings | {"penalty": 0.001})
    said = [str(w.message) for w in caught if w.filename == __file__]
    assert any("has 150 of the 400 genes of the reference" in text for text in said)
    assert any("same `target_sum`" in text for text in said)
    other.var_names = [f"ENSG{i}" for i in range(150)]
    with pytest.raises(ValueError, match="no gene in common"):
        sd.tl.annotate(other, reference=reference, **settings)


def test_votes_by_their_definition(blood: ad.AnnData, annotated: ad.AnnData) -> None:
    adata = blood.copy()
    adata.obs["cluster"] = pd.Categorical(np.random.default_rng(0).integers(0, 40, 700).astype(str))
    sd.tl.annotate(adata, labels_key="known", penalty=0.1, n_folds=2, majority_voting=True, over_clustering="cluster")
    votes = pd.crosstab(types(annotated), adata.obs["cluster"])
    order = [*annotated.uns["annotation"]["names"], "unassigned"]
    winner = votes.reindex(order).idxmax(0)
    expected = winner[adata.obs["cluster"].astype(str)].to_numpy()
    np.testing.assert_array_equal(types(adata)[~LABELLED], expected[~LABELLED])
    assert (types(adata) == types(annotated))[LABELLED].all()


def test_calibration_error_by_hand() -> None:
    confidence, right = np.array([0.95, 0.97, 0.5, 0.99, 1.0]), np.array([True, True, False, False, True])
    # Bins of width 1/15: one holds 0.5, the last the others.
    expected = 0.2 * 0.5 + 0.8 * abs((0.95 + 0.97 + 0.99 + 1.0) / 4 - 0.75)
    assert calibration_error(confidence, right) == pytest.approx(expected)


def test_wrong_calls_name_themselves() -> None:
    x = jnp.ones((6, 3))
    with pytest.raises(ValueError, match="call `op = op"):
        ops.LogisticAnnotation()(x)
    with pytest.raises(ValueError, match="without gaps"):
        ops.LogisticAnnotation().init(x, jnp.asarray([0, 0, 2, 2, -1, 0]))
    with pytest.raises(ValueError, match="single cell"):
        ops.LogisticAnnotation().init(x, jnp.asarray([0, 1, 2, -1, -1, 3]))


@pytest.mark.slow
def test_a_plan_learns_the_coefficients(blood: ad.AnnData) -> None:
    raw = pbmc_counts(n_genes=N_GENES)
    raw.obs["known"] = blood.obs["known"]
    plan = sd.plan(raw)
    sd.pp.normalize_total(plan, target_sum=1e4)
    sd.pp.log1p(plan)
    sd.tl.annotate(plan, labels_key="known", penalty=0.01)
    loss = sd.losses.cross_entropy("annotation_probabilities", "cell_type")
    fitted = sd.fit(plan, loss, learn="annotate", optimizer=optax.adam(1e-4), n_steps=5, progress=False)
    assert {"annotate.bias", "annotate.temperature", "annotate.weights"} < set(fitted.params)
    assert fitted.history["train"][-1] < fitted.history["train"][0]
    found = fitted.apply(raw, copy=True)
    assert jax.tree.leaves(fitted.params)[0].dtype == np.float32
    assert (types(found) == types(blood, "cell_type"))[LABELLED].all()
