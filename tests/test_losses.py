"""Losses: values, masks, and no collapse or NaN on degenerate outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import scdiffx as sd
from helpers import pbmc_counts
from scdiffx._slots import Obs
from scdiffx.losses import Correlation, CrossEntropy, TimeOrder

N = 200
TIME = jnp.asarray(np.random.default_rng(0).permutation(N), jnp.float32)
ALL = jnp.ones(N, bool)


def noisy(scale: float) -> jax.Array:
    return TIME + scale * jnp.asarray(np.random.default_rng(1).normal(size=N), jnp.float32)


@pytest.mark.parametrize("term", [Correlation(output="t"), TimeOrder(output="t")])
def test_order_losses_rank_right_noisy_and_reversed(term):
    right, rough, wrong = (float(term(v, TIME, ALL)) for v in (TIME, noisy(60.0), -TIME))
    assert right < rough < wrong


@pytest.mark.parametrize("term", [Correlation(output="t"), TimeOrder(output="t")])
def test_whole_numbers_are_targets_like_others(term):
    """Days are often stored as integers."""
    assert float(term(noisy(60.0), TIME.astype(jnp.int32), ALL)) == pytest.approx(float(term(noisy(60.0), TIME, ALL)))


def test_correlation_is_one_minus_pearson():
    expected = 1 - np.corrcoef(noisy(60.0), TIME)[0, 1]
    assert float(Correlation(output="t")(noisy(60.0), TIME, ALL)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("term", [Correlation(output="t"), TimeOrder(output="t")])
@pytest.mark.parametrize(
    "value",
    [TIME * 1e-3, jnp.zeros(N), jnp.full(N, 0.3).at[0].set(jnp.nan), TIME.at[:5].set(jnp.inf)],
    ids=["shrunk", "zero", "constant", "inf"],
)
def test_degenerate_outputs_give_finite_losses_and_gradients(term, value):
    loss, slope = jax.value_and_grad(term)(value, TIME, ALL)
    assert bool(jnp.isfinite(loss))
    assert bool(jnp.isfinite(slope).all())
    if float(jnp.nanstd(value)) < 1e-6:
        assert float(jnp.abs(slope).max()) == 0


@pytest.mark.parametrize("term", [Correlation(output="t"), TimeOrder(output="t")])
def test_losses_do_not_reward_shrinking(term):
    assert float(term(noisy(60.0) * 1e-3, TIME, ALL)) == pytest.approx(float(term(noisy(60.0), TIME, ALL)), abs=1e-4)


@pytest.mark.parametrize("term", [Correlation(output="t"), TimeOrder(output="t")])
def test_cells_without_a_target_or_masked_do_not_count(term):
    value = noisy(60.0)
    gone = jnp.arange(N) < 50
    spoiled = jnp.where(gone, 1e6 * jnp.sin(jnp.arange(N)), value)
    by_nan = term(spoiled, jnp.where(gone, jnp.nan, TIME), ALL)
    by_mask = term(spoiled, TIME, ~gone)
    assert float(by_nan) == pytest.approx(float(by_mask))
    assert float(jnp.abs(jax.grad(term)(spoiled, TIME, ~gone)[:50]).max()) == 0


def test_cross_entropy_starts_at_the_best_readout_of_the_unfitted_plan():
    from sklearn.linear_model import LogisticRegression

    z = jnp.asarray(np.random.default_rng(2).normal(size=(N, 3)), jnp.float32)
    noise = jnp.asarray(np.random.default_rng(3).normal(size=N))
    labels = jnp.digitize(z[:, 0] + 0.7 * noise, jnp.asarray([-0.5, 0.5])).astype(jnp.int32).at[:20].set(-1)
    term = CrossEntropy(output="z").init(z, labels, ALL)
    known = np.asarray(labels) >= 0
    # On standardised outputs this is scikit-learn's default penalty.
    scaled = (np.asarray(z) - np.asarray(z)[known].mean(0)) / np.asarray(z)[known].std(0)
    model = LogisticRegression(C=1, tol=1e-6).fit(scaled[known], np.asarray(labels)[known])
    np.testing.assert_allclose(np.asarray(term.weight).T, model.coef_, atol=5e-3)


def test_cross_entropy_of_cells_that_a_plane_separates_has_an_optimum():
    z = jnp.asarray(np.random.default_rng(4).normal(size=(60, 80)), jnp.float32)
    labels = jnp.arange(60, dtype=jnp.int32) % 2
    term = CrossEntropy(output="z").init(z, labels, jnp.ones(60, bool))
    # The penalised cost is below that of no weights, log 2.
    assert float((term.weight**2).sum() / (2 * 60)) < np.log(2)


@pytest.mark.parametrize(
    "change", [lambda z: z * 1e-3, lambda z: 0 * z + 0.3, lambda z: z + 1e4], ids=["shrunk", "constant", "far"]
)
def test_cross_entropy_is_finite_on_collapsed_outputs(change):
    z = jnp.asarray(np.random.default_rng(2).normal(size=(N, 3)), jnp.float32)
    labels = (z[:, 0] > 0).astype(jnp.int32).at[:20].set(-1)
    for term in (CrossEntropy(output="z").init(z, labels, ALL), CrossEntropy(output="z").init(change(z), labels, ALL)):
        loss, slope = jax.value_and_grad(term)(change(z), labels, ALL)
        assert bool(jnp.isfinite(loss))
        assert bool(jnp.isfinite(slope).all())
        assert not np.asarray(slope[:20]).any()


def test_losses_add_and_scale():
    loss = 2 * sd.losses.correlation("a", "b") + sd.losses.l1("c") * 0.5
    assert [w for w, _ in loss.terms] == [2.0, 0.5]
    with pytest.raises(ValueError, match="temperature"):
        sd.losses.time_order("a", "b", temperature=0)
    with pytest.raises(ValueError, match="at least two labels"):
        CrossEntropy(output="z", target="t").init(jnp.ones((4, 2)), jnp.zeros(4, jnp.int32), jnp.ones(4, bool))


def test_times_may_be_ordered_categories_and_missing_ones_do_not_count():
    adata = pbmc_counts(60, 50)
    time = np.arange(60) % 3
    missing = np.arange(60) % 7 == 0
    names = np.array(["late", "early", "middle"])[time]
    adata.obs["number"] = np.where(missing, np.nan, time)
    adata.obs["numbers"] = pd.Categorical(adata.obs["number"])
    adata.obs["ranked"] = pd.Categorical(
        np.where(missing, None, names), categories=["late", "early", "middle"], ordered=True
    )
    adata.obs["names"] = names
    found = [np.asarray(Obs(key).numbers(adata)) for key in ("number", "numbers", "ranked")]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert np.isnan(found[0][missing]).all()
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=2)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=0)
    with pytest.raises(ValueError, match=r"obs\['names'\] holds .* no order"):
        sd.fit(plan, sd.losses.correlation("dpt_pseudotime", "names"), n_steps=1, progress=False)
