"""Attribution: correlations against scipy, gradients against finite differences of the plan, and what is left out."""

from __future__ import annotations

import functools

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import scdiffx as sd
from helpers import QUICK, contents, pbmc_counts
from scdiffx._core.counts import values_at
from scdiffx._program import Program
from scdiffx._slots import Obs, Obsm, X
from scdiffx._steps import Plan
from scdiffx.tl._attribution import probes


def logs(n_cells: int = 150, n_genes: int = 90) -> ad.AnnData:
    adata = pbmc_counts(n_cells, n_genes)
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    adata.obs["half"] = np.where(np.arange(n_cells) % 2 == 0, "even", "odd/rest")
    return adata


def ordered(adata: ad.AnnData) -> Plan:
    """A plan from logarithms to pseudotime."""
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=6)
    sd.pp.neighbors(plan, n_neighbors=8)
    sd.tl.pseudotime(plan, n_dcs=4, root=0)
    return plan


def smoothed(adata: ad.AnnData) -> Plan:
    """A plan from logarithms to two imputed genes: as little to compile as there is where cells depend on others."""
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=6)
    sd.pp.magic(plan, [adata.var_names[3], adata.var_names[17]], knn=4, t=2)
    return plan


def test_correlations_equal_scipys_in_each_group() -> None:
    adata = logs()
    sd.pp.pca(adata, n_comps=6)
    sd.tl.attribution(adata, "X_pca", column=1, groupby="half")
    table = adata.varm["attribution_X_pca_1"]
    assert list(table) == ["even_value", "even_qval", "odd|rest_value", "odd|rest_qval"]
    x, y = adata.X.toarray().astype(np.float64), adata.obsm["X_pca"][:, 1].astype(np.float64)
    for name, first in (("even", 0), ("odd|rest", 1)):
        with np.errstate(invalid="ignore"):
            expected = np.nan_to_num([np.corrcoef(column[first::2], y[first::2])[0, 1] for column in x.T])
        np.testing.assert_allclose(table[f"{name}_value"], expected, atol=1e-7)
        p = 2 * stats.norm.sf(np.abs(np.arctanh(expected)) * np.sqrt(75 - 3))
        np.testing.assert_allclose(table[f"{name}_qval"], stats.false_discovery_control(p), rtol=1e-5)


@pytest.mark.slow
def test_fates_are_known_by_the_names_of_their_states() -> None:
    adata = logs()
    plan = ordered(adata)
    states = {"late": list(adata.obs_names[90:100]), "one": [adata.obs_names[2]]}
    sd.tl.fate_probabilities(plan, states)
    sd.tl.attribution(plan, "lineages_fwd", column="late")
    of_plan = adata.varm.pop("attribution_lineages_fwd_late")
    with pytest.raises(KeyError, match=r"column='absent'.*'late', 'one'"):
        sd.tl.attribution(plan, "lineages_fwd", column="absent")
    plan.apply()
    sd.tl.attribution(adata, "lineages_fwd", column="late")
    np.testing.assert_allclose(of_plan, adata.varm["attribution_lineages_fwd_late"], rtol=1e-4, atol=1e-6)
    with pytest.raises(KeyError, match=r"column='absent'.*'late', 'one'"):
        sd.tl.attribution(adata, "lineages_fwd", column="absent")


def test_cells_with_an_infinite_target_are_left_out() -> None:
    adata = logs()
    adata.obs["time"] = np.random.default_rng(0).normal(size=150)
    adata.obs.iloc[20:150, adata.obs.columns.get_loc("time")] = np.inf
    few = adata[:20].copy()
    for data in (adata, few):
        sd.tl.attribution(data, "time")
    left, right = (data.varm["attribution_time"] for data in (adata, few))
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_a_component_is_its_loading() -> None:
    adata = logs()
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=6)
    before = contents(adata)
    copied = sd.tl.attribution(plan, "X_pca", column=2, method="gradient", n_probes=2, copy=True)
    assert set(contents(adata)) == set(before)
    reduced = adata.copy()
    sd.pp.pca(reduced, n_comps=6)
    table = copied.varm["attribution_X_pca_2"]
    found = np.asarray((adata.X > 0).sum(0)).ravel() > 0
    # A score depends on the cell's own expression alone, so that the probes leave no noise.
    np.testing.assert_allclose(table["all_value"][found], reduced.varm["PCs"][found, 2], atol=1e-5)
    assert copied.uns["attribution_X_pca_2"]["params"]["method"] == "gradient"
    sd.tl.attribution(plan, "X_pca", column=2)
    np.testing.assert_allclose(table["all_correlation"], adata.varm["attribution_X_pca_2"]["all_value"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "form"),
    [("X_magic", "sparse"), ("X_magic", "dense"), ("dpt_pseudotime", "sparse")],
)
def test_gradients_equal_finite_differences_of_the_plan(output: str, form: str) -> None:
    adata = logs(90, 40)
    adata.X = adata.X.astype(np.float64)
    if form == "dense":
        adata.X = adata.X.toarray()
    plan, column = (smoothed(adata), 1) if output == "X_magic" else (ordered(adata), None)
    settings = {"column": column, "key_added": "found", "groupby": "half", "n_probes": 1, "rng": 5}
    sd.tl.attribution(plan, output, method="gradient", **settings)
    table = adata.varm["found"]
    dense = adata.X.toarray() if form == "sparse" else adata.X
    signs, slot = probes(90, 1, 5)[0], Obs(output) if column is None else Obsm(output)
    with jax.enable_x64(True):
        program, _ = Program.between(plan, X(), slot)
        start = program.frozen[X()]
        values = start if form == "dense" else start.data

        @functools.partial(jax.jit, compiler_options=QUICK)
        def weighed(values: jax.Array) -> jax.Array:
            x = values if form == "dense" else start.with_data(values)
            y = program.evaluate(program.ops, {**program.frozen, X(): x})[slot]
            return ((y if column is None else y[:, column]) * signs).sum()

        for gene in (3, 17, 30):
            for name, first in (("even", 0), ("odd|rest", 1)):
                step = np.zeros_like(dense)
                step[first::2, gene] = signs[first::2] * (dense[first::2, gene] != 0)
                if form == "sparse":
                    step = np.asarray(values_at(start, jnp.asarray(step)))
                both = [float(weighed(values + sign * 1e-6 * jnp.asarray(step))) for sign in (1, -1)]
                expected = (both[0] - both[1]) / 2e-6 / max((dense[first::2, gene] != 0).sum(), 1)
                assert table[f"{name}_value"].iloc[gene] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_sensitivity_is_the_pattern_of_the_gradient() -> None:
    adata = logs()
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=6)
    settings = {"column": 0, "groupby": "half", "groups": ["even"], "key_added": "found"}
    sd.tl.attribution(plan, "X_pca", method="gradient", **settings)
    weight = adata.varm["found"]["even_value"].to_numpy()
    assert np.count_nonzero(weight) > 40
    sd.tl.attribution(plan, "X_pca", method="sensitivity", **settings)
    x = adata.X.toarray().astype(np.float64)[::2]
    centred = x - x.mean(0)
    spread = x.std(0)
    expected = np.where(spread > 0, centred.T @ (centred @ weight) / 75 / np.where(spread > 0, spread, 1), 0)
    found = adata.varm["found"]["even_value"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
def test_the_sensitivity_of_a_fate_equals_finite_differences() -> None:
    adata = logs(60, 30)
    adata.X = adata.X.toarray().astype(np.float64)
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=4)
    sd.pp.neighbors(plan, n_neighbors=8)
    sd.tl.pseudotime(plan, n_dcs=4, root=0)
    sd.tl.fate_probabilities(plan, {"a": adata.obs_names[20:25], "b": adata.obs_names[40:45]})
    sd.tl.attribution(plan, "lineages_fwd", column=1, method="sensitivity", n_probes=1, rng=5)
    table, signs, slot = adata.varm["attribution_lineages_fwd_1"], probes(60, 1, 5)[0], Obsm("lineages_fwd")
    with jax.enable_x64(True):
        program, found = Program.between(plan, X(), slot)
        start = program.frozen[X()]

        @functools.partial(jax.jit, compiler_options=QUICK)
        def weighed(x: jax.Array) -> jax.Array:
            return (program.evaluate(program.ops, {**program.frozen, X(): x})[slot][:, 1] * signs).sum()

        weight = np.zeros(30)
        for gene in np.flatnonzero((adata.X != 0).any(0)):
            step = np.zeros_like(adata.X)
            step[:, gene] = signs * (adata.X[:, gene] != 0)
            both = [float(weighed(start + sign * 1e-5 * jnp.asarray(step))) for sign in (1, -1)]
            weight[gene] = (both[0] - both[1]) / 2e-5 / (adata.X[:, gene] != 0).sum()
    assert np.abs(weight).max() > 0.01
    centred, spread = adata.X - adata.X.mean(0), np.maximum(adata.X.std(0), 1e-12)
    expected = centred.T @ (centred @ weight) / 60 / spread
    np.testing.assert_allclose(table["all_value"], expected, atol=1e-5 * np.abs(expected).max())
    fate = np.asarray(found[slot])[:, 1]
    expected = centred.T @ (fate - fate.mean()) / 60 / spread / fate.std()
    np.testing.assert_allclose(table["all_correlation"], expected, atol=1e-7)


@pytest.mark.slow
def test_what_a_later_step_overwrites_does_not_count() -> None:
    adata = logs(60, 40)
    adata.obsm["X_given"] = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=3)
    for use_rep in ("X_pca", "X_given"):
        sd.tl.kmeans(plan, 2, use_rep=use_rep, n_init=1, key_added="a")
    with pytest.raises(ValueError, match="does not depend on"):
        sd.tl.attribution(plan, "a_probabilities", column=0, method="gradient")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": "absent"}, KeyError, r"target='absent'.*'half'"),
        ({"target": "half"}, TypeError, "target='half'"),
        ({"target": "X_pca"}, KeyError, "column=None of target='X_pca': it has 6"),
        ({"target": "X_pca", "column": 6}, KeyError, "column=6"),
        ({"target": "X_pca", "column": "CD4"}, KeyError, "column='CD4'"),
        ({"column": 0, "method": "best"}, ValueError, r"method='best'.*'sensitivity'"),
        ({"column": 0, "method": "gradient"}, ValueError, "needs a plan"),
        ({"column": 0, "n_probes": 0}, ValueError, "n_probes=0"),
        ({"column": 0, "groups": ["even"]}, ValueError, "needs `groupby=`"),
        ({"column": 0, "groupby": "absent"}, KeyError, "groupby='absent'"),
        ({"column": 0, "groupby": "half", "groups": ["none"]}, KeyError, r"'none'.*'even'"),
        ({"column": 0, "groupby": "lonely"}, ValueError, "'one' has 1 cells"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = logs(60, 40)
    sd.pp.pca(adata, n_comps=6)
    adata.obs["lonely"] = np.where(np.arange(60) == 0, "one", "many")
    before = set(contents(adata))
    with pytest.raises(error, match=message):
        sd.tl.attribution(adata, **({"target": "X_pca"} | settings))
    assert set(contents(adata)) == before


def test_a_target_that_rests_on_no_expression_is_refused() -> None:
    adata = logs()
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=6)
    adata.obs["day"] = np.arange(150.0)
    with pytest.raises(ValueError, match="does not depend on"):
        sd.tl.attribution(plan, "day", method="gradient")
    sd.tl.attribution(plan, "day")
    assert np.isfinite(adata.varm["attribution_day"]).all(axis=None)
    assert "X_pca" not in adata.obsm
