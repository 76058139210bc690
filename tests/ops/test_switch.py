"""Switches along pseudotime against scipy's optimisers, on planted curves and on a villus; calibration of p-values."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

import scdiffx as sd
from conftest import _read
from helpers import QUICK, directional_fd
from scdiffx import ops

# Zonation of enterocytes by Moor et al. (2018): at the tip and at the bottom of the villus.
TIP = ["Apoa4", "Ada", "Nt5e", "Slc28a2"]
BOTTOM = ["Reg1", "Nlrp6", "Reg3b", "Il18"]


@pytest.fixture(scope="module")
def villus() -> ad.AnnData:
    """Logarithms of 128 genes in the cells of a villus; the known ones first."""
    adata = _read("moor_villus")
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    found = np.asarray((adata.X > 0).sum(0)).ravel()
    rest = np.flatnonzero((found >= 10) & ~adata.var_names.isin(TIP + BOTTOM))
    chosen = [*adata.var_names.get_indexer(TIP + BOTTOM), *np.random.default_rng(0).choice(rest, 120, replace=False)]
    adata.obs["zone"] = adata.obs["zone"].astype(float)
    return adata[:, chosen].copy()


@pytest.fixture(scope="module")
def tested(villus: ad.AnnData) -> ad.AnnData:
    adata = villus.copy()
    sd.tl.switch_de(adata, "zone")
    return adata


def best_by_scipy(x: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray]:
    """The smallest sum of squares over nine starts of all three parameters, and (level, strength, time) there."""
    u = (t - t.min()) / np.ptp(t)

    def residuals(p: np.ndarray) -> np.ndarray:
        return x - p[0] / (1 + np.exp(-(p[1] * (1 - u) + p[2] * u)))

    found = []
    for sign in (1, -1):
        low, high = ([-100, 0], [0, 100]) if sign == 1 else ([0, -100], [100, 0])
        for k in (1.0, 6.0, 25.0):
            for time in (0.15, 0.5, 0.85):
                start = [2 * x.mean(), *(sign * k * np.array([-time, 1 - time]))]
                bounds = ([0, *low], [np.inf, *high])
                fit = optimize.least_squares(residuals, start, bounds=bounds, xtol=1e-12, ftol=1e-12, gtol=1e-12)
                found.append((2 * fit.cost, fit.x))
    squares, (level, first, last) = min(found, key=lambda f: f[0])
    return squares, np.array([level, (last - first) / np.ptp(t), t.min() - first / (last - first) * np.ptp(t)])


@pytest.mark.slow
def test_fits_are_as_good_as_scipys(villus: ad.AnnData) -> None:
    t, x = villus.obs["zone"].to_numpy(), villus.X[:, :60].toarray().astype(np.float64)
    with jax.enable_x64(True):
        # The program of `tested` serves here too.
        result = ops.SwitchDE()(ops.Counts.from_scipy(villus.X.astype(np.float64)), jnp.asarray(t))
    n, same = len(t), 0
    for i in range(0, 60, 3):
        squares, expected = best_by_scipy(x[:, i], t)
        statistic = n * np.log(((x[:, i] - x[:, i].mean()) ** 2).sum() / squares)
        # Scipy may stop short of a minimum.
        assert -0.02 < float(result.statistic[i]) - statistic < 0.5
        found = np.array([float(v[i]) for v in (result.level, result.strength, result.time)])
        same += np.allclose(found, expected, rtol=1e-3)
    # Steps between two zones have no best strength.
    assert same >= 15


@pytest.mark.slow
def test_known_zonation_is_found(tested: ad.AnnData) -> None:
    var = tested.var
    assert (var.loc[TIP + BOTTOM, "switch_qval"] < 1e-6).all()
    assert (var.loc[TIP, "switch_strength"] > 0).all()
    assert (var.loc[BOTTOM, "switch_strength"] < 0).all()
    assert var["switch_time"].between(0, 6).all()
    # Purine and nucleotide genes come on at the tip, after the lipid genes (Moor et al., figure 2).
    assert var.loc["Apoa4", "switch_time"] < var.loc[["Ada", "Nt5e", "Slc28a2"], "switch_time"].min()
    np.testing.assert_allclose(var["switch_qval"], stats.false_discovery_control(var["switch_pval"]))


@pytest.mark.slow
def test_shuffled_orders_give_uniform_p_values(villus: ad.AnnData) -> None:
    calibrated, chi_squared = villus.copy(), villus.copy()
    rng = np.random.default_rng(3)
    found: dict[str, list[np.ndarray]] = {"calibrated": [], "chi": []}
    for _ in range(5):
        order = rng.permutation(villus.obs["zone"])
        for adata, n, name in ((calibrated, 20, "calibrated"), (chi_squared, 0, "chi")):
            adata.obs["zone"] = order
            sd.tl.switch_de(adata, "zone", n_permutations=n)
            found[name].append(adata.var["switch_pval"].to_numpy())
    p, chi = (np.concatenate(found[name]) for name in ("calibrated", "chi"))
    # Genes of one permutation are not independent: the bound is about three times that of 1,000 independent ones.
    assert stats.kstest(p, "uniform").statistic < 0.08
    assert 0.03 < (p < 0.05).mean() < 0.07
    assert (p < 0.01).mean() < 0.02
    # What it corrects: with two degrees of freedom most p-values are too large.
    assert stats.kstest(chi, "uniform").statistic > 0.1


@pytest.mark.slow
def test_genes_of_few_cells_are_not_found_by_chance() -> None:
    rng = np.random.default_rng(0)
    x = np.zeros((400, 256), np.float32)
    for gene in range(256):
        x[rng.choice(400, 4, replace=False), gene] = rng.uniform(1, 3, 4)
    adata = ad.AnnData(x)
    adata.obs["order"] = rng.uniform(size=400)
    small = {}
    for n in (0, 20):
        sd.tl.switch_de(adata, "order", n_permutations=n)
        small[n] = (adata.var["switch_pval"] < 0.003).mean()
    # Switches at either end pick single cells: two degrees of freedom would find five times too many.
    assert small[0] > 0.015
    assert small[20] < 0.01


@pytest.mark.slow
def test_single_precision_keeps_the_statistics_and_is_finite(villus: ad.AnnData) -> None:
    x, t = villus.X.toarray(), villus.obs["zone"].to_numpy(np.float32)
    single = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(jnp.asarray(x), t)
    with jax.enable_x64(True):
        double = jax.jit(total, compiler_options=QUICK)(jnp.asarray(x, jnp.float64), t.astype(np.float64))
    np.testing.assert_allclose(single[0][1].statistic, double[1].statistic, atol=0.1, rtol=1e-4)
    assert all(bool(jnp.isfinite(part).all()) for part in (*single[0][1], single[1]))


def total(x: jax.Array, t: jax.Array) -> tuple[jax.Array, ops.SwitchDEResult]:
    result = ops.SwitchDE()(x, t)
    return result.time.sum() + result.level.sum(), result


def planted(n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Curves with little noise, and their levels, strengths and times."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(2, 5, n))
    level, strength, time = rng.uniform(1, 4, 12), np.tile([4.0, -4.0, 9.0], 4), rng.uniform(2.7, 4.3, 12)
    x = level / (1 + np.exp(-strength * (t[:, None] - time)))
    return np.maximum(x + rng.normal(0, 0.1, x.shape), 0), t, level, strength, time


@pytest.mark.usefixtures("x64")
def test_planted_switches_and_their_derivatives() -> None:
    x, t, level, strength, time = planted()
    weight = jnp.arange(1.0, 13)

    def scalar(v: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ops.SwitchDEResult]:
        r = ops.SwitchDE()(*v)
        return (weight * (r.time + jnp.tanh(r.strength / 5) + r.level)).sum(), r

    both = jax.jit(jax.value_and_grad(scalar, has_aux=True), compiler_options=QUICK)
    at = (jnp.asarray(x), jnp.asarray(t))
    (_, result), slope = both(at)
    assert bool(result.converged.all())
    np.testing.assert_allclose(result.time, time, atol=0.05)
    np.testing.assert_allclose(result.strength, strength, rtol=0.1)
    np.testing.assert_allclose(result.level, level, rtol=0.03)
    rng = np.random.default_rng(1)
    for i in (0, 1):
        move = [jnp.zeros_like(v) for v in at]
        move[i] = jnp.asarray(rng.normal(size=at[i].shape))
        numeric = directional_fd(lambda v: both(v)[0][0], at, tuple(move), steps=(1e-6,))
        np.testing.assert_allclose(numeric, float((slope[i] * move[i]).sum()), rtol=1e-6)


def test_cells_without_pseudotime_are_left_out_and_constant_genes_are_no_finding() -> None:
    x, t, *_, time = planted(120)
    x[:, 3], x[:, 5] = 0, 1.5
    t[5::12] = [np.inf, np.nan, -np.inf] * 3 + [np.inf]
    found = []
    for value in (0, 9):
        adata = ad.AnnData(x.astype(np.float32))
        adata.X[~np.isfinite(t)] = value
        adata.obs["order"] = t
        sd.tl.switch_de(adata, "order", n_permutations=0)
        found.append(adata.var)
    pd.testing.assert_frame_equal(*found)
    switches = np.setdiff1d(np.arange(12), [3, 5])
    np.testing.assert_allclose(found[0]["switch_time"].iloc[switches], time[switches], atol=0.1)
    assert (found[0]["switch_pval"].iloc[[3, 5]] == 1).all()
    assert (found[0]["switch_strength"].iloc[[3, 5]] == 0).all()
    assert np.isfinite(found[0]["switch_time"]).all()


def test_a_plan_writes_the_same() -> None:
    x, t, *_ = planted(120)
    adata = ad.AnnData(x.astype(np.float32))
    adata.obs["order"] = t
    plan = sd.plan(adata)
    sd.tl.switch_de(plan, "order")
    with pytest.raises(KeyError, match="neither the AnnData nor an earlier step"):
        sd.tl.switch_de(plan, "order", layer="absent")
    plan.apply()
    other = adata.copy()
    sd.tl.switch_de(other, "order")
    assert adata.var.equals(other.var)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pseudotime": "absent"}, KeyError, r"pseudotime='absent'.*'order'"),
        ({"pseudotime": "text"}, TypeError, "pseudotime='text'"),
        ({"pseudotime": "same"}, ValueError, "1 of them different"),
        ({"pseudotime": "unreached"}, ValueError, "3 finite values"),
        ({"n_permutations": -1}, ValueError, "n_permutations=-1"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = ad.AnnData(np.ones((20, 3), np.float32))
    adata.obs["order"], adata.obs["same"], adata.obs["text"] = np.arange(20), 1.0, "a"
    adata.obs["unreached"] = np.where(np.arange(20) < 3, np.arange(20), np.inf)
    with pytest.raises(error, match=message):
        sd.tl.switch_de(adata, **({"pseudotime": "order"} | settings))
    assert not list(adata.var)
