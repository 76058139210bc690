"""PHATE against phate 2 (tests/record_phate.py), its metric scaling, derivatives; more of it in test_contract.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
from scipy.spatial.distance import pdist, squareform
from sklearn.manifold import smacof

import scdiffx as sd
from helpers import QUICK, called, directional_fd, pbmc_counts, random_direction, tree_vdot
from scdiffx import ops
from scdiffx.ops._mds import classic_mds, metric_mds, stress_of
from scdiffx.ops._phate_structure import chosen_time, landmarks, operator_of, reach


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    z = np.asarray(sc.datasets.pbmc68k_reduced().obsm["X_pca"], np.float32)[::2]
    return ad.AnnData(np.zeros((len(z), 1), np.float32), obsm={"X_pca": z})


@pytest.fixture(scope="module")
def phate() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).with_name("phate_phate.npz")))


def same(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of distances."""
    return float(np.corrcoef(pdist(a), pdist(b))[0, 1])


def test_layout_is_phates(pbmc: ad.AnnData, phate: dict[str, np.ndarray]) -> None:
    sd.tl.phate(pbmc)
    found = pbmc.uns["phate"]
    assert found["t"] == phate["default_t"]
    np.testing.assert_allclose(found["entropy"], phate["default_entropy"], rtol=1e-5)
    y = pbmc.obsm["X_phate"]
    # phate's own seeds: .9996; the first two components: .87.
    assert same(y, phate["default"]) > 0.999
    assert same(y, phate["smacof"]) > 0.999
    assert same(pbmc.obsm["X_pca"][:, :2], phate["default"]) < 0.95
    assert 0 < found["stress"] < 0.2


def test_knee_is_phates() -> None:
    # The example in phate's documentation, and a corner.
    assert chosen_time(np.exp(-np.arange(20) / 10)) == 8
    assert chosen_time(np.maximum(5.0 - np.arange(30), 0)) in (5, 6)


def test_operator_by_its_definition(pbmc: ad.AnnData) -> None:
    z = np.asarray(pbmc.obsm["X_pca"][:60], np.float64)
    d = squareform(pdist(z))
    kernel = np.exp(-((d / np.sort(d, 1)[:, [5]]) ** 40))
    kernel[kernel < 1e-4] = 0
    kernel = (kernel + kernel.T) / 2
    _, found = reach(z, 5, 40.0, 1.0, 0)
    np.testing.assert_allclose(found.toarray() + np.eye(60), kernel, atol=1e-4)
    label = np.arange(60) % 7
    member = np.eye(7)[label]
    to_cells = member.T @ kernel
    expected = (to_cells / to_cells.sum(1, keepdims=True)) @ (to_cells.T / kernel.sum(1, keepdims=True))
    np.testing.assert_allclose(operator_of(found, label), expected, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_metric_scaling_reaches_scikit_learns_minimum() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)) * np.array([3, 2, 1, 1, 1])
    distances, start = squareform(pdist(x)), np.asarray(classic_mds(jnp.asarray(x), 2))
    # Classic scaling gives the principal components.
    left, size, _ = np.linalg.svd(x - x.mean(0))
    np.testing.assert_allclose(np.abs(start), np.abs(left[:, :2] * size[:2]), atol=1e-8)
    found = jax.jit(metric_mds, static_argnums=(2, 3), compiler_options=QUICK)(distances, start, 5000, 1e-8)
    theirs, _ = smacof(distances, n_components=2, init=start, n_init=1, max_iter=5000, eps=1e-10)
    gaps = squareform(pdist(theirs))
    expected = np.sqrt(((gaps - distances) ** 2).sum() / (distances**2).sum())
    assert float(stress_of(found.points, distances)) == pytest.approx(expected, rel=1e-3)
    assert same(found.points, theirs) > 0.999


def small(pbmc: ad.AnnData, **settings: Any) -> tuple[ops.PHATE, jax.Array]:
    z = jnp.asarray(pbmc.obsm["X_pca"][:60], jnp.float64)
    exact = ops.PHATESettings(max_iter=50_000, tol=1e-11, **settings.pop("more", {}))
    return ops.PHATE(t=3, settings=exact, **settings).init(z), z


def differentiated(op: ops.PHATE, z: jax.Array) -> None:
    """Potential distances, and distances in the layout, against finite differences."""
    weights = [jnp.asarray(random_direction(np.zeros(s), seed=i)) for i, s in enumerate(((60, 60), (60, 60)))]

    def costs(z: jax.Array, decay: jax.Array, bandwidth: jax.Array) -> jax.Array:
        found = sd.ops.PHATE.__call__(changed(op, decay, bandwidth), z)
        count = found.distances.shape[0]
        apart = ((found.embedding[:, None] - found.embedding) ** 2).sum(2)
        parts = [(weights[0][:count, :count] * found.distances).sum(), (weights[1] * apart).sum()]
        return jnp.stack(parts)

    at = (z, jnp.asarray(40.0), jnp.asarray(1.0))
    move = (jnp.asarray(random_direction(z)) * 0.1, jnp.asarray(1.0), jnp.asarray(0.01))
    value = jax.jit(costs, compiler_options=QUICK)
    slopes = jax.jit(jax.jacrev(costs, (0, 1, 2)), compiler_options=QUICK)(*at)
    for i in range(2):
        exact = tree_vdot([s[i] for s in slopes], list(move))
        numeric = directional_fd(lambda x, i=i: value(*x)[i], at, move, steps=(1e-4, 1e-5, 1e-6))
        assert np.abs(numeric / exact - 1).min() < 1e-5, (i, numeric, exact)


def changed(op: ops.PHATE, decay: jax.Array, bandwidth: jax.Array) -> ops.PHATE:
    from scdiffx._core.fields import replace

    return replace(op, decay=decay, bandwidth=bandwidth)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "settings", [{"n_landmark": 13}, {"more": {"gamma": 0.0}, "n_components": 3}], ids=("landmarks", "root_3d")
)
def test_derivatives(pbmc: ad.AnnData, settings: dict[str, Any]) -> None:
    differentiated(*small(pbmc, **settings))


@pytest.mark.usefixtures("x64")
def test_derivative_of_the_metric_scaling() -> None:
    rng = np.random.default_rng(0)
    distances = jnp.asarray(squareform(pdist(rng.normal(size=(14, 4)))))
    start, weights = jnp.asarray(rng.normal(size=(14, 2))), jnp.asarray(rng.normal(size=(14, 14)))

    def cost(distances: jax.Array) -> jax.Array:
        y = metric_mds(distances, start, 50_000, 1e-12).points
        return (weights * ((y[:, None] - y) ** 2).sum(2)).sum()

    both = jax.jit(jax.value_and_grad(cost), compiler_options=QUICK)
    move = rng.normal(size=(14, 14))
    move = (move + move.T) * (1 - np.eye(14))
    exact = tree_vdot(both(distances)[1], move)
    numeric = directional_fd(lambda d: both(d)[0], distances, move, steps=(1e-4, 1e-5))
    assert np.abs(numeric / exact - 1).min() < 1e-6, (numeric, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("root", {"gamma": 0.0, "t": 5, "k": 9, "decay": 10.0}, 0.99),
        ("classic", {"mds": "classic"}, 0.95),
        ("landmarks", {"n_landmark": 100}, 0.99),
    ],
    ids=("root", "classic", "landmarks"),
)
def test_settings_mean_what_they_mean_to_phate(
    pbmc: ad.AnnData, phate: dict[str, np.ndarray], name: str, settings: dict[str, Any], least: float
) -> None:
    first, again = (sd.tl.phate(pbmc, **settings, copy=True).obsm["X_phate"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert same(first, phate[name]) > least
    assert same(first, phate["default"]) < same(first, phate[name])


def test_landmarks_follow_the_seed(pbmc: ad.AnnData) -> None:
    _, kernel = reach(np.asarray(pbmc.obsm["X_pca"]), 5, 40.0, 1.0, 0)
    first, again, other = (landmarks(kernel, 40, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(np.unique(first), np.arange(first.max() + 1))
    # Clusters are groups of neighbours: most of a cell's weight is in its own.
    rows = kernel.tocoo()
    assert rows.data[first[rows.row] == first[rows.col]].sum() > 0.3 * rows.data.sum()


def test_wrong_calls_name_themselves(pbmc: ad.AnnData) -> None:
    z = jnp.asarray(pbmc.obsm["X_pca"][:30])
    with pytest.raises(ValueError, match="call `op = op"):
        ops.PHATE()(z)
    with pytest.raises(ValueError, match=r"knn=30.*29"):
        ops.PHATE(knn=30).init(z)
    with pytest.raises(ValueError, match=r"mds='best'.*metric"):
        ops.PHATE(settings=ops.PHATESettings(mds="best")).init(z)
    with pytest.raises(ValueError, match=r"2 cells or landmarks.*n_components=2"):
        ops.PHATE(n_landmark=2).init(z)
    with pytest.raises(ValueError, match=r"mds='classic'.*metric"):
        sd.tl.phate(sd.plan(pbmc), mds="classic")


@pytest.mark.slow
def test_in_a_plan_a_loss_moves_the_layout() -> None:
    raw = pbmc_counts()[:150].copy()
    plan = sd.plan(raw)
    sd.pp.normalize_total(plan)
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=8)
    sd.tl.phate(plan)
    straight = raw.copy()
    for call in (sd.pp.normalize_total, sd.pp.log1p, partial(sd.pp.pca, n_comps=8), sd.tl.phate):
        call(straight)
    loss = sd.losses.compactness("X_phate", "cell_type")
    fitted = sd.fit(
        plan, loss, n_steps=6, refresh_every=3, learn=["phate", "pca"], holdout=None, test=None, progress=False
    )
    assert fitted.history["train"][5] < fitted.history["train"][0] - 1e-3
    kinds, z = raw.obs["cell_type"].to_numpy(), straight.obsm["X_phate"]
    within = sum(((z[kinds == kind] - z[kinds == kind].mean(0)) ** 2).sum() for kind in np.unique(kinds))
    # The fit starts at the layout that the calls make.
    assert fitted.history["train"][0] == pytest.approx(within / ((z - z.mean(0)) ** 2).sum(), rel=1e-2)


@pytest.mark.slow
def test_copies_of_cells_and_parts_apart(pbmc: ad.AnnData) -> None:
    z = pbmc.obsm["X_pca"][:40]
    z = jnp.asarray(np.concatenate([z, z[:1].repeat(8, 0), z + 1e3]))
    op = ops.PHATE(t=3, settings=ops.PHATESettings(max_iter=50)).init(z)
    found = called(op, z)
    assert np.isfinite(found.embedding).all()
    np.testing.assert_allclose(found.embedding[40:48], np.asarray(found.embedding)[[0] * 8], atol=1e-2)
    slope = jax.jit(jax.grad(lambda z: op(z).distances.sum()), compiler_options=QUICK)(z)
    assert np.isfinite(slope).all()
