"""Counts to pseudotime from a file that is never in memory: seconds, processor seconds and memory of each step.

    python benchmarks/out_of_core.py --n 100000 1000000

Writes n x 2,000 sparse counts (see `pipeline.counts`) to a temporary folder, some thousand cells at a time, and
analyses each file in a fresh process. The peak of a step is all that the process held in memory at one time, libraries
and pages of files included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 20_000
STEPS = (
    "normalize_total",
    "log1p",
    "highly_variable_genes",
    "pca",
    "neighbors",
    "diffmap",
    "pseudotime",
    "magic",
    "harmony_integrate",
    "leiden",
)
# What stands beside the way from counts to pseudotime.
BESIDE = ("magic", "harmony_integrate", "leiden")


def write(path: Path, n: int) -> None:
    """Upsampled counts in the form of an h5ad file's X, block by block."""
    import anndata as ad
    import h5py
    from pipeline import counts

    with h5py.File(path, "w") as file:
        for start in range(0, n, BLOCK):
            block = counts(min(BLOCK, n - start), seed=start)
            if start == 0:
                ad.io.write_elem(file, "X", block)
                stored = ad.io.sparse_dataset(file["X"])
            else:
                stored.append(block)


def status(name: str) -> float:
    """A line of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def analyse(path: Path, chunk: int, leave_out: list[str]) -> dict[str, Any]:
    """Every step on the lazy matrix, measured."""
    import anndata as ad
    import h5py

    import scdiffx as sd

    file = h5py.File(path)
    n, genes = (int(size) for size in file["X"].attrs["shape"])
    adata = ad.AnnData(ad.experimental.read_elem_lazy(file["X"], chunks=(chunk, genes)))
    adata.obs["batch"] = np.array(["a", "b", "c"])[np.arange(n) % 3]
    calls = {
        "normalize_total": lambda: sd.pp.normalize_total(adata, target_sum=1e4),
        "log1p": lambda: sd.pp.log1p(adata),
        "highly_variable_genes": lambda: sd.pp.highly_variable_genes(adata, n_top_genes=2000),
        "pca": lambda: sd.pp.pca(adata),
        "neighbors": lambda: sd.pp.neighbors(adata),
        "leiden": lambda: sd.tl.leiden(adata),
        "diffmap": lambda: sd.tl.diffmap(adata),
        "pseudotime": lambda: sd.tl.pseudotime(adata, root=0),
        "harmony_integrate": lambda: sd.pp.harmony_integrate(adata, "batch"),
        "magic": lambda: sd.pp.magic(adata, list(adata.var_names[:5]), neighbors_key="neighbors"),
    }
    rows = {}
    for name in STEPS:
        if name in leave_out:
            continue
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        cpu, wall = time.process_time(), time.perf_counter()
        calls[name]()
        rows[name] = {
            "wall": time.perf_counter() - wall,
            "CPU": time.process_time() - cpu,
            "peak MiB": status("VmHWM"),
            "afterwards MiB": status("VmRSS"),
        }
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    to_pseudotime = [row for name, row in rows.items() if name not in BESIDE]
    total = {key: sum(row[key] for row in to_pseudotime) for key in ("wall", "CPU")}
    return {
        "n": n,
        "file MiB": path.stat().st_size / 2**20,
        **rows,
        "counts to pseudotime": total | {"peak MiB": max(row["peak MiB"] for row in to_pseudotime)},
        "CPU ms per cell": 1000 * total["CPU"] / n,
        "wall ms per cell": 1000 * total["wall"] / n,
        "lazy": type(adata.X).__name__,
        "load average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[100_000])
    parser.add_argument("--chunk", type=int, default=10_000, help="cells in a chunk of the dask array")
    parser.add_argument("--leave-out", nargs="*", default=[], choices=STEPS)
    parser.add_argument("--folder", type=Path, help="keep the files here, and use those that are there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.child:
        print(json.dumps(analyse(args.child, args.chunk, args.leave_out)))
        return
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for n in args.n:
            path = (args.folder or Path(temporary)) / f"counts-{n}.h5"
            if not path.exists():
                write(path, n)
            command = [sys.executable, "-W", "ignore", __file__, "--child", str(path), "--chunk", str(args.chunk)]
            command += ["--leave-out", *args.leave_out]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            for key, value in results[-1].items():
                print(f"{key:>24}: {value}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
