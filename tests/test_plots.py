"""The plots: what is drawn, from which keys, for few and many groups, with cells that the root cannot reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

import scdiffx as sd


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def ordered_cells(n_groups: int = 4, n_obs: int = 400) -> ad.AnnData:
    """Cells along a line with their pseudotime, in groups that follow each other in reverse order of their names."""
    rng = np.random.default_rng(0)
    time = np.sort(rng.uniform(size=n_obs))
    adata = ad.AnnData(np.zeros((n_obs, 3), np.float32))
    adata.obs["dpt_pseudotime"] = time.astype(np.float32)
    names = [f"group {n_groups - 1 - i:02d}" for i in np.floor(time * n_groups).astype(int)]
    adata.obs["group"] = pd.Categorical(names)
    adata.obsm["X_diffmap"] = np.column_stack([np.ones(n_obs), time, time**2, time**3])
    adata.uns["iroot"] = 0
    return adata


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def inside(ax: plt.Axes) -> bool:
    """Whether the axes with all labels lie within the figure and the tick labels of y do not overlap."""
    ax.figure.canvas.draw()
    all_drawn, frame = ax.get_tightbbox(), ax.figure.bbox
    fits = all_drawn.x0 >= -1 and all_drawn.y0 >= -1 and all_drawn.x1 <= frame.x1 + 1 and all_drawn.y1 <= frame.y1 + 1
    rows = sorted((t.get_window_extent() for t in ax.get_yticklabels() if t.get_text()), key=lambda b: b.y0)
    return bool(fits) and all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(rows))


def test_pseudotime_draws_every_cell_in_its_color_and_marks_the_root() -> None:
    adata = ordered_cells()
    ax = sd.pl.pseudotime(adata, show=False)
    cells, root = ax.collections
    np.testing.assert_allclose(cells.get_offsets(), adata.obsm["X_diffmap"][:, 1:3], rtol=1e-6)
    np.testing.assert_allclose(cells.get_array(), adata.obs["dpt_pseudotime"], rtol=1e-6)
    np.testing.assert_allclose(root.get_offsets()[0], adata.obsm["X_diffmap"][0, 1:3], rtol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("DC2", "DC3")
    assert cells.get_cmap().name == "viridis"
    assert ax.figure.axes[1].get_ylabel() == "dpt_pseudotime"
    assert pixels(ax.figure)[..., :3].std() > 10


def sliced() -> ad.AnnData:
    """Spots of two slices as `sd.tl.align_slices` leaves them, under another key."""
    adata = ad.AnnData(np.zeros((30, 2), np.float32))
    adata.obs["slice"] = pd.Categorical(np.repeat(["a", "b/2"], [18, 12]), categories=["b/2", "a"])
    adata.obs["depth"] = np.where(np.arange(30) == 4, np.nan, np.arange(30.0))
    adata.obs["type"] = pd.Categorical(np.tile(["x", "y", None], 10))
    adata.obsm["mine_aligned"] = np.random.default_rng(0).normal(size=(30, 3))
    adata.uns["mine"] = {"params": {"batch_key": "slice"}, "slices": np.array(["b/2", "a"], object)}
    adata.uns["type_colors"] = ["#ff0000", "#0000ff"]
    return adata


def test_aligned_slices_lie_on_each_other_with_a_marker_each() -> None:
    adata = sliced()
    points = adata.obsm["mine_aligned"][:, :2]
    ax = sd.pl.aligned_slices(adata, key="mine", show=False)
    for drawn, name in zip(ax.collections, ["b/2", "a"], strict=True):
        np.testing.assert_array_equal(drawn.get_offsets(), points[adata.obs["slice"] == name])
    assert not np.array_equal(*(drawn.get_paths()[0].vertices[:4] for drawn in ax.collections))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b/2", "a"]
    assert inside(ax)
    ax = sd.pl.aligned_slices(adata, key="mine", color="type", show=False)
    shades = np.concatenate([drawn.get_edgecolors() for drawn in ax.collections])
    assert {tuple(map(float, shade)) for shade in shades} == {to_rgba(c) for c in ("#ff0000", "#0000ff", "#bdbdbd")}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b/2", "a", "x", "y"]
    ax = sd.pl.aligned_slices(adata, key="mine", color="depth", show=False)
    values = np.concatenate([part.get_array() for part in ax.collections if part.get_array() is not None])
    np.testing.assert_array_equal(np.sort(values), np.delete(np.arange(30.0), 4))
    assert len({part.get_clim() for part in ax.collections if part.get_array() is not None}) == 1
    with pytest.raises(KeyError, match=r"color='absent'.*'depth'"):
        sd.pl.aligned_slices(adata, key="mine", color="absent")
    with pytest.raises(KeyError, match=r"key='align_slices'.*run `sd.tl.align_slices` first"):
        sd.pl.aligned_slices(adata)


def test_pseudotime_prefers_umap_and_takes_a_basis_by_either_name() -> None:
    adata = ordered_cells()
    adata.obsm["X_umap"] = np.random.default_rng(1).normal(size=(adata.n_obs, 2))
    adata.obsm["X_pca"] = np.random.default_rng(2).normal(size=(adata.n_obs, 5))
    assert sd.pl.pseudotime(adata, show=False).get_xlabel() == "UMAP1"
    for basis in ("pca", "X_pca"):
        ax = sd.pl.pseudotime(adata, basis=basis, show=False)
        np.testing.assert_allclose(ax.collections[0].get_offsets(), adata.obsm["X_pca"][:, :2])
        assert ax.get_ylabel() == "PC2"


def test_cells_without_finite_pseudotime_are_grey_and_counted() -> None:
    adata = ordered_cells()
    adata.obs["dpt_pseudotime"] = adata.obs["dpt_pseudotime"].to_numpy(copy=True)
    adata.obs.iloc[-30:, adata.obs.columns.get_loc("dpt_pseudotime")] = np.inf
    adata.obs.iloc[100:103, adata.obs.columns.get_loc("dpt_pseudotime")] = np.nan
    ax = sd.pl.pseudotime(adata, show=False)
    absent, cells, _ = ax.collections
    assert len(absent.get_offsets()) == 33
    red, green, blue, _ = absent.get_facecolor()[0]
    assert red == green == blue
    assert len(cells.get_offsets()) == adata.n_obs - 33
    assert np.isfinite(cells.get_clim()).all()
    assert "30 unreachable, 3 missing" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_no_cell_with_finite_pseudotime_still_draws() -> None:
    adata = ordered_cells()
    adata.obs["dpt_pseudotime"] = np.inf
    assert len(sd.pl.pseudotime(adata, show=False).collections[0].get_offsets()) == adata.n_obs
    labels = [t.get_text() for t in sd.pl.pseudotime(adata, groupby="group", show=False).texts]
    assert len(labels) == 4
    assert all("unreachable" in label for label in labels)


@pytest.mark.parametrize("n_groups", [2, 12, 40])
def test_groups_are_sorted_by_median_and_legible(n_groups: int) -> None:
    adata = ordered_cells(n_groups)
    ax = sd.pl.pseudotime(adata, groupby="group", show=False)
    sizes = adata.obs["group"].value_counts()
    expected = [f"{name} ({sizes[name]})" for name in sorted(sizes.index, reverse=True)]
    assert [t.get_text() for t in ax.get_yticklabels()] == expected
    assert ax.yaxis_inverted()
    assert len(ax.patches) == n_groups
    assert inside(ax)


def test_long_names_are_not_cut() -> None:
    adata = ordered_cells(3)
    adata.obs["group"] = adata.obs["group"].cat.rename_categories(
        lambda name: f"CD4+/CD45RA+/CD25- naive T cell, {name}"
    )
    assert inside(sd.pl.pseudotime(adata, groupby="group", show=False))


def test_unreachable_cells_of_a_group_are_counted_and_whole_groups_stand_last() -> None:
    adata = ordered_cells(4)
    time = adata.obs["dpt_pseudotime"].to_numpy(copy=True)
    time[(adata.obs["group"] == "group 03").to_numpy()] = np.inf  # the earliest
    time[-5:] = np.inf  # of the latest
    adata.obs["dpt_pseudotime"] = time
    ax = sd.pl.pseudotime(adata, groupby="group", show=False)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels[-1].startswith("group 03")
    assert labels[2].startswith("group 00")
    assert "5 unreachable" in labels[2]


def test_groups_take_the_saved_colors() -> None:
    adata = ordered_cells(3)
    adata.uns["group_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    ax = sd.pl.pseudotime(adata, groupby="group", show=False)
    np.testing.assert_allclose([p.get_facecolor()[:3] for p in ax.patches], [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    adata.uns["group_colors"] = ["#ff0000"]  # left over from fewer groups
    faces = [p.get_facecolor()[:3] for p in sd.pl.pseudotime(adata, groupby="group", show=False).patches]
    assert [to_hex(face) for face in faces[::-1]] == adata.uns["group_colors"] == ["#0072b2", "#d55e00", "#009e73"]


def test_given_axes_are_used_and_pyplot_is_left_alone() -> None:
    adata = ordered_cells()
    figure = Figure()
    ax = figure.subplots()
    assert sd.pl.pseudotime(adata, ax=ax) is ax
    assert sd.pl.fit(fitted(), ax=figure.add_subplot()) in figure.axes
    assert plt.get_fignums() == []
    before = dict(plt.rcParams)
    sd.pl.pseudotime(adata, show=False)
    assert dict(plt.rcParams) == before


@pytest.fixture
def autoshow() -> Iterator[Callable[[bool], None]]:
    """Set scanpy's `autoshow`; it is put back afterwards."""
    import scanpy

    before = scanpy.settings.autoshow

    def choose(value: bool) -> None:
        scanpy.settings.autoshow = value

    yield choose
    choose(before)


@pytest.mark.parametrize("value", [True, False])
def test_show_follows_scanpy(value: bool, autoshow: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    autoshow(value)
    sd.pl.pseudotime(ordered_cells())
    assert len(shown) == value
    sd.pl.pseudotime(ordered_cells(), show=not value)
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": "palantir"}, r"key='palantir' is not in `adata.obs`. Available: \['dpt_pseudotime', 'group'\]"),
        ({"groupby": "leiden"}, r"groupby='leiden' is not in `adata.obs`. Available: \['dpt_pseudotime', 'group'\]"),
        ({"basis": "tsne"}, r"basis='tsne' is not in `adata.obsm`. Available: \['X_diffmap'\]"),
    ],
)
def test_missing_keys_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(KeyError, match=message):
        sd.pl.pseudotime(ordered_cells(), show=False, **arguments)
    assert plt.get_fignums() == []


def test_columns_that_cannot_be_drawn_are_refused() -> None:
    adata = ordered_cells()
    with pytest.raises(TypeError, match="key='group'"):
        sd.pl.pseudotime(adata, key="group", show=False)
    adata.obsm["X_diffmap"] = adata.obsm["X_diffmap"][:, :2]
    with pytest.raises(ValueError, match="basis='X_diffmap'"):
        sd.pl.pseudotime(adata, basis="X_diffmap", show=False)


def fitted(*, holdout: bool = True, adopted: bool = True) -> SimpleNamespace:
    """What a fit reports: training falls all the way, held-out cells are best at step 30."""
    steps = np.arange(100)
    history = {"step": steps.tolist(), "train": (1 - steps / 200).tolist()}
    losses = {"train_before": 1.0, "train_after": 0.85}
    if holdout:
        history["holdout"] = (1.1 - 0.2 + (steps - 30) ** 2 / 4500).tolist()
        losses |= {"holdout_before": 1.1, "holdout_after": 0.9}
    return SimpleNamespace(history=history, losses=losses, adopted=adopted)


def test_fit_draws_both_curves_the_defaults_and_the_chosen_step() -> None:
    result = fitted()
    ax = sd.pl.fit(result, show=False)
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["training cells"].get_ydata().tolist() == result.history["train"]
    assert lines["held-out cells"].get_ydata().tolist() == result.history["holdout"]
    assert set(lines["defaults, held-out cells"].get_ydata()) == {1.1}
    assert lines["defaults, training cells"].get_linestyle() == "--"
    np.testing.assert_allclose(lines["chosen: step 30"].get_xydata(), [[30, 0.9]], rtol=1e-12)
    assert ax.get_title() == "fitted parameters adopted\nloss of the held-out cells: 1.1 before, 0.9 after"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    assert inside(ax)


def test_fit_without_holdout_chooses_on_the_training_cells() -> None:
    ax = sd.pl.fit(fitted(holdout=False, adopted=False), show=False)
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["training cells", "defaults, training cells", "chosen: step 99"]
    assert ax.get_title().startswith("defaults kept\nloss of the training cells")


def test_gradients_draws_steps_and_parameters_and_names_the_dead() -> None:
    flow = sd.metrics.GradientFlow(
        steps={"pca": 2.0, "neighbors": 0.5},
        parameters={"pca.shift": 0.3, "pca.scale": 0.0, "neighbors.bandwidth": np.inf},
        dead=["pca.scale"],
        exploding=["neighbors.bandwidth"],
        loss=0.25,
        cosine={"pca.shift": 0.9999, "pca.scale": np.nan, "neighbors.bandwidth": np.nan},
        error={"pca.shift": 1e-6, "pca.scale": np.nan, "neighbors.bandwidth": np.nan},
    )
    ax = sd.pl.gradients(flow, show=False)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["pca", "neighbors", "pca.shift", "pca.scale", "neighbors.bandwidth"]
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(ends[:3], [2.0, 0.5, 0.3])
    assert [t.get_text() for t in ax.texts] == ["", "", "cosine 1.000", "dead", "exploding"]
    assert ax.get_xscale() == "log"
    assert inside(ax)


def scored(*, batches: bool = False) -> ad.AnnData:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(np.zeros((300, 2), np.float32))
    adata.obs["doublet_score"] = rng.beta(1, 12, 300)
    entry = {"doublet_scores_sim": np.r_[rng.beta(1, 12, 250), rng.beta(8, 8, 350)], "threshold": 0.3}
    adata.uns["scrublet"] = entry
    if batches:
        adata.obs["batch"] = np.where(np.arange(300) < 100, "a/1", "b")
        adata.uns["scrublet"] = {"batches": {"a|1": entry, "b": entry}, "batched_by": "batch"}
    return adata


def test_doublets_draws_both_distributions_and_the_threshold() -> None:
    adata = scored()
    ax = sd.pl.doublets(adata, show=False)
    share = (adata.obs["doublet_score"] > 0.3).mean()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["cells", "simulated doublets", f"threshold 0.30: {share:.1%} of the cells above"]
    for stairs in ax.patches[::2]:
        assert stairs.get_data().values.sum() == pytest.approx(1)
    assert any(line.get_xdata()[0] == 0.3 for line in ax.lines if len(line.get_xdata()))
    assert inside(ax)
    del adata.uns["scrublet"]["threshold"]
    assert len(sd.pl.doublets(adata, show=False).get_legend().get_texts()) == 2


def test_doublets_of_one_batch() -> None:
    adata = scored(batches=True)
    ax = sd.pl.doublets(adata, batch="a/1", show=False)
    assert ax.get_title() == "doublet scores, a/1"
    one = adata.obs["doublet_score"].to_numpy()[:100]
    counts = ax.patches[0].get_data()
    np.testing.assert_allclose(counts.values, np.histogram(one, counts.edges)[0] / 100)
    with pytest.raises(ValueError, match="pass `batch=`"):
        sd.pl.doublets(adata, show=False)
    with pytest.raises(KeyError, match="batch='c'"):
        sd.pl.doublets(adata, batch="c", show=False)
    with pytest.raises(ValueError, match="not computed by batch"):
        sd.pl.doublets(scored(), batch="b", show=False)
    with pytest.raises(KeyError, match=r"sd\.pp\.scrublet"):
        sd.pl.doublets(ad.AnnData(np.zeros((2, 2))), show=False)


def soaked() -> ad.AnnData:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(5, (90, 12)).astype(np.float32))
    adata.obs["ambient_fraction"] = rng.beta(2, 30, 90).astype(np.float32)
    adata.obs["type"] = pd.Categorical(np.array(["b", "a", "c"])[np.arange(90) % 3], categories=["a", "b", "c", "d"])
    kept = adata.X.copy()
    kept[:, 3] *= 0.2
    kept[:, 5] *= 0.6
    adata.layers["decontaminated"] = kept
    return adata


def test_ambient_draws_the_fractions_of_all_cells_and_of_groups() -> None:
    adata = soaked()
    ax = sd.pl.ambient(adata, show=False)
    assert ax.patches[0].get_data().values.sum() == 90
    median = np.median(adata.obs["ambient_fraction"])
    assert ax.lines[0].get_xdata()[0] == pytest.approx(median)
    assert ax.get_legend().get_texts()[0].get_text() == f"median {median:.1%}"
    assert inside(ax)
    ax = sd.pl.ambient(adata, groupby="type", show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (30)", "b (30)", "c (30)"]
    first = np.median(adata.obs["ambient_fraction"][adata.obs["type"] == "a"])
    assert any(np.allclose(line.get_xdata(), first) for line in ax.lines)
    assert inside(ax)


def test_ambient_draws_the_genes_that_lost_most() -> None:
    adata = soaked()
    adata.obs["mine_fraction"] = adata.obs["ambient_fraction"]
    adata.layers["mine"], adata.layers["counts"] = adata.layers["decontaminated"], adata.X
    ax = sd.pl.ambient(adata, kind="genes", n_genes=2, key="mine", layer="counts", show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["3", "5"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [0.8, 0.4], rtol=1e-5)
    assert inside(ax)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"kind": "cells"}, ValueError, r"kind='cells'.*'genes'"),
        ({"n_genes": 0}, ValueError, "n_genes=0"),
        ({"groupby": "absent"}, KeyError, r"groupby='absent'.*'type'"),
        ({"kind": "genes", "layer": "absent"}, KeyError, r"layer='absent'.*'decontaminated'"),
        ({"key": "absent"}, KeyError, r"run `sd\.pp\.remove_ambient` first"),
    ],
)
def test_ambient_says_what_is_missing(settings: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sd.pl.ambient(soaked(), show=False, **settings)


def flowing() -> ad.AnnData:
    """Two groups that keep to themselves over three days; of the second there are more and more cells."""
    rng = np.random.default_rng(0)
    counts = [(30, 10), (20, 20), (12, 36)]
    group = np.concatenate([np.repeat([0, 1], pair) for pair in counts])
    adata = ad.AnnData(np.zeros((len(group), 1), np.float32))
    adata.obsm["X_pca"] = (rng.normal(size=(len(group), 3)) * 0.2 + group[:, None] * [5, 0, 0]).astype(np.float32)
    adata.obs["day"] = np.repeat([1.3, 2, 4.1], [sum(pair) for pair in counts])
    adata.obs["type"] = pd.Categorical(
        np.array(["stem/early", "late"])[group], categories=["late", "stem/early", "none"]
    )
    sd.tl.ot_trajectory(adata, "day", tau=(0.5, 1.0))
    return adata


def test_ot_flow_draws_shares_and_what_moves_between_them() -> None:
    adata = flowing()
    adata.uns["type_colors"] = ["#ff0000", "#0000ff", "#00ff00"]
    ax = sd.pl.ot_flow(adata, "type", show=False)
    shares = [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], np.ravel(shares))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1.3\n(40)", "2.0\n(40)", "4.1\n(48)"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["stem/early", "late"]
    assert inside(ax)
    # Groups keep to themselves: one ribbon for each, from its share before to its share after.
    ribbons = [c.get_paths()[0].get_extents() for c in ax.collections]
    ends = [(c.get_paths()[0].vertices, c.get_facecolor()[0][:3]) for c in ax.collections]
    assert len(ribbons) == 4
    for (vertices, color), (before, after), expected in zip(
        ends, [(0.25, 0.5), (0.75, 0.5), (0.5, 0.75), (0.5, 0.25)], [(1, 0, 0), (0, 0, 1)] * 2, strict=True
    ):
        heights = [
            np.ptp(vertices[np.isclose(vertices[:, 0], x), 1]) for x in (vertices[:, 0].min(), vertices[:, 0].max())
        ]
        np.testing.assert_allclose(heights, [before, after], atol=1e-3)
        np.testing.assert_allclose(color, expected)
    assert not sd.pl.ot_flow(adata, "type", min_share=0.9, show=False).collections


def test_ot_flow_adds_up_what_single_cells_move() -> None:
    adata = flowing()
    sd.tl.ot_trajectory(adata, "day", tau=(0.5, 1.0), epsilon=2.0)  # groups mix
    sd.tl.ot_pull(adata, groupby="type", time=2)
    ax = sd.pl.ot_flow(adata, "type", min_share=0, show=False)
    assert len(ax.collections) == 8
    late = (adata.obs["day"] == 1.3) & (adata.obs["type"] == "late")
    vertices = ax.collections[0].get_paths()[0].vertices
    stays = np.ptp(vertices[np.isclose(vertices[:, 0], vertices[:, 0].min()), 1])
    weight = adata.obs["growth_rate"][late]
    expected = 0.25 * np.average(adata.obsm["fate"]["late"][late], weights=weight)
    assert stays == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n_groups", [12, 40])
def test_ot_flow_of_many_groups_is_legible(n_groups: int) -> None:
    adata = flowing()
    adata.obs["many"] = pd.Categorical([f"group {i % n_groups:02d}" for i in range(adata.n_obs)])
    ax = sd.pl.ot_flow(adata, "many", show=False)
    assert len({p.get_facecolor() for p in ax.get_legend().get_patches()}) == n_groups
    assert inside(ax)


def test_ot_flow_says_what_is_missing() -> None:
    adata = flowing()
    with pytest.raises(KeyError, match=r"key='absent'.*sd\.tl\.ot_trajectory"):
        sd.pl.ot_flow(adata, "type", key="absent", show=False)
    with pytest.raises(KeyError, match=r"groupby='absent'.*'type'"):
        sd.pl.ot_flow(adata, "absent", show=False)
    with pytest.raises(ValueError, match="min_share=1"):
        sd.pl.ot_flow(adata, "type", min_share=1, show=False)
    with pytest.raises(ValueError, match="no longer those that were coupled"):
        sd.pl.ot_flow(adata[:50].copy(), "type", show=False)
    adata.obs["type"] = adata.obs["type"].cat.remove_categories("late")
    with pytest.raises(ValueError, match="missing for 66 cells"):
        sd.pl.ot_flow(adata, "type", show=False)


def with_fates(n_states: int, n_obs: int = 300) -> ad.AnnData:
    """Cells with random fates; the states are named after the groups of :func:`ordered_cells`."""
    adata = ordered_cells(n_states, n_obs)
    fates = np.random.default_rng(0).dirichlet(np.full(n_states, 0.3), n_obs)
    names = adata.obs["group"].cat.categories
    adata.obsm["lineages_fwd"] = fates
    adata.obs["term_states_fwd"] = pd.Categorical([None] * n_obs, categories=names)
    adata.obs["priming_degree_fwd"] = fates.max(1)
    adata.uns["term_states_fwd_colors"] = [f"#{40 * i + 15:02x}0080" for i in range(n_states)]
    return adata


def test_fates_stand_at_the_weighted_mean_of_the_corners() -> None:
    adata = with_fates(3)
    fates = adata.obsm["lineages_fwd"]
    fates[:20] = np.nan
    corners = np.array([[1, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    ax = sd.pl.fate_probabilities(adata, normalize=False, show=False)
    cells = ax.collections[-1]
    np.testing.assert_allclose(cells.get_offsets(), fates[20:] @ corners, atol=1e-12)
    np.testing.assert_allclose(cells.get_array(), adata.obs["priming_degree_fwd"].iloc[20:])
    labels = {text.get_text(): text for text in ax.texts}
    assert "20 cells without a fate are not shown" in labels
    for name, color, corner in zip(
        adata.obs["term_states_fwd"].cat.categories, adata.uns["term_states_fwd_colors"], corners, strict=True
    ):
        assert labels[name].get_color() == color
        np.testing.assert_allclose(labels[name].get_position(), 1.1 * corner, atol=1e-12)
    scaled = fates[20:] / fates[20:].mean(0)
    scaled /= scaled.sum(1, keepdims=True)
    ax = sd.pl.fate_probabilities(adata, show=False)
    np.testing.assert_allclose(ax.collections[-1].get_offsets(), scaled @ corners, atol=1e-12)
    assert inside(ax)


def test_correlated_fates_are_neighbours_in_the_circle() -> None:
    adata = with_fates(5)
    rng = np.random.default_rng(1)
    place = rng.uniform(0, 2 * np.pi, adata.n_obs)
    # Around a circle in the order 0, 2, 4, 1, 3.
    centres = 2 * np.pi * np.argsort([0, 2, 4, 1, 3]) / 5
    fates = np.exp(2 * np.cos(place[:, None] - centres))
    adata.obsm["lineages_fwd"] = fates / fates.sum(1, keepdims=True)
    ax = sd.pl.fate_probabilities(adata, color="group", show=False)
    angle = {t.get_text(): np.arctan2(*t.get_position()[::-1]) % (2 * np.pi) for t in ax.texts}
    names = adata.obs["term_states_fwd"].cat.categories
    around = sorted(range(5), key=lambda i: angle[names[i]])
    assert around in ([0, 2, 4, 1, 3], [0, 3, 1, 4, 2])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(adata.obs["group"].cat.categories)
    assert pixels(ax.figure)[..., :3].std() > 10


def test_fates_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(KeyError, match=r"run `sd\.tl\.fate_probabilities` first"):
        sd.pl.fate_probabilities(ordered_cells())
    with pytest.raises(ValueError, match=r"at least 3 states.*has 2"):
        sd.pl.fate_probabilities(with_fates(2))
    adata = with_fates(3)
    with pytest.raises(KeyError, match=r"color='absent'.*'group'"):
        sd.pl.fate_probabilities(adata, color="absent")
    adata.obsm["lineages_fwd"][:] = np.nan
    with pytest.raises(ValueError, match="no cell has a fate"):
        sd.pl.fate_probabilities(adata)


def test_archetypes_are_corners_and_cells_their_mixtures() -> None:
    adata = ordered_cells(4, 200)
    weights = np.random.default_rng(0).dirichlet(np.full(3, 0.5), 200)
    weights[0] = [0, 1, 0]
    adata.obsm["archetype_weights"] = weights.astype(np.float32)
    corners = np.array([[0, 1], [np.sqrt(0.75), -0.5], [-np.sqrt(0.75), -0.5]])
    ax = sd.pl.archetypes(adata, show=False)
    cells = ax.collections[-1]
    np.testing.assert_allclose(cells.get_offsets(), weights @ corners, atol=1e-6)
    labels = {text.get_text(): text for text in ax.texts}
    assert set(labels) == {"0", "1", "2"}
    np.testing.assert_allclose(labels["1"].get_position(), 1.1 * corners[1], atol=1e-12)
    # A pure cell has the colour of its corner.
    np.testing.assert_allclose(cells.get_facecolors()[0], to_rgba(labels["1"].get_color()), atol=1e-6)
    assert len(np.unique(cells.get_facecolors(), axis=0)) > 100
    assert inside(ax)
    ax = sd.pl.archetypes(adata, color="dpt_pseudotime", show=False)
    np.testing.assert_allclose(ax.collections[-1].get_array(), adata.obs["dpt_pseudotime"])
    adata.obsm["mine_weights"] = np.random.default_rng(1).dirichlet(np.ones(6), 200)
    ax = sd.pl.archetypes(adata, key="mine", color="group", show=False)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(adata.obs["group"].cat.categories)
    assert inside(ax)
    assert pixels(ax.figure)[..., :3].std() > 10


def test_archetypes_that_cannot_be_drawn_are_refused() -> None:
    adata = ordered_cells()
    with pytest.raises(KeyError, match=r"key='archetypes'.*run `sd\.tl\.archetypes` first"):
        sd.pl.archetypes(adata)
    adata.obsm["archetype_weights"] = np.full((adata.n_obs, 2), 0.5)
    with pytest.raises(ValueError, match=r"at least 3 archetypes.*has 2"):
        sd.pl.archetypes(adata)
    adata.obsm["archetype_weights"] = np.full((adata.n_obs, 3), 1 / 3)
    with pytest.raises(KeyError, match=r"color='absent'.*'group'"):
        sd.pl.archetypes(adata, color="absent")


def network() -> ad.AnnData:
    adata = ad.AnnData(np.zeros((2, 5), np.float32), var=pd.DataFrame(index=list("ABCDE")))
    edges = [("A", "C", 2.0), ("B", "C", -1.5), ("A", "D", 1.0), ("B", "A", 0.5)]
    adata.uns["grn"] = pd.DataFrame(edges, columns=["tf", "target", "weight"]).assign(
        sign=lambda t: np.sign(t["weight"])
    )
    return adata


def test_a_network_has_its_strongest_edges_by_sign() -> None:
    ax = sd.pl.grn(network(), n_edges=3, show=False)
    shades = [to_rgba(color, 0.7) for color in ("#0072B2", "#D55E00", "#0072B2")]
    assert [patch.get_edgecolor() for patch in ax.patches] == shades
    assert ax.patches[0].get_linewidth() == 2 * ax.patches[2].get_linewidth()
    # Factors are in boxes, targets are not.
    assert {text.get_text(): text.get_bbox_patch() is not None for text in ax.texts} == {
        "A": True, "B": True, "C": False, "D": False,
    }  # fmt: skip
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["activates", "represses"]
    assert inside(ax)
    ax = sd.pl.grn(network(), tfs=["A"], show=False)
    assert len(ax.patches) == 2
    with pytest.raises(KeyError, match=r"key='mine'.*run `sd\.tl\.grn` first"):
        sd.pl.grn(network(), key="mine")
    with pytest.raises(KeyError, match=r"'D' has no edge.*'A', 'B'"):
        sd.pl.grn(network(), tfs=["D"])
    with pytest.raises(ValueError, match="n_edges=0"):
        sd.pl.grn(network(), n_edges=0)


def test_spatial_domains_are_drawn_in_place_and_by_slice() -> None:
    adata = ordered_cells(4, 300)
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(size=(300, 3)) * [30, 10, 1]
    ax = sd.pl.spatial_domains(adata, key="group", show=False)
    for i, group in enumerate(adata.obs["group"].cat.categories):
        drawn = adata.obsm["spatial"][adata.obs["group"] == group, :2]
        np.testing.assert_allclose(ax.collections[i].get_offsets(), drawn)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(adata.obs["group"].cat.categories)
    assert ax.yaxis_inverted()
    assert not ax.xaxis_inverted()
    assert inside(ax)
    assert pixels(ax.figure)[..., :3].std() > 10
    adata.uns["group_colors"] = ["#ff0000", "#00ff00", "#0000ff", "#123456"]
    adata.obs["slice"] = np.where(np.arange(300) < 100, "a", "b")
    adata.uns["group"] = {"params": {"batch_key": "slice"}}
    ax = sd.pl.spatial_domains(adata, key="group", batch="a", show=False)
    assert sum(len(c.get_offsets()) for c in ax.collections) == 100
    groups = [adata.obs["group"].cat.categories.get_loc(t.get_text()) for t in ax.get_legend().get_texts()]
    shades = [to_rgba(adata.uns["group_colors"][i]) for i in groups]
    np.testing.assert_allclose([c.get_facecolors()[0] for c in ax.collections], shades)
    with pytest.raises(ValueError, match=r"pass `batch=`, one of \['a', 'b'\]"):
        sd.pl.spatial_domains(adata, key="group")
    with pytest.raises(KeyError, match="batch='c'"):
        sd.pl.spatial_domains(adata, key="group", batch="c")
    with pytest.raises(KeyError, match=r"key='spatial_domain'.*run `sd\.tl\.spatial_domains` first"):
        sd.pl.spatial_domains(adata)
    with pytest.raises(KeyError, match="spatial_key='absent'"):
        sd.pl.spatial_domains(adata, key="group", spatial_key="absent")


def switching() -> ad.AnnData:
    """Three genes that switch on, in reverse order of their times, two that switch off, and one that does neither."""
    rng = np.random.default_rng(0)
    time = np.linspace(0, 1, 500)
    rates, at = np.array([20, 20, 20, -20, -20]), np.array([0.8, 0.5, 0.2, 0.7, 0.3])
    curves = 1 / (1 + np.exp(-rates * (time[:, None] - at)))
    adata = ad.AnnData(np.column_stack([curves, np.full(500, 0.5)]) + rng.uniform(0, 0.05, (500, 6)))
    adata.obs["order"] = time
    sd.tl.switch_de(adata, "order", n_permutations=0)
    return adata


def test_switch_genes_are_ordered_by_direction_and_time() -> None:
    adata = switching()
    ax = sd.pl.switch_genes(adata, n_bins=25, show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["2", "1", "0", "4", "3"]
    mesh, marks = ax.collections[0], ax.collections[-1]
    means = mesh.get_array()
    assert means.shape == (5, 25)
    assert (means.min(1) == 0).all()
    assert (means.max(1) == 1).all()
    assert means[0, 0] < 0.1 < 0.9 < means[0, -1]
    assert means[4, -1] < 0.1 < 0.9 < means[4, 0]
    np.testing.assert_allclose(marks.get_offsets()[:, 0], [0.2, 0.5, 0.8, 0.3, 0.7], atol=0.02)
    assert ax.get_xlabel() == "order"
    assert inside(ax)
    adata.obs["order"] = np.repeat([0.0, 1.0, 2.0, 3.0, np.inf], 100)
    ax = sd.pl.switch_genes(adata, ["5", "3"], show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] in (["5", "3"], ["3", "5"])
    assert ax.collections[0].get_array().shape == (2, 4)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"n_genes": 0}, ValueError, "n_genes=0"),
        ({"n_bins": 1}, ValueError, "n_bins=1"),
        ({"max_qval": -1}, ValueError, "max_qval=-1"),
        ({"genes": ["absent"]}, KeyError, "absent"),
        ({"layer": "absent"}, KeyError, "layer='absent'"),
        ({"key": "absent"}, KeyError, r"run `sd\.tl\.switch_de` first"),
    ],
)
def test_switch_genes_says_what_is_missing(settings: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sd.pl.switch_genes(switching(), show=False, **settings)


def attributed() -> ad.AnnData:
    adata = ad.AnnData(np.zeros((4, 5), np.float32))
    columns = {"a_value": [0.1, -0.9, 0.5, 0.0, 0.2], "b|c_value": [-0.3, 0.1, 0.2, 0.8, 0.0]}
    adata.varm["attribution_time"] = pd.DataFrame(columns, index=adata.var_names)
    adata.uns["attribution_time"] = {"params": {"method": "sensitivity"}, "groups": np.array(["a", "b/c"], object)}
    return adata


def test_attribution_draws_the_largest_of_each_group() -> None:
    ax = sd.pl.attribution(attributed(), "time", n_genes=2, show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["2", "1", "3", "0"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [0.5, -0.9, 0.8, -0.3])
    assert [t.get_text() for t in ax.texts] == ["a", "b/c"]
    assert ax.get_xlabel() == "sensitivity with time"
    assert inside(ax)
    ax = sd.pl.attribution(attributed(), "time", n_genes=2, groups=["b/c"], sign="negative", show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4", "0"]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"n_genes": 0}, ValueError, "n_genes=0"),
        ({"sign": "up"}, ValueError, r"sign='up'.*'positive'"),
        ({"groups": ["d"]}, KeyError, r"groups='d'.*'b/c'"),
        ({"target": "absent"}, KeyError, r"run `sd\.tl\.attribution` first"),
    ],
)
def test_attribution_says_what_is_missing(settings: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sd.pl.attribution(attributed(), **({"target": "time"} | settings), show=False)


def moving_cells(n_obs: int = 500) -> ad.AnnData:
    """Cells that turn around the centre of a ring."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, n_obs)
    ring = np.column_stack([np.cos(angle), np.sin(angle)])
    adata = ad.AnnData(np.zeros((n_obs, 3), np.float32))
    adata.obs["angle"] = angle
    adata.obs["side"] = pd.Categorical(np.where(angle < np.pi, "upper", "lower"))
    adata.obsm["X_umap"] = ring * rng.uniform(0.9, 1.1, (n_obs, 1))
    adata.obsm["velocity_umap"] = ring[:, ::-1] * [-1, 1]
    return adata


def test_streamlines_follow_the_velocities_where_there_are_cells() -> None:
    adata = moving_cells()
    ax = sd.pl.velocity_stream(adata, color="side", show=False)
    lines = next(c for c in ax.collections if isinstance(c, LineCollection))
    pieces = np.array([p for p in lines.get_segments() if len(p) == 2])
    middle, step = pieces.mean(1), pieces[:, 1] - pieces[:, 0]
    along = (middle[:, ::-1] * [-1, 1] * step).sum(1) / np.linalg.norm(middle, axis=1) / np.linalg.norm(step, axis=1)
    assert np.median(along) > 0.99
    assert np.percentile(np.linalg.norm(middle, axis=1), 1) > 0.6
    assert len(pieces) > 100
    assert {t.get_text() for t in ax.texts} == {"lower", "upper"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP1", "UMAP2")
    assert pixels(ax.figure)[..., :3].std() > 10


def test_stream_colors_by_groups_and_numbers() -> None:
    adata = moving_cells()
    adata.uns["side_colors"] = ["#ff0000", "#0000ff"]
    ax = sd.pl.velocity_stream(adata, color="side", show=False)
    np.testing.assert_allclose(ax.collections[0].get_facecolor()[0][:3], [1, 0, 0])
    numbers = sd.pl.velocity_stream(adata, color="angle", show=False)
    np.testing.assert_allclose(numbers.collections[0].get_array(), adata.obs["angle"])
    assert numbers.figure.axes[1].get_ylabel() == "angle"
    plain = sd.pl.velocity_stream(adata, show=False, size=3.0).collections[0]
    assert plain.get_sizes() == [3.0]


def test_stream_names_what_is_missing() -> None:
    adata = moving_cells()
    for settings, error, match in (
        ({"basis": "tsne"}, KeyError, r"basis='tsne'.*'X_umap'.*velocity_embedding"),
        ({"vkey": "absent"}, KeyError, "'absent_umap'"),
        ({"color": "absent"}, KeyError, r"color='absent'.*'side'"),
        ({"density": 0}, ValueError, "density=0"),
        ({"smooth": -1}, ValueError, "smooth=-1"),
        ({"cutoff": 100}, ValueError, "cutoff=100"),
    ):
        with pytest.raises(error, match=match):
            sd.pl.velocity_stream(adata, **settings)
    adata.obsm["velocity_umap"] = np.zeros((adata.n_obs, 2))
    with pytest.raises(ValueError, match="no velocity that is not 0"):
        sd.pl.velocity_stream(adata)


def tested_interactions() -> ad.AnnData:
    adata = ad.AnnData(np.zeros((3, 2), np.float32))
    frame = pd.DataFrame(
        [
            ("a", "b", "L1", "R1", 2.0, 0.001, 0.004),
            ("b", "a", "L1", "R1", 1.0, 0.5, 0.5),
            ("a", "a", "L2_L3", "R2", 3.0, 0.01, 0.02),
            ("b", "b/c", "L4", "R4", 9.0, 0.9, 0.9),
        ],
        columns=["source", "target", "ligand", "receptor", "mean", "pvalue", "qvalue"],
    )
    for name in ("source", "target", "ligand", "receptor"):
        frame[name] = frame[name].astype("category")
    adata.uns["ligrec"] = frame
    return adata


def test_ligrec_draws_the_strongest_of_the_significant() -> None:
    ax = sd.pl.ligrec(tested_interactions(), show=False)
    dots = ax.collections[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["L2_L3 – R2", "L1 – R1"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a → a", "a → b", "b → a"]
    drawn = {tuple(at): i for i, at in enumerate(dots.get_offsets().astype(int).tolist())}
    assert set(drawn) == {(0, 0), (1, 1), (2, 1)}
    order = [drawn[at] for at in ((1, 1), (0, 0), (2, 1))]
    np.testing.assert_allclose(dots.get_array()[order], [2, 3, 1])
    assert (np.diff(dots.get_sizes()[order]) < 0).all()
    assert [edge[3] > 0 for edge in dots.get_edgecolors()[order]] == [True, True, False]
    assert inside(ax)
    one = sd.pl.ligrec(tested_interactions(), target_groups=["b", "b/c"], interactions=[("L4", "R4")], show=False)
    assert [t.get_text() for t in one.get_xticklabels()] == ["b → b/c"]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"key": "absent"}, KeyError, "key='absent'.*run `sd.tl.ligrec` first"),
        ({"n_interactions": 0}, ValueError, "n_interactions=0"),
        ({"max_qvalue": 0.001}, ValueError, r"max_qvalue=0.001; the smallest is 0.004"),
        ({"source_groups": ["z"]}, KeyError, r"source_groups: \['z'\].*'a', 'b'"),
        ({"interactions": [("L4", "R1")]}, KeyError, r"\('L4', 'R1'\)"),
        ({"source_groups": "a", "target_groups": "b/c"}, ValueError, "no pair of these groups"),
    ],
)
def test_ligrec_says_what_is_missing(settings: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sd.pl.ligrec(tested_interactions(), **settings)
