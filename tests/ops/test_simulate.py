"""Splatter's model: every distribution against scipy's, recovery of parameters, and likeness to real counts."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats
from scipy.special import expit

import scdiffx as sd
from helpers import QUICK, called, changed, contents, directional_fd, largest_array, pbmc_counts, same, tree_vdot
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.ops._simulate import drawn_counts
from scdiffx.ops._splatter import brownian_bridges, path_order, step_probabilities


@pytest.fixture(scope="module")
def grouped() -> ad.AnnData:
    return sd.datasets.splatter(
        n_vars=3000, batch_cells=[500, 300], group_prob=[0.5, 0.3, 0.2], de_prob=[0.1, 0.3, 0.2], bcv_common=0.3, rng=3
    )


def dense(adata: ad.AnnData) -> np.ndarray:
    return adata.X.toarray().astype(np.float64)


def fits(values: np.ndarray, cdf, level: float = 1e-3) -> bool:
    return stats.kstest(values, cdf).pvalue > level


def test_genes_and_cells_follow_the_stated_distributions(grouped: ad.AnnData) -> None:
    var, obs = grouped.var, grouped.obs
    assert fits(var["base_mean"], stats.gamma(0.6, scale=1 / 0.3).cdf)
    outlier = var["outlier_factor"] != 1
    assert stats.binomtest(int(outlier.sum()), len(var), 0.05).pvalue > 1e-3
    assert fits(np.log(var["outlier_factor"][outlier]), stats.norm(4, 0.5).cdf)
    np.testing.assert_allclose(
        var["mean"], np.where(outlier, var["base_mean"].median() * var["outlier_factor"], var["base_mean"])
    )
    assert fits(60 * (0.3 / var["bcv"]) ** 2, stats.chi2(60).cdf)
    assert fits(np.log(obs["expected_library_size"]), stats.norm(11, 0.2).cdf)
    assert stats.chisquare(obs["group"].value_counts(sort=False), 800 * np.array([0.5, 0.3, 0.2])).pvalue > 1e-3
    assert list(obs["batch"].value_counts(sort=False)) == [500, 300]
    folded = stats.foldnorm(0.1 / 0.4, scale=0.4).cdf
    for group, share in zip(obs["group"].cat.categories, [0.1, 0.3, 0.2], strict=True):
        logs = np.log(var[f"de_factor_{group}"])
        hit = logs != 0
        assert stats.binomtest(int(hit.sum()), len(var), share).pvalue > 1e-3
        assert stats.binomtest(int((logs[hit] < 0).sum()), int(hit.sum()), 0.5).pvalue > 1e-3
        assert fits(np.abs(logs[hit]), folded)
    for batch in obs["batch"].cat.categories:
        logs = np.log(var[f"batch_factor_{batch}"])
        assert fits(np.abs(logs), stats.foldnorm(1, scale=0.1).cdf)
        assert abs((logs < 0).mean() - 0.5) < 0.04


def reference(op: ops.Simulate, state: np.ndarray, batch: np.ndarray, library: np.ndarray) -> tuple[np.ndarray, ...]:
    """Expected counts and dispersions, cell by cell."""
    mean, factor, batch_factor, bcv = (np.asarray(p, np.float64) for p in (op.mean, op.factor, op.batch_factor, op.bcv))
    expected = np.empty((len(state), len(mean)))
    for i in range(len(state)):
        own = mean * factor[state[i]] * batch_factor[batch[i]]
        expected[i] = library[i] * own / own.sum()
    return expected, (bcv * (1 + float(op.bcv_trend) / np.sqrt(expected))) ** 2


@pytest.fixture
def small() -> tuple[ops.Simulate, np.ndarray, np.ndarray]:
    """Six genes; two groups and two batches, whose library sizes are as good as fixed."""
    op = ops.Simulate(
        mean=jnp.asarray([0.2, 1.0, 2.0, 5.0, 10.0, 40.0]),
        factor=jnp.asarray([[1.0, 1, 1, 1, 1, 1], [1, 3, 0.5, 1, 1, 2]]),
        batch_factor=jnp.asarray([[1.0, 1, 1, 1, 1, 1], [2, 1, 1, 0.7, 1, 1]]),
        lib_loc=jnp.log(jnp.asarray([[60.0, 90.0], [40.0, 120.0]])),
        lib_scale=1e-6,
        bcv=jnp.asarray([0.5, 0.3, 1.0, 0.3, 0.2, 0.6]),
        bcv_trend=0.8,
    )
    state, batch = np.tile([0, 1, 0, 1], 4000).astype(np.int32), np.tile([0, 0, 1, 1], 4000).astype(np.int32)
    return op, state, batch


def test_counts_are_negative_binomial_given_the_cell(small) -> None:
    op, state, batch = small
    counts, library = drawn_counts(op, state, batch, 0)
    np.testing.assert_allclose(library[:4], [60, 90, 40, 120], rtol=1e-4)
    expected, dispersion = reference(op, state, batch, library)
    counts = counts.toarray()
    for kind in range(4):
        for gene in range(6):
            values, size = counts[kind::4, gene], 1 / dispersion[kind, gene]
            law = stats.nbinom(size, size / (size + expected[kind, gene]))
            at = np.arange(values.max() + 1)
            gap = np.abs((values[:, None] <= at).mean(0) - law.cdf(at)).max()
            # The Kolmogorov-Smirnov bound at 1e-3 / 24, conservative for whole numbers.
            assert gap < np.sqrt(np.log(2 * 24 / 1e-3) / 2 / len(values))


def test_rates_of_the_operator_are_gamma(small) -> None:
    op, state, batch = small
    result = called(op, jnp.asarray(state), jnp.asarray(batch), jax.random.key(5))
    expected, dispersion = reference(op, state, batch, np.asarray(result.library, np.float64))
    np.testing.assert_allclose(result.expected, expected, rtol=1e-5)
    np.testing.assert_allclose(np.square(result.bcv), dispersion, rtol=1e-5)
    for kind in range(4):
        for gene in range(6):
            size, mean = 1 / dispersion[kind, gene], expected[kind, gene]
            assert fits(np.asarray(result.rate)[kind::4, gene], stats.gamma(size, scale=mean / size).cdf, 1e-4)


def test_dropout_is_logistic_in_the_log_rate(small) -> None:
    op, state, batch = small
    lossy = replace(op, dropout=jnp.asarray([0.5, -1.5]))
    result = called(lossy, jnp.asarray(state), jnp.asarray(batch), jax.random.key(0))
    rate = np.asarray(result.rate, np.float64)
    np.testing.assert_allclose(result.kept, 1 - expit(-1.5 * (np.log(rate) - 0.5)), rtol=1e-4, atol=1e-6)
    counts, _ = drawn_counts(lossy, state, batch, 1)
    np.testing.assert_allclose(counts.toarray().mean(0), (rate * np.asarray(result.kept)).mean(0), rtol=0.05, atol=0.01)
    lost = sd.datasets.splatter(100, 500, dropout_mid=2.0, rng=1)
    assert lost.X.sum() < 0.999 * sd.datasets.splatter(100, 500, rng=1).X.sum()


def test_bridges_lead_from_start_to_end() -> None:
    rng = np.random.default_rng(0)
    start, end = rng.lognormal(0, 0.4, 2000), rng.lognormal(0, 0.4, 2000)
    sigma = np.where(np.arange(2000) < 1000, 0, 0.8)
    path = brownian_bridges(rng, start, end, 41, sigma)
    np.testing.assert_allclose(path[[0, -1]], [start, end], rtol=1e-12)
    straight = start + np.linspace(0, 1, 41)[:, None] * (end - start)
    np.testing.assert_allclose(path[:, :1000], straight[:, :1000], rtol=1e-12)
    # Halfway, at an anchor of the walk, a bridge of a uniform standard deviation up to s has variance s^2 / 3 / 4.
    away = (path - straight)[20, 1000:] / (0.8 * (start + end)[1000:] / 2)
    assert away.std() == pytest.approx(np.sqrt(1 / 12), rel=0.1)
    assert (path > 0).all()


def test_cells_lie_on_branching_paths() -> None:
    adata = sd.datasets.splatter(
        1500,
        400,
        group_prob=[0.4, 0.3, 0.3],
        path_from=[0, 1, 1],
        path_n_steps=[20, 10, 10],
        path_skew=[0.5, 0.9, 0.1],
        de_prob=0.5,
        rng=2,
    )
    step, path = adata.obs["step"].to_numpy(), adata.obs["group"]
    for name, n_steps, skew in zip(path.cat.categories, [20, 10, 10], [0.5, 0.9, 0.1], strict=True):
        count = np.bincount(step[path == name] - 1, minlength=n_steps)
        assert stats.chisquare(count, count.sum() * step_probabilities(n_steps, skew)).pvalue > 1e-3
        last = (path == name) & (step > n_steps * 0.8)
        share = (adata.X[last.to_numpy()].sum(0) / adata.X[last.to_numpy()].sum()).A1
        frequent = share > 1e-3
        planned = np.asarray(adata.var["mean"] * adata.var[f"de_factor_{name}"])
        origin = np.asarray(adata.var["mean"])
        off = [np.abs(np.log(share / (m / m.sum()), where=frequent))[frequent].mean() for m in (planned, origin)]
        assert off[0] < 0.6 * off[1]
    assert path_order([2, 0, 1]) == [1, 0, 2]


def test_parameters_are_recovered() -> None:
    adata = sd.datasets.splatter(n_vars=2500, batch_cells=[500], bcv_common=0.25, bcv_df=25, rng=7)
    found = sd.tl.simulate(adata, 10).uns["simulate"]["splatter"]
    assert found["lib_loc"] == pytest.approx(11, abs=0.03)
    assert found["lib_scale"] == pytest.approx(0.2, rel=0.1)
    # Counts tell means up to the factor that makes them sum to the library size.
    scale = np.median(adata.obs["expected_library_size"]) / adata.var["mean"].sum()
    assert found["mean_shape"] == pytest.approx(0.6, rel=0.1)
    assert found["mean_rate"] == pytest.approx(0.3 / scale, rel=0.2)
    assert found["out_prob"] == pytest.approx(0.05, abs=0.01)
    assert found["out_fac_loc"] == pytest.approx(4, abs=0.2)
    assert found["bcv_common"] == pytest.approx(0.25, rel=0.1)
    assert found["bcv_trend"] == pytest.approx(1, rel=0.1)
    assert 15 < found["bcv_df"] < 45


def test_groups_and_batches_are_recovered(grouped: ad.AnnData) -> None:
    made = sd.tl.simulate(grouped, groupby="group", batch_key="batch")
    found = made.uns["simulate"]["splatter"]
    np.testing.assert_allclose(found["group_prob"], [0.5, 0.3, 0.2], atol=0.05)
    np.testing.assert_allclose(found["batch_prob"], [5 / 8, 3 / 8], atol=1e-12)
    # Small factors are not told from 1: shares are too low, and the sizes of those that are found too large.
    assert (np.argsort(found["de_prob"]) == [0, 2, 1]).all()
    assert ((found["de_prob"] > [0.03, 0.1, 0.06]) & (found["de_prob"] < [0.15, 0.35, 0.25])).all()
    np.testing.assert_allclose(found["de_down_prob"], 0.5, atol=0.12)
    frequent = (grouped.var["mean"] > 2).to_numpy()
    for a, b in (
        (f"{kind}_factor_{x}", f"{kind}_factor_{y}")
        for kind, x, y in (("de", "Group1", "Group2"), ("de", "Group2", "Group3"), ("batch", "Batch1", "Batch2"))
    ):
        truth, estimate = (np.log(v[a] / v[b])[frequent] for v in (grouped.var, made.var))
        assert np.corrcoef(truth, estimate)[0, 1] > 0.85
    assert list(made.obs["group"].cat.categories) == ["Group1", "Group2", "Group3"]


def test_paths_are_recovered() -> None:
    settings = {"group_prob": [0.5, 0.5], "path_from": [0, 1], "path_nonlinear_prob": 0, "path_n_steps": 30}
    adata = sd.datasets.splatter(1000, 800, de_prob=0.4, de_fac_loc=0.8, bcv_common=0.3, rng=5, **settings)
    made = sd.tl.simulate(adata, 700, groupby="group", path_key="step", path_n_steps=10)
    assert made.obs["step"].min() == 1
    assert made.obs["step"].max() == 10
    assert list(made.uns["simulate"]["step"]) == [*range(1, 11)] * 2
    assert list(made.uns["simulate"]["path"]) == ["Path1"] * 10 + ["Path2"] * 10
    found = np.log(made.varm["path_factor"])
    frequent = (adata.var["mean"] > 1).to_numpy()
    end = [np.ones(adata.n_vars), *(adata.var[f"de_factor_Path{i}"].to_numpy() for i in (1, 2))]
    for path in range(2):
        truth = np.log(end[path + 1] / end[path])[frequent]
        change = (found[:, 10 * path + 9] - found[:, 10 * path])[frequent]
        assert np.corrcoef(truth, change)[0, 1] > 0.9
    for path in ("Path1", "Path2"):
        assert (
            stats.ks_2samp(*(a.obs["expected_library_size"][a.obs["group"] == path] for a in (adata, made))).pvalue
            > 1e-3
        )


def test_dropout_is_found_where_it_is_and_only_there() -> None:
    settings = {"n_vars": 900, "batch_cells": [500], "rng": 4}
    source = sd.datasets.splatter(dropout_mid=1.0, dropout_shape=-1.5, **settings)
    lossy = sd.tl.simulate(source, dropout=True)
    assert lossy.uns["simulate"]["splatter"]["dropout_mid"] == pytest.approx(1, abs=0.4)
    assert lossy.uns["simulate"]["splatter"]["dropout_shape"] == pytest.approx(-1.5, abs=0.6)
    assert lossy.uns["simulate"]["splatter"]["mean_shape"] == pytest.approx(0.6, rel=0.1)
    with_it, without = (distances(source.X, a.X) for a in (lossy, sd.tl.simulate(source)))
    assert with_it["zeros of genes"] < 0.3 * without["zeros of genes"]
    assert with_it["mean"] < 0.04
    none = sd.tl.simulate(sd.datasets.splatter(**settings), 10, dropout=True)
    assert "dropout_mid" not in none.uns["simulate"]["splatter"]


def features(x: sp.csr_matrix) -> dict[str, np.ndarray]:
    """What SimBench compares: moments and zeros of genes, sizes and zeros of cells, correlation of genes."""
    x = sp.csr_matrix(x, dtype=np.float64)
    mean, square = (np.asarray(m.mean(0)).ravel() for m in (x, x.multiply(x)))
    top = x[:, np.argsort(-mean)[:100]].toarray()
    rank = stats.rankdata(top, axis=0)
    return {
        "mean": mean,
        "variance": square - mean**2,
        "zeros of genes": 1 - np.bincount(x.indices, minlength=x.shape[1]) / x.shape[0],
        "library size": np.asarray(x.sum(1)).ravel(),
        "zeros of cells": 1 - np.diff(x.indptr) / x.shape[1],
        "correlation": np.corrcoef(rank.T)[np.triu_indices(100, 1)],
    }


def distances(a: sp.csr_matrix, b: sp.csr_matrix) -> dict[str, float]:
    one, other = features(a), features(b)
    return {name: float(stats.ks_2samp(one[name], other[name]).statistic) for name in one}


@pytest.fixture(scope="module")
def like_paul15(_paul15: ad.AnnData) -> ad.AnnData:
    return sd.tl.simulate(_paul15, groupby="paul15_clusters")


def test_simulated_paul15_is_like_paul15_and_poisson_is_not(paul15: ad.AnnData, like_paul15: ad.AnnData) -> None:
    counts = sp.csr_matrix(paul15.X)
    size, share = (np.asarray(counts.sum(axis)).ravel() for axis in (1, 0))
    share = share / share.sum()
    rng = np.random.default_rng(0)
    ours = distances(counts, like_paul15.X)
    naive = distances(counts, rng.poisson(np.broadcast_to(share * size.mean(), counts.shape)))
    with_sizes = distances(counts, rng.poisson(share * rng.choice(size, len(size))[:, None]))
    # Measured: .010 .017 .014 .034 .039 .028; a Poisson with the gene means .006 .125 .089 .54 .63 .94, and with the
    # very library sizes of the data .006 .063 .054 .011 .115 .42.
    for name, limit in {"mean": 0.03, "variance": 0.03, "zeros of genes": 0.03, "library size": 0.06}.items():
        assert ours[name] < limit, name
    assert ours["zeros of cells"] < 0.06
    assert ours["correlation"] < 0.08
    for name in ("variance", "zeros of genes", "zeros of cells", "correlation"):
        assert ours[name] < 0.5 * min(naive[name], with_sizes[name]), name
    assert ours["library size"] < 0.2 * naive["library size"]


def test_variance_by_mean_is_kept_gene_by_gene(paul15: ad.AnnData, like_paul15: ad.AnnData) -> None:
    assert list(like_paul15.var_names) == list(paul15.var_names)
    one, other = features(paul15.X), features(like_paul15.X)
    frequent = one["mean"] > 0.05
    for name, bound in (("mean", 0.15), ("variance", 0.4)):
        gap = np.abs(np.log(other[name][frequent] / one[name][frequent]))
        assert np.median(gap) < bound / 2
        assert np.quantile(gap, 0.9) < bound


def test_new_genes_are_drawn_from_the_fitted_distributions(paul15: ad.AnnData) -> None:
    made = sd.tl.simulate(paul15, 300, n_vars=2000, groupby="paul15_clusters", rng=1)
    found = made.uns["simulate"]["splatter"]
    assert made.shape == (300, 2000)
    assert fits(made.var["base_mean"], stats.gamma(found["mean_shape"], scale=1 / found["mean_rate"]).cdf)
    ratio = found["bcv_df"] * (found["bcv_common"] / made.var["bcv"]) ** 2
    assert fits(ratio, stats.chi2(found["bcv_df"]).cdf)
    assert abs(np.log(made.X.sum() / 300 / (paul15.X.sum() / paul15.n_obs))) < 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_rates_and_moments(small) -> None:
    op, state, batch = small
    op, state, batch = jax.tree.map(jnp.float64, op), jnp.asarray(state[:48]), jnp.asarray(batch[:48])
    op = replace(op, lib_scale=jnp.asarray(0.3), bcv_trend=None, dropout=jnp.asarray([1.0, -1.0]))

    def rates(op: ops.Simulate) -> jax.Array:
        result = op(state, batch, jax.random.key(1))
        return (result.rate * result.kept * jnp.sin(jnp.arange(6))).sum()

    def moments(op: ops.Simulate) -> jax.Array:
        return sum((m * jnp.cos(jnp.arange(6))).sum() for m in op.moments(state, batch, jax.random.key(1)))

    for function, names in (
        (rates, ("mean", "factor", "batch_factor", "lib_loc", "lib_scale", "dropout")),
        (moments, ("mean", "factor", "batch_factor", "lib_loc", "lib_scale", "bcv")),
    ):
        both = jax.jit(jax.value_and_grad(function), compiler_options=QUICK)
        slope = both(op)[1]
        for name in names:
            at = getattr(op, name)
            step = jnp.asarray(np.random.default_rng(1).normal(size=at.shape))
            exact = tree_vdot(getattr(slope, name), step)
            assert exact != 0
            numeric = directional_fd(lambda v, n=name, f=both: f(replace(op, **{n: v}))[0], at, step, (1e-5, 1e-6))
            assert np.abs(numeric / exact - 1).min() < 1e-6, (function, name)


def test_derivatives_in_the_variation_are_those_of_the_expectation(small) -> None:
    op, state, batch = small
    op = replace(op, bcv_trend=None)
    state, batch = jnp.asarray(state[:2000]), jnp.asarray(batch[:2000])

    def square(op: ops.Simulate) -> tuple[jax.Array, jax.Array]:
        result = op(state, batch, jax.random.key(2))
        return (result.rate**2).mean(0).sum(), result.expected

    slope, expected = jax.jit(jax.grad(square, has_aux=True), compiler_options=QUICK)(op)
    # E[rate^2] = expected^2 (1 + bcv^2).
    slope, expected = slope.bcv, np.asarray(expected)
    np.testing.assert_allclose(slope, 2 * np.asarray(op.bcv) * (expected**2).mean(0), rtol=0.25)


def test_moments_are_those_of_the_counts(small) -> None:
    op, state, batch = small
    op = replace(op, lib_scale=0.4)
    counts = drawn_counts(op, state, batch, 3)[0].toarray()
    mean, variance, zeros = jax.jit(lambda op: op.moments(jnp.asarray(state), jnp.asarray(batch)))(op)
    np.testing.assert_allclose(mean, counts.mean(0), rtol=0.06)
    np.testing.assert_allclose(variance, counts.var(0), rtol=0.2)
    np.testing.assert_allclose(zeros, (counts == 0).mean(0), atol=0.012)


@pytest.mark.slow
def test_moments_fit_by_gradient(small) -> None:
    op, state, batch = small
    aim = op.moments(jnp.asarray(state), jnp.asarray(batch)).variance

    @jax.jit
    def loss(log_bcv: jax.Array) -> jax.Array:
        found = replace(op, bcv=jnp.exp(log_bcv)).moments(jnp.asarray(state), jnp.asarray(batch)).variance
        return ((jnp.log(found) - jnp.log(aim)) ** 2).sum()

    at, slope = jnp.zeros(6), jax.jit(jax.grad(loss))
    for _ in range(200):
        at = at - 0.2 * slope(at)
    np.testing.assert_allclose(jnp.exp(at), op.bcv, rtol=0.02)


def test_moments_hold_a_block_of_cells_only() -> None:
    genes = 500
    wide = ops.Simulate(mean=jnp.ones(genes), bcv=jnp.ones(genes), lib_loc=5.0, lib_scale=0.3)

    def both(op: ops.Simulate, n: int) -> int:
        return largest_array(
            jax.grad(lambda op: op.moments(jnp.zeros(n, jnp.int32)).variance.sum()), jax.tree.map(jnp.float32, op)
        )

    assert both(wide, 40_000) < 3 * 1024 * genes
    assert both(wide, 4000) > 1000 * genes


def test_simulation_is_reproducible_and_leaves_its_source_alone() -> None:
    adata = pbmc_counts(150, 120)
    before = contents(adata)
    first = sd.tl.simulate(adata, groupby="cell_type", rng=1)
    assert not changed(before, contents(adata))
    again, other = (sd.tl.simulate(adata, groupby="cell_type", random_state=s) for s in (1, 2))
    left, right = contents(first), contents(again)
    assert all(same(left[path], right[path]) for path in left)
    assert not same(left["X"], contents(other)["X"])
    assert sd.tl.simulate(adata, 33).n_obs == 33
    a, b = (sd.datasets.splatter(30, 50, rng=s) for s in (1, 2))
    assert same(a.X, sd.datasets.splatter(30, 50, rng=1).X)
    assert not same(a.X, b.X)


@pytest.mark.parametrize("form", [sp.csc_matrix, sp.csr_array, lambda m: m.toarray(), lambda m: m.astype(np.int64)])
def test_every_matrix_format_and_layers_give_the_same(form) -> None:
    adata = pbmc_counts(100, 80)
    expected = sd.tl.simulate(adata).X
    adata.layers["here"] = form(adata.X)
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    assert same(sd.tl.simulate(adata, layer="here").X, expected)
    assert type(expected) is sp.csr_matrix
    assert expected.dtype == np.float32
    assert (expected.data % 1 == 0).all()


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_what_is_made_can_be_stored(form: str, tmp_path) -> None:
    adata = pbmc_counts(200, 80)
    adata.obs["batch"] = np.where(np.arange(200) % 2, "a/b", "c")
    made = sd.tl.simulate(adata, groupby="cell_type", batch_key="batch")
    assert any("/" in name for name in made.obs["cell_type"].cat.categories)
    assert {"mean", "bcv", "batch_factor_a|b"} <= set(made.var)
    path = tmp_path / f"made.{form}"
    getattr(made, f"write_{form}")(path)
    back = getattr(ad, f"read_{form}")(path)
    left, right = contents(made), contents(back)
    assert set(left) == set(right)
    assert not [p for p in left if not p.startswith("uns/simulate/params") and not same(left[p], right[p])]


def test_genes_and_cells_without_counts() -> None:
    adata = pbmc_counts(100, 60)
    adata.X[:, 7] = 0
    adata.X[3] = 0
    adata.X.eliminate_zeros()
    made = sd.tl.simulate(adata, 500)
    assert np.isfinite(made.X.data).all()
    assert made.X[:, 7].sum() == 0
    assert np.isfinite(made.var["mean"]).all()
    # A group of empty cells alone has nothing of its own to estimate.
    adata.obs["group"] = np.where(np.arange(100) == 3, "z", np.where(np.arange(100) % 2, "a", "b"))
    made = sd.tl.simulate(adata, 500, groupby="group", dropout=True)
    np.testing.assert_array_equal(made.var["de_factor_z"], 1)
    assert all(np.isfinite(value).all() for value in made.uns["simulate"]["splatter"].values())
    assert (made.obs["group"] == "z").any()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_obs": 0}, ValueError, "n_obs=0"),
        ({"n_vars": 0}, ValueError, "n_vars=0"),
        ({"groupby": "absent"}, KeyError, r"groupby='absent'.*'cell_type'"),
        ({"batch_key": "absent"}, KeyError, "batch_key='absent'"),
        ({"batch_key": "partial"}, ValueError, "batch_key='partial' is missing for 1 of 40"),
        ({"layer": "absent"}, KeyError, "'absent'"),
        ({"path_key": "absent"}, KeyError, "path_key='absent'"),
        ({"path_key": "cell_type"}, ValueError, "path_key='cell_type' must be numeric"),
        ({"path_key": "time"}, ValueError, "path_key='time' is not finite for 1 of 40"),
        ({"path_key": "order", "path_n_steps": 0}, ValueError, "path_n_steps=0"),
        ({"path_key": "order", "n_vars": 5}, ValueError, "n_vars=5 cannot be combined"),
        ({"rng": 1, "random_state": 1}, TypeError, "not both"),
        ({"rng": "seed"}, TypeError, "rng='seed'"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = pbmc_counts(40, 30)
    adata.obs["partial"] = [None, *["a"] * 39]
    adata.obs["order"] = np.arange(40)
    adata.obs["time"] = np.where(np.arange(40) == 3, np.inf, 0.5)
    with pytest.raises(error, match=message):
        sd.tl.simulate(adata, **settings)


def test_bad_data_are_refused() -> None:
    with pytest.raises(TypeError, match="cannot be part of a plan"):
        sd.tl.simulate(sd.plan(pbmc_counts(20, 30)))
    with pytest.raises(TypeError, match="must be an AnnData or a scdiffx plan, got ndarray"):
        sd.tl.simulate(np.ones((3, 3)))
    with pytest.raises(ValueError, match="0 of 5 cells"):
        sd.tl.simulate(ad.AnnData(sp.csr_matrix((5, 4), dtype=np.float32)))
    with pytest.raises(ValueError, match="empty"):
        sd.tl.simulate(pbmc_counts(20, 30)[:0].copy())
    for value, message in ((-1, "negative"), (np.nan, "not finite")):
        adata = pbmc_counts(20, 30)
        adata.X[0, 0] = value
        with pytest.raises(ValueError, match=message):
            sd.tl.simulate(adata)
    adata = pbmc_counts(20, 30)
    adata.X[0, 0] = 0.5
    with pytest.warns(UserWarning, match="non-integers") as caught:
        sd.tl.simulate(adata)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="needs its parameters"):
        ops.Simulate()(jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_obs": 0}, "n_obs=0"),
        ({"n_vars": 0}, "n_vars=0"),
        ({"batch_cells": [10, 0]}, "batch_cells"),
        ({"group_prob": [0.5, 0.4]}, "group_prob"),
        ({"mean_shape": 0}, "mean_shape=0"),
        ({"lib_scale": -1}, "lib_scale=-1"),
        ({"de_prob": 1.5}, "de_prob=1.5"),
        ({"group_prob": [0.5, 0.5], "de_prob": [0.1, 0.2, 0.3]}, "de_prob"),
        ({"bcv_df": 0}, "bcv_df=0"),
        ({"path_from": [0, 1]}, "path_from"),
        ({"group_prob": [0.5, 0.5], "path_from": [2, 1]}, "circle"),
        ({"path_from": [0], "path_n_steps": 0}, "path_n_steps=0"),
        ({"dropout_mid": np.nan}, "dropout_mid"),
    ],
)
def test_bad_parameters_of_splatter_name_themselves(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.datasets.splatter(**({"n_vars": 20} | settings))
