"""Communication: features and z-scores by their definition, scikit-learn's ridge, planted responses, the network."""

from __future__ import annotations

import warnings

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

import scdiffx as sd
from helpers import called
from scdiffx import ops
from scdiffx._core.spatial import neighbors_in_space
from scdiffx.ops import _communication_models as models
from scdiffx.ops._communication_features import Columns, features_of
from scdiffx.ops._communication_test import Signals, basis_of, folds_of, standardised, z_scores

SIDES = {"ligands": np.array([[0, 0], [3, 4], [9, 9]]), "receptors": np.array([[5, 5], [6, 7], [0, 8]])}


def small(n: int = 90) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    rng = np.random.default_rng(0)
    x, points = np.log1p(rng.poisson(rng.gamma(2, 1, 40), (n, 40))), rng.uniform(size=(n, 2))
    graph = neighbors_in_space(points, n_neighbors=4).toarray()
    graph[0] = graph[:, 0] = 0  # a cell without neighbours
    return x, (3 * points[:, 0]).astype(int), sp.csr_matrix(graph)


def tissue(seed: int, n: int = 700, pairs: int = 12, bent: bool = False) -> tuple[ad.AnnData, list[tuple[str, str]]]:
    """Two types, side by side; ligands of the first three pairs change genes of neighbours with the receptor."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(size=(n, 2)) * np.sqrt(n)
    types = (np.sin(where[:, 0] / 2) + 0.5 * rng.normal(size=n) > 0).astype(int)
    on = rng.uniform(size=(2, n, pairs)) < np.where(types == np.arange(2)[:, None], 0.6, 0.1)[:, :, None]
    ligands, receptors = on * rng.gamma(4, 0.25, (2, n, pairs))
    near = neighbors_in_space(where)
    mean = sp.diags(1 / np.asarray(near.sum(1)).ravel()) @ near
    signal = receptors * (mean @ ligands)
    if bent:
        signal = 3.0 * (receptors > 0) * ((near @ (ligands > 0.8)) >= 3)
    y = rng.normal(size=(n, 60)) + types[:, None] * rng.normal(size=60)
    for k in range(3):
        y[:, 8 * k : 8 * (k + 1)] += 1.5 * signal[:, [k]]
    names = [*(f"L{k}" for k in range(pairs)), *(f"R{k}" for k in range(pairs)), *(f"g{k}" for k in range(60))]
    adata = ad.AnnData(np.concatenate([ligands, receptors, y], 1).astype(np.float32), var=pd.DataFrame(index=names))
    adata.obsm["spatial"], adata.obs["type"] = where, np.where(types, "b", "a")
    return adata, [(f"L{k}", f"R{k}") for k in range(pairs)]


@pytest.mark.usefixtures("x64")
def test_features_by_their_definition() -> None:
    x, types, graph = small()
    columns = Columns(np.array([0, 3, 4, 5, 6, 7, 8, 9]), **SIDES)
    found = features_of(columns, 3, jnp.asarray(x), ops.Graph.from_scipy(graph), jnp.asarray(types))
    walk = graph.toarray() / np.maximum(graph.toarray().sum(1, keepdims=True), 1)
    ligand, receptor = (np.stack([x[:, side].min(1) for side in SIDES[name]], 1) for name in SIDES)
    member = np.eye(3)[types]
    np.testing.assert_allclose(found.sent, ligand)
    np.testing.assert_allclose(found.borne, receptor)
    np.testing.assert_allclose(found.around, walk @ ligand, atol=1e-12)
    near = ((walk @ member)[:, :, None] * member[:, None]).reshape(len(x), 9)
    np.testing.assert_allclose(found.near, near, atol=1e-12)
    np.testing.assert_allclose(found.all()[:, -3:], receptor * (walk @ ligand), atol=1e-12)
    assert not np.asarray(found.around)[0].any()


def test_z_scores_are_those_of_regression() -> None:
    x, types, graph = small()
    ligand, receptor, genes = x[:, :3], x[:, 3:6], x[:, 10:20]
    walk = sp.csr_matrix(graph / np.maximum(graph.sum(1), 1).reshape(-1, 1))
    controls = np.concatenate([np.eye(3)[types], x[:, 6:9]], 1)
    basis = basis_of(controls)
    left = standardised(genes, basis)
    z = z_scores(Signals(ligand, receptor, walk), left, basis)
    around = walk @ ligand
    for k in range(3):
        design = np.column_stack([controls, around[:, k], receptor[:, k] * around[:, k]])
        slope = np.linalg.lstsq(design, left, rcond=None)[0][-1]
        error = np.sqrt(np.linalg.pinv(design.T @ design)[-1, -1])
        np.testing.assert_allclose(z[k], slope / error, rtol=2e-3, atol=2e-4)


def test_ridge_equals_scikit_learn_and_blocks_are_held_out() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)), rng.normal(size=(300, 2))
    y[:, 0] += x[:, 0] + 0.5 * x[:, 3]
    fold = folds_of(np.arange(300)[::-1], 5, rng)
    assert (np.bincount(fold) == 60).all()
    assert (np.diff(fold) != 0).sum() < 30
    split = models.split_of(fold, 4)
    np.testing.assert_array_equal(np.stack(split).sum(0), 1)
    assert (fold[split.test] == 4).all()
    assert (fold[split.validation] == 0).all()
    found = models.fitted(models.Blocks(x[:, :2], x[:, 2:4], x[:, 4:]), y, split)
    train = (x[split.train] - found.centre) / found.scale
    for i, q in enumerate((2, 4, 6)):
        weights = np.sqrt(np.repeat(found.penalties[: i + 1], 2) * split.train.sum())
        theirs = Ridge(alpha=1.0).fit(train[:, :q] / weights, y[split.train])
        np.testing.assert_allclose(
            found.predicted(x, i)[split.train], theirs.predict(train[:, :q] / weights), rtol=1e-6
        )
    assert models.r2(y, found.predicted(x, 2), found.intercept, split.test) > 0.2


def test_planted_responses_are_found_and_none_once_neighbours_are_permuted() -> None:
    adata, pairs = tissue(0)
    sd.tl.communication(adata, pairs, groupby="type", n_programs=3, n_perms=60)
    found, params = adata.uns["communication"], adata.uns["communication_params"]
    true = found["ligand"].isin(["L0", "L1", "L2"])
    assert roc_auc_score(true, -found["pvalue"]) == 1
    assert (found["qvalue"][true] < 0.05).all()
    assert not (found["qvalue"][~true] < 0.05).any()
    assert found["gain"][true].min() > found["gain"][~true].max()
    r2 = params["r2"]
    assert r2["linear"] > r2["types"] + 0.02
    groups = adata.uns["communication_groups"]
    lost = groups[groups["ligand"] == "L0"].groupby("source", observed=True)["importance"].sum()
    assert lost["a"] > lost["b"]
    assert found["importance"][true].min() > 0
    # Cells of a type change places.
    rng, p = np.random.default_rng(1), []
    for _ in range(3):
        for cells in adata.obs.groupby("type").indices.values():
            adata.obsm["spatial"][cells] = adata.obsm["spatial"][rng.permutation(cells)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sd.tl.communication(adata, pairs, groupby="type", n_programs=3, n_perms=60)
        p += adata.uns["communication"]["pvalue"].tolist()
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.asarray(p) < 0.05) < 0.15


@pytest.mark.slow
def test_attention_finds_what_sums_of_products_do_not() -> None:
    adata, pairs = tissue(0, n=2000, pairs=6, bent=True)
    sd.tl.communication(adata, pairs, groupby="type", method="gat", n_programs=3, n_perms=1)
    scores = adata.uns["communication_params"]["r2_test"]
    assert scores["gat"] > scores["linear"] + 0.01


@pytest.mark.slow
def test_graphs_batches_and_targets() -> None:
    adata, pairs = tissue(1)
    settings = {"n_programs": 3, "n_perms": 5}
    sd.tl.communication(adata, pairs, targets=["g1", "g2", "g30", "L0"], **settings)
    assert adata.uns["communication_params"]["n_genes"] == 3
    assert adata.obsm["X_communication"].shape == (700, 3)
    assert "communication_groups" not in adata.uns
    own = neighbors_in_space(adata.obsm["spatial"])
    adata.obsp["mine"] = own
    again = sd.tl.communication(adata, pairs, targets=["g1", "g2", "g30"], neighbors="mine", copy=True, **settings)
    pd.testing.assert_frame_equal(again.uns["communication"], adata.uns["communication"])
    adata.obs["slice"] = np.arange(700) % 2
    with pytest.raises(ValueError, match="joins cells of different batches"):
        sd.tl.communication(adata, pairs, neighbors="mine", batch_key="slice", **settings)
    sd.tl.communication(adata, pairs, batch_key="slice", **settings)
    with pytest.raises(ValueError, match="at least 50 cells"):
        sd.tl.communication(adata[:40].copy(), pairs, **settings)


def test_a_plan_has_the_effect() -> None:
    adata, pairs = tissue(2)
    plan = sd.plan(adata)
    sd.tl.communication(plan, pairs, groupby="type", n_programs=3, n_perms=5)
    expected = sd.tl.communication(adata, pairs, groupby="type", n_programs=3, n_perms=5, copy=True)
    plan.apply()
    np.testing.assert_allclose(adata.obsm["X_communication"], expected.obsm["X_communication"], rtol=1e-5)
    op = plan.steps[0].op
    x, graph = jnp.asarray(adata.X), ops.Graph.from_scipy(neighbors_in_space(adata.obsm["spatial"]))
    types = jnp.asarray(adata.obs["type"] == "b", jnp.int32)
    result = called(op.init(x, graph, types), x, graph, types)
    np.testing.assert_allclose(result.effect, expected.obsm["X_communication"], atol=1e-3)
