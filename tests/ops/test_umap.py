"""UMAP against umap-learn and against its definition; permutations and memory are in test_contract."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist
from sklearn.manifold import trustworthiness

import scdiffx as sd
from helpers import QUICK, allowed_direction, called, directional_fd, pbmc_counts, random_direction, tree_vdot
from scdiffx import ops
from scdiffx.ops._umap import _local, _Numbers, _pulled, _pushed, sampled
from scdiffx.ops._umap_start import curve, spectral_start

A, B = 0.5830300203414425, 1.3341669924314914


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    adata = pbmc_counts()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=300)
    sd.pp.pca(adata, n_comps=20)
    sd.pp.neighbors(adata)
    return adata


def kept(z: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Trustworthiness, and the share of the 15 nearest cells that stay so."""
    near = [np.argsort(cdist(x, x), axis=1)[:, 1:16] for x in (z, y)]
    shared = np.mean([len(np.intersect1d(*rows)) for rows in zip(*near, strict=True)]) / 15
    return float(trustworthiness(z, y, n_neighbors=15)), float(shared)


def test_the_curve_is_umap_learns() -> None:
    # Those of umap-learn 0.5.12, for scanpy's and for its own defaults.
    np.testing.assert_allclose(curve(0.5, 1.0), (A, B), rtol=1e-6)
    np.testing.assert_allclose(curve(0.1, 1.0), (1.576943460405378, 0.8950608781227859), rtol=1e-6)


def test_edges_are_sampled_when_umap_learn_does() -> None:
    weights = np.random.default_rng(0).uniform(0.01, 1, 200).astype(np.float32)
    weights[:3] = 1, 0.5, 0.01
    every = 1 / weights.astype(np.float64)
    following, n = every.copy(), 100
    for epoch in range(1, n):
        due = following <= epoch
        following[due] += every[due]
        found = np.asarray(sampled(jnp.asarray(weights), jnp.asarray(epoch, jnp.float32)))
        # Where the epoch is a multiple up to rounding it may come one later.
        passed = np.stack([epoch * weights, (epoch - 1) * weights])
        clear = ((np.abs(passed - np.round(passed)) > 1e-4) | (passed == 0)).all(0)
        np.testing.assert_array_equal(found[clear], due[clear])
        assert clear.mean() > 0.9


@pytest.mark.usefixtures("x64")
def test_pull_and_push_by_their_definition() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(scale=0.5, size=(40, 2))
    matrix = sp.random(40, 40, 0.2, random_state=0).tocsr()
    graph = ops.Graph.from_scipy((matrix + matrix.T) / 2)
    p = graph.pattern
    # A row of overflow is what distinguishes cells of many neighbours.
    assert len(p.owner)
    assert (np.asarray(p.owner) < 40).any()
    gap = y[:, None] - y
    squared = (gap**2).sum(2)
    near = np.where(squared > 0, squared, 1)
    coordinates, numbers = tuple(jnp.asarray(y).T), _Numbers(A, B, 1.0, 0.7, 9)

    moved, alpha, total = np.zeros_like(y), 1e-6, jnp.zeros(40)
    weights = jnp.asarray(graph.values).T
    pulled = jax.jit(_pulled, compiler_options=QUICK)
    for j in range(0, p.indices.shape[1], 2):
        found, edges = pulled(coordinates, weights[j : j + 2], p.indices.T[j : j + 2], p.owner, alpha, numbers)
        moved += (np.stack(found, 1) - y) / alpha
        total += edges
    dense = graph.to_scipy().toarray()
    pull = dense * 2 * A * B * near ** (B - 1) / (1 + A * near**B)
    np.testing.assert_allclose(moved, -2 * (pull[..., None] * gap).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total, dense.sum(1))

    order = jnp.asarray(rng.permutation(40))
    shifts = jnp.arange(40)[:, None]
    pushed = jax.vmap(lambda shift: jnp.stack(_pushed(coordinates, total, order, shift, alpha, numbers), 1))
    found = jax.jit(pushed, compiler_options=QUICK)(shifts)
    push = 2 * 0.7 * B / ((1e-3 + squared) * (1 + A * squared**B))
    expected = np.asarray(total)[:, None] * np.clip(push[..., None] * gap, -4, 4).mean(1)
    np.testing.assert_allclose((found.mean(0) - y) / alpha, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_densities_pull_by_umap_learns_formula() -> None:
    """The lines of umap-learn's layouts.py, for all edges of weight above 0 at once."""
    rng = np.random.default_rng(0)
    y = rng.normal(scale=0.5, size=(40, 2))
    matrix = sp.random(40, 40, 0.2, random_state=0).tocsr()
    graph = ops.Graph.from_scipy((matrix + matrix.T) / 2)
    weights = graph.to_scipy().toarray()
    edge = weights > 0
    squared = np.where(edge, cdist(y, y, "sqeuclidean"), 1)
    radius = rng.normal(size=40)
    known = (radius - radius.mean()) / radius.std()
    phi = np.where(edge, 1 / (1 + A * squared**B), 0)
    phi_sum, re_sum = 2 * phi.sum(1), np.log(1e-8 + 2 * (phi * squared).sum(1) / (2 * phi.sum(1)))
    std = np.sqrt(re_sum.var() + 0.2)
    covariance = re_sum @ known / 39
    weight = known - covariance * (re_sum - re_sum.mean()) / std**2
    dphi = A * B * squared ** (B - 1) / (1 + A * squared**B)
    q = phi / phi_sum  # of the cell in the column
    dr = q * ((1 - B * (1 - phi)) / np.exp(re_sum) + dphi)
    both = weight * dr + (weight[:, None] * (phi / phi_sum[:, None])) * (
        (1 - B * (1 - phi)) / np.exp(re_sum)[:, None] + dphi
    )
    total = 2 * weights.sum() / 2
    coefficient = np.where(edge, 3.0 * total * both / (np.where(edge, weights, 1) * std) / 40, 0)
    gap = y[:, None] - y
    expected = 2 * np.clip(2 * coefficient[..., None] * gap, -4, 4).sum(1)

    numbers = _Numbers(A, B, 1.0, 1.0, 9)
    density = ops.UMAPDensity(3.0, 0.3, 0.2, jnp.asarray(radius))
    p, coordinates, alpha = graph.pattern, tuple(jnp.asarray(y).T), 1e-6
    local = _local(graph, coordinates, numbers, density)
    pulled = jax.jit(_pulled, compiler_options=QUICK)
    moved = np.zeros_like(y)
    slots = jnp.asarray(graph.values).T
    for j in range(0, p.indices.shape[1], 2):
        given = (coordinates, (slots[j : j + 2] > 0) * 1.0, p.indices.T[j : j + 2], p.owner, alpha, numbers)
        plain, dense = (np.stack(pulled(*given, *more)[0], 1) for more in ((), (local, slots[j : j + 2])))
        moved += (dense - plain) / alpha
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 1


@pytest.mark.usefixtures("x64")
def test_strong_pulls_do_not_overshoot() -> None:
    hub = sp.csr_matrix(np.r_[[np.r_[0, np.ones(59)]], np.c_[np.ones(59), np.zeros((59, 59))]])
    graph = ops.Graph.from_scipy(hub)
    y = np.zeros((60, 2))
    y[0] = 1.0
    found, _ = jax.jit(_pulled, compiler_options=QUICK)(
        tuple(jnp.asarray(y).T),
        jnp.asarray(graph.values).T[:2],
        graph.pattern.indices.T[:2],
        graph.pattern.owner,
        1.0,
        _Numbers(A, B, 1.0, 1.0, 9),
    )
    assert 0.4 < float(found[0][0]) <= 0.55


@pytest.mark.usefixtures("x64")
def test_the_loss_and_its_derivatives(pbmc: ad.AnnData) -> None:
    graph = ops.Graph.from_scipy(pbmc.obsp["connectivities"][:200, :200], np.float64)
    y = jnp.asarray(np.random.default_rng(0).normal(scale=2, size=(200, 2)))
    op = ops.UMAP(settings=ops.UMAPSettings(gamma=0.7))

    def cost(values: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        return op.loss(graph.with_values(values), y, key)

    weights, squared = graph.to_scipy().toarray(), cdist(y, y, "sqeuclidean")
    pull = (weights * np.log1p(A * squared**B)).sum() / weights.sum()
    apart = np.log1p(A * squared**B) - B * np.log(squared + 1e-3) - np.log(A)
    np.fill_diagonal(apart, 0)
    expected = pull + 0.7 * 5 * (weights.sum(1) * apart.mean(1)).sum() / weights.sum()
    both = jax.jit(jax.vmap(jax.value_and_grad(cost, (0, 1)), (None, None, 0)), compiler_options=QUICK)
    keys = jax.random.split(jax.random.key(0), 150)
    draws, slopes = both(graph.values, y, keys)
    assert float(draws.mean()) == pytest.approx(expected, rel=0.02)
    (step,) = allowed_direction(graph)
    for place, move in enumerate((step, random_direction(y))):
        numeric = directional_fd(
            lambda t, place=place, move=move: both(
                *(x + t * move if i == place else x for i, x in enumerate((graph.values, y))), keys
            )[0][0],
            0.0,
            1.0,
            steps=(1e-5, 1e-6),
        )
        np.testing.assert_allclose(numeric, tree_vdot(slopes[place][0], move), rtol=1e-6)


@pytest.mark.slow
def test_neighbourhoods_are_kept(pbmc: ad.AnnData) -> None:
    z = pbmc.obsm["X_pca"]
    found = [sd.tl.umap(pbmc, random_state=seed, copy=True).obsm["X_umap"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1
    # umap-learn 0.5.12 through scanpy: .980 to .981 and .535 to .544 over four seeds.
    for y in found[1:]:
        trust, shared = kept(z, y)
        assert trust > 0.975
        assert shared > 0.52
    op = ops.UMAP().init(ops.Graph.from_scipy(pbmc.obsp["connectivities"]))
    for trust, shared in (kept(z, z[:, :2]), kept(z, np.asarray(op.start))):
        assert trust < 0.94
        assert shared < 0.31


def test_components_are_laid_out_apart(pbmc: ad.AnnData) -> None:
    weights = pbmc.obsp["connectivities"].astype(np.float64)
    for count in (3, 7):
        group = np.arange(700) % count
        apart = sp.csr_matrix(weights.multiply(group[:, None] == group))
        apart.eliminate_zeros()
        n_parts, part = connected_components(apart)
        assert n_parts >= count
        start = spectral_start(apart, 2, np.random.default_rng(0))
        assert np.isfinite(start).all()
        nearest = np.argsort(cdist(start, start), axis=1)[:, 1]
        assert (part[nearest] == part).mean() > 0.8


def test_starts(pbmc: ad.AnnData) -> None:
    short = {"maxiter": 20, "copy": True}
    pbmc.obsm["two"] = pbmc.obsm["X_pca"][:, :2].copy()
    by_key = sd.tl.umap(pbmc, init_pos="two", **short).obsm["X_umap"]
    by_array = sd.tl.umap(pbmc, init_pos=pbmc.obsm["two"], **short).obsm["X_umap"]
    np.testing.assert_array_equal(by_key, by_array)
    assert not np.allclose(by_key, sd.tl.umap(pbmc, init_pos="random", **short).obsm["X_umap"])
    # Cells at one place part.
    same = sd.tl.umap(pbmc, init_pos=np.zeros((700, 2)), **short).obsm["X_umap"]
    assert np.isfinite(same).all()
    assert len(np.unique(same, axis=0)) == 700


def test_every_setting_changes_the_layout(pbmc: ad.AnnData) -> None:
    plain = sd.tl.umap(pbmc, maxiter=20, copy=True).obsm["X_umap"]
    settings = (
        {"min_dist": 0.1},
        {"spread": 2.0},
        {"alpha": 0.5},
        {"gamma": 2.0},
        {"a": 1.0, "b": 1.0},
        {"maxiter": 30},
    )
    for setting in settings:
        other = sd.tl.umap(pbmc, copy=True, **{"maxiter": 20, **setting}).obsm["X_umap"]
        assert np.abs(plain - other).max() > 0.1, setting


@pytest.mark.slow
def test_number_of_random_cells_and_of_dimensions(pbmc: ad.AnnData) -> None:
    plain = sd.tl.umap(pbmc, maxiter=200, copy=True).obsm["X_umap"]
    other = sd.tl.umap(pbmc, maxiter=200, negative_sample_rate=1, copy=True).obsm["X_umap"]
    assert other.std() < 0.9 * plain.std()
    three = sd.tl.umap(pbmc, maxiter=200, n_components=3, copy=True).obsm["X_umap"]
    assert three.shape == (700, 3)
    assert kept(pbmc.obsm["X_pca"], three)[1] > kept(pbmc.obsm["X_pca"], plain)[1] + 0.03


def test_wrong_calls_name_themselves(pbmc: ad.AnnData) -> None:
    graph = ops.Graph.from_scipy(pbmc.obsp["connectivities"][:50, :50])
    with pytest.raises(ValueError, match="call `op = op"):
        ops.UMAP()(graph)
    with pytest.raises(ValueError, match="init\\(graph, distances"):
        ops.UMAP(density=ops.UMAPDensity()).init(graph)
    with pytest.raises(ValueError, match="no edge"):
        ops.UMAP().init(graph.with_values(jnp.zeros_like(graph.values)))
    with pytest.raises(ValueError, match=r"49.*n_components=48.*50"):
        ops.UMAP(n_components=48).init(ops.Graph.from_scipy(pbmc.obsp["connectivities"][:49, :49]))
    with pytest.raises(ValueError, match="init_pos='best'"):
        ops.UMAP(settings=ops.UMAPSettings(init_pos="best")).init(graph)
    with pytest.raises(ValueError, match=r"\(50, 3\).*\(50, 2\)"):
        ops.UMAP(start=jnp.zeros((50, 3))).init(graph)
    with pytest.raises(ValueError, match="part of a plan"):
        sd.tl.umap(sd.plan(pbmc))


@pytest.mark.slow
def test_densities_are_kept(pbmc: ad.AnnData) -> None:
    correlations = []
    for weight in (1e-6, 0.2, 2.0):
        sd.tl.umap(pbmc, densmap=True, dens_lambda=weight, key_added="dense")
        correlations.append(pbmc.uns["dense"]["density_correlation"])
    # umap-learn 0.5.12: .983 to .984 over three seeds.
    assert correlations[0] < 0.2 < correlations[1] - 0.2
    assert correlations[2] > 0.97
    assert kept(pbmc.obsm["X_pca"], pbmc.obsm["dense"])[0] > 0.97
    short = {"densmap": True, "maxiter": 60, "copy": True}
    plain = sd.tl.umap(pbmc, **short).obsm["X_umap"]
    for setting in ({"dens_frac": 0.8}, {"dens_var_shift": 1.0}):
        assert np.abs(plain - sd.tl.umap(pbmc, **short, **setting).obsm["X_umap"]).max() > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_small_steps_are_umap_learns(pbmc: ad.AnnData) -> None:
    from umap.layouts import optimize_layout_euclidean

    weights = pbmc.obsp["connectivities"]
    start = np.random.default_rng(0).uniform(0, 10, (700, 2)).astype(np.float32)
    start = ops.UMAP(start=start).init(ops.Graph.from_scipy(weights)).start.astype(jnp.float32)
    n_epochs, alpha = 30, 2e-4
    settings = ops.UMAPSettings(alpha=alpha, gamma=0.0)
    op = ops.UMAP(start=start, n_epochs=n_epochs, settings=settings, a=1.0, b=0.9)
    graph = ops.Graph.from_scipy(weights, np.float64)
    ours = np.asarray(called(op.init(graph), graph).embedding)
    edges = weights.tocoo(copy=True)
    edges.data[edges.data < edges.data.max() / n_epochs] = 0
    edges.eliminate_zeros()
    at = np.array(start)
    theirs = optimize_layout_euclidean(
        at, at, edges.row, edges.col, n_epochs, 700, (edges.data.max() / edges.data).astype(np.float64), 1.0, 0.9,
        np.zeros(3, np.int64), gamma=0.0, initial_alpha=alpha, move_other=True,
    )  # fmt: skip
    moved = [y - np.asarray(start, np.float64) for y in (ours, theirs)]
    error = np.linalg.norm(moved[0] - moved[1]) / np.linalg.norm(moved[1])
    assert error < 0.02
    assert np.abs(moved[1]).max() > 100 * 1e-6


@pytest.mark.slow
def test_as_good_as_umap_learn(pbmc: ad.AnnData) -> None:
    import scanpy as sc

    z = pbmc.obsm["X_pca"]
    both = [
        np.array([kept(z, run(pbmc, random_state=seed, copy=True).obsm["X_umap"]) for seed in range(3)])
        for run in (sd.tl.umap, sc.tl.umap)
    ]
    assert (both[0].mean(0) > both[1].min(0) - 0.005).all()
