"""Ambient RNA planted in cells of distinct types; derivatives are in test_contract."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import scdiffx as sd
from helpers import called, same
from scdiffx import ops
from scdiffx.ops._ambient_estimates import levels, plausible, without_bursts

TYPES, CELLS, GENES = 4, 400, 300


def distinct(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of cells of four types, each with a fifth of the genes for itself, and their types."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(0.6, 1, (1, GENES)) * np.ones((TYPES, 1)) + 0.02
    for c in range(TYPES):
        others = np.arange(TYPES) != c
        share[np.ix_(others, np.arange(60 * c, 60 * c + 60))] = 0
    share /= share.sum(1, keepdims=True)
    types = rng.permutation(np.arange(CELLS) % TYPES)
    depth = rng.lognormal(8, 0.3, CELLS)
    rate = depth[:, None] * share[types] * rng.gamma(8, 1 / 8, (CELLS, GENES))
    return rng.poisson(rate).astype(np.float32), types


def planted(low: float, high: float, seed: int = 0) -> tuple[ad.AnnData, np.ndarray]:
    """The same with an average soup added, the share of which is returned; `var["soup"]` is the soup."""
    native, types = distinct(seed)
    rng = np.random.default_rng(seed + 1)
    soup = native.sum(0) / native.sum()
    depth, share = native.sum(1), rng.uniform(low, high, CELLS)
    added = np.stack([rng.multinomial(n, soup) for n in rng.poisson(depth * share / (1 - share))])
    adata = ad.AnnData(sp.csr_matrix(native + added.astype(np.float32)))
    adata.obs["type"] = [f"type {c}" for c in types]
    adata.var["soup"] = soup
    adata.layers["native"] = sp.csr_matrix(native)
    return adata, added.sum(1) / (native + added).sum(1)


@pytest.fixture(scope="module")
def soaked() -> tuple[ad.AnnData, np.ndarray]:
    adata, truth = planted(0.02, 0.3)
    sd.pp.remove_ambient(adata, empty_profile=adata.var["soup"].to_numpy(), groupby="type")
    return adata, truth


def test_planted_fractions_are_recovered(soaked: tuple[ad.AnnData, np.ndarray]) -> None:
    adata, truth = soaked
    found = adata.obs["ambient_fraction"].to_numpy()
    assert np.corrcoef(found, truth)[0, 1] > 0.95
    assert np.abs(found - truth).mean() < 0.02
    assert adata.uns["ambient"]["level"] == pytest.approx(0.16, abs=0.03)
    assert adata.uns["ambient"]["groups"].tolist() == [f"type {c}" for c in range(TYPES)]
    np.testing.assert_allclose(adata.var["ambient_profile"], adata.var["soup"], rtol=1e-5)


def test_what_is_taken_is_what_was_added(soaked: tuple[ad.AnnData, np.ndarray]) -> None:
    adata, _ = soaked
    observed, native, found = (m.toarray() for m in (adata.X, adata.layers["native"], adata.layers["decontaminated"]))
    own = np.zeros_like(observed, dtype=bool)
    for c in range(TYPES):
        own[np.ix_(adata.obs["type"] == f"type {c}", np.arange(60 * c, 60 * c + 60))] = True
    marks = np.arange(GENES) < 240
    away, at_home = marks & ~own, marks & own
    assert found[away].sum() < 0.05 * observed[away].sum()
    assert found[at_home].sum() == pytest.approx(native[at_home].sum(), rel=0.03)
    assert np.abs(found - native).sum() < 0.5 * np.abs(observed - native).sum()


@pytest.mark.parametrize("integers", [False, True])
def test_native_and_removed_are_the_observed(integers: bool) -> None:
    adata, _ = planted(0.02, 0.3)
    sd.pp.remove_ambient(adata, groupby="type", integers=integers)
    observed, native = adata.X, adata.layers["decontaminated"]
    removed = observed - native
    assert sp.issparse(native)
    assert native.dtype == np.float32
    np.testing.assert_array_equal(native.indices, observed.indices)
    assert native.data.min() >= 0
    assert (native.data <= observed.data).all()
    np.testing.assert_array_equal((native + removed).toarray(), observed.toarray())
    assert (np.trunc(native.data) == native.data).all() == integers


def test_integers_keep_the_sums_and_follow_the_seed() -> None:
    adata, _ = planted(0.02, 0.3)
    expected, first, again, other = (
        sd.pp.remove_ambient(adata, groupby="type", copy=True, **settings).layers["decontaminated"]
        for settings in ({}, *({"integers": True, "rng": seed} for seed in (1, 1, 2)))
    )
    assert same(first, again)
    assert (first != other).nnz > 0
    # Cells follow one another in the matrix, so each keeps its sum; each entry is rounded up or down.
    assert np.abs(first.sum(1) - expected.sum(1)).max() < 1.01
    assert np.abs((first - expected).data).max() < 1
    means = [np.asarray(m.mean(0)).ravel() for m in (first, expected)]
    np.testing.assert_allclose(means[0], means[1], atol=0.1)


def test_dense_counts_give_the_same_integers() -> None:
    sparse, _ = planted(0.02, 0.3)
    dense = ad.AnnData(sparse.X.toarray(), obs=sparse.obs)
    for adata in (sparse, dense):
        sd.pp.remove_ambient(adata, groupby="type", integers=True)
    assert isinstance(dense.layers["decontaminated"], np.ndarray)
    different = dense.layers["decontaminated"] != sparse.layers["decontaminated"].toarray()
    assert different.mean() < 1e-3


@pytest.mark.slow
def test_clusters_are_found_where_none_are_given() -> None:
    adata, truth = planted(0.02, 0.3)
    sd.pp.remove_ambient(adata)
    found = adata.obs["ambient_fraction"].to_numpy()
    assert np.corrcoef(found, truth)[0, 1] > 0.9
    assert np.abs(found - truth).mean() < 0.04
    assert len(adata.uns["ambient"]["level"]) >= TYPES


def test_clean_cells_stay_clean() -> None:
    counts, types = distinct()
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.obs["type"] = types.astype(str)
    with pytest.warns(UserWarning, match="no ambient RNA was found"):
        sd.pp.remove_ambient(adata, groupby="type")
    assert adata.obs["ambient_fraction"].max() == 0
    assert same(adata.layers["decontaminated"], adata.X)


def test_cells_without_distinct_types_are_left_alone_and_it_is_said() -> None:
    adata = sd.datasets.splatter(300, 500, group_prob=[0.5, 0.5])
    with pytest.warns(UserWarning, match="contamination="):
        sd.pp.remove_ambient(adata, groupby="group")
    assert adata.obs["ambient_fraction"].max() == 0
    known = sd.pp.remove_ambient(adata, groupby="group", contamination=0.1, copy=True)
    assert known.obs["ambient_fraction"].mean() == pytest.approx(0.1, abs=0.02)


def test_soup_from_droplets(soaked: tuple[ad.AnnData, np.ndarray]) -> None:
    adata = soaked[0].copy()
    rng = np.random.default_rng(3)
    soup = adata.var["soup"].to_numpy()
    drops = np.stack([rng.multinomial(n, soup) for n in rng.integers(0, 80, 1500)])
    names = [*adata.obs_names, *(f"empty {i}" for i in range(1500))]
    raw = ad.AnnData(sp.vstack([adata.X, sp.csr_matrix(drops.astype(np.float32))]).tocsr())
    raw.obs_names, raw.var_names = names, adata.var_names
    mixed = raw[:, np.random.default_rng(0).permutation(GENES)].copy()
    sd.pp.remove_ambient(adata, empty_profile=mixed, groupby="type", key_added="mine")
    np.testing.assert_allclose(adata.var["mine_profile"], drops.sum(0) / drops.sum(), rtol=1e-5)
    assert np.corrcoef(adata.obs["mine_fraction"], adata.obs["ambient_fraction"])[0, 1] > 0.99
    with pytest.raises(KeyError, match="1 genes of `adata` are not among"):
        sd.pp.remove_ambient(adata, empty_profile=mixed[:, mixed.var_names != "7"].copy())
    with pytest.raises(ValueError, match="no droplet with 1 to 100 counts"):
        sd.pp.remove_ambient(adata, empty_profile=adata)
    with pytest.raises(ValueError, match="empty_max_counts=0"):
        sd.pp.remove_ambient(adata, empty_profile=mixed, empty_max_counts=0)
    mixed.var_names = ["same"] * GENES
    with pytest.raises(ValueError, match="not unique"):
        sd.pp.remove_ambient(adata, empty_profile=mixed)


def test_integers_are_not_asked_of_other_numbers() -> None:
    adata, _ = planted(0.02, 0.3)
    adata.X.data[3] = 0.5
    with pytest.raises(ValueError, match="integers=True"):
        sd.pp.remove_ambient(adata, groupby="type", integers=True)
    assert "decontaminated" not in adata.layers
    with pytest.warns(UserWarning, match="raw count"):
        sd.pp.remove_ambient(adata, groupby="type")


def test_a_layer_with_another_pattern_than_x() -> None:
    adata, _ = planted(0.02, 0.3)
    expected = sd.pp.remove_ambient(adata, groupby="type", copy=True).layers["decontaminated"]
    adata.layers["counts"] = adata.X
    adata.X = sp.csr_matrix(np.eye(CELLS, GENES, dtype=np.float32))
    for _ in range(2):  # the second time the layer is there already
        sd.pp.remove_ambient(adata, groupby="type", layer="counts")
    assert same(adata.layers["decontaminated"], expected)


def test_levels_are_the_lower_end_of_the_ratios() -> None:
    rng = np.random.default_rng(0)
    soup = np.full(120, 1 / 120)
    native = np.where(rng.random((5, 120)) < 0.4, 0, rng.gamma(1, 1, (5, 120)) * 2.5)
    native[np.arange(120) % 5, np.arange(120)] = 20
    native = native / native.sum(1, keepdims=True)
    for truth in (0.0, 0.05, 0.2):
        size = np.full(5, 4e4)
        counts = rng.poisson(size[:, None] * ((1 - truth) * native + truth * soup))
        found = levels(counts / size[:, None], size, soup)
        np.testing.assert_allclose(found, truth, atol=0.03)
    assert levels(np.tile(soup, (5, 1)), size, soup).tolist() == [0] * 5


def test_a_burst_belongs_to_its_cell() -> None:
    adata, _ = planted(0.1, 0.1)
    x, codes = adata.X.copy(), adata.obs["type"].astype("category").cat.codes.to_numpy()
    cell = int(np.flatnonzero(codes == 0)[0])
    x = x.tolil()
    x[cell, 70] = 500  # a gene of another type
    x = x.tocsr()
    mean, cut = without_bursts(x.astype(np.float64), codes, TYPES)
    plain = np.asarray(adata.X[codes == 0].sum(0)).ravel() / adata.X[codes == 0].sum()
    assert mean[0, 70] < plain[70] + 2e-4
    assert cut[cell, 70] < 50
    op = ops.RemoveAmbient().init(ops.Counts.from_scipy(x), codes)
    kept = np.asarray(called(op, jnp.asarray(x.toarray())).corrected)
    assert kept[cell, 70] > 450
    assert float(plausible(jnp.zeros(()))) == 2
    assert np.isfinite(jax.grad(plausible)(0.0))


def test_new_cells_find_their_cluster() -> None:
    adata, _ = planted(0.02, 0.3)
    codes = adata.obs["type"].astype("category").cat.codes.to_numpy()
    x = ops.Counts.from_scipy(adata.X)
    op = ops.RemoveAmbient().init(x, codes)
    fresh, _ = planted(0.02, 0.3, seed=0)
    part = fresh.X[100:150]
    moved = op.init(ops.Counts.from_scipy(part))
    np.testing.assert_array_equal(moved.membership, codes[100:150])
    result = called(moved, ops.Counts.from_scipy(part))
    np.testing.assert_allclose(result.fraction, called(op, x).fraction[100:150], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="5 groups, but 4"):
        op.init(x, codes + 1)
    with pytest.raises(ValueError, match="init"):
        ops.RemoveAmbient()(x)


@pytest.mark.slow
def test_a_plan_learns_through_it() -> None:
    adata, truth = planted(0.02, 0.3)
    adata.obs["truth"] = truth
    plan = sd.plan(adata)
    sd.pp.remove_ambient(plan, groupby="type")
    fitted = sd.fit(
        plan, sd.losses.correlation("ambient_fraction", "truth"), n_steps=3, refresh_every=2, progress=False
    )
    fitted.apply(adata)
    assert np.corrcoef(adata.obs["ambient_fraction"], truth)[0, 1] > 0.95


def real(data_dir: Path, name: str) -> ad.AnnData:
    path = data_dir / name / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"the data set {name} is not at ../shared/data/{name}")
    return ad.read_h5ad(path)


@pytest.mark.slow
def test_a_real_soup(data_dir: Path) -> None:
    adata = real(data_dir, "soupx_pbmc")
    soup = adata.var["soup_profile"].to_numpy()
    sd.pp.remove_ambient(adata, empty_profile=soup, groupby="annotation")
    assert 0.03 < adata.obs["ambient_fraction"].mean() < 0.08
    observed, native = adata.X.tocsr(), adata.layers["decontaminated"].tocsr()
    assert ((native + (observed - native)) != observed).nnz == 0
    labels = adata.obs["annotation"].astype(str).to_numpy()
    away = np.isin(labels, ["T_CD4", "T_CD8", "NK", "MNP"])
    at = adata.var_names.get_indexer(["IGKC", "IGHM", "IGHA1", "IGLC2", "IGLC3", "JCHAIN", "HBA1", "HBA2", "HBB"])
    before, after = (m[away][:, at].toarray() for m in (observed, native))
    expected = 0.5 * np.asarray(observed.sum(1))[away] * soup[at]
    usual = before <= expected + 5 * np.sqrt(expected) + 3
    assert 1 - after[usual].sum() / before[usual].sum() > 0.8
    for cell_type, genes in {"B": ["CD79A", "MS4A1", "IGKC"], "MNP": ["LYZ", "S100A8"], "NK": ["GNLY"]}.items():
        for gene in adata.var_names.get_indexer(genes):
            kept = (m[labels == cell_type][:, gene].sum() for m in (native, observed))
            assert np.divide(*kept) > 0.95


@pytest.mark.slow
def test_real_cells_with_planted_soup(data_dir: Path) -> None:
    adata = real(data_dir, "pbmc_4271")
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(adata.X)
    soup = np.asarray(counts.sum(0)).ravel() / counts.sum()
    depth, share = np.asarray(counts.sum(1)).ravel(), rng.uniform(0.02, 0.3, adata.n_obs)
    counts.data = rng.binomial(counts.data.astype(int), np.repeat(1 - share, np.diff(counts.indptr)))
    added = sp.vstack([sp.csr_matrix(rng.multinomial(n, soup)) for n in rng.poisson(depth * share)]).tocsr()
    adata.X = sp.csr_matrix(counts + added).astype(np.float32)
    truth = np.asarray(added.sum(1)).ravel() / np.asarray(adata.X.sum(1)).ravel()
    sd.pp.remove_ambient(adata, empty_profile=soup, groupby="label")
    found = adata.obs["ambient_fraction"].to_numpy(np.float64)
    assert np.corrcoef(found, truth)[0, 1] > 0.65
    # The cells had some 6 % of their own soup before.
    assert 0.03 < (found - truth).mean() < 0.07
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.pp.remove_ambient(adata)
