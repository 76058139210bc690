"""Can structure be improved without labels? Gene weights fitted so that two halves of a cell's molecules agree.

    python benchmarks/joint_structure.py [--data paul15 mixology_sc ...] [--seeds 0 1 2] [--steps 60] [--json out.json]

Every cell is measured twice (`sd.pp.replicates`). Through normalise -> logarithm -> gene weights -> components the
weights of the 2,000 candidate genes and the scales of the components are fitted to `sd.losses.replicate_consistency`;
a fifth of the cells chooses, a fifth is the test. Controls: the frozen defaults, and a grid of numbers of genes and
components by the same loss on the cells that choose. Labels are looked at after all is done, by

- consistency: the loss on the halves of the test cells;
- overlap: neighbours that both halves of a test cell have in common, of 15, halves of another split of the molecules;
- votes: accuracy of 15 neighbours among the other cells for the label of whole test cells;
- ARI: the best of six Leiden resolutions, all whole cells.
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
import optax
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

import scdiffx as sd
from scdiffx._calls import replay

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LABELS = {
    "paul15": "paul15_clusters",
    "mixology_sc": "cell_line_demuxlet",
    "pbmc_4271": "label",
    "soupx_pbmc": "annotation",
    "worm_embryo": "cell.type",
    "cite_cbmc": "label",
}
GRID = {"highly_variable_genes.n_top_genes": [250, 500, 1000, 2000], "pca.n_comps": [10, 20, 30, 50]}
MOST_CELLS = 4000


def loaded(name: str) -> ad.AnnData:
    """Counts of 2,000 candidate genes, with the labels in obs["label"]."""
    adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    column = LABELS[name]
    adata = adata[~adata.obs[column].isna()].copy()
    if adata.n_obs > MOST_CELLS:
        adata = adata[np.sort(np.random.default_rng(0).choice(adata.n_obs, MOST_CELLS, replace=False))].copy()
    label = adata.obs[column].astype(str).to_numpy()
    adata = ad.AnnData(sp.csr_matrix(adata.X).astype(np.float32), obs={"label": label}, var={"gene": adata.var_names})
    log = adata.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    sc.pp.highly_variable_genes(log, n_top_genes=min(2000, log.n_vars))
    return adata[:, log.var["highly_variable"].to_numpy()].copy()


def workflow(target: Any) -> None:
    sd.pp.normalize_total(target, target_sum=1e4)
    sd.pp.log1p(target)
    sd.pp.highly_variable_genes(target, n_top_genes=1000, soft=True)
    sd.pp.pca(target, n_comps=30)


def shared_neighbors(z: np.ndarray, cells: np.ndarray) -> float:
    """Of the 15 nearest whole-cell partners of each half, how many both halves have."""
    n = len(z) // 2
    found = [
        NearestNeighbors(n_neighbors=16).fit(half).kneighbors(half[cells], return_distance=False)[:, 1:]
        for half in (z[:n], z[n:])
    ]
    return float(np.mean([len(np.intersect1d(a, b)) / 15 for a, b in zip(*found, strict=True)]))


def best_ari(z: np.ndarray, label: np.ndarray) -> float:
    graph = ad.AnnData(np.zeros((len(z), 1), np.float32), obsm={"z": z})
    sc.pp.neighbors(graph, use_rep="z")
    found = []
    for resolution in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5):
        sc.tl.leiden(graph, resolution, flavor="igraph", n_iterations=2, directed=False)
        found.append(adjusted_rand_score(label, graph.obs["leiden"]))
    return float(max(found))


def run(name: str, seed: int, steps: int, rate: float, learn: list[str]) -> dict[str, Any]:
    whole = loaded(name)
    halves, others = (sd.pp.replicates(whole, rng=s) for s in (seed, seed + 1000))
    order = np.random.default_rng(seed).permutation(whole.n_obs)
    test, choose = np.zeros((2, whole.n_obs), bool)
    test[order[: whole.n_obs // 5]] = True
    choose[order[whole.n_obs // 5 : 2 * (whole.n_obs // 5)]] = True
    masks = {"holdout": np.tile(choose, 2), "test": np.tile(test, 2)}
    plan = sd.plan(halves)
    workflow(plan)
    loss = sd.losses.replicate_consistency("X_pca")
    start = time.process_time()
    fitted = sd.fit(
        plan, loss, learn=learn, n_steps=steps, optimizer=optax.adam(rate), refresh_every=10, progress=False, **masks
    )
    seconds = time.process_time() - start
    grid = sd.grid(plan, loss, GRID, progress=False, **masks)
    variants = {
        "frozen": (lambda cells: replay(plan.calls, cells).apply(copy=True), fitted.losses["test_before"]),
        "joint fit": (lambda cells: fitted.apply(cells, copy=True), fitted.losses["test_after"]),
        "grid": (lambda cells: replay(grid.plan.calls, cells).apply(copy=True), grid.losses["test"]),
    }
    result: dict[str, Any] = {"adopted": fitted.adopted, "fit CPU s": seconds, "grid chose": grid.best}
    label = whole.obs["label"].to_numpy()
    for method, (applied, consistency) in variants.items():
        z = np.asarray(applied(whole).obsm["X_pca"])
        votes = KNeighborsClassifier(15).fit(z[~test], label[~test]).score(z[test], label[test])
        overlap = shared_neighbors(np.asarray(applied(others).obsm["X_pca"]), np.flatnonzero(test))
        result[method] = [float(consistency), overlap, float(votes), best_ari(z, label)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--learn", nargs="+", default=["highly_variable_genes.shift", "pca.scale"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    everything: dict[str, Any] = {}
    for name in args.data:
        found = [run(name, seed, args.steps, args.rate, args.learn) for seed in args.seeds]
        everything[name] = found
        print(f"\n{name}: consistency (lower is better), overlap, votes, ARI")
        for method in ("frozen", "grid", "joint fit"):
            rows = np.array([r[method] for r in found])
            print(
                f"{method:>10}: "
                + "  ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(rows.mean(0), rows.std(0), strict=True))
            )
        print({k: [r[k] for r in found] for k in ("adopted", "grid chose")}, flush=True)
        if args.json:
            args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
