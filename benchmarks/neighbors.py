"""Nearest neighbours: scdiffx against pynndescent, called as scanpy and umap call it.

python benchmarks/neighbors.py --n 50000 --k 15 --repeat 3 [--data ../shared/data] [--json out.json]

Cells are upsampled from the spring_hpc counts (each cell mixed with one of its neighbours, depth redrawn, Poisson
sampled, normalised, log1p, 50 principal components), or lie on a noisy low-dimensional manifold where that data set is
absent. Warm figures come from alternate runs in one process, first calls from fresh processes; recall is against the
exact neighbours of 1,000 cells.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

GENES, COMPONENTS, CHUNK = 2000, 50, 20_000


def upsampled(n: int, path: Path, seed: int = 0) -> np.ndarray:
    """Principal components (n, 50) of n cells drawn around the cells of an .h5ad file of counts."""
    import anndata
    import scipy.sparse as sp
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(anndata.read_h5ad(path).X).astype(np.float32)
    depth = np.asarray(counts.sum(axis=1)).ravel()
    usual = np.median(depth)
    logged = counts.multiply((usual / depth)[:, None]).tocsr()
    logged.data = np.log1p(logged.data)
    mean = np.asarray(logged.mean(axis=0)).ravel()
    variance = np.asarray(logged.multiply(logged).mean(axis=0)).ravel() - mean**2
    genes = np.sort(np.argsort(-variance / (mean + 0.05))[:GENES])
    components = PCA(30, random_state=0).fit_transform(logged[:, genes].toarray())
    near = NearestNeighbors(n_neighbors=11).fit(components).kneighbors(return_distance=False)
    share = counts[:, genes].multiply(1 / depth[:, None]).toarray().astype(np.float32)
    out, model = np.empty((n, COMPONENTS), np.float32), None
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        a = rng.integers(0, len(share), m)
        b = near[a, rng.integers(1, 11, m)]
        weight = rng.random((m, 1), dtype=np.float32)
        drawn = rng.choice(depth, m)[:, None].astype(np.float32)
        cells = rng.poisson((weight * share[a] + (1 - weight) * share[b]) * drawn).astype(np.float32)
        cells = np.log1p(cells * (usual / drawn))
        model = model or PCA(COMPONENTS, random_state=0, svd_solver="randomized").fit(cells)
        out[start : start + m] = model.transform(cells)
    return out


def manifold(n: int, seed: int = 0) -> np.ndarray:
    """Branches in 10 dimensions with noise in 50, (n, 50): a stand-in where no data are at hand."""
    rng = np.random.default_rng(seed)
    corners = np.zeros((8, COMPONENTS))
    corners[:, :10] = rng.normal(scale=4, size=(8, 10))
    a, b = rng.integers(0, 8, (2, n))
    t = rng.random((n, 1))
    return (t * corners[a] + (1 - t) * corners[b] + rng.normal(scale=0.7, size=(n, COMPONENTS))).astype(np.float32)


def ours(x: np.ndarray, k: int, method: str = "auto") -> np.ndarray:
    from scdiffx._core.knn import nearest

    return nearest(x, k, method=method)[0]


def peer(x: np.ndarray, k: int) -> np.ndarray:
    from pynndescent import NNDescent

    n = len(x)
    search = NNDescent(
        x,
        n_neighbors=k,
        metric="euclidean",
        random_state=0,
        n_trees=min(64, 5 + round(n**0.5 / 20)),
        n_iters=max(5, round(np.log2(n))),
        max_candidates=60,
        low_memory=True,
        n_jobs=-1,
        compressed=False,
    )
    return search.neighbor_graph[0]


RUNS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "scdiffx": ours,
    "scdiffx exact": lambda x, k: ours(x, k, "exact"),
    "pynndescent": peer,
}


def exact_sample(x: np.ndarray, k: int, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Some cells and their k nearest cells, found in float64 without the code under test."""
    wide = x.astype(np.float64)
    wide -= wide.mean(axis=0)
    size = (wide**2).sum(axis=1)
    some = np.random.default_rng(0).choice(len(x), min(count, len(x)), replace=False)
    parts = np.array_split(some, max(1, len(some) * len(x) // 20_000_000))
    near = [np.argpartition(size - 2 * wide[part] @ wide.T, k - 1, axis=1)[:, :k] for part in parts]
    return some, np.concatenate(near)


def recall(found: np.ndarray, truth: np.ndarray, some: np.ndarray) -> float:
    """Share of the true neighbours found, the cell itself not counted."""
    hits = [len(np.setdiff1d(np.intersect1d(found[i], row), [i])) for i, row in zip(some, truth, strict=True)]
    return float(np.sum(hits)) / (len(some) * (truth.shape[1] - 1))


def timed(run: Callable[[np.ndarray, int], np.ndarray], x: np.ndarray, k: int) -> tuple[np.ndarray, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    found = run(x, k)
    return found, time.process_time() - cpu, time.perf_counter() - wall


def first_call(name: str, file: str, k: int) -> dict[str, float]:
    """CPU and wall seconds of import and first call, and peak memory in MiB, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache folder, so that nothing compiled by an earlier run is found.
        env = os.environ | {"NUMBA_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--child", name, "--file", file, "--k", str(k)]
        return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def peak_mib() -> float:
    """Peak memory of this process; getrusage would include what its parent held when it started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Let the peak start from what is held now, where the system can."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def child(name: str, file: str, k: int) -> None:
    x = np.load(file)
    before = peak_mib()
    _, cpu, wall = timed(RUNS[name], x, k)
    print(json.dumps({"first_cpu_s": cpu, "first_wall_s": wall, "peak_mib": peak_mib(), "before_mib": before}))


def measure(x: np.ndarray, k: int, repeat: int, names: list[str]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "x.npy")
        np.save(file, x)
        for name in names:
            out[name] = first_call(name, file, k)
    some, truth = exact_sample(x, k)
    for name in names:
        RUNS[name](x, k)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            found, cpu, wall = timed(RUNS[name], x, k)
            times[name].append((cpu, wall))
            out[name]["recall"] = recall(found, truth, some)
    for name in names:
        out[name]["warm_cpu_s"], out[name]["warm_wall_s"] = map(float, np.median(times[name], axis=0))
    return out


COLUMNS = ("warm_cpu_s", "warm_wall_s", "first_cpu_s", "first_wall_s", "recall", "peak_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--k", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=["scdiffx", "pynndescent"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.file, args.k)
        return
    source = args.data / "spring_hpc" / "spring_hpc.h5ad"
    x = upsampled(args.n, source) if source.exists() else manifold(args.n)
    kind = "upsampled spring_hpc" if source.exists() else f"synthetic manifold ({source} is absent)"
    print(f"{args.n} cells x {x.shape[1]}, k={args.k}, {kind}, {os.cpu_count()} cores", flush=True)
    result = measure(x, args.k, args.repeat, args.only)
    print(" ".join([f"{'':14s}", *(f"{name:>12s}" for name in COLUMNS)]))
    for name, row in result.items():
        print(" ".join([f"{name:14s}", *(f"{row[c]:12.4g}" for c in COLUMNS)]))
    if {"scdiffx", "pynndescent"} <= result.keys():
        a, b = result["scdiffx"], result["pynndescent"]
        print("pynndescent / scdiffx: " + ", ".join(f"{c} {b[c] / a[c]:.2f}" for c in COLUMNS[:4]))
    if args.json:
        setting = {"n": args.n, "d": x.shape[1], "k": args.k, "repeat": args.repeat, "data": kind}
        args.json.write_text(json.dumps(setting | {"results": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
