"""Responses to neighbours: planted ones and decoys, held-out prediction with and without neighbours, the null, cost.

    OMP_NUM_THREADS=1 python benchmarks/communication.py [--data ../shared/data] [--seeds 6] [--n 20000] [--json x]

Planted: the 2,170 cells of soupx_pbmc on as many neighbouring places of osmfish_cortex, types in patches that mix at
their edges, cells of a type at random. Pairs are genes of real cells: a ligand that 25 to 85 % of the cells of one type
express, a receptor of another or the same type. For 8 of 40 pairs a cell gets molecules of 30 other genes, Poisson, by
its receptor times the mean ligand of its neighbours of the sending type: `strength` times their mean at the 80th
percentile of that signal. Decoys have the ligand or the receptor of a true pair and another partner, or neither, with
the same expression. AUROC of the true pairs, and pairs with a q-value of at most .05. "ligrec" is tl.ligrec among
neighbours with shuffle="group", by its least p-value: it asks for something else.

The null: the same data after cells of a type change places. Real tissue: pairs of random genes in dlpfc_151510, whose
expression varies in space for other reasons. Cost: cells of soupx_pbmc drawn with replacement.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

import scdiffx as sd
from scdiffx._core.spatial import neighbors_in_space

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRUE, GENES = 8, 30


def placed(data: Path, rng: np.random.Generator) -> ad.AnnData:
    """Blood cells on places of a cortex, types in patches."""
    adata = ad.read_h5ad(data / "soupx_pbmc" / "soupx_pbmc.h5ad")
    where = np.asarray(ad.read_h5ad(data / "osmfish_cortex" / "osmfish_cortex.h5ad").obsm["spatial"], float)
    types = adata.obs["annotation"].astype("category").cat.codes.to_numpy()
    near = np.argsort(((where - where[rng.integers(len(where))]) ** 2).sum(1))[: len(types)]
    where = where[near]
    unit = (where - where.mean(0)) / where.std(0)
    fields = [
        6 * np.cos(1.5 * unit @ rng.normal(size=(2, 40)) + rng.uniform(0, 2 * np.pi, 40)).mean(1)
        for _ in range(types.max() + 1)
    ]
    score = np.stack(fields, 1) + rng.gumbel(size=(len(types), len(fields)))
    left, order = [list(rng.permutation(np.flatnonzero(types == k))) for k in range(len(fields))], np.empty(len(where))
    for i in rng.permutation(len(where)):
        best = max((k for k in range(len(fields)) if left[k]), key=lambda k: score[i, k])
        order[i] = left[best].pop()
    adata = adata[order.astype(int)].copy()
    adata.obs["annotation"] = adata.obs["annotation"].astype("category")
    adata.obsm["spatial"] = where
    return adata


def planted(data: Path, seed: int, strength: float) -> tuple[ad.AnnData, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    adata = placed(data, rng)
    types = adata.obs["annotation"].cat.codes.to_numpy()
    counts = sp.csr_matrix(adata.X, dtype=np.float64)
    depth = np.asarray(counts.sum(1)).ravel()
    log = sp.csr_matrix(counts.multiply(1e4 / depth[:, None])).log1p().tocsc()
    share = np.stack([np.asarray((log[types == k] > 0).mean(0)).ravel() for k in range(types.max() + 1)])
    large = np.flatnonzero(np.bincount(types) > 150)
    used: set[int] = set()

    def gene(k: int) -> int:
        free = [g for g in np.flatnonzero((share[k] > 0.25) & (share[k] < 0.85)) if g not in used]
        used.add(chosen := int(rng.choice(free)))
        return chosen

    rows = []
    for _ in range(TRUE):
        a, b = rng.choice(large, 2, replace=bool(rng.random() < 0.3))
        ligand, receptor = gene(a), gene(b)
        others = [(ligand, gene(b)), (gene(a), receptor), (gene(a), gene(b)), (gene(a), gene(b))]
        rows += [(ligand, receptor, a, True), *((*pair, a, False) for pair in others)]
    near = neighbors_in_space(adata.obsm["spatial"])
    near = sp.diags(1 / np.asarray(near.sum(1)).ravel()) @ near
    mean = np.asarray(counts.mean(0)).ravel()
    free = np.setdiff1d(np.flatnonzero((mean > 0.1) & (mean < 3)), list(used))
    for ligand, receptor, sender, true in rows:
        if true:
            sent = np.asarray(log[:, [ligand]].todense()).ravel() * (types == sender)
            signal = np.asarray(log[:, [receptor]].todense()).ravel() * (near @ sent)
            signal = np.clip(signal / np.quantile(signal[signal > 0], 0.8), 0, 2)
            genes = rng.choice(free, GENES, replace=False)
            new = rng.poisson(strength * signal[:, None] * (mean[genes] / mean.sum()) * depth[:, None])
            at = (np.repeat(np.arange(len(types)), GENES), np.tile(genes, len(types)))
            counts = counts + sp.csr_matrix((new.ravel(), at), shape=counts.shape)
    adata.X = counts.astype(np.float32)
    table = pd.DataFrame(rows, columns=["ligand", "receptor", "sender", "true"])
    for side in ("ligand", "receptor"):
        table[side] = adata.var_names[table[side]]
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    return adata, table


def truth(found: pd.DataFrame, table: pd.DataFrame) -> np.ndarray:
    true = dict(zip(zip(table["ligand"], table["receptor"], strict=True), table["true"], strict=True))
    return np.asarray([true[pair] for pair in zip(found["ligand"], found["receptor"], strict=True)])


def recovered(data: Path, seed: int, strength: float, method: str) -> dict[str, Any]:
    adata, table = planted(data, seed, strength)
    start = time.process_time()
    sd.tl.communication(adata, table, groupby="annotation", method=method)
    line = {"seed": seed, "strength": strength, "method": method, "seconds": time.process_time() - start}
    found, params = adata.uns["communication"], adata.uns["communication_params"]
    true, hit = truth(found, table), (found["qvalue"] <= 0.05).to_numpy()
    scores = {"p": -found["pvalue"].rank(), "gain": found["gain"], "importance": found["importance"]}
    line |= {"AUROC": {name: float(roc_auc_score(true, value)) for name, value in scores.items()}}
    line |= {"q <= .05": {"true": int(hit[true].sum()), "decoys": int(hit[~true].sum())}}
    line |= {name: params[name] for name in ("r2", "r2_test")}
    if method == "linear":
        sd.tl.ligrec(adata, "annotation", table, neighbors=True, shuffle="group", n_perms=199)
        least = adata.uns["ligrec"].groupby(["ligand", "receptor"], observed=True)["pvalue"].min().reset_index()
        line["AUROC"]["ligrec"] = float(roc_auc_score(truth(least, table), -least["pvalue"]))
    print(json.dumps(line), flush=True)
    return line


def shares(tables: list[pd.DataFrame]) -> dict[str, Any]:
    p = np.concatenate([table["pvalue"] for table in tables])
    found: dict[str, Any] = {f"<= {level}": float((p <= level).mean()) for level in (0.01, 0.05, 0.2, 0.5)}
    found |= {"tests": len(p), "with q <= .05": sum(int((table["qvalue"] <= 0.05).sum()) for table in tables)}
    return found


def null(data: Path, shuffles: int) -> dict[str, Any]:
    tables, better = [], 0
    for seed in range(shuffles):
        if seed % 5 == 0:
            adata, table = planted(data, seed, 2.0)
            types = adata.obs["annotation"].cat.codes.to_numpy()
        rng, order = np.random.default_rng(seed), np.arange(len(types))
        for k in range(types.max() + 1):
            order[types == k] = rng.permutation(order[types == k])
        adata.obsm["spatial"] = adata.obsm["spatial"][order]
        sd.tl.communication(adata, table, groupby="annotation", rng=seed)
        tables.append(adata.uns["communication"])
        r2 = adata.uns["communication_params"]["r2"]
        better += r2["linear"] > r2["types"]
    found = shares(tables) | {"shuffles": shuffles, "linear above types": better}
    print(json.dumps({"null": found}), flush=True)
    return found


def tissue(data: Path) -> dict[str, Any]:
    """Pairs of random genes, which nobody planted, in a cortex; and after cells of a layer change places."""
    adata = ad.read_h5ad(data / "dlpfc_151510" / "dlpfc_151510.h5ad")
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    rng = np.random.default_rng(0)
    common = np.flatnonzero(np.asarray((adata.X > 0).mean(0)).ravel() > 0.2)
    genes = adata.var_names[rng.choice(common, 80, replace=False)]
    pairs = list(zip(genes[::2], genes[1::2], strict=True))
    adata.obs["layer"] = adata.obs["layer"].astype(str)
    found = {}
    for name in ("as it is", "shuffled in layers"):
        if name != "as it is":
            for cells in adata.obs.groupby("layer").indices.values():
                adata.obsm["spatial"][cells] = adata.obsm["spatial"][rng.permutation(cells)]
        sd.tl.communication(adata, pairs, groupby="layer")
        found[name] = shares([adata.uns["communication"]]) | {"r2": adata.uns["communication_params"]["r2"]}
    print(json.dumps({"tissue": found}), flush=True)
    return found


def cost(data: Path, n: int) -> dict[str, Any]:
    source, table = planted(data, 0, 2.0)
    rng, found = np.random.default_rng(0), {}
    for cells in (n // 2, n):
        adata = source[rng.integers(source.n_obs, size=cells)].copy()
        adata.obs_names_make_unique()
        adata.obsm["spatial"] = rng.uniform(size=(cells, 2))
        start = time.process_time()
        sd.tl.communication(adata, table, groupby="annotation")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        found[f"{cells} cells"] = {"seconds": time.process_time() - start, "GB": memory}
    print(json.dumps({"cost": found}), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [recovered(given.data, seed, s, "linear") for s in (1.0, 2.0) for seed in range(given.seeds)]
    lines += [recovered(given.data, seed, 2.0, "gat") for seed in range(min(3, given.seeds))]
    result: dict[str, Any] = {"planted": lines, "null": null(given.data, given.shuffles)}
    result |= {"tissue": tissue(given.data), "cost": cost(given.data, given.n)}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
