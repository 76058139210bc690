"""The network that lays cells out, against umap-learn and its places of new cells; more is in test_contract."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.manifold import trustworthiness
from sklearn.neighbors import KNeighborsClassifier

import scdiffx as sd
from helpers import pbmc_counts
from scdiffx import ops
from scdiffx.ops._umap import attraction, repulsion


def reduced(cells: int) -> ad.AnnData:
    adata = pbmc_counts()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=20)
    adata = adata[:cells].copy()
    sd.pp.neighbors(adata)
    return adata


def test_the_objective_is_the_cross_entropy_of_similarities(x64: None) -> None:
    d = np.array([0.0, 0.1, 1.0, 3.0, 8.0])
    a, b = 0.583, 1.334
    similar = 1 / (1 + a * d ** (2 * b))
    np.testing.assert_allclose(attraction(jnp.asarray(d**2), a, b), -np.log(similar), atol=1e-12)
    np.testing.assert_allclose(repulsion(jnp.asarray(d**2), a, b)[2:], -np.log(1 - similar[2:]), rtol=4e-3)
    assert np.isfinite(jax.vmap(jax.grad(lambda v: repulsion(v, a, b)))(jnp.asarray(d**2))).all()


@pytest.fixture(scope="module")
def trained() -> ad.AnnData:
    adata = reduced(500)
    sd.tl.parametric_umap(adata, n_steps=400, n_hidden=64, progress=False)
    return adata


def kept(adata: ad.AnnData, y: np.ndarray) -> float:
    return float(trustworthiness(adata.obsm["X_pca"], y, n_neighbors=15))


def test_neighbourhoods_are_kept_better_than_by_two_components(trained: ad.AnnData) -> None:
    assert kept(trained, trained.obsm["X_parametric_umap"]) > kept(trained, trained.obsm["X_pca"][:, :2]) + 0.02
    history = trained.uns["parametric_umap"]["history"]
    assert len(history) == 8
    assert history[-1] < 0.8 * history[0]


# umap-learn 0.5.12, means of three seeds by tests/record_umap.py: trustworthiness of the places of the 500 cells (.976
# to .977) and of the 200 others (.946 to .958), and how many of these are of the type around them (.78 to .80).
UMAP_LEARN = (0.977, 0.952, 0.787)


def test_neighbourhoods_and_types_of_new_cells_beside_umap_learn(trained: ad.AnnData) -> None:
    rest = reduced(700)[500:].copy()
    sd.tl.parametric_umap(rest, reference=trained)
    here, there = (adata.obsm["X_parametric_umap"] for adata in (trained, rest))
    assert kept(trained, here) > UMAP_LEARN[0] - 0.02
    assert kept(rest, there) > UMAP_LEARN[1] - 0.03
    types, wanted = (data.obs["cell_type"].astype(str) for data in (trained, rest))
    # Of 200 cells: one standard error of a share is .03.
    assert KNeighborsClassifier(15).fit(here, types).score(there, wanted) > UMAP_LEARN[2] - 0.08


def test_a_reference_places_its_own_cells_where_they_were(trained: ad.AnnData, tmp_path: Path) -> None:
    trained.write_h5ad(tmp_path / "trained.h5ad")
    stored = ad.read_h5ad(tmp_path / "trained.h5ad")
    part = trained[::3].copy()
    del part.obsm["X_parametric_umap"], part.uns["parametric_umap"], part.obsp, part.uns["neighbors"]
    sd.tl.parametric_umap(part, reference=stored)
    np.testing.assert_allclose(
        part.obsm["X_parametric_umap"], trained.obsm["X_parametric_umap"][::3], rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_in_a_plan_a_loss_moves_the_network() -> None:
    cells = reduced(260)
    plan = sd.plan(cells[:200].copy())
    sd.pp.neighbors(plan)
    sd.tl.parametric_umap(plan, n_steps=50, n_hidden=16, progress=False)
    loss = sd.losses.compactness("X_parametric_umap", "cell_type")
    assert "parametric_umap.net" not in sd.metrics.gradient_flow(plan, loss).dead
    fitted = sd.fit(plan, loss, n_steps=10, learn=["parametric_umap"], progress=False)
    assert fitted.history["train"][-1] < fitted.history["train"][0]
    new = cells[200:].copy()
    placed = fitted.apply(new, copy=True).obsm["X_parametric_umap"]
    assert placed.shape == (60, 2)
    assert np.isfinite(placed).all()


def test_what_cannot_be_is_named(trained: ad.AnnData) -> None:
    plain = trained.copy()
    del plain.uns["parametric_umap"]
    with pytest.raises(KeyError, match=r"reference.uns.*parametric_umap\(reference\)"):
        sd.tl.parametric_umap(plain, reference=plain)
    with pytest.raises(TypeError, match=r"reference.*str"):
        sd.tl.parametric_umap(plain, reference="path")
    plain.obsm["X_few"] = plain.obsm["X_pca"][:, :5]
    with pytest.raises(ValueError, match="20 features, got 5"):
        sd.tl.parametric_umap(plain, reference=trained, use_rep="X_few")
    with pytest.raises(ValueError, match="init"):
        ops.ParametricUMAP()(jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="graph"):
        ops.ParametricUMAP().init(jnp.zeros((3, 2)))
