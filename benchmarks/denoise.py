"""Denoising judged on molecules held out: MAGIC, a grid of its settings, and a joint fit, beside simple predictors.

    python benchmarks/denoise.py --data paul15 ifnb_2k --seeds 0 1 2 [--steps 80] [--json out.json]

The molecules of each cell are split 60/20/20. Genes, size factors, principal components and the graph come from the
first part only. Settings (grid) and parameters (fit) are chosen on the second part. The table is the Poisson deviance
per molecule of the third part; every method's prediction is mixed with 1 % of the mean profile.

- gene mean: every cell has the mean profile
- raw: the first part as it is
- neighbour mean: the mean of the 15 nearest cells and the cell itself, one step
- MAGIC: its defaults (square roots, 100 components, knn 5, t 3), squared
- grid: the best of 135 settings (knn, components, t) of the walk on proportions
- joint fit: `sd.fit` of the kernel (bandwidth, decay, self-weight), the time and the filter, from the default walk on
  proportions, which is "start of the fit"

With `--labels` a second table follows, for data with labels: on components of the logarithm of each prediction, the
accuracy of 15 neighbours for the label (leaving the cell out) and the best adjusted Rand index of six Leiden
resolutions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.sparse as sp

import scdiffx as sd
from scdiffx import ops
from scdiffx.losses._terms import MolecularCrossValidation

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LABELS = {
    "paul15": "paul15_clusters",
    "pbmc_4271": "label",
    "soupx_pbmc": "annotation",
    "mixology_sc": "cell_line_demuxlet",
}
GRID = {"knn": (3, 5, 8, 12, 20), "comps": (10, 20, 50), "t": tuple(range(1, 10))}


def prepared(name: str, seed: int, genes: int) -> ad.AnnData:
    """The chosen genes of a data set, split; X is the first part. Labels, where there are any, in obs["label"]."""
    adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    obs = {"label": adata.obs[LABELS[name]].astype(str).to_numpy()} if name in LABELS else {}
    adata = ad.AnnData(sp.csr_matrix(adata.X).astype(np.float32), obs=pd.DataFrame(obs, index=adata.obs_names))
    sd.pp.split_counts(adata, rng=seed)
    adata.X = adata.layers["fit"].copy()
    log = ad.AnnData(adata.X.copy())
    sd.pp.normalize_total(log)
    sd.pp.log1p(log)
    sd.pp.highly_variable_genes(log, n_top_genes=genes)
    adata = adata[:, log.var["highly_variable"].to_numpy()].copy()
    adata = adata[np.asarray(adata.layers["fit"].sum(1)).ravel() > 0].copy()
    adata.layers["linear"] = adata.X.copy()
    return adata


def deviance(adata: ad.AnnData, values: Any, part: str, scale: str = "linear") -> float:
    term = MolecularCrossValidation(output="magic", target=part, scale=scale)
    keep = jnp.ones(adata.n_obs, bool)
    return float(jax.jit(term)(jnp.asarray(values), ops.Counts.from_scipy(adata.layers[part]), keep))


def structure(values: Any, label: np.ndarray, scale: str = "linear") -> list[float]:
    """Votes of neighbours and best ARI on components of log-normalised values."""
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score
    from sklearn.neighbors import NearestNeighbors

    values = np.asarray(values.toarray() if sp.issparse(values) else values)
    cells = ad.AnnData(np.maximum(values, 0) ** (2 if scale == "sqrt" else 1))
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=30)
    sc.pp.neighbors(cells)
    z, codes = cells.obsm["X_pca"], np.unique(label, return_inverse=True)[1]
    index = NearestNeighbors(n_neighbors=16).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    votes = np.mean([np.bincount(codes[row]).argmax() == own for row, own in zip(index, codes, strict=True)])
    found = []
    for resolution in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5):
        sc.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, directed=False)
        found.append(adjusted_rand_score(label, cells.obs["leiden"]))
    return [float(votes), float(max(found))]


def workflow(target: Any, comps: int = 50, **settings: Any) -> None:
    """Proportions smoothed over a graph of log-normalised cells."""
    sd.pp.normalize_total(target, layer="linear")
    sd.pp.normalize_total(target)
    sd.pp.log1p(target)
    sd.pp.pca(target, n_comps=comps)
    sd.pp.magic(target, layer="linear", **settings)


def grid(adata: ad.AnnData) -> tuple[dict[str, int], Any]:
    """The setting that predicts the second part best."""
    base = adata.copy()
    workflow(base, max(GRID["comps"]))
    linear, best, chosen, found = base.layers["linear"].toarray(), np.inf, {}, None
    for knn, comps in itertools.product(GRID["knn"], GRID["comps"]):
        z = jnp.asarray(base.obsm["X_pca"][:, :comps])
        op = ops.Magic(knn=(knn, 3 * knn), t=1.0).init(jnp.asarray(linear), z)
        value, step = jnp.asarray(linear), jax.jit(lambda op, x, z: op(x, z).imputed)
        for t in GRID["t"]:
            value = step(op, value, z)
            score = deviance(adata, value, "choose")
            if score < best:
                best, chosen, found = score, {"knn": knn, "comps": comps, "t": t}, value
    return chosen, found


def joint(adata: ad.AnnData, steps: int, rate: float, learn: list[str]) -> tuple[Any, Any]:
    import optax

    plan = sd.plan(adata)
    workflow(plan)
    loss = sd.losses.molecular_cross_validation("magic", "choose")
    fitted = sd.fit(
        plan,
        loss,
        learn=learn,
        n_steps=steps,
        optimizer=optax.adam(rate),
        refresh_every=20,
        # All cells take part: what is held out are molecules.
        holdout=None,
        test=sd.losses.molecular_cross_validation("magic", "test"),
        progress=False,
    )
    return fitted, fitted.apply(adata, copy=True).layers["magic"]


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    adata = prepared(name, seed, args.genes)
    results: dict[str, Any] = {"data": name, "seed": seed, "cells": adata.n_obs, "genes": adata.n_vars}
    fit = adata.layers["fit"].toarray()
    results["gene mean"] = deviance(adata, np.tile((fit / fit.sum(1, keepdims=True)).mean(0), (len(fit), 1)), "test")
    results["raw"] = deviance(adata, fit, "test")
    near = adata.copy()
    workflow(near, t=1)
    sd.pp.neighbors(near, n_neighbors=16)
    mean = near.layers["linear"] + (near.obsp["distances"] > 0).astype(np.float32) @ near.layers["linear"]
    results["neighbour mean"] = deviance(adata, mean.toarray(), "test")
    magic = adata.copy()
    sd.pp.normalize_total(magic)
    magic.X = magic.X.sqrt()
    sd.pp.pca(magic, n_comps=min(100, min(magic.shape) - 1))
    sd.pp.magic(magic)
    results["MAGIC"] = deviance(adata, magic.layers["magic"], "test", "sqrt")
    default = adata.copy()
    workflow(default)
    results["start of the fit"] = deviance(adata, default.layers["magic"], "test")
    start = time.process_time()
    results["grid chose"], found = grid(adata)
    results["grid"] = deviance(adata, found, "test")
    results["grid CPU s"] = time.process_time() - start
    start = time.process_time()
    fitted, value = joint(adata, args.steps, args.rate, args.learn)
    results["joint fit"] = deviance(adata, value, "test")
    results["fit CPU s"] = time.process_time() - start
    results["adopted"] = fitted.adopted
    results["choose"] = fitted.losses
    results["t"] = float(fitted.params["magic.t"])
    if args.labels and "label" in adata.obs:
        label = adata.obs["label"].to_numpy()
        predictions = {
            "raw": (fit, "linear"),
            "MAGIC": (magic.layers["magic"], "sqrt"),
            "start of the fit": (default.layers["magic"], "linear"),
            "grid": (found, "linear"),
            "joint fit": (value, "linear"),
        }
        results["labels"] = {key: structure(of, label, scale) for key, (of, scale) in predictions.items()}
    return results


METHODS = ("gene mean", "raw", "neighbour mean", "MAGIC", "start of the fit", "grid", "joint fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["paul15", "mixology_rnamix", "ifnb_2k", "pbmc_4271"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--genes", type=int, default=800)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--learn", nargs="+", default=["magic"])
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    print(f"{'data':<16} seed " + " ".join(f"{name:>16}" for name in METHODS))
    for name, seed in itertools.product(args.data, args.seeds):
        rows.append(run(name, seed, args))
        print(f"{name:<16} {seed:>4} " + " ".join(f"{rows[-1][m]:>16.4f}" for m in METHODS), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    labelled = [row for row in rows if "labels" in row]
    for name in dict.fromkeys(row["data"] for row in labelled):
        print(f"\n{name}: votes, best ARI, means of the splits")
        of = [row["labels"] for row in labelled if row["data"] == name]
        for method in of[0]:
            votes, ari = np.mean([row[method] for row in of], 0)
            print(f"{method:>16} {votes:.3f} {ari:.3f}", flush=True)


if __name__ == "__main__":
    main()
