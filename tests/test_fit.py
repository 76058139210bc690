"""Plans and fits: recording, optimising, choosing, saving, applying to new cells."""

from __future__ import annotations

import json

import numpy as np
import optax
import pytest

import scdiffx as sd
from helpers import compilations, pbmc_counts
from scdiffx._slots import Obsm, Var

LEARN = ["highly_variable_genes.shift", "neighbors.bandwidth"]


@pytest.fixture(scope="module")
def data(_paul15):
    """360 cells and 300 genes, logged, with an invented time that follows erythroid genes, and labels."""
    adata = _paul15[::7].copy()[:360].copy()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=300, subset=True)
    adata.obs["day"] = np.asarray(adata[:, adata.var_names[:40]].X.sum(1)).ravel()
    adata.obs["label"] = (adata.obs["day"] > adata.obs["day"].median()).map({True: "late", False: "early"})
    del adata.uns["log1p"]
    return adata


def make_plan(adata):
    plan = sd.plan(adata)
    sd.pp.highly_variable_genes(plan, n_top_genes=100, soft=True)
    sd.pp.pca(plan, n_comps=10)
    sd.pp.neighbors(plan, n_neighbors=10)
    sd.tl.pseudotime(plan, root=0)
    return plan


@pytest.fixture(scope="module")
def holdout(data):
    return np.random.default_rng(0).random(data.n_obs) < 0.25


def run_fit(adata, holdout, rate=0.1, steps=8):
    return sd.fit(
        make_plan(adata),
        sd.losses.correlation("dpt_pseudotime", "day"),
        learn=LEARN,
        optimizer=optax.adam(rate),
        n_steps=steps,
        refresh_every=4,
        holdout=holdout,
        test=None,
        progress=False,
    )


@pytest.fixture(scope="module")
def fitted(data, holdout):
    return run_fit(data.copy(), holdout)


def test_a_plan_records_and_leaves_the_data_alone(data):
    before = (set(data.obs), set(data.var), set(data.obsm), set(data.uns))
    plan = make_plan(data)
    assert [step.name for step in plan.steps] == ["highly_variable_genes", "pca", "neighbors", "pseudotime"]
    assert (set(data.obs), set(data.var), set(data.obsm), set(data.uns)) == before
    with pytest.raises(KeyError, match="neither the AnnData nor an earlier step"):
        sd.tl.diffmap(sd.plan(data))
    with pytest.raises(ValueError, match="copy=True"):
        sd.pp.pca(plan, copy=True)


def test_an_unfitted_plan_equals_the_calls(data):
    direct = data.copy()
    sd.pp.highly_variable_genes(direct, n_top_genes=100)
    sd.pp.pca(direct, n_comps=10)
    sd.pp.neighbors(direct, n_neighbors=10)
    sd.tl.pseudotime(direct, root=0)
    plan = sd.plan(data)
    sd.pp.highly_variable_genes(plan, n_top_genes=100)
    sd.pp.pca(plan, n_comps=10)
    sd.pp.neighbors(plan, n_neighbors=10)
    sd.tl.pseudotime(plan, root=0)
    planned = plan.apply(copy=True)
    assert (planned.var["highly_variable"] == direct.var["highly_variable"]).all()
    np.testing.assert_allclose(planned.obsm["X_pca"], direct.obsm["X_pca"], atol=1e-4)
    np.testing.assert_allclose(planned.obs["dpt_pseudotime"], direct.obs["dpt_pseudotime"], atol=1e-4)


def test_the_fit_starts_at_the_defaults_and_lowers_the_loss(fitted, holdout, data):
    unfitted = make_plan(data).apply(copy=True)
    r = np.corrcoef(unfitted.obs["dpt_pseudotime"][~holdout], data.obs["day"][~holdout])[0, 1]
    assert fitted.history["train"][0] == pytest.approx(1 - r, abs=2e-3)
    assert fitted.losses["train_before"] == pytest.approx(fitted.history["train"][0], abs=1e-5)
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    assert fitted.history["step"] == list(range(8))
    assert fitted.adopted == (fitted.losses["holdout_after"] < fitted.losses["holdout_before"])


def test_only_what_was_asked_for_is_learned(fitted):
    assert fitted.params["highly_variable_genes.temperature"] == pytest.approx(0.1)
    assert np.abs(fitted.params["pca.shift"]).max() == 0
    if fitted.adopted:
        assert float(fitted.params["neighbors.bandwidth"]) != 1
        assert np.abs(fitted.params["highly_variable_genes.shift"]).max() > 0


def test_a_bad_fit_falls_back_to_the_defaults(data, holdout):
    fitted = run_fit(data.copy(), holdout, rate=30.0, steps=2)
    if not fitted.adopted:
        assert float(fitted.params["neighbors.bandwidth"]) == pytest.approx(1)
        assert np.abs(fitted.params["highly_variable_genes.shift"]).max() == 0
    assert fitted.losses["holdout_after"] < fitted.losses["holdout_before"] or not fitted.adopted


def test_held_out_targets_never_reach_the_gradient(data, holdout, fitted):
    spoiled = data.copy()
    invented = np.random.default_rng(1).normal(size=data.n_obs)
    spoiled.obs["day"] = np.where(holdout, invented, data.obs["day"])
    again = run_fit(spoiled, holdout)
    assert again.history["train"] == fitted.history["train"]
    assert again.history["holdout"] != fitted.history["holdout"]


def test_saved_fits_give_the_same_numbers_on_old_and_new_cells(fitted, data, tmp_path):
    first = fitted.apply(data.copy(), copy=True)
    fitted.save(tmp_path / "fit")
    loaded = sd.Fitted.load(tmp_path / "fit")
    second = loaded.apply(data.copy(), copy=True)
    for slot in (Obsm("X_pca"), Var("gene_weight")):
        np.testing.assert_array_equal(slot.read(first), slot.read(second))
    np.testing.assert_array_equal(first.obs["dpt_pseudotime"], second.obs["dpt_pseudotime"])
    new = data[: data.n_obs // 2].copy()
    loaded.apply(new)
    assert np.isfinite(new.obsm["X_pca"]).all()
    with pytest.raises(ValueError, match="genes"):
        loaded.apply(data[:, :100].copy())
    with pytest.raises(ValueError, match="pass the AnnData"):
        loaded.apply()


@pytest.mark.slow
def test_a_projection_does_not_depend_on_which_cells_come_along(data):
    plan = sd.plan(data.copy())
    sd.pp.pca(plan, n_comps=5)
    fitted = sd.fit(plan, sd.losses.cross_entropy("X_pca", "label"), n_steps=3, progress=False)
    whole = fitted.apply(copy=True)
    half = fitted.apply(data[::2].copy(), copy=True)
    np.testing.assert_allclose(half.obsm["X_pca"], whole.obsm["X_pca"][::2], atol=1e-4)


def test_broken_files_are_refused(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved fit"):
        sd.Fitted.load(tmp_path)
    fitted.save(tmp_path)
    record = json.loads((tmp_path / "fit.json").read_text())
    (tmp_path / "fit.json").write_text(json.dumps(record | {"calls": [["os.system", {"command": "true"}]]}))
    with pytest.raises(ValueError, match=r"'os.system' is no step"):
        sd.Fitted.load(tmp_path).apply(fitted._plan.adata.copy())
    (tmp_path / "fit.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        sd.Fitted.load(tmp_path)


def test_labels_fit_a_projection_with_a_readout(data):
    plan = sd.plan(data.copy())
    sd.pp.highly_variable_genes(plan, n_top_genes=100, soft=True)
    sd.pp.pca(plan, n_comps=5)
    plan.adata.obs.loc[plan.adata.obs_names[:30], "label"] = np.nan
    loss = sd.losses.cross_entropy("X_pca", "label") + 0.01 * sd.losses.l1("gene_weight")
    fitted = sd.fit(plan, loss, n_steps=10, holdout=None, test=None, progress=False)
    assert fitted.adopted
    assert fitted.losses["train_after"] < fitted.losses["train_before"]


def test_structure_that_is_found_anew_compiles_nothing_anew():
    """The temperature starts as a number of Python, and would be compiled for once more as an array."""
    adata = pbmc_counts(80, 50)
    sd.pp.pca(adata, n_comps=5)
    sd.pp.neighbors(adata, n_neighbors=8)
    plan = sd.plan(adata)
    sd.tl.leiden(plan)
    with compilations() as programs:
        fitted = sd.fit(plan, sd.losses.modularity("leiden_probabilities"), n_steps=2, holdout=None, progress=False)
    assert set(fitted.params) == {"leiden.temperature"}
    assert programs.count("jit(_losses)") == programs.count("jit(called)") == 1
    with compilations() as programs:
        fitted.apply()
    assert "jit(called)" not in programs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"learn": "nope"}, ValueError, "names no learnable parameter"),
        ({"n_steps": 0}, ValueError, "n_steps"),
        ({"refresh_every": -1}, ValueError, "refresh_every"),
        ({"patience": 0}, ValueError, "patience"),
        ({"holdout": 1.5}, ValueError, "between 0 and 1"),
        ({"holdout": "nope"}, KeyError, "nope"),
        ({"holdout": np.zeros(3, bool)}, ValueError, "boolean"),
        ({"holdout": 0.5, "test": 0.5}, ValueError, "no cell is left"),
        ({"test": "nope"}, KeyError, "nope"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 10_000}, ValueError, "training cells"),
        ({"schedules": {"pca.nope": lambda step: 1.0}, "learn": "pca"}, ValueError, "names no learnable parameter"),
        ({"schedules": {"pca.scale": lambda step: -1.0}}, ValueError, "greater than 0"),
        ({"test": sd.losses.cross_entropy("X_pca", "label")}, ValueError, "learns a readout"),
    ],
)
def test_bad_arguments_name_themselves(data, arguments, error, message):
    plan = sd.plan(data)
    sd.pp.pca(plan, n_comps=3)
    with pytest.raises(error, match=message):
        sd.fit(plan, sd.losses.cross_entropy("X_pca", "label"), progress=False, **arguments)


def test_wrong_objects_are_refused(data):
    with pytest.raises(TypeError, match="AnnData"):
        sd.plan(3)
    with pytest.raises(TypeError, match=r"sd\.plan"):
        sd.fit(data, sd.losses.l1("X_pca"))
    plan = sd.plan(data)
    with pytest.raises(ValueError, match="empty"):
        sd.fit(plan, sd.losses.l1("X_pca"))
    sd.pp.pca(plan, n_comps=3)
    with pytest.raises(TypeError, match=r"sd\.losses"):
        sd.fit(plan, "correlation")
    with pytest.raises(KeyError, match="nope"):
        sd.fit(plan, sd.losses.l1("nope"), progress=False)


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_place(data, monkeypatch):
    plan = sd.plan(data)
    sd.pp.pca(plan, n_comps=3)
    explode = optax.stateless(lambda updates, _: {k: _blow_up(v) for k, v in updates.items()})
    with pytest.raises(FloatingPointError, match="at step 1, in pca"):
        sd.fit(plan, sd.losses.cross_entropy("X_pca", "label"), optimizer=explode, n_steps=3, progress=False)


def _blow_up(tree):
    import jax

    return jax.tree.map(lambda x: x * np.inf, tree)


@pytest.mark.slow
def test_gradient_flow_names_dead_parameters(data):
    plan = make_plan(data)
    flow = sd.metrics.gradient_flow(plan, sd.losses.correlation("dpt_pseudotime", "day"))
    assert flow.dead == []
    assert flow.exploding == []
    assert list(flow.steps) == ["highly_variable_genes", "pca", "neighbors", "pseudotime"]
    assert all(size > 0 for size in flow.steps.values())
    assert all(cosine > 0.9999 for cosine in flow.cosine.values()), flow.cosine
    assert all(error < 0.01 for error in flow.error.values()), flow.error
    # The loss stops at the weights: nothing behind them can be reached.
    flow = sd.metrics.gradient_flow(plan, sd.losses.l1("gene_weight"), n_directions=1)
    assert set(flow.dead) == {"pca.shift", "pca.scale", "neighbors.bandwidth"}
    assert all(np.isnan(flow.cosine[name]) for name in flow.dead)


def test_gradient_flow_tells_right_derivatives_from_wrong_ones(data, monkeypatch):
    from scdiffx import ops

    plan = sd.plan(data)
    sd.pp.pca(plan, n_comps=3)
    loss = sd.losses.cross_entropy("X_pca", "label")
    flow = sd.metrics.gradient_flow(plan, loss)
    assert flow.cosine["pca.shift"] > 0.9999
    assert flow.error["pca.shift"] < 1e-4
    right = ops.PCA.__call__

    def wrong(self, *args):
        import jax

        # Half of the derivative by way of the scores is lost.
        result = right(self, *args)
        return result._replace(scores=0.5 * result.scores + 0.5 * jax.lax.stop_gradient(result.scores))

    monkeypatch.setattr(ops.PCA, "__call__", wrong)
    flow = sd.metrics.gradient_flow(plan, loss)
    assert flow.error["pca.shift"] == pytest.approx(0.5, abs=1e-3)
    assert sd.metrics.gradient_flow(plan, loss, n_directions=0).cosine == {}
    with pytest.raises(ValueError, match="n_directions"):
        sd.metrics.gradient_flow(plan, loss, n_directions=-1)
    with pytest.raises(ValueError, match="step"):
        sd.metrics.gradient_flow(plan, loss, step=0)
