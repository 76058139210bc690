"""Plots beside small reference images, and what all plots share: parameters, colours of groups, legends.

Images have no text: its shapes differ between versions of FreeType, and `test_plots.py` reads labels as text. To draw
the references anew: ``python tests/test_plot_images.py``; then look at them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text

import scdiffx as sd
import test_plots as made

BASELINE = Path(__file__).parent / "baseline"
# Root of the mean squared difference of pixels, of 255: what antialiasing may change. Another colour or a missing
# artist is far more.
TOLERANCE = 4


def flow() -> sd.metrics.GradientFlow:
    sizes = {"pca.shift": 0.3, "pca.scale": 0.0, "neighbors.bandwidth": 0.02}
    nothing = dict.fromkeys(sizes, np.nan)
    steps = {"pca": 2.0, "neighbors": 0.5}
    return sd.metrics.GradientFlow(steps, sizes, ["pca.scale"], [], 0.25, cosine=nothing, error=nothing)


def domains(n_groups: int = 4) -> ad.AnnData:
    """Spots on a square grid in stripes."""
    adata = ad.AnnData(np.zeros((400, 1), np.float32))
    place = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
    adata.obsm["spatial"] = place
    stripe = (np.arange(400) * n_groups // 400).astype(str)
    adata.obs["spatial_domain"] = pd.Categorical(stripe, categories=[str(i) for i in range(n_groups)])
    adata.obsm["archetype_weights"] = np.random.default_rng(0).dirichlet(np.full(4, 0.4), 400)
    return adata


def network_in_a_circle(ax: Axes) -> Axes:
    """A network in places of its own: igraph's differ between versions."""

    def circle(graph: Any) -> Any:
        angle = 2 * np.pi * np.arange(graph.vcount()) / graph.vcount()
        return SimpleNamespace(coords=np.stack([np.cos(angle), np.sin(angle)], 1).tolist())

    with mock.patch("igraph.Graph.layout_kamada_kawai", circle):
        return sd.pl.grn(made.network(), ax=ax)


DRAWINGS: dict[str, Callable[[Axes], Axes]] = {
    "aligned_slices": lambda ax: sd.pl.aligned_slices(made.sliced(), key="mine", ax=ax),
    "ambient": lambda ax: sd.pl.ambient(made.soaked(), ax=ax),
    "archetypes": lambda ax: sd.pl.archetypes(domains()[:100].copy(), ax=ax),
    "attribution": lambda ax: sd.pl.attribution(made.attributed(), "time", n_genes=3, ax=ax),
    "doublets": lambda ax: sd.pl.doublets(made.scored(), ax=ax),
    "fate_probabilities": lambda ax: sd.pl.fate_probabilities(made.with_fates(3), color="group", ax=ax),
    "fit": lambda ax: sd.pl.fit(made.fitted(), ax=ax),
    "gradients": lambda ax: sd.pl.gradients(flow(), ax=ax),
    "grn": network_in_a_circle,
    "ligrec": lambda ax: sd.pl.ligrec(made.tested_interactions(), ax=ax),
    "ot_flow": lambda ax: sd.pl.ot_flow(made.flowing(), "type", ax=ax),
    "pseudotime": lambda ax: sd.pl.pseudotime(made.ordered_cells(), groupby="group", ax=ax),
    "spatial_domains": lambda ax: sd.pl.spatial_domains(domains(), ax=ax),
    "switch_genes": lambda ax: sd.pl.switch_genes(made.switching(), n_genes=12, ax=ax),
    "velocity_stream": lambda ax: sd.pl.velocity_stream(made.moving_cells(), color="side", ax=ax),
}


def save(name: str, path: Path) -> None:
    """Draw a plot, small and without text."""
    with mpl.rc_context(mpl.rcParamsDefault):
        figure = Figure((4, 3), dpi=40)
        DRAWINGS[name](figure.add_axes((0.2, 0.15, 0.6, 0.75)))
        for part in figure.findobj(lambda artist: isinstance(artist, Text | Legend)):
            part.set_visible(False)
        figure.savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.parametrize("name", sorted(DRAWINGS))
def test_plot_looks_like_its_reference(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / f"{name}.png")
    assert compare_images(str(BASELINE / f"{name}.png"), str(tmp_path / f"{name}.png"), TOLERANCE) is None


def test_every_plot_has_a_small_reference() -> None:
    assert set(DRAWINGS) == set(sd.pl.__all__) == {path.stem for path in BASELINE.glob("*.png")}
    assert all(path.stat().st_size < 10_000 for path in BASELINE.glob("*.png"))


@pytest.mark.parametrize("name", sd.pl.__all__)
def test_every_plot_takes_axes_and_returns_them(name: str) -> None:
    signature = inspect.signature(getattr(sd.pl, name))
    for parameter in ("ax", "show"):
        assert signature.parameters[parameter].kind is inspect.Parameter.KEYWORD_ONLY
        assert signature.parameters[parameter].default is None
    assert signature.return_annotation == "Axes"


@pytest.mark.parametrize("n_groups", [2, 40, 41, 102])
def test_groups_have_colors_of_their_own_that_are_saved(n_groups: int) -> None:
    adata = domains(n_groups)
    sd.pl.spatial_domains(adata, show=False)
    colors = adata.uns["spatial_domain_colors"]
    assert len(set(colors)) == len(colors) == n_groups
    if n_groups > 40:
        assert colors == list(pytest.importorskip("scanpy.plotting.palettes").default_102[:n_groups])


# What eyes without one kind of cone see of linear RGB (Machado et al. 2009, severity 1), and linear RGB to XYZ.
VISIONS = (
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
)
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def least_distance(colors: list[str]) -> float:
    """The distance in CIELAB of the two colours that some eye tells apart least."""
    from scipy.spatial.distance import pdist

    rgb = np.array([to_rgb(color) for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    found = []
    for vision in VISIONS:
        xyz = np.clip(linear @ np.transpose(vision), 0, 1) @ np.transpose(TO_XYZ) / [0.95047, 1, 1.08883]
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
        found.append(pdist(np.stack([116 * y, 500 * (x - y), 200 * (y - z)], 1)).min())
    return min(found)


@pytest.mark.parametrize(("count", "least"), [(8, 16), (20, 16), (28, 13), (40, 10)])
def test_every_eye_tells_the_colors_of_40_groups_apart(count: int, least: float) -> None:
    from scdiffx.pl._common import palette

    assert least_distance(palette(count)) > least  # 2 is what can just be seen; scanpy's 28 colours come to 0.9


def test_colors_that_are_no_use_are_replaced_and_others_kept() -> None:
    adata = domains(3)
    for useless in (["red"], ["red", "green", "no such color"]):
        adata.uns["spatial_domain_colors"] = useless
        sd.pl.spatial_domains(adata, show=False)
        assert adata.uns["spatial_domain_colors"] == ["#0072b2", "#d55e00", "#009e73"]
    adata.uns["spatial_domain_colors"] = ["red", "lime", "blue", "black"]
    ax = sd.pl.spatial_domains(adata, show=False)
    assert adata.uns["spatial_domain_colors"] == ["red", "lime", "blue", "black"]
    assert [tuple(part.get_facecolor()[0][:3]) for part in ax.collections] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


def test_a_plot_of_a_view_leaves_it_a_view() -> None:
    view = domains(3)[:300]
    sd.pl.spatial_domains(view, show=False)
    assert view.is_view
    assert "spatial_domain_colors" not in view.uns


@pytest.mark.parametrize(
    "draw",
    [
        lambda adata: sd.pl.spatial_domains(adata),
        lambda adata: sd.pl.archetypes(adata, color="spatial_domain"),
        lambda adata: sd.pl.aligned_slices(adata, color="spatial_domain", key="mine"),
    ],
    ids=["spatial_domains", "archetypes", "aligned_slices"],
)
def test_a_legend_of_40_groups_lies_in_the_figure(draw: Callable[[ad.AnnData], Axes]) -> None:
    adata = domains(40)
    adata.obs["spatial_domain"] = adata.obs["spatial_domain"].cat.rename_categories(lambda name: f"CD4+ subset {name}")
    adata.obs["slice"] = pd.Categorical(np.repeat(["a", "b"], 200))
    adata.obsm["mine_aligned"] = adata.obsm["spatial"]
    adata.uns["mine"] = {"params": {"batch_key": "slice"}, "slices": np.array(["a", "b"], object)}
    ax = draw(adata)
    assert made.inside(ax)
    texts = [text.get_window_extent() for text in ax.get_legend().get_texts()]
    assert len(texts) >= 40
    assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
    assert ax.get_window_extent().width > 0.25 * ax.figure.bbox.width


if __name__ == "__main__":
    for drawing in DRAWINGS:
        save(drawing, BASELINE / f"{drawing}.png")
