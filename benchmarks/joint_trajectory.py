"""Joint fits against time or position with few or many known cells, beside their controls.

    python benchmarks/joint_trajectory.py [--sets NAME ...] [--seeds 0 1 2] [--shares 0.05 0.2 0.8] [--json out.json]

A fifth of the cells is the test set. Of the others a share is known; three quarters of these train and a quarter
chooses. Gene weights and the bandwidth of the graph are learned through gene weights -> PCA -> graph -> pseudotime,
from the earliest known cell. Printed: Spearman correlation (without sign) of the test cells with the truth, of

- the pseudotime of the defaults, of the joint fit, and of the best of a grid of classical settings, chosen by all known
  cells (`sd.grid`);
- the first principal component, and the distance from the root in all of them;
- the mean of the 15 nearest known cells in the components (kNN), which sees the same labels.

The 2,000 most variable genes come from all cells, without labels. The rate was chosen with seed 0 of worm_embryo by the
cells that choose.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import optax
import scipy.sparse as sp
from scipy.stats import spearmanr
from sklearn.neighbors import KNeighborsRegressor

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"worm_embryo": "embryo.time", "moor_villus": "zone"}
GRID = {
    "highly_variable_genes.n_top_genes": [500, 1000, 2000],
    "pca.n_comps": [20, 50],
    "neighbors.n_neighbors": [15, 30],
}
METHODS = ("defaults", "joint", "grid", "PC1", "distance", "kNN")


def read(name: str, data: Path) -> ad.AnnData:
    adata = ad.read_h5ad(data / name / f"{name}.h5ad")
    adata.X = sp.csr_matrix(adata.X).astype(np.float32)
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=2000, subset=True)
    adata.obs["truth"] = adata.obs[SETS[name]].astype(float)
    return adata


def dealt(truth: np.ndarray, seed: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the cells that train, choose, and are the test set; a larger share holds the smaller."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(np.isfinite(truth)))
    test, rest = np.split(order, [len(order) // 5])
    choose, train = np.split(rest[: round(share * len(rest))], [round(share * len(rest)) // 4])
    masks = np.zeros((3, len(truth)), bool)
    for mask, cells in zip(masks, (train, choose, test), strict=True):
        mask[cells] = True
    return masks[0], masks[1], masks[2]


def planned(adata: ad.AnnData, root: int) -> sd.Plan:
    plan = sd.plan(adata)
    sd.pp.highly_variable_genes(plan, n_top_genes=1000, soft=True)
    sd.pp.pca(plan, n_comps=50)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=root)
    return plan


def run(name: str, adata: ad.AnnData, seed: int, share: float, given: argparse.Namespace) -> dict[str, Any]:
    truth = adata.obs["truth"].to_numpy()
    train, choose, test = dealt(truth, seed, share)
    known = train | choose
    adata.obs["known"] = np.where(known, truth, np.nan)
    root = int(np.nanargmin(adata.obs["known"]))
    plan, loss = planned(adata, root), sd.losses.correlation("dpt_pseudotime", "known")
    begun = time.process_time()
    fitted = sd.fit(
        plan,
        loss,
        learn=["highly_variable_genes.shift", "neighbors.bandwidth"],
        optimizer=optax.adam(given.rate),
        n_steps=given.steps,
        patience=30,
        holdout=choose,
        test=test,
        progress=False,
    )
    between = time.process_time()
    grid = sd.grid(plan, loss, GRID, budget=3 * given.steps, holdout=None, test=test, progress=False)
    end = time.process_time()
    plain, joint, best = (each.apply(copy=True) for each in (plan, fitted, grid.plan))
    z = plain.obsm["X_pca"]
    nearest = KNeighborsRegressor(min(15, int(known.sum()))).fit(z[known], truth[known])
    values = dict.fromkeys(METHODS)
    values |= {k: v.obs["dpt_pseudotime"] for k, v in (("defaults", plain), ("joint", joint), ("grid", best))}
    values |= {"PC1": z[:, 0], "distance": np.linalg.norm(z - z[root], axis=1), "kNN": nearest.predict(z)}
    row: dict[str, Any] = {"set": name, "seed": seed, "share": share, "known": int(known.sum())}
    row |= {method: spearman(np.asarray(value), truth, test) for method, value in values.items()}
    row |= {"adopted": fitted.adopted, "best step": int(np.argmin(fitted.history["holdout"]))}
    row |= {"holdout": fitted.losses["holdout_after"], "grid choice": grid.best, "settings": len(grid.table)}
    row |= {"fit CPU s": between - begun, "grid CPU s": end - between}
    print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def spearman(values: np.ndarray, truth: np.ndarray, cells: np.ndarray) -> float:
    keep = cells & np.isfinite(values)
    return abs(float(spearmanr(values[keep], truth[keep])[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.2, 0.8])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    data = {name: read(name, given.data) for name in given.sets}
    for seed, share in itertools.product(given.seeds, given.shares):
        for name, adata in data.items():
            rows.append(run(name, adata, seed, share, given))
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))
    for name in given.sets:
        for share in given.shares:
            some = [row for row in rows if (row["set"], row["share"]) == (name, share)]
            print(f"\n{name}, {some[0]['known']} known cells: mean and standard deviation of {len(some)} seeds")
            for method in METHODS:
                values = [row[method] for row in some]
                spread = np.std(values, ddof=min(1, len(values) - 1))
                print(f"{method:>10}: {np.mean(values):.3f} +- {spread:.3f}")


if __name__ == "__main__":
    main()
