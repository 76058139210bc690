"""Parametric UMAP beside umap-learn: the layout of three quarters of the cells, and the places of the others in it.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/parametric_layout.py [--data ../shared/data] [--seeds 3]
        [--json out.json]

50 components fitted on the three quarters. Trustworthiness of 15 neighbours for the cells that were laid out and, among
themselves, for the others; and how many of the others get their label from their 15 nearest cells in the layout, beside
the same in the 50 components and in the first two (the trivial layout). umap-learn (the layout that is no function)
places new cells by its `transform`. Processor seconds, compilation included.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import umap
from layout import kept
from sklearn.neighbors import KNeighborsClassifier

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"paul15": "paul15_clusters", "cite_cbmc": "label", "pbmc_4271": "label"}


def prepared(name: str, data: Path, seed: int) -> tuple[ad.AnnData, ad.AnnData, str]:
    """The cells to lay out and the others, with components of the first."""
    adata = ad.read_h5ad(data / name / f"{name}.h5ad")
    label = SETS[name]
    adata = adata[~adata.obs[label].isna()].copy()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    held = np.random.default_rng(seed).random(adata.n_obs) < 0.25
    old, new = adata[~held].copy(), adata[held].copy()
    sd.pp.pca(old, n_comps=50)
    mean = np.asarray(old.X.mean(0)).ravel()
    new.obsm["X_pca"] = (new.X @ old.varm["PCs"] - mean @ old.varm["PCs"]).astype(np.float32)
    return old, new, label


def layouts(old: ad.AnnData, new: ad.AnnData, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """For each method the places of both, and processor seconds."""
    start = time.process_time()
    sd.pp.neighbors(old)
    sd.tl.parametric_umap(old, random_state=seed, progress=False)
    sd.tl.parametric_umap(new, reference=old)
    key = "X_parametric_umap"
    found = {"scdiffx": (old.obsm[key], new.obsm[key], time.process_time() - start)}
    start = time.process_time()
    model = umap.UMAP(min_dist=0.5, random_state=seed, n_jobs=1).fit(old.obsm["X_pca"])
    places = model.transform(new.obsm["X_pca"])
    found["umap-learn"] = (model.embedding_, places, time.process_time() - start)
    for dims in (2, 50):
        found[f"{dims} components"] = (old.obsm["X_pca"][:, :dims], new.obsm["X_pca"][:, :dims], 0.0)
    return found


def scores(old: ad.AnnData, new: ad.AnnData, label: str, found: tuple[np.ndarray, np.ndarray, float]) -> dict[str, Any]:
    here, there, seconds = found
    types = old.obs[label].astype(str)
    vote = KNeighborsClassifier(15).fit(here, types)
    return {
        "old": kept(old.obsm["X_pca"], here)[0],
        "new": kept(new.obsm["X_pca"], there)[0],
        "label": float(vote.score(there, new.obs[label].astype(str))),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in args.sets:
        for seed in range(args.seeds):
            old, new, label = prepared(name, args.data, seed)
            for method, found in layouts(old, new, seed).items():
                rows.append({"set": name, "seed": seed, "method": method} | scores(old, new, label, found))
    print(f"{'set':10} {'method':14} {'old':>7} {'new':>7} {'label':>7} {'CPU s':>7}")
    for name in args.sets:
        for method in dict.fromkeys(row["method"] for row in rows):
            part = [row for row in rows if (row["set"], row["method"]) == (name, method)]
            mean = {key: np.mean([row[key] for row in part]) for key in ("old", "new", "label", "seconds")}
            numbers = f"{mean['old']:7.4f} {mean['new']:7.4f} {mean['label']:7.3f} {mean['seconds']:7.1f}"
            print(f"{name:10} {method:14} {numbers}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
