"""Losses without labels: hidden entries, cells measured twice, a budget of genes."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import scdiffx as sd
from helpers import directional_fd, largest_array, pbmc_counts, random_direction
from scdiffx._core.counts import Counts
from scdiffx._fit._split import three_ways
from scdiffx.losses._label_free import Budget, MaskedReconstruction, ReplicateConsistency


@pytest.fixture(scope="module")
def counts():
    return pbmc_counts(200, 150)


@pytest.fixture(scope="module")
def twice(counts):
    """Both halves of each cell, with components of the normalised logarithms."""
    halves = sd.pp.replicates(counts, rng=0)
    sd.pp.normalize_total(halves, target_sum=1e3)
    sd.pp.log1p(halves)
    sd.pp.pca(halves, n_comps=8)
    return halves


def test_hidden_and_shown_make_up_the_counts(counts, tmp_path):
    adata = sd.pp.mask_counts(counts, 0.2, rng=3, copy=True)
    shown, hidden = adata.layers["shown"], adata.layers["hidden"]
    assert abs(shown + hidden - counts.X).max() == 0
    assert hidden.nnz == pytest.approx(0.2 * counts.n_obs * counts.n_vars, rel=0.05)
    assert (hidden.data == 0).any()
    where = sp.csr_matrix((np.ones(hidden.nnz), hidden.indices, hidden.indptr), shape=hidden.shape)
    assert where.multiply(shown).nnz == 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad").layers["hidden"]
    assert again.nnz == hidden.nnz
    dense = ad.AnnData(counts.X.toarray(), obs=counts.obs, var=counts.var)
    sd.pp.mask_counts(dense, 0.2, rng=3)
    np.testing.assert_array_equal(dense.layers["hidden"].indices, hidden.indices)
    assert sd.pp.mask_counts(counts, 0.2, rng=4, copy=True).layers["hidden"].nnz != hidden.nnz
    with pytest.raises(ValueError, match="fraction"):
        sd.pp.mask_counts(counts, 1.0)
    with pytest.raises(TypeError, match="cannot be part of a plan"):
        sd.pp.mask_counts(sd.plan(counts))


def masked_case(counts, dtype=np.float64):
    hidden = sd.pp.mask_counts(counts, 0.3, rng=0, copy=True).layers["hidden"].astype(dtype)
    value = np.random.default_rng(0).gamma(1.0, size=hidden.shape).astype(dtype)
    keep = np.arange(len(value)) % 4 > 0
    return hidden, value, keep


def test_masked_reconstruction_is_the_deviance_of_the_hidden_shares(counts, x64):
    hidden, value, keep = masked_case(counts)
    term = MaskedReconstruction(output="y", target="hidden", background=1e-12)
    found = float(term(jnp.asarray(value), Counts.from_scipy(hidden), jnp.asarray(keep)))
    total = deviance = 0.0
    for i in np.flatnonzero(keep):
        at = slice(hidden.indptr[i], hidden.indptr[i + 1])
        n, share = hidden.data[at], value[i, hidden.indices[at]]
        share, some = share / share.sum(), n > 0
        deviance += 2 * (n[some] * np.log(n[some] / (n.sum() * share[some]))).sum()
        total += n.sum()
    assert found == pytest.approx(deviance / total, rel=1e-9)


def test_masked_reconstruction_is_blind_to_depth_and_has_the_right_derivative(counts, x64):
    hidden, value, keep = masked_case(counts)
    target, kept = Counts.from_scipy(hidden), jnp.asarray(keep)
    term = MaskedReconstruction(output="y", target="hidden")
    assert float(term(jnp.asarray(value) * 7, target, kept)) == pytest.approx(
        float(term(jnp.asarray(value), target, kept))
    )
    loss = jax.jit(lambda v: term(v, target, kept))
    direction = random_direction(value)
    slope = float((jax.grad(loss)(jnp.asarray(value)) * direction).sum())
    np.testing.assert_allclose(directional_fd(loss, jnp.asarray(value), direction)[2:], slope, rtol=1e-5)
    empty = jax.value_and_grad(loss)(jnp.zeros_like(value))
    assert bool(jnp.isfinite(empty[0]))
    assert bool(jnp.isfinite(empty[1]).all())
    with pytest.raises(TypeError, match="must be sparse"):
        term(jnp.asarray(value), jnp.asarray(value), kept)


def test_the_mean_profile_is_worse_than_the_neighbours(counts):
    """What it is for: smoothing over neighbours predicts hidden entries better than the mean of all cells."""
    adata = sd.pp.mask_counts(counts, 0.1, rng=0, copy=True)
    adata.X = adata.layers["shown"].copy()
    adata.layers["linear"] = adata.X.copy()
    sd.pp.normalize_total(adata, layer="linear")
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=10)
    sd.pp.magic(adata, layer="linear", t=1)
    target, keep = Counts.from_scipy(adata.layers["hidden"]), jnp.ones(adata.n_obs, bool)
    term = MaskedReconstruction(output="magic", target="hidden")
    mean = np.tile(adata.layers["linear"].mean(0), (adata.n_obs, 1))
    assert float(term(jnp.asarray(adata.layers["magic"]), target, keep)) < 0.95 * float(
        term(jnp.asarray(mean), target, keep)
    )


def test_replicates_are_two_halves_of_every_cell(counts):
    halves = sd.pp.replicates(counts, 0.3, rng=1)
    first, second = halves[: counts.n_obs], halves[counts.n_obs :]
    assert abs(first.X + second.X - counts.X).max() == 0
    assert first.X.sum() == pytest.approx(0.3 * counts.X.sum(), rel=0.02)
    assert list(first.obs["replicate_of"]) == list(counts.obs_names) == list(second.obs["replicate_of"])
    assert halves.obs["replicate"].tolist() == ["1"] * 200 + ["2"] * 200
    assert list(halves.obs["cell_type"][:200]) == list(counts.obs["cell_type"])
    assert halves.obs_names.is_unique
    again = sd.pp.replicates(counts, 0.3, rng=1)
    assert abs(again.X - halves.X).max() == 0
    with pytest.raises(ValueError, match="fraction"):
        sd.pp.replicates(counts, 0.0)
    with pytest.raises(TypeError, match="cannot be part of a plan"):
        sd.pp.replicates(sd.plan(counts))


def consistency(halves, z, keep=None):
    codes = jnp.asarray(halves.obs["replicate_of"].cat.codes.to_numpy())
    keep = jnp.ones(len(codes), bool) if keep is None else keep
    term = ReplicateConsistency(output="z").init(z, codes, keep)
    return term, codes, keep


def test_consistency_orders_workflows_and_cannot_be_cheated(twice):
    z = jnp.asarray(twice.obsm["X_pca"])

    def loss(value):
        term, codes, keep = consistency(twice, value)
        return float(term(value, codes, keep))

    noise = jnp.asarray(np.random.default_rng(0).normal(size=z.shape), jnp.float32)
    assert loss(z) < loss(z + 3 * noise) < loss(noise)
    assert loss(noise) == pytest.approx(1.1, abs=0.1)
    assert loss(jnp.zeros_like(z)) == pytest.approx(1, abs=2e-3)
    assert loss(z * 1e-3) == pytest.approx(loss(z), abs=1e-4)
    both = np.concatenate([np.arange(200), np.arange(200)])
    assert loss(jnp.asarray(np.asarray(z)[both] + 1e-4 * noise)) < 0.1


def test_consistency_is_the_share_of_the_twin(twice, x64):
    z = jnp.asarray(twice.obsm["X_pca"][:, :3], jnp.float64)
    keep = jnp.arange(400) % 200 >= 40
    term, codes, _ = consistency(twice, z, keep)
    found, z = float(term(z, codes, keep)), np.asarray(z)
    total = 0.0
    for i in np.flatnonzero(np.asarray(keep)):
        j, half = (i + 200) % 400, np.flatnonzero(np.asarray(keep) & ((np.arange(400) < 200) != (i < 200)))
        d = ((z[i] - z) ** 2).sum(1)
        near = half[half != j][np.argsort(d[half[half != j]])[:15]]
        assert set(near) == set(np.asarray(term.others)[i, :15])
        distant = np.asarray(term.others)[i, 15:]
        assert set(distant) <= set(half)
        weight = 1 / (1 + d / (0.01 * d[near].mean()))
        total += np.log1p((weight[near].sum() + weight[distant[distant != j]].sum()) / weight[j]) / np.log1p(30)
    assert found == pytest.approx(total / int(keep.sum()), rel=1e-9)


def test_the_derivative_of_consistency(twice, x64):
    z = jnp.asarray(twice.obsm["X_pca"], jnp.float64)
    term, codes, keep = consistency(twice, z)
    loss = jax.jit(lambda v: term(v, codes, keep))
    direction = random_direction(z)
    slope = float((jax.grad(loss)(z) * direction).sum())
    np.testing.assert_allclose(directional_fd(loss, z, direction)[1:], slope, rtol=1e-6)
    assert float(jnp.abs(jax.grad(loss)(jnp.zeros_like(z))).max()) == 0
    assert largest_array(jax.grad(loss), z) <= 400 * 30


def test_random_splits_keep_both_halves_together(twice):
    split = three_ways(twice, sd.losses.replicate_consistency("X_pca"), 0.2, 0.2, seed=0)
    for mask in (split.train, split.holdout, split.test):
        np.testing.assert_array_equal(mask[:200], mask[200:])
    assert split.holdout.sum() == 80


def test_a_fit_brings_the_halves_together_and_serves_whole_cells(counts):
    halves = sd.pp.replicates(counts, rng=0)
    plan = sd.plan(halves)
    sd.pp.normalize_total(plan, target_sum=1e3)
    sd.pp.log1p(plan)
    sd.pp.highly_variable_genes(plan, n_top_genes=60, soft=True)
    sd.pp.pca(plan, n_comps=6)
    loss = sd.losses.replicate_consistency("X_pca") + sd.losses.budget("gene_weight", 60)
    fitted = sd.fit(
        plan, loss, learn=["highly_variable_genes.shift", "pca.scale"], n_steps=10, refresh_every=5, progress=False
    )
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    whole = fitted.apply(counts, copy=True)
    assert whole.obsm["X_pca"].shape == (200, 6)


def test_a_budget_costs_only_beyond_it():
    term = Budget(output="w", size=10.0)
    assert float(term(jnp.full(20, 0.5), None, None)) == 0
    assert float(term(jnp.full(20, 1.0), None, None)) == pytest.approx(1)
    with pytest.raises(ValueError, match="size"):
        sd.losses.budget("gene_weight", 0)
    with pytest.raises(ValueError, match="n_neighbors"):
        sd.losses.replicate_consistency("X_pca", n_neighbors=0)
    with pytest.raises(ValueError, match="scale"):
        sd.losses.masked_reconstruction("magic", scale="cube")
