"""Integration by `mmd_integrate` and `wgan_integrate` beside Harmony, `vae` and no correction.

    python benchmarks/integrate.py [--data mixology_sc worm_embryo harmony_cell_lines] [--seeds 0 1 2]

Each on the same 30 components (those given, for harmony_cell_lines) with the batches of the data set; `vae`,
`mmd_counts` and `wgan_counts` on the counts of the same genes. Mixing: inverse Simpson's index of the batches among 30
neighbours, 0 apart, 1 as in all cells. Conservation: accuracy of a vote of 15 neighbours for the label, and the best
adjusted Rand index over six Leiden resolutions. Shuffled cells mix perfectly and keep nothing, so the overall score is
scIB's .4 mixing + .6 conservation. Means and standard deviations over seeds, and processor seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# Batch, label.
COLUMNS = {
    "mixology_sc": ("batch", "cell_line_demuxlet"),
    "worm_embryo": ("batch", "cell.type"),
    "harmony_cell_lines": ("dataset", "cell_type"),
}
METHODS = ("none", "shuffled", "harmony", "mmd", "wgan", "vae", "mmd_counts", "wgan_counts")
ON_COUNTS = METHODS[-3:]


def loaded(name: str) -> ad.AnnData:
    """Cells with a batch, a label and an embedding."""
    batch, label = COLUMNS[name]
    adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    adata = adata[~adata.obs[label].isna()].copy()
    adata.obs["batch"] = adata.obs[batch].astype(str).astype("category")
    adata.obs["label"] = adata.obs[label].astype(str).astype("category")
    if "X_pca" not in adata.obsm:
        adata.layers["counts"] = adata.X.copy()
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.pp.highly_variable_genes(adata, n_top_genes=2000, batch_key="batch")
        sc.pp.pca(adata, n_comps=30)
        adata = adata[:, adata.var["highly_variable"]].copy()
    return adata


def scores(z: np.ndarray, adata: ad.AnnData) -> np.ndarray:
    batch, label = (adata.obs[key].cat.codes.to_numpy() for key in ("batch", "label"))
    index = NearestNeighbors(n_neighbors=31).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    shares = np.stack([(batch[index] == b).mean(1) for b in range(batch.max() + 1)])
    best = 1 / ((np.bincount(batch) / len(batch)) ** 2).sum()
    mixing = ((1 / (shares**2).sum(0)).mean() - 1) / (best - 1)
    votes = [np.bincount(label[row[:15]]).argmax() == own for row, own in zip(index, label, strict=True)]
    graph = ad.AnnData(np.zeros((len(z), 1), np.float32), obsm={"z": z})
    sc.pp.neighbors(graph, use_rep="z")
    found = []
    for resolution in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5):
        sc.tl.leiden(graph, resolution, flavor="igraph", n_iterations=2, directed=False)
        found.append(adjusted_rand_score(label, graph.obs["leiden"]))
    return np.array([mixing, np.mean(votes), max(found), 0.4 * mixing + 0.3 * (np.mean(votes) + max(found))])


def embedding(adata: ad.AnnData, method: str, seed: int) -> np.ndarray:
    z = np.asarray(adata.obsm["X_pca"])
    if method == "none":
        return z
    if method == "shuffled":
        return z[np.random.default_rng(seed).permutation(len(z))]
    if method == "vae":
        sd.pp.vae(adata, batch_key="batch", layer="counts", rng=seed, progress=False)
        return np.asarray(adata.obsm["X_vae"])
    settings = {} if method == "harmony" else {"progress": False}
    if method in ON_COUNTS:
        method, settings = method.removesuffix("_counts"), settings | {"basis": None, "layer": "counts"}
    getattr(sd.pp, f"{method}_integrate")(adata, "batch", rng=seed, **settings)
    return np.asarray(adata.obsm[{"harmony": "X_pca_harmony"}.get(method, f"X_{method}")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.data:
        adata = loaded(name)
        print(f"\n{name}: mixing, neighbours' vote, best ARI, overall, variance kept; seconds")
        for method in options.methods:
            if method in ON_COUNTS and "counts" not in adata.layers:
                continue
            rows, start = [], time.process_time()
            for seed in options.seeds if method != "none" else options.seeds[:1]:
                z = embedding(adata, method, seed)
                kept = z.var(0).sum() / adata.obsm["X_pca"].var(0).sum()
                rows.append([*scores(z, adata), kept, (time.process_time() - start) / (len(rows) + 1)])
            mean, spread = np.mean(rows, 0), np.std(rows, 0)
            figures = "  ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean[:5], spread[:5], strict=True))
            print(f"{method:<11} {figures}   {mean[5]:.0f}", flush=True)


if __name__ == "__main__":
    main()
