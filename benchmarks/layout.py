"""UMAP beside umap-learn, called as scanpy calls it: kept neighbourhoods and processor time on the same graph.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/layout.py [--data ../shared/data] [--n 10000 50000]
        [--seeds 3] [--json out.json]

cite_cbmc (50 components of its 2,000 genes), and cells upsampled from spring_hpc (50 components), which are noisier
than real ones. Trustworthiness and the share of the 15 nearest cells in the components that are so in the layout, each
over 1,000 cells and all others. Seconds are processor time of calls after the first; the first, which compiles, apart.
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
import scanpy as sc
from neighbors import upsampled

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
K = 15


def kept(z: np.ndarray, y: np.ndarray, cells: int = 1000) -> tuple[float, float]:
    """Trustworthiness and the share of nearest cells kept, by all distances of some cells in float64."""
    n = len(z)
    some = np.random.default_rng(0).choice(n, min(cells, n), replace=False)
    penalty = shared = 0.0
    for part in np.array_split(some, max(1, len(some) * n // 20_000_000)):
        ranks, near = [], []
        for x in (z.astype(np.float64), y.astype(np.float64)):
            gap = (x**2).sum(1) - 2 * x[part] @ x.T
            gap[np.arange(len(part)), part] = -np.inf
            order = gap.argsort(1)
            near.append(order[:, 1 : K + 1])
            rank = np.empty_like(order)
            np.put_along_axis(rank, order, np.arange(n)[None], 1)
            ranks.append(rank)
        penalty += np.maximum(np.take_along_axis(ranks[0], near[1], 1) - K, 0).sum()
        shared += (np.take_along_axis(ranks[0], near[1], 1) <= K).sum()
    return 1 - 2 * penalty / (len(some) * K * (2 * n - 3 * K - 1)), shared / (len(some) * K)


def prepared(name: str, data: Path) -> ad.AnnData:
    if name.isdigit():
        z = upsampled(int(name), data / "spring_hpc" / "spring_hpc.h5ad").astype(np.float32)
        adata = ad.AnnData(np.zeros((len(z), 1), np.float32), obsm={"X_pca": z})
    else:
        source = ad.read_h5ad(data / name / f"{name}.h5ad")
        sd.pp.normalize_total(source)
        sd.pp.log1p(source)
        sd.pp.pca(source, n_comps=50)
        adata = ad.AnnData(np.zeros((source.n_obs, 1), np.float32), obsm={"X_pca": source.obsm["X_pca"]})
    sd.pp.neighbors(adata, use_rep="X_pca")
    return adata


def compared(name: str, data: Path, seeds: int) -> list[dict[str, Any]]:
    adata = prepared(name, data)
    z = np.asarray(adata.obsm["X_pca"])
    print(f"{name}, {len(z)} cells")
    rows = []
    for tool, run in (("scdiffx", sd.tl.umap), ("umap-learn", sc.tl.umap)):
        found, seconds = [], []
        for seed in [0, *range(seeds)]:
            start = time.process_time()
            run(adata, random_state=seed)
            seconds.append(time.process_time() - start)
            found.append(kept(z, adata.obsm["X_umap"]))
        trust, shared = np.array(found[1:]).T
        rows.append({"set": name, "tool": tool, "trust": trust.tolist(), "shared": shared.tolist(), "seconds": seconds})
        print(f"  {tool:<11} trustworthiness {trust.mean():.4f} ({trust.min():.4f} to {trust.max():.4f}), kept "
              f"{shared.mean():.4f} ({shared.min():.4f} to {shared.max():.4f}), {np.mean(seconds[1:]):.1f} s, "
              f"first {seconds[0]:.1f} s", flush=True)  # fmt: skip
    for what, y in (("2 components", z[:, :2]),):
        trust, shared = kept(z, y)
        print(f"  {what:<11} trustworthiness {trust:.4f}, kept {shared:.4f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--n", type=int, nargs="*", default=[10_000, 50_000])
    parser.add_argument("--sets", nargs="*", default=["cite_cbmc"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [row for name in (*given.sets, *map(str, given.n)) for row in compared(name, given.data, given.seeds)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
