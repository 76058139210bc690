"""Fits by minibatches of plans that look at neighbours, beside fits on all cells.

    python benchmarks/graph_batches.py fits [--data dlpfc cbmc graph] [--batches 256 512] [--steps 50] [--seeds 0 1 2]
    python benchmarks/graph_batches.py steps [--n 50000] [--genes 500] [--batches 128 256]

`fits`: the test loss before and after, and processor seconds of the whole fit with its compilation. dlpfc: 4,634 spots
of a slice of brain; MAGIC over the six nearest in space, all of it learned, against held-out molecules. cbmc: 8,617
blood cells measured twice, by splitting their molecules; gene weights and scales of components against agreement.
graph: the same cells, once; gene weights, scales of components, weights of five neighbours and averages over these
against held-out molecules; neighbours are looked up every 25 steps.

`steps`: one gradient of a plan from counts through gene weights, 30 components and neighbours to averages over these,
for all cells and by batches: cells that it takes in, processor seconds (median of five, warm), the memory that XLA
plans for what lies between inputs and results; with the seconds to look up the pieces at each refresh. Counts are
upsampled from spring_hpc (`pipeline.py`).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from fit_cost import median_cpu
from pipeline import DATA, counts

import scdiffx as sd
from scdiffx._fit._minibatches import Minibatches
from scdiffx._fit._split import three_ways
from scdiffx._fit._training import Run
from scdiffx._program import Program

Case = tuple[ad.AnnData, Callable[[], Any], sd.losses.Loss, list[str]]


def dlpfc() -> Case:
    from sklearn.neighbors import kneighbors_graph

    adata = ad.read_h5ad(DATA / "dlpfc_151510" / "dlpfc_151510.h5ad")
    sd.pp.split_counts(adata)
    near = kneighbors_graph(adata.obsm["spatial"], 6)
    adata.obsp["connectivities"] = sp.csr_matrix(((near + near.T) > 0).astype(np.float32))
    adata.uns["neighbors"] = {"connectivities_key": "connectivities"}

    def plan() -> Any:
        plan = sd.plan(adata)
        sd.pp.normalize_total(plan, layer="fit")
        sd.pp.magic(plan, layer="fit", t=2, neighbors_key="neighbors")
        return plan

    return adata, plan, sd.losses.molecular_cross_validation("magic", "choose"), ["magic"]


def cbmc() -> Case:
    adata = ad.read_h5ad(DATA / "cite_cbmc" / "cite_cbmc.h5ad")
    adata = sd.pp.replicates(ad.AnnData(adata.X, obs=adata.obs, var=adata.var))
    loss = sd.losses.replicate_consistency("X_pca")
    return adata, lambda: to_components(adata), loss, ["highly_variable_genes.shift", "pca.scale"]


def graph() -> Case:
    adata = ad.read_h5ad(DATA / "cite_cbmc" / "cite_cbmc.h5ad")
    adata = ad.AnnData(adata.X, obs=adata.obs, var=adata.var)
    sd.pp.split_counts(adata)
    loss = sd.losses.molecular_cross_validation("magic", "choose", scale="log1p")
    return adata, lambda: to_averages(adata, 5), loss, MOVING


MOVING = ["highly_variable_genes.shift", "pca.scale", "neighbors", "magic.self_weight"]


def to_averages(adata: ad.AnnData, n_neighbors: int) -> Any:
    plan = to_components(adata, "fit")
    sd.pp.neighbors(plan, n_neighbors=n_neighbors)
    sd.pp.magic(plan, layer="fit", t=1, neighbors_key="neighbors")
    return plan


def to_components(adata: ad.AnnData, layer: str | None = None) -> Any:
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan, target_sum=1e4, layer=layer)
    sd.pp.log1p(plan, layer=layer)
    sd.pp.highly_variable_genes(plan, n_top_genes=adata.n_vars // 2, soft=True, layer=layer)
    sd.pp.pca(plan, n_comps=30, layer=layer)
    return plan


def fits(args: argparse.Namespace) -> None:
    for name in args.data:
        adata, plan, loss, learn = {"dlpfc": dlpfc, "cbmc": cbmc, "graph": graph}[name]()
        for batch in (None, *args.batches):
            losses, seconds = [], []
            for seed in args.seeds:
                start = time.process_time()
                settings = {"n_steps": args.steps, "batch_size": batch, "rng": seed, "progress": False}
                fitted = sd.fit(plan(), loss, learn=learn, **settings)
                seconds.append(time.process_time() - start)
                losses.append([fitted.losses["test_before"], fitted.losses["test_after"]])
            before, after = np.mean(losses, 0)
            size = adata.n_obs if batch is None else batch
            print(f"{name:>6}, {size:>6} cells a step: test loss {before:.4f} -> {after:.4f}, CPU s", end=" ")
            print(", ".join(f"{s:.1f}" for s in seconds), flush=True)


def steps(args: argparse.Namespace) -> None:
    adata = ad.AnnData(counts(args.n, args.genes))
    sd.pp.split_counts(adata)
    plan = to_averages(adata, 15)
    loss = sd.losses.molecular_cross_validation("magic", "choose", scale="log1p")
    run = Run(Program.build(plan, MOVING), loss, three_ways(adata, loss, 0.2, 0.2, 0))
    given = {"train": run.given["train"]}
    measured("all cells", args.n, run, (run.settled, run.program.frozen, given))
    for batch in args.batches:
        start = time.process_time()
        try:
            batches = Minibatches(run.program, run.settled, given["train"], batch, 0)
        except ValueError as error:
            print(error)
            continue
        found = time.process_time() - start
        start = time.process_time()
        drawn = [batches.draw(i) for i in range(10)]
        each = (time.process_time() - start) / 10
        measured(f"batches of {batch}", batches.around.size, run, drawn[0])
        print(f"{'':>18} pieces {found:.2f} CPU s, drawing a batch {each:.3f}", flush=True)


def measured(name: str, cells: int, run: Run, args: tuple[Any, ...]) -> None:
    seconds = median_cpu(lambda: run._step(run.start, *args))
    memory = run._step.lower(run.start, *args).compile().memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name:>18}: {cells} cells, {seconds:.3f} CPU s, {memory:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fits", "steps"])
    parser.add_argument("--data", nargs="+", default=["dlpfc", "cbmc"], choices=["dlpfc", "cbmc", "graph"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=500)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    {"fits": fits, "steps": steps}[args.what](args)


if __name__ == "__main__":
    main()
