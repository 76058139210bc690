"""K-means against scikit-learn's and against its definition; derivatives and cost are in test_contract."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.cluster import KMeans as Reference
from sklearn.metrics import adjusted_rand_score

import scdiffx as sd
from helpers import called, pbmc_counts
from scdiffx import ops


def components(adata: ad.AnnData, n_comps: int = 30) -> ad.AnnData:
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=300)
    sd.pp.pca(adata, n_comps=n_comps)
    return adata


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    return components(pbmc_counts(), 20)


@pytest.fixture
def blood(pbmc: ad.AnnData) -> np.ndarray:
    return np.asarray(pbmc.obsm["X_pca"], np.float64)


def same_partition(op: ops.KMeans, z: np.ndarray, start: np.ndarray) -> None:
    theirs = Reference(len(start), init=start, n_init=1, tol=0).fit(z)
    op = op.init(jnp.asarray(z))
    result = called(op, jnp.asarray(z))
    np.testing.assert_array_equal(result.labels, theirs.labels_)
    np.testing.assert_allclose(op.centers, theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_allclose(result.centers, theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_allclose(result.inertia, theirs.inertia_, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn_from_the_same_start(blood: np.ndarray, seed: int) -> None:
    start = blood[np.random.default_rng(seed).choice(len(blood), 7, replace=False)]
    same_partition(ops.KMeans(n_clusters=7, centers=start), blood, start)
    # In the limit of temperature 0 soft iterations change nothing.
    same_partition(ops.KMeans(n_clusters=7, centers=start, temperature=1e-6, n_soft=4), blood, start)


@pytest.mark.usefixtures("x64")
def test_empty_clusters_start_anew_as_in_scikit_learn(blood: np.ndarray) -> None:
    start = blood[[3, 50, 200, 400, 500, 600, 20]].copy()
    start[[1, 3]] += 1e3
    assert len(np.unique(((blood[:, None] - start) ** 2).sum(2).argmin(1))) == 5
    same_partition(ops.KMeans(n_clusters=7, centers=start), blood, start)


def test_restarts_are_as_good_as_scikit_learns(pbmc: ad.AnnData) -> None:
    theirs = Reference(7, n_init=10, random_state=0).fit(pbmc.obsm["X_pca"])
    inertia = [sd.tl.kmeans(pbmc, 7, n_init=n, copy=True).uns["kmeans"]["inertia"] for n in (1, 10)]
    # scikit-learn's own seeds differ by 0.2 %.
    assert inertia[1] < 1.003 * theirs.inertia_
    assert inertia[1] < inertia[0]


@pytest.mark.slow
def test_real_clusters_are_found_as_by_scikit_learn(_paul15: ad.AnnData) -> None:
    paul = components(_paul15.copy())
    z, truth = paul.obsm["X_pca"], paul.obs["paul15_clusters"]
    theirs = [Reference(19, n_init=10, random_state=seed).fit(z) for seed in range(2)]
    ours = [sd.tl.kmeans(paul, 19, random_state=seed, copy=True) for seed in range(2)]
    # The seeds of either differ by 0.1 to 0.4 %.
    assert max(a.uns["kmeans"]["inertia"] for a in ours) < 1.004 * min(t.inertia_ for t in theirs)
    score = np.mean([adjusted_rand_score(truth, a.obs["kmeans"]) for a in ours])
    chance = adjusted_rand_score(truth, np.random.default_rng(0).permutation(ours[0].obs["kmeans"]))
    assert score > np.mean([adjusted_rand_score(truth, t.labels_) for t in theirs]) - 0.03
    assert abs(chance) < 0.01 < 0.3 < score


def test_keys_agree_with_each_other(pbmc: ad.AnnData) -> None:
    adata = sd.tl.kmeans(pbmc, 7, copy=True)
    z, entry = np.asarray(adata.obsm["X_pca"], np.float64), adata.uns["kmeans"]
    codes, member = adata.obs["kmeans"].cat.codes.to_numpy(), adata.obsm["kmeans_probabilities"]
    assert list(adata.obs["kmeans"].cat.categories) == [str(i) for i in range(7)]
    assert (np.diff(np.bincount(codes)) <= 0).all()
    np.testing.assert_array_equal(member.argmax(1), codes)
    np.testing.assert_allclose(entry["centers"], [z[codes == i].mean(0) for i in range(7)], atol=1e-4)
    gap = ((z[:, None] - entry["centers"]) ** 2).sum(2)
    assert entry["inertia"] == pytest.approx(gap.min(1).sum(), rel=1e-5)
    assert entry["temperature"] == pytest.approx(2 * entry["inertia"] / z.size, rel=1e-5)
    np.testing.assert_allclose(member, softmax(-gap / entry["temperature"], axis=1), atol=1e-3)
    softer = sd.tl.kmeans(pbmc, 7, temperature=10 * entry["temperature"], copy=True)
    assert (softer.obs["kmeans"] == adata.obs["kmeans"]).all()
    assert softer.obsm["kmeans_probabilities"].max(1).mean() < member.max(1).mean() - 0.03


@pytest.mark.usefixtures("x64")
def test_soft_iterations_by_their_definition(blood: np.ndarray) -> None:
    op = ops.KMeans(n_clusters=7, temperature=20.0, n_soft=4).init(jnp.asarray(blood))
    hard = expected = np.asarray(op.centers)
    for _ in range(4):
        weight = softmax(-((blood[:, None] - expected) ** 2).sum(2) / 20, axis=1)
        expected = weight.T @ blood / weight.sum(0)[:, None]
    result = called(op, jnp.asarray(blood))
    np.testing.assert_allclose(result.centers, expected, rtol=1e-9)
    assert np.abs(expected - hard).max() > 0.1
    np.testing.assert_array_equal(result.labels, np.asarray(result.memberships).argmax(1))


@pytest.mark.usefixtures("x64")
def test_the_derivative_of_the_centres_is_that_of_the_whole_search(blood: np.ndarray) -> None:
    # Where a cell moves a little, Lloyd's iterations from anew arrive where the held partition says.
    z, start = jnp.asarray(blood), jnp.asarray(blood[:7])
    step = jnp.asarray(np.random.default_rng(0).normal(size=z.shape))

    def search(t: float) -> ops.KMeansResult:
        moved = z + t * step
        return called(ops.KMeans(n_clusters=7, centers=start, temperature=8.0).init(moved), moved)

    held = ops.KMeans(n_clusters=7, centers=start, temperature=8.0).init(z)
    _, slope = jax.jvp(lambda z: called(held, z), (z,), (step,))
    for name in ("centers", "memberships", "inertia"):
        low, high = (getattr(search(t), name) for t in (-1e-6, 1e-6))
        np.testing.assert_allclose(getattr(slope, name), (high - low) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_other_cells_keep_the_numbers_of_clusters(blood: np.ndarray) -> None:
    op = ops.KMeans(n_clusters=7).init(jnp.asarray(blood))
    labels = np.asarray(called(op, jnp.asarray(blood)).labels)
    moved = np.asarray(called(op, jnp.asarray(blood + 0.05)).labels)
    np.testing.assert_array_equal(moved, labels)
    # A cluster without cells keeps its place, and the others their cells.
    rest = called(op, jnp.asarray(blood[labels != 3]))
    assert (np.asarray(rest.labels) == labels[labels != 3]).mean() > 0.95
    assert np.isfinite(rest.centers).all()


def test_copies_of_cells_are_no_obstacle() -> None:
    z = jnp.asarray(np.repeat([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0]], 10, axis=0), jnp.float32)
    op = ops.KMeans(n_clusters=5).init(z)
    result, pull = jax.vjp(jax.jit(lambda z: op(z)._replace(labels=None)), z)
    (slope,) = pull(jax.tree.map(jnp.ones_like, result))
    assert all(np.isfinite(value).all() for value in jax.tree.leaves((result, slope)))
    assert float(result.inertia) == pytest.approx(0, abs=1e-6)


def test_too_few_iterations_are_said(pbmc: ad.AnnData) -> None:
    with pytest.warns(UserWarning, match="max_iter=2") as caught:
        sd.tl.kmeans(pbmc, 7, n_init=1, max_iter=2, copy=True)
    assert caught[0].filename == __file__


def test_wrong_calls_name_themselves(blood: np.ndarray) -> None:
    z = jnp.asarray(blood)
    with pytest.raises(ValueError, match="call `op = op"):
        ops.KMeans()(z)
    with pytest.raises(ValueError, match=r"n_clusters=701.*700"):
        ops.KMeans(n_clusters=701).init(z)
    with pytest.raises(ValueError, match=r"\(2, 20\) must be \(8, 20\)"):
        ops.KMeans(centers=z[:2]).init(z)


@pytest.mark.slow
def test_a_fit_moves_components_and_temperature(pbmc: ad.AnnData, tmp_path: Path) -> None:
    raw = ad.AnnData(pbmc.X.copy(), obs=pbmc.obs[["cell_type"]].copy())
    plan = sd.plan(raw)
    sd.pp.pca(plan, n_comps=6)
    sd.tl.kmeans(plan, 10)
    loss = sd.losses.cross_entropy("kmeans_probabilities", "cell_type")
    fitted = sd.fit(plan, loss, n_steps=10, refresh_every=5, progress=False)
    assert np.isfinite(fitted.history["train"]).all()
    # New centers at a refresh can raise the loss, so the last step need not be the lowest.
    assert min(fitted.history["train"]) < fitted.history["train"][0] - 0.01
    assert sorted(fitted.params) == ["kmeans.temperature", "pca.scale", "pca.shift"]
    found = fitted.apply(raw, copy=True).obs["kmeans"]
    assert found.nunique() == 10
    # Saved, loaded and applied to some of the cells, clusters keep their numbers.
    fitted.save(tmp_path / "fit")
    some = sd.Fitted.load(tmp_path / "fit").apply(raw[::2].copy(), copy=True).obs["kmeans"]
    assert (some.astype(str) == found[::2].astype(str)).mean() > 0.9
