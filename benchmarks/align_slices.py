"""Slices of tissue brought together: known motions, objectives beside POT's, and large slices.

    python benchmarks/align_slices.py truth [--pot PYTHON] [--draws 3]
    python benchmarks/align_slices.py overlap [--draws 3] [--molecules 1] [--shares .8 .7 .5]
    python benchmarks/align_slices.py partial --pot PYTHON [--share 0.7]
    python benchmarks/align_slices.py center [--draws 3] [--molecules 1]
    python benchmarks/align_slices.py pairs [--pot PYTHON] [--epsilon 0.002]
    python benchmarks/align_slices.py size [--spots 20000]

"truth": of each of paste_breast's four slices, 80 % of the spots, drawn at random, are turned and shifted, and their
counts thinned. They are aligned onto the slice that they are of: median distance to where they belong in spot
distances, and error of the rotation in degrees, over all draws the mean and the largest. Beside it stand "expression":
each spot with the most similar profile (the same divergence), then Procrustes; and POT's coupling of the same costs,
with the same Procrustes, where a Python in which POT runs is given.
"overlap": the same, but what is turned is not a random part: spots beyond a line are missing. With `overlap` left at 1,
at what it is, and a tenth off to either side.
"partial": consecutive slices, of which `--share` is coupled, the objective beside POT's on the same costs.
"center": each slice four times, turned and thinned anew, aligned as a chain and onto a centre.
"pairs": consecutive slices, the objective beside POT's on the same costs.
"size": two slices with this many spots, made of a slice by putting spots at random between those that there are, mixing
the neighbours' expected counts, and drawing molecules; the second is a new draw, turned. Seconds and the peak of memory
of the process, and the same errors, for what they are worth on such data.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "paste_breast" / "paste_breast.h5ad"
ALPHA = 0.1
POT = """
import sys, numpy as np, ot
with np.load(sys.argv[1]) as f:
    given, alpha, share = (f["m"], f["c"], f["d"]), float(f["alpha"]), float(f["share"])
if share == 1:
    plan, log = ot.gromov.fused_gromov_wasserstein(*given, alpha=alpha, log=True)
    objective = log["fgw_dist"]
else:
    plan = ot.gromov.partial_fused_gromov_wasserstein(*given, alpha=alpha, m=share, tol=1e-12)
    (m, c, d), p, q = given, plan.sum(1), plan.sum(0)
    geometry = p @ c**2 @ p + q @ d**2 @ q - 2 * ((c @ plan @ d) * plan).sum()
    objective = (1 - alpha) * (m * plan).sum() + alpha * geometry
np.savez(sys.argv[2], plan=plan, objective=objective)
"""


def turn(degrees: float) -> np.ndarray:
    t = np.radians(degrees)
    return np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])


def spacing(x: np.ndarray) -> float:
    return float(np.median(cKDTree(x).query(x, k=2)[0][:, 1]))


def costs(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The divergence of profiles, and squared distances in our units, from their definitions."""
    a, b = ((v + 0.01) / (v + 0.01).sum(1, keepdims=True) for v in (a, b))
    c, d = (cdist(v, v, "sqeuclidean") for v in (x, y))
    scale = 2 * np.sqrt((c.mean() + d.mean()) / 2) * (spacing(x) + spacing(y)) / 2
    return (a * np.log(a)).sum(1)[:, None] - a @ np.log(b).T, c / scale, d / scale


def value(m: np.ndarray, c: np.ndarray, d: np.ndarray, plan: np.ndarray) -> float:
    p, q = plan.sum(1), plan.sum(0)
    geometry = p @ c**2 @ p + q @ d**2 @ q - 2 * ((c @ plan @ d) * plan).sum()
    return float((1 - ALPHA) * (m * plan).sum() + ALPHA * geometry)


def pot(python: str, m: np.ndarray, c: np.ndarray, d: np.ndarray, share: float = 1.0) -> tuple[np.ndarray, float]:
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, m=m, c=c, d=d, alpha=ALPHA, share=share)
        subprocess.run([python, "-c", POT, str(given), str(found)], check=True)
        with np.load(found) as file:
            return file["plan"], float(file["objective"])


def procrustes(plan: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, q = plan.sum(1) / plan.sum(), plan.sum(0) / plan.sum()
    u, _, v = np.linalg.svd((x - p @ x).T @ plan @ (y - q @ y))
    rotation = (u * [1, np.linalg.det(u @ v)]) @ v
    return rotation, p @ x - rotation @ (q @ y)


def errors(rotation: np.ndarray, aligned: np.ndarray, truth: np.ndarray, degrees: float, unit: float) -> list[float]:
    rest = rotation @ turn(degrees)
    angle = abs(np.degrees(np.arctan2(rest[1, 0], rest[0, 0])))
    return [float(np.median(np.linalg.norm(aligned - truth, axis=1)) / unit), float(angle)]


def joined(x: Any, y: Any, a: Any, b: Any) -> ad.AnnData:
    adata = ad.AnnData(sp.csr_matrix(sp.vstack([sp.csr_matrix(a), sp.csr_matrix(b)]), dtype=np.float32))
    adata.obsm["spatial"] = np.concatenate([x, y])
    adata.obs["slice"] = pd.Categorical(np.repeat(["first", "second"], [len(x), len(y)]))
    return adata


def truth(python: str | None, draws: int) -> None:
    adata = ad.read_h5ad(DATA)
    rows = []
    for name in adata.obs["slice"].unique():
        one = adata[adata.obs["slice"] == name]
        a, x = one.X.toarray().astype(int), np.asarray(one.obsm["spatial"], np.float64)
        for seed in range(draws):
            rng = np.random.default_rng(seed)
            degrees = float(rng.uniform(0, 360))
            kept = np.sort(rng.choice(len(x), int(0.8 * len(x)), replace=False))
            y = x[kept] @ turn(degrees).T + rng.normal(size=2) * 20
            for thin in (1.0, 0.1):
                b = rng.binomial(a[kept], thin)
                both = joined(x, y, a, b)
                start = time.process_time()
                sd.tl.align_slices(both, "slice")
                seconds = time.process_time() - start
                entry = both.uns["align_slices"]
                aligned = both.obsm["spatial_aligned"][len(x) :]
                found = {"scdiffx": errors(entry["rotation"][1], aligned, x[kept], degrees, spacing(x))}
                m, c, d = costs(x, y, a, b)
                nearest = np.zeros_like(m)
                nearest[m.argmin(0), np.arange(len(y))] = 1 / len(y)
                plans = {"expression": nearest}
                if python:
                    plans["POT"], objective = pot(python, m, c, d)
                    rows.append((thin, "excess", float(entry["objective"][0]) / objective - 1, seconds))
                for method, plan in plans.items():
                    rotation, shift = procrustes(plan, x, y)
                    found[method] = errors(rotation, y @ rotation.T + shift, x[kept], degrees, spacing(x))
                rows += [(thin, method, *error) for method, error in found.items()]
    table = pd.DataFrame(rows, columns=["molecules", "method", "median error", "degrees"])
    excess = table[table["method"] == "excess"]
    table = table[table["method"] != "excess"].groupby(["molecules", "method"], sort=False)
    print(table.agg(["mean", "max"]).round(3).to_string())
    if len(excess):
        relative, seconds = excess["median error"], excess["degrees"]
        print(f"objective over POT's, less 1: mean {relative.mean():.1e}, largest {relative.max():.1e}")
        print(f"seconds of a later call: {seconds.median():.2f}")


def overlap(draws: int, molecules: float, shares: list[float]) -> None:
    adata = ad.read_h5ad(DATA)
    rows = []
    for number, name in enumerate(adata.obs["slice"].unique()):
        one = adata[adata.obs["slice"] == name]
        a, x = one.X.toarray().astype(int), np.asarray(one.obsm["spatial"], np.float64)
        for seed in range(draws):
            rng = np.random.default_rng([seed, number])
            degrees, side = rng.uniform(0, 360, 2)
            b = rng.binomial(a, molecules)
            along = x @ turn(float(side))[0]
            for share in shares:
                kept = np.flatnonzero(along <= np.quantile(along, share))
                both = joined(x, x[kept] @ turn(degrees).T + [5, 9], a, b[kept])
                for off in (None, 0, -0.1, 0.1):
                    given = 1.0 if off is None else round(share + off, 2)
                    sd.tl.align_slices(both, "slice", overlap=given)
                    aligned = both.obsm["spatial_aligned"][len(x) :]
                    rotation = both.uns["align_slices"]["rotation"][1]
                    label = "1 (whole)" if off is None else f"truth {off:+.1f}" if off else "truth"
                    rows.append((share, label, *errors(rotation, aligned, x[kept], degrees, spacing(x))))
                    print(name, *rows[-1], flush=True)
    table = pd.DataFrame(rows, columns=["share of the slice", "overlap", "median error", "degrees"])
    table = table.groupby(["share of the slice", "overlap"], sort=False)
    print(table.agg(["median", "mean", "max"]).round(2).to_string())


def partial(python: str, overlap: float) -> None:
    adata = ad.read_h5ad(DATA)
    parts = [adata[adata.obs["slice"] == name] for name in adata.obs["slice"].unique()]
    for k, (one, two) in enumerate(pairwise(parts)):
        given = (one.obsm["spatial"], two.obsm["spatial"], one.X.toarray(), two.X.toarray())
        both = joined(*given)
        sd.tl.align_slices(both, "slice", overlap=overlap)
        ours = float(both.uns["align_slices"]["objective"][0])
        _, theirs = pot(python, *costs(*given), overlap)
        print(f"slices {k + 1}, {k + 2}: {ours:.6f}, POT {theirs:.6f}, ratio less 1: {ours / theirs - 1:.1e}")


def center(draws: int, molecules: float) -> None:
    adata = ad.read_h5ad(DATA)
    rows = []
    for number, name in enumerate(adata.obs["slice"].unique()):
        one = adata[adata.obs["slice"] == name]
        a, x = one.X.toarray().astype(int), np.asarray(one.obsm["spatial"], np.float64)
        for seed in range(draws):
            rng = np.random.default_rng([seed, number])
            degrees = [0.0, *rng.uniform(0, 360, 3)]
            counts = np.concatenate([rng.binomial(a, molecules) for _ in degrees])
            four = ad.AnnData(sp.csr_matrix(counts, dtype=np.float32))
            four.obsm["spatial"] = np.concatenate([x @ turn(t).T for t in degrees])
            four.obs["slice"] = pd.Categorical(np.repeat(list("abcd"), len(x)))
            for reference in (None, "center"):
                sd.tl.align_slices(four, "slice", reference=reference)
                turns, at = four.uns["align_slices"]["rotation"], np.split(four.obsm["spatial_aligned"], 4)
                label = "chain" if reference is None else "centre"
                # Where the first lies is the system of coordinates, of the centre too.
                rows += [(label, *errors(turns[k], at[k], x, degrees[k], spacing(x))) for k in (1, 2, 3)]
                print(name, rows[-3:], flush=True)
    table = pd.DataFrame(rows, columns=["onto", "median error", "degrees"]).groupby("onto", sort=False)
    print(table.agg(["mean", "max"]).round(4).to_string())


def pairs(python: str | None, epsilon: float) -> None:
    adata = ad.read_h5ad(DATA)
    start = time.process_time()
    sd.tl.align_slices(adata, "slice", epsilon=epsilon)
    print(f"four slices, first call: {time.process_time() - start:.1f} s")
    start = time.process_time()
    sd.tl.align_slices(adata, "slice", epsilon=epsilon)
    print(f"later call: {time.process_time() - start:.1f} s")
    entry = adata.uns["align_slices"]
    for (i, j), ours in zip(entry["pairs"], entry["objective"], strict=True):
        one, two = (adata[adata.obs["slice"] == entry["slices"][k]] for k in (i, j))
        given = costs(one.obsm["spatial"], two.obsm["spatial"], one.X.toarray(), two.X.toarray())
        line = f"{entry['slices'][i]}, {entry['slices'][j]}: {ours:.6f}"
        if python:
            start = time.perf_counter()
            _, theirs = pot(python, *given)
            line += f", POT {theirs:.6f} (ratio less 1: {ours / theirs - 1:.1e}), {time.perf_counter() - start:.1f} s"
        print(line)


def size(spots: int) -> None:
    adata = ad.read_h5ad(DATA)
    one = adata[adata.obs["slice"] == "slice1"]
    at, counts = np.asarray(one.obsm["spatial"], np.float64), one.X.toarray()
    tree, rng = cKDTree(at), np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, sp.csr_matrix]:
        # On a grid that covers the slice, its own kind of spots at a distance of less than one.
        low, high = at.min(0), at.max(0)
        side = np.sqrt(np.prod(high - low) / spots)
        inside = np.empty((0, 2))
        while len(inside) < spots:
            side *= 0.98
            grid = np.stack(np.meshgrid(*(np.arange(a, b, side) for a, b in zip(low, high, strict=True))), -1)
            grid = grid.reshape(-1, 2) + rng.uniform(0, side, 2)
            inside = grid[tree.query(grid)[0] < 0.75 * spacing(at)]
        where = inside[np.sort(rng.choice(len(inside), spots, replace=False))]
        blocks = []
        for begin in range(0, spots, 1000):
            distance, near = tree.query(where[begin : begin + 1000], k=4)
            weight = np.exp(-((distance / spacing(at)) ** 2) * 2)
            mean = np.einsum("ij,ijg->ig", weight / weight.sum(1, keepdims=True), counts[near])
            blocks.append(sp.csr_matrix(rng.poisson(mean), dtype=np.float32))
        return where, sp.vstack(blocks, format="csr")

    (x, a), (y, b) = draw(), draw()
    both = joined(x, y @ turn(70).T + [5, 9], a, b)
    del a, b
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for call in ("first call", "later call"):
        start, wall = time.process_time(), time.perf_counter()
        sd.tl.align_slices(both, "slice")
        print(f"{call}: {time.process_time() - start:.1f} s of processors, {time.perf_counter() - wall:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    entry = both.uns["align_slices"]
    found = errors(entry["rotation"][1], both.obsm["spatial_aligned"][len(x) :], y, 70, spacing(x))
    print(f"2 x {spots} spots x {both.n_vars} genes, {both.X.nnz / both.X.shape[0]:.0f} values a spot")
    print(f"peak {peak:.2f} GB, {before:.2f} GB before the call; error {found[0]:.2f} spots, {found[1]:.2f} degrees")
    print(f"steps {entry['steps'].tolist()}, error {entry['error'].tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "overlap", "partial", "center", "pairs", "size"])
    parser.add_argument("--pot")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=0.002)
    parser.add_argument("--spots", type=int, default=20_000)
    parser.add_argument("--molecules", type=float, default=1.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--share", type=float, default=0.7)
    args = parser.parse_args()
    if args.what == "truth":
        truth(args.pot, args.draws)
    elif args.what == "overlap":
        overlap(args.draws, args.molecules, args.shares)
    elif args.what == "partial":
        partial(args.pot, args.share)
    elif args.what == "center":
        center(args.draws, args.molecules)
    elif args.what == "pairs":
        pairs(args.pot, args.epsilon)
    else:
        size(args.spots)


if __name__ == "__main__":
    main()
