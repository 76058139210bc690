"""How a fit goes about it: splits, minibatches, schedules, checkpoints, other losses to judge by, controls."""

from __future__ import annotations

import numpy as np
import optax
import pandas as pd
import pytest

import scdiffx as sd
from helpers import pbmc_counts
from scdiffx._fit._controls import direct_predictor
from scdiffx._fit._split import three_ways


@pytest.fixture(scope="module")
def data():
    """Blood cells with types, and molecules dealt into three layers."""
    adata = pbmc_counts(400, 300)
    adata.obs["label"] = adata.obs["cell_type"].astype(str).where(np.arange(400) % 7 > 0)
    sd.pp.split_counts(adata)
    return adata


def projection(adata, layer=None):
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan, target_sum=1e3, layer=layer)
    sd.pp.log1p(plan, layer=layer)
    sd.pp.highly_variable_genes(plan, n_top_genes=80, soft=True, layer=layer)
    sd.pp.pca(plan, n_comps=4, layer=layer)
    return plan


LABELS = sd.losses.cross_entropy("X_pca", "label")
QUIET = {"learn": ["pca.shift", "highly_variable_genes.shift"], "progress": False}


def test_cells_are_split_three_ways_label_by_label(data):
    split = three_ways(data, LABELS, 0.2, 0.1, seed=0)
    assert not (split.holdout & split.test).any()
    assert ((split.train.astype(int) + split.holdout + split.test) == 1).all()
    assert split.holdout.sum() == pytest.approx(80, abs=1)
    assert split.test.sum() == pytest.approx(40, abs=1)
    groups = data.obs["label"].fillna("none")
    share = pd.Series(split.holdout).groupby(groups.to_numpy()).mean()
    size = groups.value_counts()
    assert (share - 0.2).abs().mul(size).max() <= 1.01
    other = three_ways(data, LABELS, 0.2, 0.1, seed=1)
    assert (other.holdout != split.holdout).any()
    mask = np.arange(400) < 50
    given = three_ways(data, LABELS, 0.2, mask, seed=0)
    assert not (given.holdout & mask).any()
    with pytest.raises(ValueError, match="share 50 cells"):
        three_ways(data, LABELS, mask, mask, seed=0)


def test_test_cells_are_judged_and_take_no_part(data):
    spoiled = data.copy()
    split = three_ways(data, LABELS, 0.2, 0.2, seed=3)
    labels = spoiled.obs["label"].to_numpy(copy=True)
    labels[split.test & spoiled.obs["label"].notna().to_numpy()] = "CD19+ B"
    spoiled.obs["label"] = labels
    masks = {"holdout": split.holdout, "test": split.test}
    one = sd.fit(projection(data), LABELS, n_steps=4, **masks, **QUIET)
    two = sd.fit(projection(spoiled), LABELS, n_steps=4, **masks, **QUIET)
    assert one.losses["test_after"] != two.losses["test_after"]
    np.testing.assert_allclose(one.history["train"], two.history["train"], rtol=1e-5)
    np.testing.assert_allclose(one.history["holdout"], two.history["holdout"], rtol=1e-5)
    drawn = sd.fit(projection(data), LABELS, n_steps=4, rng=3, **QUIET)
    assert drawn.losses == one.losses


def test_cells_without_labels_cannot_choose_and_have_no_test_loss(data):
    unknown = data.obs["label"].isna().to_numpy()
    fitted = sd.fit(projection(data), LABELS, n_steps=1, test=unknown, **QUIET)
    assert np.isnan(fitted.losses["test_before"])
    grid = sd.grid(projection(data), LABELS, {"pca.n_comps": [3]}, test=unknown, progress=False)
    assert np.isfinite(grid.table["holdout"]).all()
    assert fitted.report(grid)["test"].isna().all()
    with pytest.raises(ValueError, match="no held-out cell has a value in 'label'"):
        sd.fit(projection(data), LABELS, n_steps=1, holdout=unknown, **QUIET)


def test_minibatches_of_all_cells_are_the_whole(data):
    """One batch an epoch, of all training cells, takes the steps of a fit without minibatches."""
    train = int(three_ways(data, LABELS, 0.2, 0.2, seed=0).train.sum())
    whole = sd.fit(projection(data), LABELS, n_steps=6, refresh_every=0, **QUIET)
    batched = sd.fit(projection(data), LABELS, n_steps=6, batch_size=train, refresh_every=0, **QUIET)
    assert batched.history["step"] == [0, 6]
    assert batched.history["train"][0] == pytest.approx(whole.history["train"][0], rel=1e-5)
    assert batched.history["holdout"][-1] < batched.history["holdout"][0]
    last = sd.fit(projection(data), LABELS, n_steps=7, refresh_every=0, **QUIET).history["train"][-1]
    assert batched.history["train"][1] == pytest.approx(last, rel=1e-4)


def test_small_minibatches_lower_the_loss(data):
    fitted = sd.fit(projection(data), LABELS, n_steps=50, batch_size=64, **QUIET)
    assert fitted.adopted
    assert fitted.history["step"] == [0, 25, 50]
    assert fitted.losses["train_after"] < fitted.losses["train_before"] - 0.2


def test_minibatches_are_refused_where_cells_depend_on_each_other(data):
    plan = projection(data)
    sd.tl.kmeans(plan, n_clusters=3)
    with pytest.raises(ValueError, match=r"\['kmeans'\] look at all cells at once \(those that do not: \['highly_var"):
        sd.fit(plan, sd.losses.entropy("kmeans_probabilities"), batch_size=50, **QUIET)
    with pytest.raises(ValueError, match=r"\['BatchMixing'\] look at other cells, so batches reach up to 400 of 400"):
        sd.fit(projection(data), sd.losses.batch_mixing("X_pca", "label"), batch_size=50, **QUIET)


def test_scheduled_parameters_follow_their_schedule(data):
    plan = projection(data)
    falling = optax.linear_schedule(0.4, 0.1, 5)
    fitted = sd.fit(
        plan, LABELS, n_steps=6, schedules={"highly_variable_genes.temperature": falling}, refresh_every=0, **QUIET
    )
    best = fitted.history["step"][int(np.argmin(fitted.history["holdout"]))]
    assert fitted.adopted
    assert fitted.params["highly_variable_genes.temperature"] == pytest.approx(float(falling(best)), rel=1e-5)


def test_any_optimiser_with_whatever_it_is_chained_with(data):
    """Clipped to next to nothing, gradients move next to nothing."""
    tiny = optax.chain(optax.clip_by_global_norm(1e-6), optax.sgd(optax.constant_schedule(1.0)))
    fitted = sd.fit(projection(data), LABELS, optimizer=tiny, n_steps=3, **QUIET)
    assert fitted.history["train"] == pytest.approx([fitted.history["train"][0]] * 3, abs=1e-5)


@pytest.mark.parametrize("batch_size", [None, 100])
def test_a_fit_goes_on_from_its_checkpoint(data, tmp_path, batch_size):
    settings = {**QUIET, "refresh_every": 3, "batch_size": batch_size}
    whole = sd.fit(projection(data), LABELS, n_steps=8, **settings)
    # Left off after five steps, two after its state was saved.
    sd.fit(projection(data), LABELS, n_steps=5, checkpoint=tmp_path / "fit", **settings)
    resumed = sd.fit(projection(data), LABELS, n_steps=8, checkpoint=tmp_path / "fit", **settings)
    assert resumed.history == whole.history
    for name, value in whole.params.items():
        np.testing.assert_array_equal(resumed.params[name], value)
    with pytest.raises(ValueError, match="state of another fit"):
        sd.fit(projection(data), LABELS, n_steps=8, rng=1, checkpoint=tmp_path / "fit", **settings)


def test_a_checkpoint_remembers_the_best_step(data, tmp_path):
    """Downhill for two steps, then uphill: what is kept lies before the state was saved."""
    settings = {**QUIET, "refresh_every": 3, "optimizer": optax.adam(lambda count: 0.02 - 0.04 * (count >= 2))}
    whole = sd.fit(projection(data), LABELS, n_steps=6, **settings)
    assert int(np.argmin(whole.history["holdout"])) == 2
    sd.fit(projection(data), LABELS, n_steps=4, checkpoint=tmp_path / "fit", **settings)
    resumed = sd.fit(projection(data), LABELS, n_steps=6, checkpoint=tmp_path / "fit", **settings)
    np.testing.assert_array_equal(resumed.params["pca.shift"], whole.params["pca.shift"])


@pytest.mark.slow
def test_molecules_choose_and_judge(data):
    """A loss on other molecules in place of held-out cells."""
    adata = data.copy()
    sd.pp.pca(adata, n_comps=10, layer="fit")
    sd.pp.neighbors(adata, n_neighbors=8)
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan, target_sum=1e3, layer="fit")
    sd.pp.magic(plan, layer="fit", t=2)
    losses = {name: sd.losses.molecular_cross_validation("magic", name) for name in ("choose", "test")}
    fitted = sd.fit(
        plan, losses["choose"], learn="magic", n_steps=3, holdout=losses["choose"], test=losses["test"], progress=False
    )
    # The same loss of the same values, in two compiled programs.
    np.testing.assert_allclose(fitted.history["train"], fitted.history["holdout"], rtol=1e-5)
    assert fitted.losses["test_before"] != fitted.losses["holdout_before"]
    assert fitted.losses["test_after"] < fitted.losses["test_before"]


def test_controls_stand_beside_the_fit(data):
    plan = projection(data)
    fitted = sd.fit(plan, LABELS, n_steps=5, **QUIET)
    grid = sd.grid(
        plan, LABELS, {"highly_variable_genes.n_top_genes": [20, 200], "pca.n_comps": [4, 8]}, progress=False
    )
    assert len(grid.table) == 5
    # The plan's own setting comes first, and is what the fit starts from.
    assert grid.table["holdout"][0] == pytest.approx(fitted.losses["holdout_before"], rel=1e-4)
    assert grid.losses["holdout"] == grid.table["holdout"].min()
    assert grid.plan.apply(copy=True).obsm["X_pca"].shape[1] == grid.best.get("pca.n_comps", 4)
    assert len(sd.grid(plan, LABELS, {"pca.n_comps": [2, 3, 4]}, budget=2, progress=False).table) == 2
    report = fitted.report(grid)
    assert list(report.index) == ["frozen defaults", "fit (adopted)", "grid of 5", "direct predictor"]
    assert list(report.columns) == ["train", "holdout", "test"]
    assert report.loc["direct predictor", "test"] < np.log(10)
    with pytest.raises(ValueError, match="names no call"):
        sd.grid(plan, LABELS, {"umap.min_dist": [0.1]}, progress=False)
    with pytest.raises(ValueError, match="unexpected keyword"):
        sd.grid(plan, LABELS, {"pca.nope": [1]}, progress=False)
    plan.add(plan.steps[0])
    with pytest.raises(ValueError, match=r"no recorded call makes, \['normalize_total_2'\]"):
        sd.grid(plan, LABELS, {"pca.n_comps": [2]}, progress=False)


def test_predictor_of_numbers_is_a_nearest_neighbour_mean(data):
    from sklearn.neighbors import KNeighborsRegressor

    data = data.copy()
    data.obs["depth"] = np.log(np.asarray(data.X.sum(1)).ravel())
    plan, loss = projection(data), sd.losses.correlation("dpt_pseudotime", "depth")
    split = three_ways(data, loss, 0.2, 0.2, seed=0)
    z, depth = plan.apply(copy=True).obsm["X_pca"], data.obs["depth"].to_numpy()
    predicted = KNeighborsRegressor(15).fit(z[split.train], depth[split.train]).predict(z)
    r = np.corrcoef(predicted[split.test], depth[split.test])[0, 1]
    found = direct_predictor(plan, loss, split, z)
    assert found["test"] == pytest.approx(1 - r, abs=1e-4)
