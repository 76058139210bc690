"""The dynamical model against scVelo and its parts against their definitions; derivatives are in test_contract."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from scipy.stats import gaussian_kde, norm

import scdiffx as sd
from scdiffx.ops._dynamics_fit import _jumps, _without_jumps, nelder_mead_step
from scdiffx.ops._dynamics_start import _upper_mode, quantile
from scdiffx.ops._splicing import Rates, at_time, solution, time_from_start, time_from_switch
from velocity_reference import bits, normalised, recorded, rows


@pytest.fixture(scope="module")
def _fitted(data_dir: Path) -> ad.AnnData:
    adata = normalised(data_dir)
    sd.tl.velocity(adata, mode="dynamical", var_names=list(adata.var_names[bits("fit_genes")]))
    sd.tl.velocity_graph(adata)
    sd.tl.velocity_embedding(adata, basis="umap")
    sd.tl.latent_time(adata)
    return adata


@pytest.mark.slow
def test_fit_equals_scvelo(_fitted: ad.AnnData) -> None:
    r, genes = recorded(), bits("fit_genes")
    fitted = _fitted.var[genes]
    for name in ("alpha", "beta", "gamma", "t_", "scaling", "likelihood", "variance", "alignment_scaling"):
        off = np.abs(fitted[f"fit_{name}"].to_numpy() / r[f"fit_{name}"] - 1)
        # One gene in a hundred decides a tie the other way in single precision.
        assert (off < 1e-3).mean() >= 0.98, name
    for name in ("std_u", "std_s", "pval_steady"):
        off = np.abs(fitted[f"fit_{name}"].to_numpy() - r[f"fit_{name}"])
        # Rounding decides which cells are above a quantile.
        assert (off < 1e-3 * np.abs(r[f"fit_{name}"]) + 1e-5 * np.abs(r[f"fit_{name}"]).max()).mean() >= 0.995, name
    np.testing.assert_allclose(_fitted.var["fit_r2"][genes], r["fit_r2"], atol=1e-5)
    np.testing.assert_array_equal(_fitted.var["velocity_genes"], bits("dyn_genes"))
    cells = r["cells"][:4]
    for layer, name in (("fit_t", "fit_t_cells"), ("velocity", "dyn_velocity")):
        found, expected = np.asarray(_fitted.layers[layer][cells][:, genes]), r[name]
        off = np.abs(found - expected).max(0) / np.abs(expected).max(0)
        assert (off[np.isfinite(off)] < 1e-3).mean() >= 0.97, layer
    assert np.isnan(_fitted.layers["velocity"][:, ~genes]).all()
    assert np.isnan(_fitted.var["fit_alpha"][~genes]).all()


@pytest.mark.slow
def test_graph_embedding_and_time_of_the_dynamical_model_equal_scvelo(_fitted: ad.AnnData) -> None:
    r = recorded()
    found = _fitted.uns["velocity_graph"][r["cells"]]
    assert abs(found - rows("dyn_graph", _fitted.n_obs)).max() < 0.02
    field, expected = _fitted.obsm["velocity_umap"], r["dyn_umap"]
    assert (field * expected).sum() / np.sqrt((field**2).sum() * (expected**2).sum()) > 0.999
    for key in ("latent_time", "velocity_pseudotime", "end_points"):
        assert np.corrcoef(_fitted.obs[key], r[f"dyn_{key}"])[0, 1] > 0.99, key
    # Two regions of roots share one eigenvalue: any mixture of them is as good.
    assert np.corrcoef(_fitted.obs["root_cells"], r["dyn_root_cells"])[0, 1] > 0.7
    loss = _fitted.varm["loss"][bits("fit_genes")]
    assert (loss[:, -1] < loss[:, 0]).mean() > 0.95


@pytest.mark.slow
def test_latent_time_from_given_roots_and_with_another_end(_fitted: ad.AnnData) -> None:
    adata = _fitted.copy()
    adata.obs["mine"] = (adata.obs["clusters"] == "Ductal").astype(float)
    sd.tl.latent_time(adata, root_key="mine", t_max=20.0)
    time = adata.obs["latent_time"]
    assert time.max() == pytest.approx(20, rel=1e-5)
    assert adata.obs["root_cells"].equals(adata.obs["mine"].rename("root_cells"))
    assert time[adata.obs["clusters"] == "Ductal"].median() < 8 < time[adata.obs["clusters"] == "Beta"].median()


RATES = Rates(*(jnp.asarray([x, y]) for x, y in ((3.0, 2.0), (0.7, 0.4), (0.3, 0.9), (1.0, 1.0), (2.5, 4.0))))


@pytest.mark.usefixtures("x64")
def test_solution_solves_the_equations() -> None:
    r = Rates(*(jnp.asarray(np.asarray(x), jnp.float64) for x in RATES))
    t = jnp.asarray([[0.5], [2.0], [3.0], [7.0]]) * jnp.ones(2)
    u, s, alpha = at_time(t, r)
    for gene in range(2):
        a, b, c, _, switch = (float(x[gene]) for x in r)

        def change(time: float, x: np.ndarray, r: tuple[float, ...] = (a, b, c, switch)) -> list[float]:
            return [r[0] * (time < r[3]) - r[1] * x[0], r[1] * x[0] - r[2] * x[1]]

        for i, time in enumerate(np.asarray(t[:, gene])):
            exact = solve_ivp(change, (0, time), [0, 0], rtol=1e-9, atol=1e-10, max_step=0.02).y[:, -1]
            np.testing.assert_allclose([u[i, gene], s[i, gene]], exact, rtol=2e-3)
            assert alpha[i, gene] == (a if time < switch else 0)


@pytest.mark.usefixtures("x64")
def test_times_invert_the_solution() -> None:
    r = Rates(*(jnp.asarray(np.asarray(x), jnp.float64) for x in RATES))
    tau = jnp.asarray([[0.3], [1.1], [2.0]]) * jnp.ones(2)
    u, s = solution(tau, 0.0, 0.0, r.alpha, r.beta, r.gamma)
    np.testing.assert_allclose(time_from_start(u, s, r), tau, rtol=1e-6)
    end = solution(r.switch, 0.0, 0.0, r.alpha, r.beta, r.gamma)
    u, s = solution(tau, *end, 0.0, r.beta, r.gamma)
    np.testing.assert_allclose(time_from_switch(u, s, *end, r), tau, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_rates_that_are_alike_lose_no_digits() -> None:
    tau = jnp.asarray([0.5, 3.0])
    alike, apart = (solution(tau, 2.0, 1.0, 1.5, jnp.asarray(0.4), jnp.asarray(0.4 + gap)) for gap in (0.0, 1e-5))
    np.testing.assert_allclose(alike, apart, rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [1, 3])
def test_simplex_step_equals_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    genes = 40
    target, start = rng.uniform(0.5, 2, (n, genes)), rng.uniform(0.5, 2, (n, genes))
    start[0, 0] = 0
    bend = rng.uniform(0, 40, genes)

    def f(x: jnp.ndarray, wanted: np.ndarray | None = None) -> jnp.ndarray:
        value = ((x - target) ** 2).sum(0) + bend * ((x - 1) ** 4).sum(0) + jnp.sin(30 * x).sum(0) / 10
        # What is not wanted is not looked at.
        return value if wanted is None else jnp.where(wanted, value, -jnp.inf)

    found = nelder_mead_step(f, jnp.asarray(start), 1e-4)
    for g in range(genes):

        def one(x: np.ndarray, g: int = g) -> float:
            return float(((x - target[:, g]) ** 2).sum() + bend[g] * ((x - 1) ** 4).sum() + np.sin(30 * x).sum() / 10)

        expected = minimize(one, start[:, g], method="Nelder-Mead", options={"maxiter": 2}).x
        np.testing.assert_allclose(found[:, g], expected, rtol=1e-9)


def cut(tau: np.ndarray, bound: float) -> np.ndarray:
    """scVelo's: what lies above a jump moves down by its size."""
    new, ordered = tau.copy(), np.sort(tau)
    steps = np.diff(ordered, prepend=0)
    for i in np.flatnonzero(steps > bound):
        new[tau >= ordered[i]] -= steps[i]
    return new


def test_jumps_of_time_are_cut() -> None:
    rng = np.random.default_rng(0)
    tau, off = (rng.uniform(0, 1, (400, 3)).astype(np.float32) for _ in range(2))
    tau[tau > 0.9] += 2
    off[off > 0.5] += 1
    on = rng.uniform(size=(400, 3)) < 0.5
    on[:, 1], on[:, 2] = True, False
    found = _without_jumps(*(jnp.asarray(x) for x in (tau, off, on)))
    for g in range(3):
        sides = (tau[on[:, g], g], off[~on[:, g], g])
        steps = np.concatenate([np.diff(np.sort(x), prepend=0) for x in sides])
        bound = 3 * np.percentile(steps, 99.5)
        for x, side, both in zip(sides, found, (on, ~on), strict=True):
            np.testing.assert_allclose(np.asarray(side)[both[:, g], g], cut(x, bound), atol=1e-6)
    assert np.isfinite(_jumps(tau, on)[0]).any()


def test_upper_mode_equals_scipys_density() -> None:
    rng = np.random.default_rng(0)
    x = np.column_stack([np.r_[rng.normal(1, 0.1, 150), rng.normal(3, 0.05, 150)] / 30, rng.gamma(2, size=300)])
    mask = rng.uniform(size=x.shape) < 0.9
    p, place = _upper_mode(x, mask)
    np.testing.assert_allclose(quantile(x, mask, 30)[1], np.percentile(x[mask[:, 1], 1], 30))
    for g in range(2):
        values = x[mask[:, g], g]
        grid = np.linspace(values.min(), values.max(), 30)
        density = gaussian_kde(values)(grid)
        middle = 13 + density[13:17].argmin()
        peak = middle + density[middle:].argmax()
        assert place[g] == pytest.approx((grid[peak] + grid[min(peak + 1, 29)]) / 2)
        excess = density[peak] - density[middle:].mean()
        assert p[g] == pytest.approx(norm.sf(excess / max(density.std() / np.sqrt(30), 1)), rel=1e-3)
    assert p[0] < 1e-3 < p[1]
