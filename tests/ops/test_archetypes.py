"""Archetypes against planted ones, known mixtures and their definition; derivatives and cost are in test_contract."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, nnls

import scdiffx as sd
from helpers import called, directional_fd, pbmc_counts, random_direction
from scdiffx import ops
from scdiffx.ops._archetypes import _elbow, _furthest

KINDS = ["H2228_prop", "H1975_prop", "HCC827_prop"]
K, DIMS = 3, 8


def planted(n: int = 240, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, weights and archetypes; the first cells are pure."""
    rng = np.random.default_rng(seed)
    corners = 5 * rng.normal(size=(K, DIMS))
    weights = rng.dirichlet(np.ones(K), size=n)
    weights[:K] = np.eye(K)
    return weights @ corners + noise * rng.normal(size=(n, DIMS)), weights, corners


def matched(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The columns of `found` in the order in which they are nearest to `truth`."""
    best = min(permutations(range(truth.shape[1])), key=lambda p: float(((found[:, p] - truth) ** 2).sum()))
    return found[:, best]


def convex(x: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The weights by non-negative least squares, with a heavy row for their sum."""
    heavy = 1e4 * np.abs(corners).max()
    system = np.vstack([corners.T, np.full(len(corners), heavy)])
    return np.stack([nnls(system, np.append(cell, heavy))[0] for cell in x])


@pytest.mark.usefixtures("x64")
def test_planted_archetypes_are_found_exactly() -> None:
    x, weights, corners = planted()
    op = ops.Archetypes(n_archetypes=K).init(jnp.asarray(x))
    result = called(op, jnp.asarray(x))
    np.testing.assert_allclose(matched(np.asarray(result.weights), weights), weights, atol=2e-3)
    np.testing.assert_allclose(matched(np.asarray(result.archetypes).T, corners.T), corners.T, atol=0.02)
    assert float(result.explained) > 1 - 1e-5
    np.testing.assert_allclose(op.mix.sum(1), 1, rtol=1e-9)
    assert float(op.mix.min()) >= 0
    # The largest total weight comes first.
    assert (np.diff(result.weights.sum(0)) < 0).all()


@pytest.mark.usefixtures("x64")
def test_weights_solve_their_least_squares() -> None:
    x, _, _ = planted(noise=2.0)
    op = ops.Archetypes(n_archetypes=K).init(jnp.asarray(x))
    result = called(op, jnp.asarray(x))
    np.testing.assert_allclose(result.weights, convex(x, np.asarray(result.archetypes)), atol=1e-6)
    assert (np.asarray(result.weights) == 0).mean() > 0.05
    residual = ((x - np.asarray(result.weights) @ np.asarray(result.archetypes)) ** 2).sum()
    assert float(result.explained) == pytest.approx(1 - residual / ((x - x.mean(0)) ** 2).sum())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_search_ends_at_a_minimum() -> None:
    x, _, _ = planted(60, noise=1.0)
    op = ops.Archetypes(n_archetypes=K).init(jnp.asarray(x))
    explained = float(called(op, jnp.asarray(x)).explained)
    total = ((x - x.mean(0)) ** 2).sum()

    def residual(flat: np.ndarray) -> float:
        u, v = np.split(flat, [len(x) * K])
        weights, mix = (np.exp(m - m.max(1, keepdims=True)) for m in (u.reshape(-1, K), v.reshape(K, -1)))
        weights, mix = weights / weights.sum(1, keepdims=True), mix / mix.sum(1, keepdims=True)
        return float(((x - weights @ (mix @ x)) ** 2).sum() / total)

    # Another parametrisation and optimiser, started at the result, finds nothing better.
    start = np.log(np.append(np.asarray(called(op, jnp.asarray(x)).weights), np.asarray(op.mix)) + 1e-4)
    grad = jax.jit(jax.grad(lambda f: _residual(jnp.asarray(x), f) / total))
    found = minimize(residual, start, jac=lambda f: np.asarray(grad(f)), method="L-BFGS-B", options={"maxiter": 500})
    assert explained > 1 - found.fun - 1e-4


def _residual(x: jax.Array, flat: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(flat[: len(x) * K].reshape(-1, K), axis=1)
    mix = jax.nn.softmax(flat[len(x) * K :].reshape(K, -1), axis=1)
    return ((x - weights @ (mix @ x)) ** 2).sum()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_derivative_of_explained_variance_is_that_of_the_whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdiffx.ops._archetypes._TOL", 1e-13)
    jax.clear_caches()
    x, _, corners = planted(noise=1.0)
    x = jnp.asarray(x)
    step = jnp.asarray(random_direction(x))
    # Searched anew from the same archetypes, on cells that have moved.
    searching = ops.Archetypes(n_archetypes=K, archetypes=jnp.asarray(corners), max_iter=3000)

    def whole(x: jax.Array) -> jax.Array:
        return called(searching.init(x), x).explained

    held = searching.init(x)
    slope = jax.grad(lambda x: called(held, x).explained)(x)
    numeric = directional_fd(whole, x, step, steps=(1e-3, 1e-4))
    assert np.abs(numeric / float(jnp.vdot(slope, step)) - 1).min() < 1e-2
    jax.clear_caches()


@pytest.mark.usefixtures("x64")
def test_permuted_cells_have_permuted_weights() -> None:
    x, _, corners = planted(noise=1.0)
    order = np.random.default_rng(1).permutation(len(x))
    found = []
    for cells in (x, x[order]):
        op = ops.Archetypes(n_archetypes=K, archetypes=jnp.asarray(corners)).init(jnp.asarray(cells))
        found.append(called(op, jnp.asarray(cells)))
    np.testing.assert_allclose(found[1].weights, np.asarray(found[0].weights)[order], atol=0.02)
    assert float(found[0].explained) == pytest.approx(float(found[1].explained), abs=1e-4)


@pytest.mark.slow
def test_the_number_is_found_and_its_stability_judged() -> None:
    x, _, _ = planted(noise=0.3)
    adata = ad.AnnData(np.zeros((len(x), 1), np.float32), obsm={"X_pca": x.astype(np.float32)})
    sd.tl.archetypes(adata, max_archetypes=6, n_init=2, n_bootstrap=3)
    entry = adata.uns["archetypes"]
    assert adata.obsm["archetype_weights"].shape == (len(x), K)
    assert entry["curve"].shape == (6,)
    assert entry["curve"][K - 1] == pytest.approx(entry["explained"], abs=1e-3)
    assert (np.diff(entry["curve"]) > -1e-3).all()
    assert entry["curve"][0] == 0
    assert (entry["spread"] < 0.2).all()
    # Archetypes of a cloud without corners are anywhere.
    adata.obsm["cloud"] = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    sd.tl.archetypes(adata, K, use_rep="cloud", n_init=2, n_bootstrap=3, key_added="cloud")
    assert adata.uns["cloud"]["spread"].mean() > 2 * entry["spread"].mean()
    assert "curve" not in adata.uns["cloud"]
    assert "spread" not in sd.tl.archetypes(adata, K, n_bootstrap=0, copy=True).uns["archetypes"]


def test_an_elbow_and_furthest_sums_by_hand() -> None:
    assert _elbow(np.array([0, 0.4, 0.8, 0.83, 0.86])) == 2
    line = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [10.0, 0.0], [5.0, 9.0]])
    assert set(_furthest(line, 3)) == {0, 3, 4}


def test_copies_of_cells_are_no_obstacle() -> None:
    z = jnp.asarray(np.repeat([[0.0, 0.0], [3.0, 0.0]], 10, axis=0), jnp.float32)
    op = ops.Archetypes(n_archetypes=3).init(z)
    result, pull = jax.vjp(jax.jit(lambda z: op(z)), z)
    (slope,) = pull(jax.tree.map(jnp.ones_like, result))
    assert all(np.isfinite(value).all() for value in jax.tree.leaves((result, slope)))
    np.testing.assert_allclose(result.weights @ result.archetypes, z, atol=1e-3)


def test_wrong_calls_and_too_few_rounds_name_themselves() -> None:
    x = jnp.asarray(planted(noise=1.0)[0], jnp.float32)
    with pytest.raises(ValueError, match="call `op = op"):
        ops.Archetypes()(x)
    with pytest.raises(ValueError, match="call `op = op"):
        ops.Archetypes().spread(x, 2)
    with pytest.raises(ValueError, match=r"n_archetypes=10.*2 and 9"):
        ops.Archetypes(n_archetypes=10).init(x)
    with pytest.warns(UserWarning, match="max_iter=1") as caught:
        ops.Archetypes(n_archetypes=3, max_iter=1).init(x)
    assert caught[0].filename == __file__


@pytest.fixture(scope="module")
def mixtures(data_dir) -> ad.AnnData:
    path = data_dir / "mixology_rnamix" / "mixology_rnamix.h5ad"
    if not path.exists():
        pytest.skip("the data set mixology_rnamix is not at ../shared/data beside the repository")
    adata = ad.read_h5ad(path)
    # The two protocols are farther apart than the mixtures.
    adata = adata[(adata.obs["batch"] == "RNAmix_sortseq").to_numpy()].copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=2000)
    sd.pp.pca(adata, n_comps=30)
    return adata


@pytest.mark.slow
def test_known_mixtures_of_rna_are_recovered(mixtures: ad.AnnData) -> None:
    truth = mixtures.obs[KINDS].to_numpy(float)
    sd.tl.archetypes(mixtures, 3)
    found = matched(mixtures.obsm["archetype_weights"], truth)
    error = np.sqrt(((found - truth) ** 2).mean())
    assert min(np.corrcoef(found[:, i], truth[:, i])[0, 1] for i in range(3)) > 0.96
    assert error < 0.085
    # Memberships of clusters are not mixtures.
    sd.tl.kmeans(mixtures, 3)
    soft = matched(mixtures.obsm["kmeans_probabilities"], truth)
    assert error < 0.5 * np.sqrt(((soft - truth) ** 2).mean())
    assert error < 0.5 * np.sqrt(((truth.mean(0) - truth) ** 2).mean())


@pytest.mark.slow
def test_a_plan_carries_derivatives_to_the_counts(tmp_path: Path) -> None:
    adata = pbmc_counts(300, 200)
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan)
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=6)
    sd.tl.archetypes(plan, 4, n_init=1, n_bootstrap=0)
    loss = sd.losses.cross_entropy("archetype_weights", "cell_type")
    fitted = sd.fit(plan, loss, n_steps=10, refresh_every=5, progress=False)
    assert np.isfinite(fitted.history["train"]).all()
    assert fitted.history["train"][-1] < fitted.history["train"][0]
    fitted.save(tmp_path / "fit")
    loaded = sd.Fitted.load(tmp_path / "fit")
    for cells in (adata, adata[::2].copy()):
        here, there = (f.apply(cells, copy=True).obsm["archetype_weights"] for f in (fitted, loaded))
        np.testing.assert_allclose(here, there, atol=1e-6)
