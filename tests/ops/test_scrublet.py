"""Scrublet against scanpy's on the same pairs and on planted doublets; derivatives and cost are in test_contract."""

from __future__ import annotations

import warnings

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

import scdiffx as sd
from conftest import _read
from helpers import pbmc_counts
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.ops._scrublet import threshold_between_modes


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    return sp.csr_matrix(_read("pbmc_4271").X)[:1500].astype(np.float32)


def scanpys(counts: sp.csr_matrix, parents: np.ndarray) -> ad.AnnData:
    """scanpy's scores of the cells and of the doublets of these pairs, prepared as scanpy prepares them."""
    cells = ad.AnnData(counts.copy())
    sc.pp.filter_genes(cells, min_cells=3)
    log = cells.copy()
    sc.pp.normalize_total(log)
    sc.pp.log1p(log)
    sc.pp.highly_variable_genes(log)
    cells = cells[:, log.var["highly_variable"].to_numpy()].copy()
    doublets = ad.AnnData(sp.csr_matrix(cells.X[parents[:, 0]] + cells.X[parents[:, 1]]))
    doublets.obsm["doublet_parents"] = parents
    for part in (cells, doublets):
        sc.pp.normalize_total(part, target_sum=1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.scrublet(cells, adata_sim=doublets, threshold=0.3, verbose=False)
    return cells


def test_scores_equal_scanpys_on_the_same_pairs(counts: sp.csr_matrix) -> None:
    adata = ad.AnnData(counts.copy())
    sd.pp.scrublet(adata, threshold=0.3)
    theirs = scanpys(counts, adata.uns["scrublet"]["doublet_parents"])
    # Rounding can decide who the last neighbour is, and of a pair drawn twice which doublet is the point itself.
    for ours, other in (
        (adata.obs["doublet_score"], theirs.obs["doublet_score"]),
        *[tuple(a.uns["scrublet"]["doublet_scores_sim"] for a in (adata, theirs))],
    ):
        ours, other = np.asarray(ours), np.asarray(other)
        assert np.mean(np.abs(ours - other) < 1e-6) > 0.99
        assert np.corrcoef(ours, other)[0, 1] > 0.999
    assert np.mean(adata.obs["predicted_doublet"] == theirs.obs["predicted_doublet"]) > 0.995


@pytest.mark.slow
def test_planted_doublets_are_found_whatever_their_depth(counts: sp.csr_matrix) -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(counts.shape[0])
    first, second, rest = order[:100], order[100:200], order[200:]
    made = sp.csr_matrix(counts[first] + counts[second])
    depth = np.asarray(counts[order[200:300]].sum(1)).ravel() / np.asarray(made.sum(1)).ravel()
    made.data = rng.binomial(made.data.astype(int), np.repeat(np.minimum(depth, 1), np.diff(made.indptr)))
    adata = ad.AnnData(sp.vstack([counts[rest], made]).tocsr().astype(np.float32))
    truth = np.r_[np.zeros(len(rest)), np.ones(100)]
    sd.pp.scrublet(adata, threshold=0.3)
    score = adata.obs["doublet_score"]
    assert score.between(0, 1).all()
    assert roc_auc_score(truth, np.asarray(adata.X.sum(1)).ravel()) < 0.6
    assert roc_auc_score(truth, score) > 0.72


@pytest.mark.slow
def test_a_small_temperature_counts_and_a_larger_one_has_derivatives() -> None:
    x = ops.Counts.from_scipy(pbmc_counts(200, 150).X)
    hard = ops.Scrublet(n_comps=8).init(x)
    counted = hard(x)
    soft = replace(hard, temperature=1e-7)
    soft = soft.init(x)
    np.testing.assert_array_equal(soft.parents, hard.parents)
    # Only where the next neighbour is as far as the last voter do the two differ.
    same = np.isclose(np.asarray(soft(x).score), np.asarray(counted.score), atol=1e-6)
    assert same.mean() > 0.97

    def total(op: ops.Scrublet, data: jax.Array) -> jax.Array:
        return (op(x.with_data(data)).score * jnp.sin(jnp.arange(200))).sum()

    slopes = [np.asarray(jax.grad(total, argnums=1)(replace(hard, temperature=t).init(x), x.data)) for t in (0.0, 0.1)]
    assert not slopes[0].any()
    assert np.isfinite(slopes[1]).all()
    assert slopes[1].any()


def test_the_threshold_lies_between_two_modes() -> None:
    rng = np.random.default_rng(0)
    two = np.r_[rng.normal(0.1, 0.03, 3000), rng.normal(0.5, 0.06, 2000)]
    assert 0.2 < threshold_between_modes(two) < 0.4
    assert threshold_between_modes(np.full(100, 0.3)) is None


def test_without_two_modes_no_cell_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdiffx.pp._scrublet.threshold_between_modes", lambda scores: None)
    adata = pbmc_counts(150, 120)
    with pytest.warns(UserWarning, match="no cell is called"):
        sd.pp.scrublet(adata)
    assert not adata.obs["predicted_doublet"].any()
    assert "threshold" not in adata.uns["scrublet"]


@pytest.mark.slow
def test_batches_are_scored_by_themselves() -> None:
    adata = pbmc_counts(300, 150)
    adata.obs["batch"] = np.where(np.arange(300) % 2 == 0, "a/1", "b")
    alone = adata[adata.obs["batch"] == "b"].copy()
    sd.pp.scrublet(adata, batch_key="batch", threshold=0.2)
    sd.pp.scrublet(alone, threshold=0.2)
    np.testing.assert_allclose(adata.obs["doublet_score"][adata.obs["batch"] == "b"], alone.obs["doublet_score"])
    assert set(adata.uns["scrublet"]["batches"]) == {"a|1", "b"}
    assert adata.uns["scrublet"]["batched_by"] == "batch"
    for key, error in (("absent", KeyError), ("single", ValueError), ("missing", ValueError)):
        adata.obs["single"] = np.where(np.arange(300) == 0, "x", "y")
        adata.obs["missing"] = np.where(np.arange(300) == 0, None, "y")
        with pytest.raises(error, match=key):
            sd.pp.scrublet(adata, batch_key=key)


@pytest.mark.parametrize(
    "settings",
    [
        {"expected_doublet_rate": 0},
        {"sim_doublet_ratio": -1},
        {"n_prin_comps": 0},
        {"n_neighbors": 0},
        {"temperature": -1},
    ],
)
def test_bad_settings_name_themselves(settings: dict) -> None:
    adata = pbmc_counts(60, 40)
    with pytest.raises(ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
        sd.pp.scrublet(adata, **settings)
    assert "doublet_score" not in adata.obs
