"""Couplings beside Sinkhorn's iterations in NumPy, what they carry beside matrices, and a time that is held out."""

from __future__ import annotations

import functools
from pathlib import Path

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import expit, logsumexp

import scdiffx as sd
from helpers import QUICK, directional_fd, largest_array
from scdiffx import ops
from scdiffx._core import transport
from scdiffx.ops._ot_trajectory import between, birth_death

SIZES, DIMS = (40, 50, 45), 4
HOURS = (0.0, 6.0, 18.0)


@functools.cache
def _cells() -> ad.AnnData:
    rng = np.random.default_rng(0)
    group = np.concatenate([np.arange(n) % 2 for n in SIZES])
    step = np.repeat(range(3), SIZES)
    z = rng.normal(size=(sum(SIZES), DIMS)) + step[:, None] * [0.8, 0, 0, 0] + group[:, None] * [0, 4, 0, 0]
    order = rng.permutation(len(z))
    adata = ad.AnnData(rng.gamma(2, size=(len(z), 6)).astype(np.float32))
    adata.obsm["X_pca"] = z[order].astype(np.float32)
    adata.obs["hours"] = np.asarray(HOURS)[step[order]]
    adata.obs["group"] = pd.Categorical(np.array(["CD4+/CD45RO+", "B"])[group[order]])
    adata.obs["prior"] = rng.uniform(0.5, 2, len(z))[order]
    return adata


def cells() -> ad.AnnData:
    """Two groups of cells that drift over three time points, in random order."""
    return _cells().copy()


def early() -> ad.AnnData:
    """Those of the first two time points."""
    adata = cells()
    return adata[adata.obs["hours"] < 18].copy()


@functools.cache
def _coupled() -> ad.AnnData:
    adata = cells()
    sd.tl.ot_trajectory(adata, "hours")
    return adata


def coupled() -> ad.AnnData:
    return _coupled().copy()


def points(adata: ad.AnnData, k: int) -> np.ndarray:
    return adata.obsm["X_pca"][(adata.obs["hours"] == HOURS[k]).to_numpy()].astype(np.float64)


def matrix(adata: ad.AnnData, k: int, key: str = "ot_trajectory") -> np.ndarray:
    """The coupling of time points k and k + 1 as a matrix, by its definition."""
    entry = adata.uns[key]
    here, there = ((adata.obs["hours"] == HOURS[k + d]).to_numpy() for d in (0, 1))
    cost = cdist(points(adata, k), points(adata, k + 1), "sqeuclidean") / np.float64(entry["scale"][k])
    return np.exp((entry["f"][here].astype(np.float64)[:, None] + entry["g"][there] - cost) / entry["epsilon"])


def reference(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, tau: tuple[float, float], n_iter: int = 5000
) -> np.ndarray:
    """Unbalanced Sinkhorn iterations on logarithms (Chizat et al. 2018) in float64."""
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(n_iter):
        before = f
        g = tau[1] * epsilon * (np.log(b) - logsumexp((f[:, None] - cost) / epsilon, axis=0))
        f = tau[0] * epsilon * (np.log(a) - logsumexp((g - cost) / epsilon, axis=1))
        if np.abs(f - before).max() < 1e-12:
            break
    return np.exp((f[:, None] + g - cost) / epsilon)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("tau", "scale"), [((0.9, 0.97), "mean"), pytest.param((0.95, 1.0), "median", marks=pytest.mark.slow)]
)
def test_couplings_equal_sinkhorn_in_numpy(tau: tuple[float, float], scale: str) -> None:
    adata = early()
    adata.obsm["X_pca"] = adata.obsm["X_pca"].astype(np.float64)
    sd.tl.ot_trajectory(adata, "hours", tau=tau, epsilon=0.1, scale_cost=scale, growth="prior", time_unit=6)
    cost = cdist(points(adata, 0), points(adata, 1), "sqeuclidean")
    cost /= getattr(np, scale)(cost)
    a = adata.obs["prior"][adata.obs["hours"] == 0].to_numpy()
    b = np.full(SIZES[1], 1 / SIZES[1])
    expected = reference(cost, a / a.sum(), b, 0.1, tau)
    found = matrix(adata, 0)
    # Potentials are stored in single precision.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9 * expected.max())
    moved = (expected * cost).sum() / expected.sum() * adata.uns["ot_trajectory"]["scale"][0]
    assert adata.uns["ot_trajectory"]["cost"][0] == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("three", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_marginals_are_met_and_single_precision_is_close(three: bool) -> None:
    adata = cells() if three else early()
    sd.tl.ot_trajectory(adata, "hours", tau=1.0, epsilon=0.1, growth="prior", time_unit=6)
    entry = adata.uns["ot_trajectory"]
    assert (entry["error"] < 1e-4).all()
    for k, span in ((0, 1), (1, 2))[: 1 + three]:
        found = matrix(adata, k)
        a = adata.obs["prior"][adata.obs["hours"] == HOURS[k]].to_numpy() ** span
        assert np.abs(found.sum(1) - a / a.sum()).sum() < 1e-3
        assert np.abs(found.sum(0) - 1 / SIZES[k + 1]).sum() < 1e-3
        cost = cdist(points(adata, k), points(adata, k + 1), "sqeuclidean") / entry["scale"][k]
        expected = reference(cost, a / a.sum(), np.full(SIZES[k + 1], 1 / SIZES[k + 1]), 0.1, (1, 1))
        assert np.abs(found - expected).sum() < 1e-3
    # Rows that are held exactly say nothing new about growth.
    np.testing.assert_allclose(adata.obs["growth_rate"], adata.obs["prior"], rtol=2e-3)


@pytest.mark.slow
def test_growth_is_learned_and_counts_per_unit_of_time() -> None:
    rng = np.random.default_rng(1)
    many = np.concatenate([np.arange(60) % 2 == 0, np.arange(80) % 4 > 0])  # a half, then three quarters
    adata = ad.AnnData(np.zeros((140, 1), np.float32))
    adata.obsm["X_pca"] = (rng.normal(size=(140, 3)) * 0.5 + many[:, None] * [2, 0, 0]).astype(np.float32)
    adata.obs["hours"] = np.repeat([0.0, 2.0], [60, 80])
    before = adata.obs["hours"].to_numpy() == 0
    ratios = []
    for rounds in (1, 8):
        sd.tl.ot_trajectory(adata, "hours", tau=(0.95, 1.0), growth_iters=rounds)
        rate = adata.obs["growth_rate"].to_numpy()
        assert (rate[~before] == 1).all()
        # The mean over the step of two units is that of the growth that was assumed.
        np.testing.assert_allclose((rate[before] ** 2).mean(), 1, rtol=1e-5)
        ratios.append((rate[before & many] ** 2).mean() / (rate[before & ~many] ** 2).mean())
    assert 1 < ratios[0] < ratios[1] - 0.2
    assert ratios[1] == pytest.approx(3, rel=0.1)


def test_growth_from_genes_follows_the_logistic_curves() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(90, 5))
    x[:, 4] = 3  # without variance: z-score 0
    x[0, 0] = 60  # cut at 5
    z = np.clip((x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1), -5, 5)
    assert z.max() == 5
    birth = 0.3 + 1.4 * expit(8 * (z[:, :3].mean(1) - 0.25))
    death = 0.3 + 1.4 * expit(20 * (z[:, 3:].mean(1) - 0.1))
    np.testing.assert_allclose(birth_death(jnp.asarray(x), (3, 2)), birth - death, atol=1e-5)
    np.testing.assert_allclose(birth_death(jnp.asarray(x[:, :3]), (3, 0)), birth, atol=1e-5)


@pytest.mark.slow
def test_genes_are_read_by_name() -> None:
    adata = early()
    adata.layers["log"] = adata.X[:, ::-1].copy()
    x = adata.X[:, [4, 1, 2]]
    adata.obs["expected"] = np.exp(np.asarray(birth_death(jnp.asarray(x), (2, 1))))
    sd.tl.ot_trajectory(adata, "hours", growth={"apoptosis": ["2"], "proliferation": ["4", "1"]}, time_unit=6)
    mine = adata.obs["growth_rate"].copy()
    sd.tl.ot_trajectory(adata, "hours", growth="expected", time_unit=6)
    np.testing.assert_allclose(adata.obs["growth_rate"], mine, rtol=1e-4)
    last = (adata.obs["hours"] == HOURS[1]).to_numpy()
    np.testing.assert_allclose(mine[last], adata.obs["expected"][last], rtol=1e-5)
    genes = {"apoptosis": "3", "proliferation": ["1", "4"]}  # the same ones, in the reversed layer
    sd.tl.ot_trajectory(adata, "hours", growth=genes, layer="log", time_unit=6)
    np.testing.assert_allclose(adata.obs["growth_rate"], mine, rtol=1e-4)


def test_fates_and_origins_are_products_of_normalised_couplings() -> None:
    adata = coupled()
    sd.tl.ot_pull(adata, groupby="group")
    sd.tl.ot_push(adata, groupby="group")
    first, second = matrix(adata, 0), matrix(adata, 1)
    at = [(adata.obs["hours"] == hour).to_numpy() for hour in HOURS]
    is_group = np.column_stack([adata.obs["group"] == name for name in ("B", "CD4+/CD45RO+")]).astype(float)
    middle = second / second.sum(1, keepdims=True) @ is_group[at[2]]
    expected = {2: is_group[at[2]], 1: middle, 0: first / first.sum(1, keepdims=True) @ middle}
    fate = adata.obsm["fate"]
    assert list(fate) == ["B", "CD4+|CD45RO+"]
    for k, values in expected.items():
        np.testing.assert_allclose(fate[at[k]], values, atol=1e-5)
    np.testing.assert_allclose(fate.sum(axis=1), 1, atol=1e-5)
    middle = first.T / first.sum(0)[:, None] @ is_group[at[0]]
    expected = {0: is_group[at[0]], 1: middle, 2: second.T / second.sum(0)[:, None] @ middle}
    for k, values in expected.items():
        np.testing.assert_allclose(adata.obsm["origin"][at[k]], values, atol=1e-5)
    truth = np.asarray(adata.obs["group"] == "B")
    assert ((fate["B"] > 0.5) == truth).mean() > 0.9


def test_numbers_are_carried_from_the_time_asked_for() -> None:
    adata = coupled()
    sd.tl.ot_push(adata, groupby="prior", time=6, key_added="before")
    sd.tl.ot_pull(adata, groupby="prior", time=6, key_added="after")
    at = [(adata.obs["hours"] == hour).to_numpy() for hour in HOURS]
    first, second = matrix(adata, 0), matrix(adata, 1)
    prior = adata.obs["prior"].to_numpy()[at[1]]
    assert adata.obs["before"][at[0]].isna().all()
    assert adata.obs["after"][at[2]].isna().all()
    np.testing.assert_allclose(adata.obs["before"][at[2]], second.T / second.sum(0)[:, None] @ prior, rtol=1e-4)
    np.testing.assert_allclose(adata.obs["after"][at[0]], first / first.sum(1, keepdims=True) @ prior, rtol=1e-4)
    np.testing.assert_allclose(adata.obs["after"][at[1]], prior, rtol=1e-6)


def test_interpolation_draws_pairs_from_the_coupling() -> None:
    adata = coupled()
    x, y = points(adata, 0), points(adata, 1)
    plan = matrix(adata, 0)
    growth = plan.sum(1)
    weights = plan * growth[:, None] ** (0.25 - 1)
    weights /= weights.sum()
    made = sd.tl.ot_interpolate(adata, 1.5, n_obs=20_000, rng=3)
    assert made.shape == (20_000, DIMS)
    assert made.dtype == np.float32
    expected = 0.75 * weights.sum(1) @ x + 0.25 * weights.sum(0) @ y
    np.testing.assert_allclose(made.mean(0), expected, atol=0.03)
    pairs = 0.75 * x[:, None] + 0.25 * y
    spread = np.einsum("ij,ijd->d", weights, (pairs - expected) ** 2)
    np.testing.assert_allclose(made.var(0), spread, rtol=0.05)
    # Each point lies on the line of a pair.
    gaps = np.abs(made[:50, None, None] - pairs).max(-1).reshape(50, -1).min(1)
    assert gaps.max() < 1e-4
    mean = sd.tl.ot_interpolate(adata, 1.5, method="barycentric")
    np.testing.assert_allclose(mean, 0.75 * x + 0.25 * (plan / growth[:, None]) @ y, atol=1e-4)


@pytest.mark.slow
def test_interpolation_ends_in_the_cells_and_repeats_with_a_seed() -> None:
    adata = coupled()
    for time, k in ((0, 0), (18.0, 2)):
        made = sd.tl.ot_interpolate(adata, time)
        assert len(made) == SIZES[k]
        assert cdist(made, points(adata, k)).min(1).max() < 1e-4
    # Drawn from equal parts of the mass, the earlier cells are all there once.
    assert len(np.unique(cdist(sd.tl.ot_interpolate(adata, 0), points(adata, 0)).argmin(1))) == SIZES[0]
    first, again, other = (sd.tl.ot_interpolate(adata, 9, rng=seed) for seed in (1, jax.random.key(1), 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (round(0.75 * SIZES[1] + 0.25 * SIZES[2]), DIMS)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("time", "kwargs", "error", "match"),
    [
        (19, {}, ValueError, r"time=19.*0 and 18"),
        (-1, {}, ValueError, "time=-1"),
        ("6", {}, TypeError, "time='6'"),
        (1, {"method": "mean"}, ValueError, r"method='mean'.*'barycentric'"),
        (1, {"n_obs": 0}, ValueError, "n_obs=0"),
        (1, {"n_obs": 5, "method": "barycentric"}, ValueError, "n_obs=5"),
        (1, {"key": "absent"}, KeyError, "key='absent'"),
        (1, {"rng": 0, "random_state": 0}, TypeError, "not both"),
    ],
)
def test_interpolation_refuses(time: object, kwargs: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sd.tl.ot_interpolate(coupled(), time, **kwargs)


def test_interpolation_is_no_step_of_a_plan() -> None:
    with pytest.raises(TypeError, match="pass an AnnData"):
        sd.tl.ot_interpolate(sd.plan(coupled()), 1)


def test_other_cells_than_were_coupled_are_refused() -> None:
    whole = coupled()
    moved, sooner = coupled(), coupled()
    moved.obsm["X_pca"][3, 0] += 1e-3
    sooner.obs["hours"] = sooner.obs["hours"].replace(6, 7)
    for adata in (whole[:100].copy(), whole[::-1].copy(), moved, sooner):
        for call in (
            functools.partial(sd.tl.ot_pull, groupby="group"),
            functools.partial(sd.tl.ot_interpolate, time=1),
        ):
            with pytest.raises(ValueError, match="no longer those that were coupled"):
                call(adata)


def test_a_plan_that_changes_the_representation_needs_new_couplings() -> None:
    plan = sd.plan(coupled())
    sd.tl.ot_pull(plan, groupby="group")
    sd.pp.pca(plan, n_comps=3)
    with pytest.raises(ValueError, match=r"the plan changes `adata.obsm\['X_pca'\]`"):
        sd.tl.ot_pull(plan, groupby="group")


def test_couplings_work_after_a_round_trip(tmp_path: Path) -> None:
    adata = coupled()
    adata.write_h5ad(tmp_path / "coupled.h5ad")
    back = ad.read_h5ad(tmp_path / "coupled.h5ad")
    for each in (adata, back):
        sd.tl.ot_pull(each, groupby="group")
    pd.testing.assert_frame_equal(back.obsm["fate"], adata.obsm["fate"])
    np.testing.assert_array_equal(sd.tl.ot_interpolate(back, 3), sd.tl.ot_interpolate(adata, 3))


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        (pd.Categorical.from_codes([0, 1, 2], [0.0, 6.0, 18.0]), (6, 12)),
        (pd.Categorical.from_codes([2, 0, 1], ["18", "6", "0"][::-1]), None),
        (np.array(["E9.5", "E10.5", "E11"]), (1, 1)),
        (pd.Categorical(["late", "mid", "early"], ["late", "mid", "early"], ordered=True), (1, 1)),
    ],
    ids=["numbers", "numeric text", "natural order", "ordered"],
)
def test_times_by_number_and_by_label(labels: object, spans: tuple[int, int] | None) -> None:
    adata = cells()
    if spans is None:
        labels = pd.Categorical(["0", "6", "18"])
        spans = (6, 12)
    step = np.searchsorted(HOURS, adata.obs["hours"])
    adata.obs["when"] = labels[step]
    sd.tl.ot_trajectory(adata, "when")
    assert tuple(np.diff(adata.uns["ot_trajectory"]["times"])) == spans
    np.testing.assert_array_equal(adata.uns["ot_trajectory"]["f"], coupled().uns["ot_trajectory"]["f"])


def test_too_few_iterations_warn() -> None:
    adata = cells()
    with pytest.warns(UserWarning, match="2 of 2 couplings are not solved after 2000 iterations") as caught:
        sd.tl.ot_trajectory(adata, "hours", epsilon=1e-5)
    assert {w.filename for w in caught if w.category is UserWarning} == {__file__}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_balanced_couplings_are_differentiated() -> None:
    adata = cells()
    x, y = (jnp.asarray(points(adata, k)) for k in (0, 1))
    op = ops.OTTrajectory(epsilon=0.3, tol=1e-13)
    time = jnp.repeat(jnp.arange(2), jnp.asarray(SIZES[:2]), total_repeat_length=sum(SIZES[:2]))
    z = jnp.concatenate([x, y])
    op = op.init(z, time)
    values = jnp.sin(jnp.arange(z.size).reshape(z.shape))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(inputs):
        def loss(inputs):
            z, epsilon, growth = inputs
            result = ops.replace(op, epsilon=epsilon)(z, time, growth)
            here, there = op.cells
            x, y, _ = between(z[here], z[there], result.scale[0])
            moved = transport.apply(x, y, result.f[here], result.g[there], epsilon, values[there])
            return (moved * values[here]).sum() * 10

        return jax.value_and_grad(loss)(inputs)

    inputs = (z, jnp.asarray(0.3), jnp.exp(jnp.cos(jnp.arange(len(z)))))
    gradient = both(inputs)[1]
    for i, part in enumerate(inputs):
        step = [jnp.zeros_like(p) for p in inputs]
        step[i] = jnp.sin(1 + jnp.arange(part.size, dtype=part.dtype)).reshape(part.shape)
        exact = float((gradient[i] * step[i]).sum())
        numeric = directional_fd(lambda v: both(v)[0], inputs, tuple(step), steps=(1e-4, 1e-5))
        assert exact != 0
        np.testing.assert_allclose(numeric, exact, rtol=1e-3)


def test_no_matrix_is_made() -> None:
    n, m = 20_000, 30_000
    z = jax.ShapeDtypeStruct((n + m, 30), np.float32)
    index = [jax.ShapeDtypeStruct((k,), np.int32) for k in (n, m)]
    time = jax.ShapeDtypeStruct((n + m,), np.int32)
    op = ops.OTTrajectory(epsilon=jax.ShapeDtypeStruct((), np.float32), cells=tuple(index), tau=(0.95, 1.0), rounds=2)
    gradient = jax.grad(lambda z, op, time: op(z, time).growth.sum())
    assert largest_array(gradient, z, op, time) <= max(transport._ENTRIES, 2 * z.size)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x, y, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((21, 3), (17, 3), (17, 2)))
    f, g = jnp.asarray(rng.normal(size=21), jnp.float32), jnp.asarray(rng.normal(size=17), jnp.float32)
    at = jnp.asarray(rng.uniform(size=21), jnp.float32)

    def all_three(inputs):
        x, y, f, g, values = inputs
        sums, moved = transport.log_sums(x, y, g, 0.7), transport.apply(x, y, f, g, 0.7, values)
        return (jnp.sin(sums).sum() + jnp.cos(moved).sum(), (sums, moved, transport.draw(x, y, g, 0.7, at)))

    whole, blocks = [], []
    for found, least, entries in ((whole, 32, 1 << 21), (blocks, 4, 17 * 4)):
        monkeypatch.setattr(transport, "_ENTRIES", entries)
        monkeypatch.setattr(transport, "_LEAST_ROWS", least)
        both = jax.jit(lambda inputs: jax.value_and_grad(all_three, has_aux=True)(inputs), compiler_options=QUICK)
        found += jax.tree.leaves(both((x, y, f, g, values)))
    for a, b in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    plan = np.exp((np.asarray(f)[:, None] + np.asarray(g) - cdist(x, y, "sqeuclidean")) / 0.7)
    np.testing.assert_allclose(whole[1], np.log((plan / np.exp(np.asarray(f) / 0.7)[:, None]).sum(1)), rtol=1e-4)
    np.testing.assert_allclose(whole[2], plan @ np.asarray(values), rtol=1e-3)
    share = np.cumsum(plan, 1) / plan.sum(1, keepdims=True)
    np.testing.assert_array_equal(whole[3], (share <= np.asarray(at)[:, None]).sum(1))


@pytest.mark.slow
def test_a_plan_learns_epsilon_from_what_is_carried() -> None:
    adata = early()
    adata.obs["height"] = adata.obsm["X_pca"][:, 1] + adata.obsm["X_pca"][:, 0]
    plan = sd.plan(adata)
    sd.tl.ot_trajectory(plan, "hours", epsilon=1.0)
    sd.tl.ot_pull(plan, groupby="height", key_added="later")
    with pytest.raises(KeyError, match="key='absent'"):
        sd.tl.ot_pull(plan, groupby="group", key="absent")
    fitted = sd.fit(plan, sd.losses.correlation("later", "height"), n_steps=5, progress=False)
    assert set(fitted.params) == {"ot_trajectory.epsilon"}
    assert fitted.params["ot_trajectory.epsilon"] < 1
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    fitted.apply(adata)
    assert adata.uns["ot_trajectory"]["epsilon"] == pytest.approx(float(fitted.params["ot_trajectory.epsilon"]))
    learned = adata.obs["later"].copy()
    sd.tl.ot_pull(adata, groupby="height", key_added="later")
    pd.testing.assert_series_equal(adata.obs["later"], learned, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_held_out_time_is_nearer_than_its_neighbours_and_their_mix(worm_embryo: ad.AnnData, k: int) -> None:
    edges = [0, 270, 330, 390, 450, 510]
    minutes = worm_embryo.obs["embryo.time"].astype(float).to_numpy()
    label = pd.cut(minutes, edges, labels=False, right=True)
    sd.pp.normalize_total(worm_embryo)
    sd.pp.log1p(worm_embryo)
    seen = worm_embryo[label != k].copy()
    sd.pp.highly_variable_genes(seen, n_top_genes=1000)
    sd.pp.pca(seen, n_comps=30)
    genes = seen.var["highly_variable"].to_numpy()
    x = worm_embryo.X[:, genes].toarray()
    z = (x - x[label != k].mean(0)) @ seen.varm["PCs"][genes]
    before, held, after = (z[label == k + d] for d in (-1, 0, 1))
    at = [minutes[label == k + d].mean() for d in (-1, 0, 1)]
    adata = ad.AnnData(np.zeros((len(before) + len(after), 1), np.float32))
    adata.obsm["X_pca"] = np.concatenate([before, after]).astype(np.float32)
    adata.obs["minutes"] = np.repeat([at[0], at[2]], [len(before), len(after)])
    sd.tl.ot_trajectory(adata, "minutes")
    rng = np.random.default_rng(0)
    n = min(len(before), len(held), len(after))
    share = (at[1] - at[0]) / (at[2] - at[0])
    mix = np.concatenate([v[rng.permutation(len(v))[:m]] for v, m in ((before, round((1 - share) * n)), (after, n))])[
        :n
    ]
    others = {"before": before, "after": after, "mix": mix, "transport": sd.tl.ot_interpolate(adata, at[1], n_obs=n)}
    error = {}
    for name, found in others.items():
        cost = cdist(*(v[rng.choice(len(v), n, replace=False)] for v in (found, held)), "sqeuclidean")
        error[name] = cost[linear_sum_assignment(cost)].mean()
    assert error["transport"] < 0.85 * min(error[name] for name in ("before", "after", "mix")), error
