"""RNA velocity against scVelo on the same layers and graph; derivatives and cost are in test_contract."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pytest

import scdiffx as sd
from scdiffx import ops
from velocity_reference import bits, close, normalised, recorded, rows


@pytest.fixture
def pancreas(data_dir: Path) -> ad.AnnData:
    return normalised(data_dir)


@pytest.mark.parametrize(("mode", "name"), [("deterministic", "det"), ("stochastic", "sto")])
def test_steady_state_equals_scvelo(pancreas: ad.AnnData, mode: str, name: str) -> None:
    sd.tl.velocity(pancreas, mode=mode)
    r = recorded()
    genes = bits("velocity_genes")
    np.testing.assert_array_equal(pancreas.var["velocity_genes"], bits(f"{name}_genes"))
    close(pancreas.var["velocity_gamma"].to_numpy(), r[f"{name}_gamma"])
    close(pancreas.var["velocity_r2"].to_numpy(), r[f"{name}_r2"])
    cells = r["cells"][:4]
    close(pancreas.layers["velocity"][cells][:, genes], r[f"{name}_velocity"])
    if name == "sto":
        close(pancreas.layers["variance_velocity"][cells[:2]][:, genes], r["sto_variance"])
        assert not pancreas.layers["variance_velocity"][:, ~genes].any()


@pytest.mark.parametrize(("mode", "name"), [("deterministic", "det"), ("stochastic", "sto")])
def test_graph_and_embedding_equal_scvelo(pancreas: ad.AnnData, mode: str, name: str) -> None:
    sd.tl.velocity(pancreas, mode=mode)
    sd.tl.velocity_graph(pancreas)
    sd.tl.velocity_embedding(pancreas, basis="umap")
    r = recorded()
    for key in ("graph", "graph_neg"):
        expected = rows(f"{name}_{key}", pancreas.n_obs)
        found = pancreas.uns[f"velocity_{key}"][r["cells"]]
        assert abs(found - expected).max() < 1e-4
        assert found.nnz == expected.nnz
    close(pancreas.obs["velocity_self_transition"].to_numpy(), r[f"{name}_self"])
    close(pancreas.obsm["velocity_umap"], r[f"{name}_umap"])
    assert pancreas.uns["velocity_params"] == {
        "mode": mode,
        "fit_offset": False,
        "perc": [5, 95],
        "mode_neighbors": "distances",
        "n_recurse_neighbors": 2,
        "embeddings": ["umap"],
    }


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_graph_by_its_definition(pancreas: ad.AnnData) -> None:
    sd.tl.velocity(pancreas, mode="deterministic")
    sd.tl.velocity_graph(pancreas, n_neighbors=4, sqrt_transform=True)
    genes = pancreas.var["velocity_genes"].to_numpy()
    x, v = (pancreas.layers[layer][:, genes].astype(np.float64) for layer in ("Ms", "velocity"))
    both = pancreas.uns["velocity_graph"] + pancreas.uns["velocity_graph_neg"]
    assert set(np.diff(both.indptr)) <= {3, 4}  # a cosine can be 0
    for cell in (3, 77):
        for other in both[cell].indices:
            root = [np.sign(a) * np.sqrt(np.abs(a)) for a in (x[other] - x[cell], v[cell])]
            assert both[cell, other] == pytest.approx(cosine(*root), abs=1e-5)


def test_three_steps_reach_further_than_two(pancreas: ad.AnnData) -> None:
    sd.tl.velocity(pancreas, mode="deterministic")
    stored = []
    for steps in (1, 2, 3):
        sd.tl.velocity_graph(pancreas, n_neighbors=3, n_recurse_neighbors=steps)
        stored.append(pancreas.uns["velocity_graph"].nnz + pancreas.uns["velocity_graph_neg"].nnz)
    assert stored[0] <= 3 * pancreas.n_obs < stored[1] < stored[2]


def test_moments_that_are_there_are_used(pancreas: ad.AnnData) -> None:
    sd.tl.velocity(pancreas, mode="deterministic")
    again = pancreas.copy()
    del again.obsp["connectivities"], again.layers["spliced"]
    again.layers["Mu"] = 2 * again.layers["Mu"]
    sd.tl.velocity(again, vkey="twice", mode="deterministic")
    np.testing.assert_allclose(again.var["twice_gamma"], 2 * pancreas.var["velocity_gamma"], rtol=1e-5)
    np.testing.assert_allclose(again.layers["twice"], 2 * pancreas.layers["velocity"], rtol=1e-4, atol=1e-5)


def test_highly_variable_genes_and_thresholds_select(pancreas: ad.AnnData) -> None:
    pancreas.var["highly_variable"] = np.arange(2000) % 2 == 0
    sd.tl.velocity(pancreas, mode="deterministic", min_r2=0.3)
    strict = (pancreas.var["velocity_r2"] > 0.3) & (pancreas.var["velocity_gamma"] > 0.01)
    np.testing.assert_array_equal(pancreas.var["velocity_genes"], strict & pancreas.var["highly_variable"])
    sd.tl.velocity(pancreas, mode="deterministic", min_r2=0.3, use_highly_variable=False)
    np.testing.assert_array_equal(pancreas.var["velocity_genes"], strict)


def test_r2_of_all_cells() -> None:
    rng = np.random.default_rng(0)
    ms = jnp.asarray(rng.gamma(2.0, size=(200, 5)))
    mu = 0.4 * ms + jnp.asarray(rng.gamma(1.0, size=(200, 5))) * 0.1
    found = ops.SteadyState(adjusted=True).init(ms, mu)(ms, mu).r2
    slope = (ms * mu).sum(0) / (ms**2).sum(0)
    expected = 1 - ((mu - slope * ms) ** 2).sum(0) / ((mu - mu.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_genes_without_counts_have_no_velocity() -> None:
    rng = np.random.default_rng(0)
    ms = jnp.asarray(rng.gamma(2.0, size=(60, 4))).at[:, 1].set(0)
    mu = 0.5 * ms + 0.01 * ms**2
    result = ops.SteadyState().init(ms, mu)(ms, mu)
    assert not np.asarray(result.velocity)[:, 1].any()
    assert [float(x[1]) for x in (result.gamma, result.r2, result.genes)] == [0, 0, 0]


def test_the_few_best_genes_are_taken_where_none_fits() -> None:
    rng = np.random.default_rng(0)
    ms, mu = (jnp.asarray(rng.gamma(2.0, size=(60, 30))) for _ in range(2))
    result = ops.SteadyState(least=(2.0, 0.01)).init(ms, mu)(ms, mu)
    np.testing.assert_array_equal(result.genes, result.r2 > np.percentile(result.r2, 80))


def test_a_plan_computes_what_the_call_does(pancreas: ad.AnnData) -> None:
    plan = sd.plan(pancreas)
    planned = pancreas.copy()
    for target in (plan, planned):
        sd.tl.velocity(target, mode="stochastic")
        sd.tl.velocity_graph(target)
        sd.tl.velocity_embedding(target, basis="umap")
    plan.apply()
    assert pancreas.uns["velocity_params"] == planned.uns["velocity_params"]
    np.testing.assert_allclose(pancreas.obsm["velocity_umap"], planned.obsm["velocity_umap"], rtol=1e-3, atol=1e-5)
    for layer in ("Ms", "velocity", "variance_velocity"):
        np.testing.assert_allclose(pancreas.layers[layer], planned.layers[layer], rtol=1e-4, atol=1e-3)


def test_unusable_input_is_refused_and_nothing_is_written(pancreas: ad.AnnData) -> None:
    pancreas = pancreas[:50, :40].copy()
    keys = set(pancreas.layers), set(pancreas.var), set(pancreas.uns)

    def refuses(error: type[Exception], match: str, adata: ad.AnnData = pancreas, **settings: object) -> None:
        with pytest.raises(error, match=match):
            sd.tl.velocity(adata, **{"mode": "deterministic", **settings})
        assert (set(pancreas.layers), set(pancreas.var), set(pancreas.uns)) == keys

    refuses(ValueError, "mode='best'.*'stochastic'", mode="best")
    refuses(ValueError, "perc=101", perc=101)
    refuses(ValueError, r"'absent'.*Run `sc.pp.neighbors` first", neighbors_key="absent")
    refuses(ValueError, r"'absent'.*Run `sc.pp.neighbors` first", neighbors_key="absent", mode="stochastic")
    for layer in ("spliced", "unspliced"):
        without = pancreas.copy()
        del without.layers[layer]
        refuses(KeyError, f"'{layer}' is not in `adata.layers`", without)
        for value, words in ((-1.0, "negative"), (np.nan, "not finite")):
            poisoned = pancreas.copy()
            poisoned.layers[layer] = poisoned.layers[layer].toarray()
            poisoned.layers[layer][3, 5] = value
            where = f"cell '{pancreas.obs_names[3]}' and gene '{pancreas.var_names[5]}' is {words}"
            refuses(ValueError, where, poisoned)


def test_raw_counts_are_pointed_out(pancreas: ad.AnnData) -> None:
    adata = pancreas[:60, :80].copy()
    adata.layers["spliced"] = adata.layers["spliced"].ceil()
    with pytest.warns(UserWarning, match=r"layers\['spliced'\] holds integers") as caught:
        sd.tl.velocity(adata, mode="deterministic", min_r2=-9)
    assert caught[0].filename == __file__
