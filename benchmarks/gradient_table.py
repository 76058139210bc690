"""The derivatives of every learnable parameter, through short plans on blood cells, beside finite differences.

    python benchmarks/gradient_table.py [--only harmony magic] [--write docs/gradients.md]

Each row is a function within a plan from counts: how large the gradient of a loss on its output is in each parameter
(in unconstrained space), the cosine of derivatives along four random directions with central differences in double
precision, and the norm of their difference over that of the latter. Networks are trained for two epochs first.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np

import scdiffx as sd

L, P, T = sd.losses, sd.pp, sd.tl
HEADER = """# Derivatives, measured

`benchmarks/gradient_table.py --write docs/gradients.md` made this page: each function in a short plan from the counts
of 400 blood cells (300 genes), a loss on its output, and for each learnable parameter the norm of the gradient in
unconstrained space, the cosine of derivatives along {n} random directions with central differences (step {step:g},
double precision), and the norm of their difference relative to that of the differences. What was called is
`sd.metrics.gradient_flow`.

| function | loss | parameter | norm | cosine | relative error |
|---|---|---|---|---|---|
"""

FOOTER = """
Where the error is large:

- `phate`: its layout ends where a step moves points by less than 0.0001 of their spread, and the derivative is that of
  the minimum beyond; finite differences see where the iterations stopped. They agree for a small tolerance (tested).
- `vae`, `solo`, `parametric_umap`: networks with rectified units have kinks, which differences step across.
- `fate_probabilities`, `spatial_domains`: iterative solutions are off by their tolerance, which small steps divide by.
- `magic` under `molecular_cross_validation` (not in the table): that loss cuts at 0, and where no neighbour has a
  molecule of a gene the filter stands on the edge; there the derivative is one of two, and the error was .06.
"""


def cells() -> ad.AnnData:
    """Blood cells with invented batches, days, places, and molecules dealt into spliced and unspliced ones."""
    adata = sd.datasets.pbmc68k_counts()[:400, :300].copy()
    adata = ad.AnnData(adata.X, obs={"type": adata.obs["bulk_labels"].astype(str).to_numpy()}, var=adata.var[[]])
    rng = np.random.default_rng(0)
    adata.obs["batch"] = np.where(np.arange(400) % 2, "a", "b")
    adata.obs["depth"] = np.log(np.asarray(adata.X.sum(1)).ravel())
    adata.obs["day"] = np.argsort(np.argsort(adata.obs["depth"])) // 134
    adata.obs["end"] = adata.obs["type"].where(adata.obs["type"].isin(["CD14+ Monocyte", "CD19+ B"]))
    adata.obs["known"] = adata.obs["type"].where(np.arange(400) % 3 > 0)
    adata.obsm["spatial"] = rng.uniform(size=(400, 2)) * 20
    P.split_counts(adata, {"spliced": 0.75, "unspliced": 0.25})
    P.split_counts(adata)
    # A velocity graph reads distances between neighbours, which a plan does not hand on.
    near = adata.copy()
    graph(near)
    adata.obsm["X_pca"], adata.uns["neighbors"] = near.obsm["X_pca"], near.uns["neighbors"]
    for key in ("distances", "connectivities"):
        adata.obsp[key] = near.obsp[key]
    return adata


def log(plan: Any) -> None:
    P.normalize_total(plan, target_sum=1e3)
    P.log1p(plan)


def components(plan: Any) -> None:
    log(plan)
    P.pca(plan, n_comps=10)


def graph(plan: Any) -> None:
    components(plan)
    P.neighbors(plan, n_neighbors=10)


def weighted(plan: Any) -> None:
    log(plan)
    P.highly_variable_genes(plan, n_top_genes=100, soft=True)
    P.pca(plan, n_comps=10)


def after(first: Callable[[Any], None], *calls: tuple[Callable[..., None], dict[str, Any]]) -> Callable[[Any], None]:
    def make(plan: Any) -> None:
        first(plan)
        for function, arguments in calls:
            function(plan, **arguments)

    return make


def nothing(plan: Any) -> None:
    """The counts themselves."""


def velocities(plan: Any) -> None:
    T.velocity(plan, use_highly_variable=False, min_r2=-10.0)
    T.velocity_graph(plan)


class Row(NamedTuple):
    """A function by the name of its step, how to make the plan, and the loss.

    `step`: of finite differences, where iterations that end at a tolerance make small ones noisy.
    """

    name: str
    make: Callable[[Any], None]
    loss: Any
    said: str
    step: float | None = None


NETWORK = {"max_epochs": 2, "progress": False}
ROWS = [
    Row("normalize_total", components, L.cross_entropy("X_pca", "type"), "cross_entropy(X_pca)"),
    Row("highly_variable_genes", weighted, L.cross_entropy("X_pca", "type"), "cross_entropy(X_pca)"),
    Row("pca", components, L.cross_entropy("X_pca", "type"), "cross_entropy(X_pca)"),
    Row(
        "neighbors",
        after(graph, (T.pseudotime, {"root": 0})),
        L.correlation("dpt_pseudotime", "depth"),
        "correlation(dpt_pseudotime)",
    ),
    Row(
        "magic",
        after(components, (P.magic, {"layer": "fit", "t": 2.5})),
        # Not the deviance, which cuts at 0: where a neighbourhood has no molecule, a filter stands on that edge.
        L.reconstruction("magic", "choose"),
        "reconstruction(magic)",
    ),
    Row(
        "harmony",
        after(components, (P.harmony_integrate, {"key": "batch", "nclust": 6})),
        L.cross_entropy("X_pca_harmony", "type"),
        "cross_entropy(X_pca_harmony)",
    ),
    Row(
        "mmd_integrate",
        after(components, (P.mmd_integrate, {"key": "batch", "max_steps": 20, "progress": False})),
        L.cross_entropy("X_mmd", "type"),
        "cross_entropy(X_mmd)",
    ),
    Row(
        "wgan_integrate",
        after(components, (P.wgan_integrate, {"key": "batch", "max_steps": 20, "progress": False})),
        L.cross_entropy("X_wgan", "type"),
        "cross_entropy(X_wgan)",
    ),
    Row("vae", after(nothing, (P.vae, NETWORK)), L.cross_entropy("X_vae", "type"), "cross_entropy(X_vae)"),
    Row("denoise", after(nothing, (P.denoise, NETWORK)), L.reconstruction("denoised"), "reconstruction(denoised)"),
    Row("solo", after(nothing, (P.solo, NETWORK)), L.correlation("solo_score", "depth"), "correlation(solo_score)"),
    Row(
        "cell_weights",
        after(nothing, (P.cell_weights, {"bounds": {"depth": (5.0, 7.0)}})),
        L.correlation("cell_weight", "depth"),
        "correlation(cell_weight)",
    ),
    Row(
        "remove_ambient",
        after(nothing, (P.remove_ambient, {"groupby": "type"})),
        L.correlation("ambient_fraction", "depth"),
        "correlation(ambient_fraction)",
    ),
    Row(
        "kmeans",
        after(components, (T.kmeans, {"n_clusters": 6})),
        L.cross_entropy("kmeans_probabilities", "type"),
        "cross_entropy(kmeans_probabilities)",
    ),
    Row("leiden", after(graph, (T.leiden, {})), L.modularity("leiden_probabilities"), "modularity"),
    Row(
        "annotate",
        after(log, (T.annotate, {"labels_key": "known", "penalty": 0.01})),
        L.entropy("annotation_probabilities"),
        "entropy(annotation_probabilities)",
    ),
    Row(
        "parametric_umap",
        after(graph, (T.parametric_umap, {"n_steps": 50, "progress": False})),
        L.compactness("X_parametric_umap", "type"),
        "compactness(X_parametric_umap)",
    ),
    Row("phate", after(components, (T.phate, {})), L.compactness("X_phate", "type"), "compactness(X_phate)"),
    Row(
        "fate_probabilities",
        after(
            graph,
            (T.pseudotime, {"root": 0}),
            (T.fate_probabilities, {"terminal_states": ["CD14+ Monocyte", "CD19+ B"], "groupby": "end"}),
        ),
        L.correlation("priming_degree_fwd", "depth"),
        "correlation(priming_degree_fwd)",
    ),
    Row(
        "ot_trajectory",
        after(
            components, (T.ot_trajectory, {"time_key": "day"}), (T.ot_pull, {"groupby": "depth", "key_added": "later"})
        ),
        L.correlation("later", "depth"),
        "correlation(ot_pull)",
    ),
    Row(
        "transition_matrix",
        after(
            velocities,
            (T.transition_matrix, {"weight_connectivities": 0.3}),
            (
                T.fate_probabilities,
                {
                    "terminal_states": ["CD14+ Monocyte", "CD19+ B"],
                    "groupby": "end",
                    "transition_key": "velocity_transitions",
                },
            ),
        ),
        L.correlation("priming_degree_fwd", "depth"),
        "correlation(priming_degree_fwd)",
    ),
    Row(
        "velocity_embedding",
        after(velocities, (T.velocity_embedding, {"basis": "pca"})),
        L.cross_entropy("velocity_pca", "type"),
        "cross_entropy(velocity_pca)",
    ),
    Row("grn", after(log, (T.grn, {"tfs": [], "penalty": 0.01})), L.l1("tf_activity"), "l1(tf_activity)"),
    Row(
        "spatial_domains",
        # Fewer components than features: the mixture does not see the scale of features that it has all of.
        after(components, (T.spatial_domains, {"n_domains": 4, "hops": 1.5, "gradient": 0.5, "n_comps": 8})),
        L.cross_entropy("spatial_domain_probabilities", "type"),
        "cross_entropy(memberships); steps of 0.001",
        step=1e-3,
    ),
    Row(
        "align_slices",
        after(log, (T.align_slices, {"batch_key": "batch", "alpha": 0.2, "epsilon": 0.1})),
        L.compactness("spatial_aligned", "type"),
        "compactness(spatial_aligned)",
    ),
]


def measured(row: Row, adata: ad.AnnData, n: int, step: float) -> list[str]:
    plan = sd.plan(adata.copy())
    row.make(plan)
    learn = next(s.name for s in plan.steps if s.name.startswith(row.name))
    flow = sd.metrics.gradient_flow(plan, row.loss, learn=learn, n_directions=n, step=step)
    lines = []
    for parameter, size in flow.parameters.items():
        note = "dead" if parameter in flow.dead else f"{flow.cosine[parameter]:.6f}"
        figures = f"{size:.2g} | {note} | {flow.error[parameter]:.1e}"
        lines.append(f"| `{row.name}` | {row.said} | {parameter.split('.', 1)[1]} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--step", type=float, default=1e-5)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = cells()
    tfs = list(adata.var_names[::20])
    text = HEADER.format(n=args.directions, step=args.step)
    for row in ROWS:
        if args.only and row.name not in args.only:
            continue
        if row.name == "grn":
            row = row._replace(make=after(log, (T.grn, {"tfs": tfs, "penalty": 0.01})))
        start = time.process_time()
        lines = measured(row, adata, args.directions, row.step or args.step)
        print("\n".join(lines), f"  {time.process_time() - start:.0f} s", flush=True)
        text += "\n".join(lines) + "\n"
    if args.write:
        args.write.write_text(text + FOOTER)


if __name__ == "__main__":
    main()
