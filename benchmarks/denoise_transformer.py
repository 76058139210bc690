"""The transformer of `pp.denoise` judged on molecules held out, beside MAGIC, the autoencoder and simple predictors.

    python benchmarks/denoise_transformer.py --data paul15 ifnb_2k --seeds 0 1 2 [--grid] [--json out.json]
    python benchmarks/denoise_transformer.py --cost 20000 [--all-genes]

Splits, genes and score are those of `denoise.py`: 60/20/20 of each cell's molecules, everything is computed from the
first part, and the table is the Poisson deviance per molecule of the third; every prediction is mixed with 1 % of the
mean profile. `--grid` adds the best of 135 settings of MAGIC, chosen on the second part, which nothing else uses.
Transformer and autoencoder have their default settings and see neither the second nor the third part.

`--cost` trains for two epochs on so many cells x 2,000 genes, upsampled, and prints seconds and memory of one process
(Linux); it denoises 50 genes, with `--all-genes` all of them into a dense layer.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from denoise import deviance, grid, prepared, workflow
from neighbors import peak_mib, reset_peak

import scdiffx as sd


def gene_mean(adata: ad.AnnData) -> Any:
    fit = adata.layers["fit"].toarray()
    return np.tile((fit / fit.sum(1, keepdims=True)).mean(0), (len(fit), 1))


def neighbour_mean(adata: ad.AnnData) -> Any:
    workflow(adata, t=1)
    sd.pp.neighbors(adata, n_neighbors=16)
    shares = adata.layers["linear"]
    return (shares + (adata.obsp["distances"] > 0).astype(np.float32) @ shares).toarray()


def magic(adata: ad.AnnData) -> Any:
    sd.pp.normalize_total(adata)
    adata.X = adata.X.sqrt()
    sd.pp.pca(adata, n_comps=min(100, min(adata.shape) - 1))
    sd.pp.magic(adata)
    return adata.layers["magic"] ** 2


def walk(adata: ad.AnnData) -> Any:
    workflow(adata)
    return adata.layers["magic"]


def vae(adata: ad.AnnData) -> Any:
    sd.pp.vae(adata, genes="all", progress=False)
    return adata.layers["vae_normalized"]


def transformer(adata: ad.AnnData) -> Any:
    sd.pp.denoise(adata, progress=False)
    return adata.layers["denoised"]


METHODS: dict[str, Callable[[ad.AnnData], Any]] = {
    "gene mean": gene_mean,
    "raw": lambda adata: adata.layers["fit"].toarray(),
    "neighbours": neighbour_mean,
    "MAGIC": magic,
    "walk": walk,
    "grid": lambda adata: grid(adata)[1],
    "vae": vae,
    "denoise": transformer,
}


def run(name: str, seed: int, args: argparse.Namespace, methods: list[str]) -> dict[str, Any]:
    adata = prepared(name, seed, args.genes)
    row: dict[str, Any] = {"data": name, "seed": seed, "cells": adata.n_obs, "genes": adata.n_vars, "seconds": {}}
    for method in methods:
        start = time.process_time()
        value = METHODS[method](adata.copy())
        row["seconds"][method] = time.process_time() - start
        row[method] = deviance(adata, value, "test")
    return row


def cost(n: int, genes: int | None) -> None:
    """One epoch twice, of which the first compiles, then two: the difference of the last two is that of an epoch."""
    from pipeline import counts

    x = counts(n)
    names = None if genes is None else [str(gene) for gene in range(genes)]
    x.indices = x.indices.astype(np.int32)
    dense = x.shape[0] * x.shape[1] * 4 / 2**20
    print(
        f"{n} x {x.shape[1]}, {x.nnz / n / x.shape[1]:.0%} non-zero: {x.nnz * 8 / 2**20:.0f} MiB, dense {dense:.0f} MiB"
    )
    for epochs in (1, 1, 2):
        adata = ad.AnnData(x.copy())
        gc.collect()
        reset_peak()
        before, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
        sd.pp.denoise(adata, names, max_epochs=epochs, progress=False)
        seconds = time.process_time() - cpu, time.perf_counter() - wall
        print(
            f"{epochs} epochs: {seconds[0]:.1f} CPU s, {seconds[1]:.1f} s of wall clock, "
            f"peak {peak_mib():.0f} MiB, {peak_mib() - before:.0f} above the start of the call",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["paul15", "mixology_rnamix", "ifnb_2k", "pbmc_4271"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--genes", type=int, default=800)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cost", type=int, metavar="CELLS")
    parser.add_argument("--all-genes", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.cost is not None:
        cost(args.cost, None if args.all_genes else 50)
        return
    methods = [name for name in METHODS if name != "grid" or args.grid]
    rows = []
    print(f"{'data':<16} seed " + " ".join(f"{name:>10}" for name in methods) + "   seconds of vae, denoise")
    for seed, name in itertools.product(args.seeds, args.data):
        rows.append(run(name, seed, args, methods))
        values = " ".join(f"{rows[-1][m]:>10.4f}" for m in methods)
        seconds = ", ".join(f"{rows[-1]['seconds'][m]:.0f}" for m in ("vae", "denoise"))
        print(f"{name:<16} {seed:>4} {values}   {seconds}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
