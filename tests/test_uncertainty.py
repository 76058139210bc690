"""Standard errors by thinning: what they are, and whether they cover what a second count of the molecules gives."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import scdiffx as sd
from conftest import _read
from documented import assert_documented
from helpers import contents, pbmc_counts
from scdiffx._steps import Plan


def reduced(adata: ad.AnnData) -> Plan:
    plan = sd.plan(adata)
    for step in (sd.pp.normalize_total, sd.pp.log1p):
        step(plan)
    sd.pp.pca(plan, n_comps=3)
    return plan


def test_it_is_the_spread_over_halves_of_the_molecules() -> None:
    adata = pbmc_counts(120, 80)
    before = set(contents(adata))
    kept = adata.X.copy()
    sd.tl.uncertainty(reduced(adata), "X_pca", column=0, n_replicates=3, rng=4, progress=False)
    assert set(contents(adata)) - before == {"obs/X_pca_0_se"}
    assert_documented(sd.tl.uncertainty, {"obs/X_pca_0_se": str(adata.obs["X_pca_0_se"].dtype)})
    assert abs(kept - adata.X).nnz == 0
    generator, scores = np.random.default_rng(4), []
    for _ in range(3):
        half = kept.copy()
        half.data = generator.binomial(half.data.astype(int), 0.5).astype(np.float32)
        one = ad.AnnData(half)
        reduced(one).apply()
        scores.append(one.obsm["X_pca"][:, 0])
    np.testing.assert_allclose(adata.obs["X_pca_0_se"], np.std(scores, axis=0, ddof=1), rtol=1e-4)
    again = sd.tl.uncertainty(reduced(adata), "X_pca", column=0, n_replicates=3, rng=4, progress=False, copy=True)
    assert again is not adata
    assert again.obs["X_pca_0_se"].equals(adata.obs["X_pca_0_se"])


@pytest.mark.slow
def test_standard_errors_cover_an_independent_half_of_the_molecules() -> None:
    """Both halves get their standard errors; they should be within 1.96 joint ones for 95 % of the cells."""
    adata = _read("moor_villus")
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(adata.n_obs, 400, replace=False))
    adata = adata[chosen, np.argsort(-np.asarray(adata.X.sum(0)).ravel())[:1000]].copy()
    whole = sp.csr_matrix(adata.X)
    root = int(np.flatnonzero(adata.obs["zone"] == 0)[0])
    first = whole.copy()
    first.data = rng.binomial(whole.data.astype(int), 0.5).astype(np.float32)
    halves = []
    for part in (first, (whole - first).tocsr().astype(np.float32)):
        one = ad.AnnData(part, obs=adata.obs.copy(), var=adata.var.copy())
        plan = sd.plan(one)
        sd.pp.normalize_total(plan)
        sd.pp.log1p(plan)
        sd.pp.pca(plan, n_comps=20)
        sd.pp.neighbors(plan)
        sd.tl.pseudotime(plan, root=root)
        sd.tl.uncertainty(plan, "dpt_pseudotime", n_replicates=10, progress=False)
        plan.apply()
        halves.append(one.obs)
    a, b = halves
    error = np.sqrt(a["dpt_pseudotime_se"] ** 2 + b["dpt_pseudotime_se"] ** 2)
    apart = np.abs(a["dpt_pseudotime"] - b["dpt_pseudotime"]) / error
    # All cells share the noise of the root and of the largest distance: one split tells the levels only roughly.
    assert abs((apart[error > 0] < 1.96).mean() - 0.95) < 0.05
    assert 0.5 < (apart[error > 0] < 1).mean() < 0.9


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": "absent"}, KeyError, "'absent'"),
        ({"target": "day"}, KeyError, "not written by the plan"),
        ({"column": None}, KeyError, "column=None of target='X_pca': it has 3"),
        ({"column": 3}, KeyError, "column=3"),
        ({"method": "delta"}, ValueError, r"method='delta'.*'thinning'"),
        ({"n_replicates": 1}, ValueError, "n_replicates=1"),
        ({"layer": "spare"}, ValueError, "does not read"),
        ({"fractional": True}, ValueError, "fractions of counts"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = pbmc_counts(60, 40)
    adata.obs["day"] = 1.0
    if settings.pop("fractional", False):
        adata.X.data[3] = 0.5
    before = set(contents(adata))
    with pytest.raises(error, match=message):
        sd.tl.uncertainty(reduced(adata), **({"target": "X_pca", "column": 0, "progress": False} | settings))
    assert set(contents(adata)) == before


@pytest.mark.parametrize("wrong", [ad.AnnData(np.ones((3, 3))), "plan"])
def test_only_a_plan_can_be_run_anew(wrong: object) -> None:
    with pytest.raises(TypeError, match="plan"):
        sd.tl.uncertainty(wrong, "day")
