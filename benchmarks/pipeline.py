"""The main workflow beside scanpy: normalise to PCA, diffusion map, first calls, gradient cost, memory.

    python benchmarks/pipeline.py pca --n 50000          # normalise -> log1p -> PCA against scanpy, alternating
    python benchmarks/pipeline.py first                  # first call of each function in a fresh process, cold and warm
    python benchmarks/pipeline.py gradient --n 5000 20000 50000
    python benchmarks/pipeline.py import

CPU seconds and wall seconds; the ratio is the peer's CPU seconds over ours. Counts are upsampled from spring_hpc (each
cell mixed with two near it, depth redrawn, Poisson sampled), or drawn from a gamma-Poisson model where it is absent.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NEAR = 30
FUNCTIONS = (
    "normalize_total",
    "log1p",
    "highly_variable_genes",
    "scale",
    "pca",
    "neighbors",
    "leiden",
    "diffmap",
    "dpt",
)


@functools.cache
def _source(genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the counts (cells, genes), and the cells near each."""
    import anndata
    import scipy.sparse as sp
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    path = DATA / "spring_hpc" / "spring_hpc.h5ad"
    if path.exists():
        source = sp.csr_matrix(anndata.read_h5ad(path).X).astype(np.float32)
        mean = np.asarray(source.mean(0)).ravel()
        share = np.asarray(source[:, np.argsort(-mean)[:genes]].todense())
        share /= np.maximum(share.sum(1, keepdims=True), 1)
    else:
        share = np.random.default_rng(0).gamma(0.3, size=(5000, genes)).astype(np.float32)
        share /= share.sum(1, keepdims=True)
    z = PCA(30, random_state=0).fit_transform(np.log1p(1e4 * share))
    return share, NearestNeighbors(n_neighbors=NEAR).fit(z).kneighbors(return_distance=False)


def counts(n: int, genes: int = 2000, seed: int = 0) -> Any:
    """A sparse count matrix (n, genes) float32 with the density of real data, of cells between measured ones.

    Three cells are mixed, one and two of the 30 nearest to it: however many are drawn, they leave no gaps.
    """
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    share, near = _source(genes)
    blocks = []
    for start in range(0, n, 10_000):
        m = min(10_000, n - start)
        first = rng.integers(0, len(share), m)
        cells = [first, *(near[first, rng.integers(1, NEAR, m)] for _ in range(2))]
        weights = rng.dirichlet(np.ones(3), m).astype(np.float32)
        mix = sum(share[cell] * weight[:, None] for cell, weight in zip(cells, weights.T, strict=True))
        blocks.append(sp.csr_matrix(rng.poisson(mix * rng.integers(1000, 4000, (m, 1))).astype(np.float32)))
    return sp.vstack(blocks).tocsr()


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def pca(n: int, repeat: int) -> dict[str, Any]:
    """Normalise -> log1p -> PCA: first call and warm, alternating with scanpy."""
    import anndata as ad
    import scanpy as sc

    import scdiffx as sd

    x = counts(n)

    def workflow(module: Any) -> Any:
        adata = ad.AnnData(x.copy())
        module.pp.normalize_total(adata, target_sum=1e4)
        module.pp.log1p(adata)
        module.pp.pca(adata, n_comps=50)
        return adata

    times: dict[str, list[tuple[float, float]]] = {"scdiffx": [], "scanpy": []}
    done = {}
    for _ in range(repeat + 1):
        for name, module in (("scdiffx", sd), ("scanpy", sc)):
            result: list[Any] = []
            times[name].append(timed(lambda module=module, result=result: result.append(workflow(module))))
            done[name] = result[0]
    ours, theirs = done["scdiffx"].uns["pca"]["variance"], done["scanpy"].uns["pca"]["variance"]
    return {
        "n": n,
        "non-zeros": int(x.nnz),
        **{f"{name} first (CPU, wall)": times[name][0] for name in times},
        **{f"{name} warm (CPU, wall)": tuple(np.median(times[name][1:], axis=0)) for name in times},
        "ratio CPU warm": float(
            np.median([t[0] for t in times["scanpy"][1:]]) / np.median([t[0] for t in times["scdiffx"][1:]])
        ),
        "largest relative difference of variances": float(np.abs(ours / theirs - 1).max()),
    }


def first() -> dict[str, Any]:
    """The first call of each function in a fresh process, with an empty and with a filled compilation cache."""
    out = {}
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold cache", "warm cache"):
            for name in FUNCTIONS:
                with tempfile.TemporaryDirectory() as other:
                    folder = str(Path(cache) / name) if state == "warm cache" else other
                    if state == "warm cache":
                        child(name, folder)
                    out[f"{name}, {state}"] = child(name, folder)
    return out


def child(name: str, cache: str) -> dict[str, float]:
    environment = {**os.environ, "SCDIFFX_CACHE": cache}
    command = [sys.executable, "-W", "ignore", __file__, "child", "--name", name]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def one_first_call(name: str) -> dict[str, float]:
    """Prepare the input of one function with scanpy, then time its first call of ours."""
    import anndata as ad
    import scanpy as sc

    import scdiffx as sd

    adata = ad.AnnData(counts(3000))
    if name not in ("normalize_total",):
        sc.pp.normalize_total(adata, target_sum=1e4)
    if name not in ("normalize_total", "log1p"):
        sc.pp.log1p(adata)
    if name in ("neighbors", "leiden", "diffmap", "dpt"):
        sc.pp.pca(adata)
    if name in ("leiden", "diffmap", "dpt"):
        sc.pp.neighbors(adata)
    adata.uns["iroot"] = 0
    function = getattr(sd.pp, name, None) or getattr(sd.tl, name)
    cpu, wall = timed(lambda: function(adata))
    return {"CPU": cpu, "wall": wall}


def gradient(n: int) -> dict[str, Any]:
    """Cost of value and gradient of pseudotime in the representation against its value; peak memory of the process."""
    import jax
    import jax.numpy as jnp

    import scdiffx as sd

    rng = np.random.default_rng(0)
    ends = rng.normal(scale=4, size=(6, 50))
    a, b = rng.integers(0, 6, (2, n))
    share = rng.random((n, 1))
    z = jnp.asarray(share * ends[a] + (1 - share) * ends[b] + rng.normal(scale=0.7, size=(n, 50)), jnp.float32)
    neighbors, pseudotime = sd.ops.Neighbors().init(z), sd.ops.Pseudotime()

    def loss(neighbors: Any, z: Any) -> Any:
        time_ = pseudotime(neighbors(z).connectivities, jnp.asarray(0)).pseudotime
        return jnp.where(jnp.isfinite(time_), time_, 0).mean()

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss, argnums=1))
    jax.block_until_ready((forward(neighbors, z), both(neighbors, z)))
    times = {"forward": [], "value and gradient": []}
    for _ in range(3):
        times["forward"].append(timed(lambda: jax.block_until_ready(forward(neighbors, z)))[0])
        times["value and gradient"].append(timed(lambda: jax.block_until_ready(both(neighbors, z)))[0])
    medians = {name: float(np.median(values)) for name, values in times.items()}
    memory = both.lower(neighbors, z).compile().memory_analysis()
    return {
        "n": n,
        **medians,
        "gradient alone / forward": medians["value and gradient"] / medians["forward"] - 1,
        "compiled temporaries MiB": memory.temp_size_in_bytes / 2**20,
        "peak RSS MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def imports() -> dict[str, Any]:
    """Time of `import scdiffx` and `import scanpy` in fresh processes, best of three."""

    def best(module: str) -> float:
        def once() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            return time.perf_counter() - start

        return min(once() for _ in range(3))

    return {f"import {module} (wall s)": best(module) for module in ("scdiffx", "scanpy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pca", "first", "gradient", "import", "child"])
    parser.add_argument("--n", type=int, nargs="+", default=[50_000])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--name", choices=FUNCTIONS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.what == "child":
        print(json.dumps(one_first_call(args.name)))
        return
    runs: dict[str, Callable[[], Any]] = {
        "pca": lambda: [pca(n, args.repeat) for n in args.n],
        "first": first,
        "gradient": lambda: [gradient(n) for n in args.n],
        "import": imports,
    }
    result = runs[args.what]()
    for row in result if isinstance(result, list) else [result]:
        for key, value in row.items():
            print(f"{key:>42}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
