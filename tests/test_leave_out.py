"""Influence of leaving out cells and samples: against differences, and against plans without them on a held graph."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdiffx as sd
from helpers import contents
from scdiffx._slots import Obs, Obsm
from scdiffx._steps import Plan
from scdiffx.tl._leave_out import LeftOut


@pytest.fixture
def adata() -> ad.AnnData:
    """90 cells with a graph, groups and samples."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(size=90))
    points = np.c_[np.cos(3 * t), np.sin(3 * t)] + 0.1 * rng.normal(size=(90, 2))
    squares = ((points[:, None] - points) ** 2).sum(2)
    near = np.exp(-squares / 0.02) * (squares < np.sort(squares, 1)[:, [8]])
    np.fill_diagonal(near, 0)
    adata = ad.AnnData(rng.poisson(2, (90, 5)).astype(np.float64))
    adata.obs_names = [f"c{i}" for i in range(90)]
    adata.obsm["X_points"] = points
    adata.obsp["connectivities"] = adata.obsp["distances"] = sp.csr_matrix(near + near.T)
    adata.uns["neighbors"] = {"connectivities_key": "connectivities", "distances_key": "distances", "params": {}}
    adata.obs["group"] = pd.Categorical(np.array(["x", "y/z", "w"])[np.arange(90) % 3])
    part = np.arange(90) // 8
    adata.obs["sample"] = pd.Categorical.from_codes(np.where(part < 2, part, -1), ["first", "next"])
    adata.obs["one"], adata.obs["none"] = 1.0, (np.arange(90) != 3).astype(float)
    return adata


def planned(adata: ad.AnnData, weights: str | None = None, fates: bool = True) -> Plan:
    plan = sd.plan(adata)
    sd.tl.pseudotime(plan, n_dcs=4, root="c3", weights=weights)
    if fates:
        sd.tl.fate_probabilities(plan, {"a": ["c60", "c61", "c88"], "b": ["c40"]}, weights=weights)
    return plan


def values(plan: Plan, target: str) -> np.ndarray:
    found = plan.run()[2][Obs(target) if target in ("dpt_pseudotime", "priming_degree_fwd") else Obsm(target)]
    return np.asarray(found)[:, 0] if found.ndim == 2 else np.asarray(found)


def without(adata: ad.AnnData, out: np.ndarray, target: str) -> np.ndarray:
    """The change of the target of the other cells on the graph whose edges to the cells are cut."""
    part = adata.copy()
    part.obsp["connectivities"] = sp.csr_matrix(adata.obsp["connectivities"].toarray() * np.outer(~out, ~out))
    plans = (planned(one, "one") for one in (part, adata))
    after, before = (values(plan, target) for plan in plans)
    return np.where(out, np.nan, after - before)


def means(adata: ad.AnnData, change: np.ndarray, out: np.ndarray) -> np.ndarray:
    kept = ~out & np.isfinite(change)
    return np.array([change[kept & (adata.obs["group"] == g).to_numpy()].mean() for g in ("w", "x", "y/z")])


@pytest.mark.slow
def test_of_cells_it_is_the_derivative_and_for_the_ends_the_change(adata: ad.AnnData) -> None:
    before = set(contents(adata))
    sd.tl.influence(planned(adata), "dpt_pseudotime", leave_out="cells", groupby="group")
    key = "influence_dpt_pseudotime_cells"
    new = {"/".join(path.split("/")[:2]) for path in set(contents(adata)) - before}
    assert new - {"obsm", "uns"} == {f"obsm/{key}", f"uns/{key}"}
    assert adata.uns[key] == {"params": {"target": "dpt_pseudotime", "leave_out": "cells", "groupby": "group"}}
    table = adata.obsm[key]
    assert list(table) == ["w", "x", "y|z"]
    assert list(table.index[table.isna().any(axis=1)]) == ["c3"]
    last = int(np.argmax(values(planned(adata, "one"), "dpt_pseudotime")))
    for cell in (8, 61):
        assert cell != last
        ends = []
        for share in (1 - 1e-4, 1 + 1e-4):
            adata.obs["w"] = np.where(np.arange(90) == cell, share, 1.0)
            ends.append(values(planned(adata, "w"), "dpt_pseudotime"))
        expected = means(adata, (ends[0] - ends[1]) / 2e-4, np.zeros(90, bool))
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(table.iloc[cell], expected, atol=1e-5 * np.abs(expected).max())
    out = np.arange(90) == last
    expected = means(adata, without(adata, out, "dpt_pseudotime"), out)
    assert np.abs(expected - table.iloc[last]).max() < 1e-6 < np.abs(expected).min()


@pytest.mark.slow
def test_neighbors_of_a_plan_are_found_anew(adata: ad.AnnData) -> None:
    plan = sd.plan(adata)
    sd.pp.neighbors(plan, n_neighbors=8, use_rep="X_points")
    plan.add(planned(adata).steps[0])
    left = LeftOut(plan, Obs("dpt_pseudotime"), "dpt_pseudotime", None)
    everyone, rng = np.ones((90, 1)), np.random.default_rng(1)
    slopes = left.slopes(everyone)[:, 0]
    chosen = rng.permutation(np.setdiff1d(np.arange(90), [3, *left.ends]))[:12]
    changes = []
    for cell in chosen:
        part = adata[np.arange(90) != cell].copy()
        again = sd.plan(part)
        sd.pp.neighbors(again, n_neighbors=8, use_rep="X_points")
        again.add(planned(part, fates=False).steps[0])
        before = np.delete(left.now, cell)
        changes.append((values(again, "dpt_pseudotime") - before).mean())
    found = np.array([left.without(np.arange(90) == cell, everyone)[0] for cell in chosen])
    np.testing.assert_allclose(found, changes, atol=1e-5)
    assert np.corrcoef(slopes[chosen], changes)[0, 1] > 0.9


def test_the_root_and_one_terminal_cell_of_each_fate_have_to_stay(adata: ad.AnnData) -> None:
    left = LeftOut(planned(adata), Obsm("lineages_fwd", ("a", "b")), "lineages_fwd", "b")
    assert [list(cells) for cells in left.needed] == [[3], [60, 61, 88], [40]]
    assert left.undefined(np.arange(90) == 40)
    assert not left.undefined(np.isin(np.arange(90), [60, 61]))
    # Pseudotime does not rest on fates.
    assert len(LeftOut(planned(adata), Obs("dpt_pseudotime"), "dpt_pseudotime", None).needed) == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["dpt_pseudotime", "lineages_fwd", "priming_degree_fwd"])
def test_of_levels_it_is_the_change_on_the_graph_without_them(adata: ad.AnnData, target: str) -> None:
    column = 0 if target == "lineages_fwd" else None
    sd.tl.influence(planned(adata), target, column=column, leave_out="sample", groupby="group", key_added="found")
    found = adata.uns["found"]["change"]
    assert list(found.index) == ["first", "next"]
    # The first holds the root.
    assert found.loc["first"].isna().all()
    out = (adata.obs["sample"] == "next").to_numpy()
    expected = means(adata, without(adata, out, target), out)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.loc["next"], expected, atol=1e-6)
    assert "found" not in adata.obsm


@pytest.mark.slow
def test_weights_that_the_plan_has_are_kept(adata: ad.AnnData) -> None:
    """A cell of weight 0 has no influence, and that of another is that among cells so weighed."""
    adata.obs["w"] = np.where(np.arange(90) == 60, 0, np.linspace(0.5, 1, 90))
    sd.tl.influence(planned(adata, "w"), "dpt_pseudotime", leave_out="cells", key_added="found")
    table = adata.obsm["found"]["all"].to_numpy()
    assert table[60] == 0
    ends = []
    for share in (1 - 1e-4, 1 + 1e-4):
        adata.obs["v"] = np.where(np.arange(90) == 8, share, 1.0) * adata.obs["w"]
        ends.append(values(planned(adata, "v"), "dpt_pseudotime"))
    change = ends[0][np.arange(90) != 60] - ends[1][np.arange(90) != 60]
    assert table[8] == pytest.approx(change.mean() / 2e-4, rel=1e-4)


@pytest.mark.slow
def test_soft_quality_control_takes_part_in_plans(adata: ad.AnnData) -> None:
    adata.obs["depth"] = np.random.default_rng(0).permutation(np.linspace(0, 1, 90))
    adata.obs.loc["c3", "depth"] = 1
    plan = sd.plan(adata)
    sd.pp.cell_weights(plan, {"depth": (0.3, None)}, temperature=0.5)
    sd.tl.pseudotime(plan, n_dcs=4, root="c3", weights="cell_weight")
    sd.tl.influence(plan, "dpt_pseudotime", knobs="cell_weights.temperature", key_added="found")
    ends = []
    for temperature in (0.49, 0.51):
        sd.pp.cell_weights(adata, {"depth": (0.3, None)}, temperature=temperature, key_added="w")
        adata.obs["w"] = adata.obs["w"].astype(np.float64)
        ends.append(values(planned(adata, "w"), "dpt_pseudotime"))
    expected = (ends[1] - ends[0]) / 0.02
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(adata.obsm["found"].iloc[:, 0], expected, atol=1e-2 * np.abs(expected).max())


def test_weights_leave_out_what_they_do_not_count(adata: ad.AnnData) -> None:
    plan = planned(adata)
    assert all(None in step.reads for step in plan.steps)
    with pytest.raises(ValueError, match="root, cell 'c3', has the weight 0"):
        sd.tl.pseudotime(adata, n_dcs=4, root="c3", weights="none")
    assert "dpt_pseudotime" not in adata.obs


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"leave_out": "absent"}, KeyError, "leave_out='absent' is neither 'cells' nor in"),
        ({"leave_out": "cells", "groupby": "absent"}, KeyError, "groupby='absent'"),
        ({"leave_out": "cells", "knobs": "b"}, ValueError, "exclude each other"),
        ({"groupby": "group"}, ValueError, "needs `leave_out=`"),
        (
            {"leave_out": "cells", "target": "X_pca", "column": 0},
            ValueError,
            r"weights of cells.*tl.pseudotime.*\['pca'\]",
        ),
    ],
)
def test_bad_settings_name_themselves(
    adata: ad.AnnData, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    plan = sd.plan(adata)
    sd.pp.pca(plan, n_comps=3) if "target" in settings else sd.tl.pseudotime(plan, root=3)
    before = set(contents(adata))
    with pytest.raises(error, match=message):
        sd.tl.influence(plan, **({"target": "dpt_pseudotime"} | settings))
    assert set(contents(adata)) == before


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("absent", KeyError, r"weights='absent'.*'one'"),
        ("group", TypeError, "weights='group'.*not numbers"),
        ("negative", ValueError, "weights='negative'.*-1.0 of cell 'c4'"),
        ("partial", ValueError, "weights='partial'.*nan of cell 'c4'"),
    ],
)
def test_bad_weights_name_themselves(adata: ad.AnnData, weights: str, error: type[Exception], message: str) -> None:
    adata.obs["negative"] = np.where(np.arange(90) == 4, -1.0, 1)
    adata.obs["partial"] = np.where(np.arange(90) == 4, np.nan, 1)
    for target in (adata, sd.plan(adata)):
        for call in (sd.tl.diffmap, sd.tl.pseudotime):
            with pytest.raises(error, match=message):
                call(target, weights=weights, **({"root": 0} if call is sd.tl.pseudotime else {}))
        with pytest.raises(error, match=message):
            sd.tl.fate_probabilities(target, {"a": ["c4"]}, threshold_scheme=None, weights=weights)
    with pytest.raises(ValueError, match="weights='one' the terminal states have to be given"):
        sd.tl.fate_probabilities(adata, threshold_scheme=None, weights="one")
