"""Eigenpairs of a cell graph: scdiffx against scanpy's diffusion map and the scipy solver inside it.

python benchmarks/spectral.py --n 5000 20000 50000 --k 15 --repeat 3 [--data ../shared/data] [--json out.json]

The graph is the symmetrised fuzzy graph of 15 neighbours of upsampled spring_hpc cells (a synthetic manifold where
that data set is absent), normalised as scanpy's diffusion map does. Warm figures are medians of alternate runs in one
process, in seconds of processor time and of wall clock; first calls and peak memory come from fresh processes (peak:
what the call adds to the process that has loaded the graph). Errors are against scipy at full precision with a large
search space; scanpy and scipy pick the largest magnitudes, so where a strongly negative eigenvalue is among those their
error here is of order 1. "vectors" is the largest distance of a unit eigenvector from the exact one. "gradient" is
value and gradient of diffusion-pseudotime distances in the edge weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from neighbors import manifold, peak_mib, reset_peak, upsampled
from scipy.sparse.linalg import eigsh as scipy_eigsh

ROOT = 0


def fuzzy_graph(index: np.ndarray, distance: np.ndarray) -> sp.csr_matrix:
    """Fuzzy union of neighbour lists (n, k) without the cells themselves: each row's weights sum to log2(k + 1)."""
    n, k = distance.shape
    excess = np.maximum(distance - distance[:, :1], 0).astype(np.float64)
    low, high = np.full((n, 1), 1e-6), np.full((n, 1), 1e6)
    for _ in range(60):
        middle = np.sqrt(low * high)
        above = np.exp(-excess / middle).sum(1, keepdims=True) > np.log2(k + 1)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    weights = np.exp(-excess / low)
    one_way = sp.csr_matrix((weights.ravel(), (np.repeat(np.arange(n), k), index.ravel())), shape=(n, n))
    return sp.csr_matrix(one_way + one_way.T - one_way.multiply(one_way.T))


def transitions(graph: sp.csr_matrix) -> sp.csr_matrix:
    """scanpy's symmetric transition matrix: density normalisation, then the square roots of the row sums."""
    for power in (1.0, 0.5):
        scale = sp.diags(np.asarray(graph.sum(0)).ravel() ** -power)
        graph = sp.csr_matrix(scale @ graph @ scale)
    return sp.csr_matrix((graph + graph.T) / 2)


def make_graph(n: int, data: Path) -> sp.csr_matrix:
    from scdiffx._core.knn import nearest

    path = data / "spring_hpc" / "spring_hpc.h5ad"
    index, distance = nearest(upsampled(n, path) if path.exists() else manifold(n), 15)
    return fuzzy_graph(index[:, 1:], distance[:, 1:])  # the first neighbour of a cell is itself


# Each engine is built once from the graph and returns a call; the call returns eigenvalues and, some, eigenvectors.
Found = tuple[np.ndarray, np.ndarray | None]


def diffmap(graph: sp.csr_matrix, k: int, package: str) -> Callable[[], Found]:
    import anndata

    tl = import_module(package).tl
    adata = anndata.AnnData(np.zeros((graph.shape[0], 1), np.float32))
    adata.obsp["connectivities"] = adata.obsp["distances"] = graph.astype(np.float32)
    keys = {"connectivities_key": "connectivities", "distances_key": "distances"}
    adata.uns["neighbors"] = keys | {"params": {"n_neighbors": 15, "method": "umap"}}

    def call() -> Found:
        tl.diffmap(adata, n_comps=k)
        return np.asarray(adata.uns["diffmap_evals"]), np.asarray(adata.obsm["X_diffmap"])

    return call


def scipy_solver(graph: sp.csr_matrix, k: int) -> Callable[[], Found]:
    matrix = transitions(graph)
    start = np.random.RandomState(0).standard_normal(graph.shape[0])

    def call() -> Found:
        values, vectors = scipy_eigsh(matrix, k=k, which="LM", v0=start)
        return values[::-1], vectors[:, ::-1]

    return call


def ours(graph: sp.csr_matrix, k: int, dtype: Any, warm: bool = False) -> Callable[[], Found]:
    import jax

    from scdiffx._core.graph import Graph
    from scdiffx._core.spectral import eigsh

    with jax.enable_x64(True):
        operator = Graph.from_scipy(transitions(graph).astype(dtype))
        start = eigsh(operator, k).vectors if warm else None

    def call() -> Found:
        with jax.enable_x64(True):
            found = eigsh(operator, k, start=start)
            if not bool(found.converged):
                raise RuntimeError(f"not converged: {found.residuals}")
            return np.asarray(found.values), np.asarray(found.vectors)

    return call


def ours_gradient(graph: sp.csr_matrix, k: int, dtype: Any) -> Callable[[], Found]:
    import jax
    import jax.numpy as jnp

    from scdiffx._core.graph import Graph
    from scdiffx._core.spectral import spectral

    with jax.enable_x64(True):
        operator = Graph.from_scipy(transitions(graph).astype(dtype))
        probe = jnp.zeros((operator.shape[0], 1), dtype).at[ROOT, 0].set(1)

    def loss(values: Any, operator: Any, probe: Any) -> tuple[Any, Any]:
        column, diagonal, eigen = spectral(weights, operator.with_values(values), probe, k=k, n_weighted=10)
        squared = diagonal[ROOT] + diagonal - 2 * column[:, 0]
        return jnp.sqrt(jnp.maximum(squared, 0) + 1).mean(), eigen.values

    def weights(values: Any) -> Any:
        stationary = values >= 0.9994
        safe = jnp.where(stationary, 0.5, values)
        return jnp.where(jnp.arange(k) < 10, jnp.where(stationary, 1, (safe / (1 - safe)) ** 2), 0)

    # The pattern travels as an argument: as a constant of the program it would be folded at compile time.
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def call() -> Found:
        with jax.enable_x64(True):
            (_, values), gradient = step(operator.values, operator, probe)
            if not bool(jnp.isfinite(gradient).all()):
                raise RuntimeError("the gradient is not finite")
            return np.asarray(values), None

    return call


ENGINES: dict[str, Callable[[sp.csr_matrix, int], Callable[[], Found]]] = {
    "scanpy tl.diffmap": lambda g, k: diffmap(g, k, "scanpy"),
    "scdiffx tl.diffmap": lambda g, k: diffmap(g, k, "scdiffx"),
    "scipy eigsh": scipy_solver,
    "scdiffx float64": lambda g, k: ours(g, k, np.float64),
    "scdiffx float32": lambda g, k: ours(g, k, np.float32),
    "scdiffx float64, warm start": lambda g, k: ours(g, k, np.float64, warm=True),
    "gradient float64": lambda g, k: ours_gradient(g, k, np.float64),
    "gradient float32": lambda g, k: ours_gradient(g, k, np.float32),
}


def timed(call: Callable[[], Found]) -> tuple[float, float, Found]:
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    return time.process_time() - cpu, time.perf_counter() - wall, found


def child(engine: str, path: str, k: int) -> None:
    """First call and memory in a process of its own."""
    call = ENGINES[engine](sp.load_npz(path), k)
    reset_peak()
    before = peak_mib()
    cpu, wall, _ = timed(call)
    print(json.dumps({"first_cpu_s": cpu, "first_wall_s": wall, "added_peak_mib": peak_mib() - before}))


def vector_error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest distance of a unit vector from the exact one, whatever its sign."""
    unit = found / np.linalg.norm(found.astype(np.float64), axis=0)
    return float(np.linalg.norm(unit * np.sign((unit * exact).sum(0)) - exact, axis=0).max())


def measure(graph: sp.csr_matrix, k: int, repeat: int, names: list[str]) -> list[dict[str, Any]]:
    values, vectors = scipy_eigsh(transitions(graph), k=k, ncv=6 * k, which="LA", tol=0)
    exact, exact_vectors = values[::-1], vectors[:, ::-1]
    calls = {name: ENGINES[name](graph, k) for name in names}
    runs: dict[str, list[tuple[float, float, Found]]] = {name: [] for name in names}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            result = timed(call)
            if turn:
                runs[name].append(result)
    rows = []
    for name in names:
        cpu, wall = (float(np.median([r[i] for r in runs[name]])) for i in (0, 1))
        values, vectors = runs[name][-1][2]
        error = float(np.abs(np.sort(values)[::-1] - exact).max())
        row = {"engine": name, "cpu_s": cpu, "wall_s": wall, "eigenvalue_error": error}
        rows.append(row | {"eigenvector_error": np.nan if vectors is None else vector_error(vectors, exact_vectors)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[5_000, 20_000, 50_000])
    parser.add_argument("--k", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--no-first", action="store_true", help="skip first calls and memory (fresh processes)")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "GRAPH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.k)
        return
    results = []
    head = f"{'cells':>6} {'engine':<28} {'cpu s':>7} {'wall s':>7} {'first cpu':>9} {'first wall':>10}"
    print(f"{head} {'MiB':>6} {'error':>8} {'vectors':>8}")
    for n in args.n:
        graph = make_graph(n, args.data)
        rows = measure(graph, args.k, args.repeat, args.engines)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "graph.npz")
            sp.save_npz(path, graph)
            for row in rows:
                if not args.no_first:
                    command = [sys.executable, __file__, "--k", str(args.k), "--child", row["engine"], path]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    row |= json.loads(out.splitlines()[-1])
                first = [row.get(key, np.nan) for key in ("first_cpu_s", "first_wall_s", "added_peak_mib")]
                print(
                    f"{n:>6} {row['engine']:<28} {row['cpu_s']:>7.2f} {row['wall_s']:>7.2f} {first[0]:>9.2f} "
                    f"{first[1]:>10.2f} {first[2]:>6.0f} {row['eigenvalue_error']:>8.1e} "
                    f"{row['eigenvector_error']:>8.1e}",
                    flush=True,
                )
        results += [{"n": n, "k": args.k, "n_edges": int(graph.nnz)} | row for row in rows]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
