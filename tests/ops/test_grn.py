"""Regulation against scikit-learn's ridge, on a simulated network and on cells whose genes were permuted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score

import scdiffx as sd
from conftest import DATA, _read
from scdiffx import ops

# Average precision of GENIE3 (200 trees) over chance, by `benchmarks/grn.py --trees 200`.
GENIE3 = 4.74


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    adata = _read("sergio_ds7")
    adata.X = adata.to_df().to_numpy(np.float32)
    return adata


@pytest.fixture(scope="module")
def edges(cells: ad.AnnData) -> pd.DataFrame:
    numbers = pd.read_csv(DATA / "sergio_ds7" / "gt_GRN.csv", header=None, names=["tf", "target"])
    return numbers.map(lambda i: f"G{i}")


@pytest.fixture(scope="module")
def inferred(cells: ad.AnnData, edges: pd.DataFrame) -> ad.AnnData:
    adata = cells.copy()
    sd.tl.grn(adata, sorted(edges["tf"].unique()))
    return adata


def matrix(adata: ad.AnnData, key: str = "grn") -> pd.DataFrame:
    table, tfs = adata.uns[key], adata.uns[f"{key}_params"]["tfs"]
    wide = table.astype({"tf": str, "target": str}).pivot_table(index="tf", columns="target", values="weight")
    return wide.reindex(index=tfs, columns=adata.var_names).fillna(0)


def standardised(adata: ad.AnnData) -> pd.DataFrame:
    x = adata.to_df().astype(np.float64)
    return (x - x.mean()) / x.std(ddof=0)


def by_scikit_learn(z: pd.DataFrame, gene: str, regulators: list[str], penalty: float) -> np.ndarray:
    model = Ridge(penalty * len(z), fit_intercept=False, solver="cholesky")
    return model.fit(z[regulators], z[gene]).coef_


@pytest.mark.parametrize("gene", ["G0", "G1"])
def test_weights_are_those_of_scikit_learns_ridge(inferred: ad.AnnData, gene: str) -> None:
    found, params = matrix(inferred)[gene], inferred.uns["grn_params"]
    others = [name for name in params["tfs"] if name != gene]
    assert (len(others) < len(params["tfs"])) == (gene == "G1")
    expected = by_scikit_learn(standardised(inferred), gene, others, params["penalty"])
    np.testing.assert_allclose(found[others], expected, rtol=1e-5, atol=1e-7)
    assert found.drop(others).eq(0).all()


def test_with_a_prior_a_gene_has_its_factors_alone(cells: ad.AnnData, edges: pd.DataFrame) -> None:
    adata = cells.copy()
    sd.tl.grn(adata, prior=edges.rename(columns={"tf": "source"}), penalty=0.01)
    found, z = matrix(adata), standardised(cells)
    for gene, part in list(edges.groupby("target"))[:5]:
        regulators = list(part["tf"])
        expected = by_scikit_learn(z, gene, regulators, 0.01)
        np.testing.assert_allclose(found.loc[regulators, gene], expected, rtol=1e-5)
        assert found[gene].drop(regulators).eq(0).all()


def test_a_simulated_network_is_found_better_than_by_forests(inferred: ad.AnnData, edges: pd.DataFrame) -> None:
    weights = matrix(inferred)
    truth = np.zeros(weights.shape, bool)
    truth[weights.index.get_indexer(edges["tf"]), weights.columns.get_indexer(edges["target"])] = True
    pairs = weights.index.to_numpy()[:, None] != weights.columns.to_numpy()
    correlation = np.corrcoef(inferred.X.T)[inferred.var_names.get_indexer(weights.index)]

    def over_chance(score: np.ndarray) -> float:
        return average_precision_score(truth[pairs], np.abs(score)[pairs]) / truth[pairs].mean()

    assert over_chance(weights.to_numpy()) > 1.25 * GENIE3
    assert over_chance(weights.to_numpy()) > 1.3 * over_chance(correlation)


def test_held_out_cells_choose_the_penalty(inferred: ad.AnnData) -> None:
    """The split is drawn as the operator draws it; all else is scikit-learn's."""
    held = np.random.default_rng(0).permutation(inferred.n_obs) < round(0.2 * inferred.n_obs)
    x, params = inferred.to_df().astype(np.float64), inferred.uns["grn_params"]
    z = (x - x[~held].mean()) / x[~held].std(ddof=0)
    genes = [gene for gene in z if gene not in set(params["tfs"])]
    model = Ridge(params["penalty"] * (~held).sum(), fit_intercept=False, solver="cholesky")
    left = z.loc[held, genes] - model.fit(z.loc[~held, params["tfs"]], z.loc[~held, genes]).predict(
        z.loc[held, params["tfs"]]
    )
    expected = 1 - (left**2).sum() / (z.loc[held, genes] ** 2).sum()
    np.testing.assert_allclose(inferred.var["grn_r2"][genes], expected, atol=1e-5)
    assert params["penalty"] in np.geomspace(1e-4, 10, 11)


def test_permuted_cells_predict_nothing(cells: ad.AnnData, edges: pd.DataFrame) -> None:
    adata = cells.copy()
    rng = np.random.default_rng(0)
    adata.X = np.stack([rng.permutation(column) for column in np.asarray(adata.X).T], 1)
    sd.tl.grn(adata, sorted(edges["tf"].unique()))
    assert adata.var["grn_r2"].max() < 0.05
    assert adata.uns["grn"]["weight"].abs().max() < 0.1


def test_activities_are_weighted_means_of_targets(inferred: ad.AnnData) -> None:
    weights = matrix(inferred).to_numpy()
    expected = standardised(inferred).to_numpy() @ (weights / np.linalg.norm(weights, axis=1, keepdims=True)).T
    np.testing.assert_allclose(inferred.obsm["tf_activity"], expected, atol=2e-3)


def test_table_is_sorted_and_cut(cells: ad.AnnData, inferred: ad.AnnData) -> None:
    table = inferred.uns["grn"]
    assert (table["weight"].abs().diff().dropna() <= 0).all()
    assert (np.sign(table["weight"]) == table["sign"]).all()
    assert (table["tf"].astype(str) != table["target"].astype(str)).all()
    few = cells.copy()
    sd.tl.grn(few, inferred.uns["grn_params"]["tfs"], n_edges=7)
    pd.testing.assert_frame_equal(few.uns["grn"], table[:7])


def test_constant_genes_and_factors_have_no_edges(cells: ad.AnnData) -> None:
    adata = cells[:300].copy()
    adata.X[:, adata.var_names.get_indexer(["G1", "G7"])] = 2.0
    sd.tl.grn(adata, ["G1", "G5", "G9"])
    weights = matrix(adata)
    assert np.isfinite(weights.to_numpy()).all()
    assert weights.loc["G1"].eq(0).all()
    assert weights["G7"].eq(0).all()
    assert adata.obsm["tf_activity"][:, 0].max() == 0


def test_a_plan_does_what_the_call_does(cells: ad.AnnData) -> None:
    adata = cells[:200].copy()
    plan = sd.plan(adata)
    sd.pp.log1p(plan)
    sd.tl.grn(plan, ["G1", "G5", "G9"])
    planned = plan.apply(copy=True)
    sd.pp.log1p(adata)
    sd.tl.grn(adata, ["G1", "G5", "G9"])
    np.testing.assert_allclose(planned.obsm["tf_activity"], adata.obsm["tf_activity"], atol=2e-3)
    assert set(planned.uns["grn_params"]["tfs"]) == {"G1", "G5", "G9"}


def test_it_needs_factors() -> None:
    with pytest.raises(ValueError, match="needs tfs"):
        ops.GRN().init(jax.numpy.ones((20, 3)))


def test_a_fitted_plan_is_saved_with_its_prior(cells: ad.AnnData, edges: pd.DataFrame, tmp_path: Path) -> None:
    adata = cells[:200].copy()
    plan = sd.plan(adata)
    sd.tl.grn(plan, np.unique(edges["tf"]), prior=edges, penalty=0.01)
    fitted = sd.fit(plan, sd.losses.l1("tf_activity"), learn="grn", n_steps=2, progress=False)
    fitted.save(tmp_path / "fit")
    again = sd.Fitted.load(tmp_path / "fit").apply(adata.copy(), copy=True)
    pd.testing.assert_frame_equal(again.uns["grn"], fitted.apply(adata.copy(), copy=True).uns["grn"])
    with pytest.raises(ValueError, match="cannot be saved: PosixPath"):
        replace(fitted, calls=[("tl.grn", {"tfs": tmp_path})]).save(tmp_path / "other")
