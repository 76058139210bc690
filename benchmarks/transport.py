"""Optimal transport between time points: cells of a time that was left out, and what large couplings cost.

    python benchmarks/transport.py interpolation [--epsilon 0.05] [--tau 0.95 1.0]
    python benchmarks/transport.py size [--n 20000] [--dims 30] [--max-iter 100]

"interpolation" leaves a middle bin of the worm's embryo time out, with everything that is fitted (genes, components),
couples its neighbours, and compares the cells that the coupling puts at the bin's mean time with those that are there:
the squared 2-Wasserstein distance of equal numbers of cells (exact, by assignment; mean over draws) and the energy
distance of all, over the same of two halves of the bin itself, which is the noise of the measure. Beside it stand
the bin before and after, their mix in the shares of the time, and pairs of them drawn at random.
"size" couples two clouds of points and prints seconds and the peak of memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EDGES = [0, 270, 330, 390, 450, 510, 580, 1000]
HELD_OUT = (1, 2, 3, 4, 5)


def projected(adata: ad.AnnData, held: np.ndarray, n_comps: int) -> np.ndarray:
    """Principal components of the cells that are not held out, and all cells in these."""
    adata = adata.copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    seen = adata[~held].copy()
    sd.pp.highly_variable_genes(seen, n_top_genes=2000)
    sd.pp.pca(seen, n_comps=n_comps)
    genes = seen.var["highly_variable"].to_numpy()
    x = adata.X[:, genes].toarray()
    return (x - x[~held].mean(0)) @ seen.varm["PCs"][genes]


def wasserstein(a: np.ndarray, b: np.ndarray, n: int, rng: np.random.Generator, draws: int = 5) -> float:
    found = []
    for _ in range(draws):
        i, j = (rng.choice(len(v), n, replace=False) for v in (a, b))
        cost = cdist(a[i], b[j], "sqeuclidean")
        found.append(cost[linear_sum_assignment(cost)].mean())
    return float(np.mean(found))


def energy(a: np.ndarray, b: np.ndarray) -> float:
    """Twice the mean distance between, less that within both: unbiased."""
    within = sum(cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (a, b))
    return float(2 * cdist(a, b).mean() - within)


def compared(z: np.ndarray, minutes: np.ndarray, label: np.ndarray, k: int, settings: dict) -> dict[str, np.ndarray]:
    """What stands for the cells of bin k: arrays of cells by name."""
    before, after, held = (z[label == k + d] for d in (-1, 1, 0))
    at = [minutes[label == k + d].mean() for d in (-1, 0, 1)]
    share = (at[1] - at[0]) / (at[2] - at[0])
    both = ad.AnnData(np.zeros((len(before) + len(after), 1), np.float32))
    both.obsm["X_pca"] = np.concatenate([before, after]).astype(np.float32)
    both.obs["minutes"] = np.repeat([at[0], at[2]], [len(before), len(after)])
    sd.tl.ot_trajectory(both, "minutes", **settings)
    rng = np.random.default_rng(0)
    n = 2 * len(held)
    from_after = rng.random(n) < share
    mix = np.where(
        from_after[:, None], after[rng.integers(len(after), size=n)], before[rng.integers(len(before), size=n)]
    )
    pairs = (1 - share) * before[rng.integers(len(before), size=n)] + share * after[rng.integers(len(after), size=n)]
    return {
        "transport": sd.tl.ot_interpolate(both, at[1], n_obs=n),
        "barycentric": sd.tl.ot_interpolate(both, at[1], method="barycentric"),
        "before": before,
        "after": after,
        "mix": mix,
        "random pairs": pairs,
    }


def interpolation(args: argparse.Namespace) -> None:
    adata = ad.read_h5ad(DATA / "worm_embryo" / "worm_embryo.h5ad")
    minutes = adata.obs["embryo.time"].astype(float).to_numpy()
    label = pd.cut(minutes, EDGES, labels=False)
    settings = {"epsilon": args.epsilon, "tau": tuple(args.tau), "time_unit": 60.0}
    print(f"{settings}\n{'minutes':<12} {'cells':>6} {'':<14} {'W2^2':>8} {'energy':>8}")
    for k in HELD_OUT:
        held = label == k
        z = projected(adata, held, args.dims)
        rng = np.random.default_rng(1)
        others = compared(z, minutes, label, k, settings)
        n = min(held.sum() // 2, *(len(v) for v in others.values()))
        halves = [z[np.flatnonzero(held)[part]] for part in np.array_split(rng.permutation(held.sum()), 2)]
        rows = {"itself": (wasserstein(*halves, n, rng), energy(*halves))}
        rows |= {name: (wasserstein(v, z[held], n, rng), energy(v, z[held])) for name, v in others.items()}
        for name, values in rows.items():
            first = f"{EDGES[k]}-{EDGES[k + 1]}" if name == "itself" else ""
            print(
                f"{first:<12} {held.sum() if first else '':>6} {name:<14} {values[0]:8.2f} {values[1]:8.3f}", flush=True
            )


def size(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    n = args.n
    # Clouds in which cells of types move, with variances that fall off as those of components do.
    spread = 3 / np.sqrt(1 + np.arange(args.dims))
    centres = rng.normal(size=(10, args.dims)) * spread * 2
    z = centres[rng.integers(10, size=2 * n)] + rng.normal(size=(2 * n, args.dims)) * spread
    z[n:] += spread
    adata = ad.AnnData(np.zeros((2 * n, 1), np.float32))
    adata.obsm["X_pca"] = z.astype(np.float32)
    adata.obs["time"] = np.repeat([0.0, 1.0], n)
    adata.obs["group"] = pd.Categorical(rng.integers(5, size=2 * n).astype(str))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    for name, call in (
        ("ot_trajectory", lambda: sd.tl.ot_trajectory(adata, "time", epsilon=args.epsilon, max_iter=args.max_iter)),
        ("ot_pull", lambda: sd.tl.ot_pull(adata, "group")),
        ("ot_interpolate", lambda: sd.tl.ot_interpolate(adata, 0.5)),
    ):
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        print(f"{name:<15} {time.process_time() - cpu:8.1f} CPU s {time.perf_counter() - wall:8.1f} s", flush=True)
    entry = adata.uns["ot_trajectory"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{n} x {n}, {args.dims} dims: {entry['iterations'][0]} iterations, error {entry['error'][0]:.1e}")
    print(f"peak of memory {peak:.2f} GB, of which {before:.2f} GB before; the matrix alone is {4e-9 * n * n:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["interpolation", "size"])
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--tau", type=float, nargs=2, default=[0.95, 1.0])
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--dims", type=int, default=30)
    parser.add_argument("--max-iter", type=int, default=2000)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    {"interpolation": interpolation, "size": size}[args.what](args)


if __name__ == "__main__":
    main()
