"""PHATE beside phate 2: agreement, known times and clusters of cells, and processor time on the same coordinates.

    OMP_NUM_THREADS=1 python benchmarks/phate_layout.py --python VENV/bin/python [--data ../shared/data]
        [--sets pbmc68k_reduced worm_embryo paul15] [--n 20000] [--json out.json]

`--python` is one in which phate runs. Sets: pbmc68k_reduced (scanpy's 50 components), worm_embryo and paul15 (50
components of normalised logarithms), and so many cells upsampled from spring_hpc. Printed are the time `t` of both; the
correlation of distances in the layouts (of 2,000 cells), and that of phate with itself from another seed; how well the
15 nearest cells in the layout know the cell's time (worm_embryo; Spearman) or cluster (share of them in it), beside the
first two components; and processor seconds of later calls and of the first, which compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
from neighbors import upsampled
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KNOWN = {"pbmc68k_reduced": "bulk_labels", "worm_embryo": "embryo.time", "paul15": "paul15_clusters"}
THEIRS = """
import sys, time, warnings
import numpy as np, phate
warnings.simplefilter("ignore")
z, found = np.load(sys.argv[1]).astype(float), {}
for seed in range(int(sys.argv[3])):
    start = time.process_time()
    op = phate.PHATE(n_pca=None, random_state=seed, n_jobs=1, verbose=0)
    found[f"y{seed}"] = op.fit_transform(z)
    found[f"seconds{seed}"], found[f"t{seed}"] = time.process_time() - start, op.optimal_t
np.savez(sys.argv[2], **found)
"""


def prepared(name: str, data: Path) -> ad.AnnData:
    if name.isdigit():
        z = upsampled(int(name), data / "spring_hpc" / "spring_hpc.h5ad").astype(np.float32)
        return ad.AnnData(np.zeros((len(z), 1), np.float32), obsm={"X_pca": z})
    if name == "pbmc68k_reduced":
        return sc.datasets.pbmc68k_reduced()
    adata = ad.read_h5ad(data / name / f"{name}.h5ad")
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=50)
    return adata


def peer(z: np.ndarray, python: str, seeds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "z.npy", Path(folder) / "y.npz"
        np.save(source, z)
        env = {**os.environ, "PYTHONPATH": ""}
        subprocess.run([python, "-c", THEIRS, source, target, str(seeds)], check=True, env=env, capture_output=True)
        return dict(np.load(target))


def same(a: np.ndarray, b: np.ndarray) -> float:
    some = np.random.default_rng(0).permutation(len(a))[:2000]
    return float(np.corrcoef(pdist(a[some]), pdist(b[some]))[0, 1])


def known(adata: ad.AnnData, name: str, y: np.ndarray) -> float:
    """What the 15 nearest cells know; not a number where nothing is known."""
    if name not in KNOWN:
        return float("nan")
    near = cKDTree(y).query(y, 16)[1][:, 1:]
    label = adata.obs[KNOWN[name]]
    if name == "worm_embryo":
        value = label.to_numpy(float)
        return float(spearmanr(value[near].mean(1), value).statistic)
    value = label.astype("category").cat.codes.to_numpy()
    return float((value[near] == value[:, None]).mean())


def compared(name: str, data: Path, python: str) -> dict[str, Any]:
    adata = prepared(name, data)
    z = np.asarray(adata.obsm["X_pca"], np.float32)
    theirs = peer(z, python, 2)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        sd.tl.phate(adata)
        seconds.append(time.process_time() - start)
    y, found = np.asarray(adata.obsm["X_phate"]), adata.uns["phate"]
    sd.tl.phate(adata, t=int(theirs["t0"]), key_added="same_t")
    row = {
        "set": name, "cells": len(z), "t": found["t"], "t_phate": int(theirs["t0"]), "stress": found["stress"],
        "same": same(y, theirs["y0"]), "same_t": same(np.asarray(adata.obsm["same_t"]), theirs["y0"]),
        "phate_itself": same(theirs["y1"], theirs["y0"]), "components": same(z[:, :2], theirs["y0"]),
        "known": [known(adata, name, x) for x in (y, theirs["y0"], z[:, :2])],
        "seconds": float(np.mean(seconds[1:])), "first": seconds[0],
        "seconds_phate": float(theirs["seconds1"]), "first_phate": float(theirs["seconds0"]),
    }  # fmt: skip
    print(
        json.dumps({k: v if isinstance(v, str | int) else np.round(v, 4).tolist() for k, v in row.items()}), flush=True
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="*", default=list(KNOWN))
    parser.add_argument("--n", type=int, nargs="*", default=[20_000])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [compared(name, given.data, given.python) for name in (*given.sets, *map(str, given.n))]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
