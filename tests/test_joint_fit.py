"""The joint fit of the tutorial on real data, with its controls on cells whose time the fit never saw."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from scipy.stats import spearmanr
from sklearn.neighbors import KNeighborsRegressor

import scdiffx as sd

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted(_worm_embryo):
    adata = _worm_embryo.copy()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=2000, subset=True)
    time = adata.obs["embryo.time"].to_numpy(float)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    test, choose = np.zeros((2, adata.n_obs), bool)
    test[order[:361]] = True
    choose[order[361:722]] = True
    adata.obs["known_time"] = np.where(test, np.nan, time)
    plan = sd.plan(adata)
    sd.pp.highly_variable_genes(plan, n_top_genes=1000, soft=True)
    sd.pp.pca(plan, n_comps=50)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=int(np.nanargmin(adata.obs["known_time"])))
    fit = sd.fit(
        plan,
        sd.losses.correlation("dpt_pseudotime", "known_time"),
        learn=["highly_variable_genes.shift", "neighbors.bandwidth"],
        optimizer=optax.adam(0.1),
        n_steps=20,
        refresh_every=10,
        holdout=choose,
        progress=False,
    )
    return adata, time, test, plan.apply(copy=True), fit


def spearman(values, time, cells):
    keep = cells & np.isfinite(values)
    return abs(spearmanr(values[keep], time[keep])[0])


def test_the_fit_lowers_both_losses_and_is_adopted(fitted):
    *_, fit = fitted
    assert fit.adopted
    assert fit.losses["train_after"] < fit.losses["train_before"] - 0.005
    assert fit.losses["holdout_after"] < fit.losses["holdout_before"] - 0.005


def test_fitted_pseudotime_follows_time_better_on_unseen_cells(fitted):
    adata, time, test, frozen, fit = fitted
    joint = fit.apply(copy=True)
    before = spearman(frozen.obs["dpt_pseudotime"].to_numpy(), time, test)
    after = spearman(joint.obs["dpt_pseudotime"].to_numpy(), time, test)
    assert "dpt_pseudotime" not in adata.obs  # copies only
    assert after > before + 0.005


def test_direct_regression_remains_the_better_predictor(fitted):
    """What the tutorial says about the controls holds: whoever wants only time should regress on it."""
    _, time, test, frozen, fit = fitted
    scores = frozen.obsm["X_pca"]
    regression = KNeighborsRegressor(15).fit(scores[~test], time[~test]).predict(scores)
    joint = fit.apply(copy=True).obs["dpt_pseudotime"].to_numpy()
    assert spearman(regression, time, test) > spearman(joint, time, test)
