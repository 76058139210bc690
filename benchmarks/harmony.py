"""Harmony beside harmonypy 2.1 and the embedding as it was.

    python benchmarks/harmony.py agree [--seeds 0 1 2 3 4]
    python benchmarks/harmony.py time [--cells 3500 50000] [--batches 4] [--repeat 3]
    python benchmarks/harmony.py record

agree: harmony_cell_lines (its 20 components; three batches) and mixology_sc (30 components of normalised logarithms;
five batches of two protocols), with one column and with an invented second one beside it. The minimum over the
components of their correlation over the cells, for all pairs of seeds of scdiffx and harmonypy, beside harmonypy with
itself from other seeds and the embedding before; the LISI of batches (how many are near a cell: higher is better mixed)
and of cell lines (1 is separate), by harmonypy's function; and the share of the embedding's variance that is kept.

time: processor seconds of a first call in a fresh process (with an empty compilation cache, and with a filled one) and
of later calls, alternately in one process, on cells upsampled from spring_hpc in invented batches, each moved its
own way; and of value and gradient.

record: what `tests/ops/test_harmony.py` compares with.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from neighbors import peak_mib, upsampled

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RECORDED = Path(__file__).resolve().parents[1] / "tests" / "ops" / "harmony_harmonypy.npz"
# Every so-maniest cell is recorded, and these settings.
EVERY = 6
# Two clear clusters, all cells assigned at once: nothing is random.
EXACT = {"nclust": 2, "block_size": 1.0, "sigma": 0.3, "max_iter_harmony": 4, "epsilon_harmony": -9.0}
RUNS: dict[str, dict[str, Any]] = {
    "default": {"key": "dataset"},
    "again": {"key": "dataset", "random_state": 1},
    "fixed": {"key": "dataset", "lamb": 1.0, "theta": 1.0},
    "pruned": {"key": "dataset", "batch_prop_cutoff": 0.01},
    "columns": {"key": ["dataset", "half"], "theta": [4.0, 2.0]},
    "exact": {"key": "dataset", **EXACT},
    "exact_columns": {"key": ["dataset", "half"], **EXACT},
}


def cell_lines() -> ad.AnnData:
    """Jurkat and 293T cells; `half` is a second column that goes with the second component."""
    adata = ad.read_h5ad(DATA / "harmony_cell_lines" / "harmony_cell_lines.h5ad")
    return with_second_column(adata)


def mixology() -> ad.AnnData:
    import scanpy as sc

    adata = ad.read_h5ad(DATA / "mixology_sc" / "mixology_sc.h5ad")
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, batch_key="batch")
    sc.pp.pca(adata, n_comps=30)
    adata.obs["cell_type"] = adata.obs["cell_line_demuxlet"].astype(str)
    adata.obs["dataset"] = adata.obs["batch"].astype(str)
    return with_second_column(adata)


def with_second_column(adata: ad.AnnData) -> ad.AnnData:
    z = adata.obsm["X_pca"][:, 1]
    noise = np.random.default_rng(0).normal(size=len(z)) * z.std() / 2
    adata.obs["half"] = np.where(z + noise > np.median(z), "x", "y")
    return adata


def harmonypy_of(adata: ad.AnnData, key: Any, **settings: Any) -> np.ndarray:
    from harmonypy import run_harmony

    settings = {"random_state": 0, **settings}
    z = np.asarray(adata.obsm["X_pca"], np.float64)
    return run_harmony(z, adata.obs.astype(str), key, verbose=False, **settings).Z_corr


def ours(adata: ad.AnnData, key: Any, **settings: Any) -> np.ndarray:
    import scdiffx as sd

    sd.pp.harmony_integrate(adata, key, **settings)
    return np.asarray(adata.obsm["X_pca_harmony"])


def closeness(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest correlation of a component."""
    return min(float(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(a.shape[1]))


def lisi(z: np.ndarray, adata: ad.AnnData) -> list[float]:
    from harmonypy import compute_lisi

    return [float(x) for x in compute_lisi(z, adata.obs.astype(str), ["dataset", "cell_type"]).mean(0)]


def agree(seeds: list[int]) -> list[dict[str, Any]]:
    rows = []
    for name, make in (("harmony_cell_lines", cell_lines), ("mixology_sc", mixology)):
        adata = make()
        z = np.asarray(adata.obsm["X_pca"], np.float64)
        for label, settings in (("one column", RUNS["default"]), ("two columns", RUNS["columns"])):
            mine = [ours(adata, **{**settings, "random_state": seed}) for seed in seeds]
            peer = [harmonypy_of(adata, **{**settings, "random_state": seed}) for seed in seeds]
            across = [closeness(a, b) for a in mine for b in peer]
            within = [closeness(peer[i], peer[j]) for i in range(len(seeds)) for j in range(i)]
            before = [closeness(z, b) for b in peer]
            print(f"\n{name}, {label}: minimum correlation of a component, lowest and median over pairs of seeds")
            for what, values in (("scdiffx, harmonypy", across), ("harmonypy, itself", within), ("before", before)):
                print(f"  {what:<20} {min(values):.4f} {np.median(values):.4f}")
                rows.append({"data": name, "columns": label, "pair": what, "correlations": values})
            groups = (("before", [z]), ("scdiffx", mine), ("harmonypy", peer))
            for what, found in groups:
                scores = np.array([lisi(x, adata) for x in found])
                kept = float(np.mean([x.var(0).sum() / z.var(0).sum() for x in found]))
                print(f"  {what:<20} LISI batch {scores[:, 0].mean():.3f} ± {scores[:, 0].std():.3f}, ", end="")
                print(f"type {scores[:, 1].mean():.3f} ± {scores[:, 1].std():.3f}; variance kept {kept:.3f}")
                rows.append({"data": name, "columns": label, "of": what, "lisi": scores.tolist(), "variance": kept})
    return rows


def large(cells: int, batches: int) -> ad.AnnData:
    """Upsampled cells in batches, each moved its own way."""
    rng = np.random.default_rng(0)
    z = upsampled(cells, DATA / "spring_hpc" / "spring_hpc.h5ad")
    batch = rng.integers(0, batches, cells)
    z = z + (rng.normal(size=(batches, z.shape[1])) * z.std(0) / 2)[batch].astype(np.float32)
    obs = pd.DataFrame({"dataset": pd.Categorical(batch.astype(str))}, index=np.arange(cells).astype(str))
    adata = ad.AnnData(np.zeros((cells, 1), np.float32), obs=obs)
    adata.obsm["X_pca"] = z
    return adata


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


CALLS = {"scdiffx": ours, "harmonypy": harmonypy_of}


def first_call(name: str, path: Path, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, "child", "--name", name, "--file", str(path)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "SCDIFFX_CACHE": cache}
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, path: Path) -> None:
    """One call in a fresh process; the packages are imported before the clock starts."""
    import harmonypy  # noqa: F401

    import scdiffx as sd

    _ = sd.ops.Harmony
    adata = ad.read_h5ad(path)
    before = peak_mib()
    cpu, wall = seconds(lambda: CALLS[name](adata, "dataset"))
    print(json.dumps({"cpu": cpu, "wall": wall, "mib": peak_mib() - before}))


def gradient(adata: ad.AnnData) -> tuple[Any, tuple[Any, Any]]:
    import jax
    import jax.numpy as jnp

    from scdiffx import ops

    z = jnp.asarray(adata.obsm["X_pca"])
    batch = jnp.asarray(adata.obs["dataset"].cat.codes.to_numpy(), jnp.int32)
    op = ops.Harmony().init(z, batch, key=jax.random.key(0))
    print(f"  {op.rounds} rounds in the derivative")
    both = jax.jit(jax.value_and_grad(lambda op, z: (op(z, batch).corrected ** 2).mean(), (0, 1), allow_int=True))
    return both, (op, z)


def timing(sizes: list[int], batches: int, repeat: int) -> list[dict[str, Any]]:
    import jax

    rows = []
    for cells in sizes:
        adata = large(cells, batches)
        dims = adata.obsm["X_pca"].shape[1]
        print(f"\n{cells} cells x {dims} dimensions, {batches} batches, processor seconds (wall clock)")
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder) / "cells.h5ad", str(Path(folder) / "cache")
            adata.write_h5ad(path)
            firsts = [("scdiffx", "empty cache"), ("scdiffx", "filled cache"), ("harmonypy", "")]
            for name, what in firsts:
                found = first_call(name, path, cache)
                print(
                    f"  first call {name:<10} {found['cpu']:.2f} ({found['wall']:.2f}), {found['mib']:.0f} MiB {what}"
                )
                rows.append({"cells": cells, "first": name, "cache": what, **found})
        results = {name: call(adata, "dataset") for name, call in CALLS.items()}
        itself = closeness(results["harmonypy"], harmonypy_of(adata, "dataset", random_state=1))
        across = closeness(*results.values())
        print(f"  minimum correlation of a component {across:.4f}, of harmonypy with itself {itself:.4f}")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in CALLS}
        for _ in range(repeat):
            for name, call in CALLS.items():
                times[name].append(seconds(partial(call, adata, "dataset")))
        for name, values in times.items():
            cpu, wall = np.median(values, axis=0)
            print(f"  later call {name:<10} {cpu:.2f} ({wall:.2f})")
            rows.append({"cells": cells, "later": name, "cpu": cpu, "wall": wall})
        print(f"  rounds: {adata.uns['harmony']['n_rounds']}")
        both, args = gradient(adata)
        first, later = (seconds(lambda both=both, args=args: jax.block_until_ready(both(*args))) for _ in range(2))
        held = both.lower(*args).compile().memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"  value and gradient {first[0]:.2f} ({first[1]:.2f}), then {later[0]:.2f} ({later[1]:.2f}), {held:.0f} MB"
        )
        rows.append({"cells": cells, "gradient_first": first, "gradient": later})
    return rows


def record() -> list[dict[str, Any]]:
    """What harmonypy makes of harmony_cell_lines: every sixth cell, and the mean LISI of all."""
    import harmonypy

    adata = cell_lines()
    found: dict[str, Any] = {"version": harmonypy.__version__, "numpy": np.__version__, "every": EVERY}
    found["lisi_before"] = lisi(np.asarray(adata.obsm["X_pca"], np.float64), adata)
    for name, settings in RUNS.items():
        corrected = harmonypy_of(adata, **settings)
        found[name] = corrected[::EVERY].astype(np.float32)
        found[f"lisi_{name}"] = lisi(corrected, adata)
    np.savez_compressed(RECORDED, **found)
    print(f"{RECORDED}: {RECORDED.stat().st_size / 1e3:.0f} kB, harmonypy {harmonypy.__version__}")
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["agree", "time", "record", "child"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cells", type=int, nargs="+", default=[3500, 50_000])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.what == "child":
        child(args.name, args.file)
        return
    rows = {
        "agree": lambda: agree(args.seeds),
        "time": lambda: timing(args.cells, args.batches, args.repeat),
        "record": record,
    }[args.what]()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
