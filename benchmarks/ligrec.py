"""Ligands and receptors beside squidpy and liana: agreement, time, the null, and signals between neighbours alone.

    OMP_NUM_THREADS=1 python benchmarks/ligrec.py --peer PYTHON [--data ../shared/data] [--n 50000] [--json out.json]

`--peer` is a Python with squidpy 1.8.2 and liana 1.10.0; it runs first, then this one, each alone and on one thread.
Agreement and time: soupx_pbmc (2,170 cells, six groups), counts scaled to 10,000 and log1p, two resources of liana's
table, 1,000 permutations; seconds of processor time of the first call of the whole function, of the fastest of three
later ones, and of 1,000 permutations more. p-values are compared as shares k / n, in units of the standard error of
their difference. liana's complexes are those of "group_min"; it tests pairs expressed by a tenth of the cells.

The null: shares of p-values below a level, of tested pairs and of all pairs of groups of the same interactions (those
that are not tested count as 1), and of q-values; over 20 shuffles: of the labels of the blood cells; of the expression
of osmfish_cortex (four pairs of genes, neighbours) over all cells, and within its types for "group".

Planted: osmfish_cortex, 31 types in their places. For each of 60 random pairs of types that touch and pairs of genes,
the values of the ligand in the senders are sorted by how many receivers a sender touches (with noise), so that no
type's values change. Before that genes are dealt out, over all cells ("of no type") or within each type ("of types").
Shares with p of at most .05, with and without the plant. squidpy's test is the one of all cells.

Cost: cells of soupx_pbmc drawn with replacement, which measures time and memory alone.
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
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESOURCES = ("consensus", "cellphonedb")
N, MORE = 1000, 2000


def resource_of(name: str, data: Path) -> pd.DataFrame:
    table = pd.read_csv(data / "resources" / "liana_omni_resource.csv.gz")
    table = table[table["resource"] == name].reset_index(drop=True)
    return table[["source_genesymbol", "target_genesymbol"]].set_axis(["source", "target"], axis=1)


def blood(data: Path) -> ad.AnnData:
    import scanpy as sc

    adata = ad.read_h5ad(data / "soupx_pbmc" / "soupx_pbmc.h5ad")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    adata.obs["annotation"] = adata.obs["annotation"].astype("category")
    return adata


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def later(call: Callable[[], Any]) -> float:
    """The least of three calls: others use the machine too."""
    return min(seconds(call)[1] for _ in range(3))


def as_peer(data: Path, target: Path) -> None:
    """What squidpy and liana find, and how long they take, as files."""
    import liana
    import squidpy as sq

    adata, times = blood(data), {}
    common = {"use_raw": False, "seed": 0, "n_jobs": 1}
    for name in RESOURCES:
        pairs = resource_of(name, data)

        def theirs(n: int, pairs: pd.DataFrame = pairs) -> Any:
            given = pairs.assign(row=pairs.index)
            settings = {"n_perms": n, "copy": True, "show_progress_bar": False, **common}
            return sq.gr.ligrec(adata, "annotation", interactions=given, **settings)

        found, first = seconds(lambda: theirs(N))
        times[name] = {"first": first, "later": later(lambda: theirs(N))}
        times[name]["1,000 more"] = later(lambda: theirs(MORE)) - times[name]["later"]
        rows = found["metadata"]["row"].to_numpy()
        tables = {key: found[key].to_numpy() for key in ("means", "pvalues")}
        np.savez(target / f"{name}.npz", rows=rows, **tables)
    resource_ = resource_of("cellphonedb", data).set_axis(["ligand", "receptor"], axis=1)
    settings = {"groupby": "annotation", "resource": resource_, "expr_prop": 0.1, "return_all_lrs": False}
    result = liana.mt.cellphonedb(adata, **settings, n_perms=N, inplace=False, **common)
    times["liana"] = later(lambda: liana.mt.cellphonedb(adata, **settings, n_perms=N, inplace=False, **common))
    columns = ["source", "target", "ligand_complex", "receptor_complex", "lr_means", "cellphone_pvals"]
    result[columns].to_csv(target / "liana.csv", index=False)
    (target / "times.json").write_text(json.dumps(times))


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    ours = (ours * (N + 1) - 1) / N
    pooled = (ours + theirs + 1 / N) / (2 + 2 / N)
    z = (ours - theirs) / np.sqrt(pooled * (1 - pooled) * 2 / N)
    return {"rms": float(np.sqrt((z**2).mean())), "largest": float(np.abs(z).max())}


def agreement(data: Path, folder: Path) -> list[dict[str, Any]]:
    import scdiffx as sd

    adata, rows = blood(data), []
    theirs_times = json.loads((folder / "times.json").read_text())
    for name in RESOURCES:
        pairs = resource_of(name, data)

        def ours(n: int, pairs: pd.DataFrame = pairs) -> None:
            sd.tl.ligrec(adata, "annotation", pairs, n_perms=n)

        times = {"first": seconds(lambda: ours(N))[1], "later": later(lambda: ours(N))}
        times["1,000 more"] = later(lambda: ours(MORE)) - times["later"]
        ours(N)
        found = adata.uns["ligrec"]
        stored = np.load(folder / f"{name}.npz")
        place = {tuple(pairs.iloc[row]): i for i, row in enumerate(stored["rows"])}
        keys = list(zip(found["ligand"], found["receptor"], strict=True))
        there = np.asarray([key in place for key in keys])
        row = [place[key] for key in keys if key in place]
        codes = [found[side].cat.codes.to_numpy(int)[there] for side in ("source", "target")]
        column = codes[0] * len(found["source"].cat.categories) + codes[1]
        line = {
            "resource": name,
            "tests": {
                "ours": len(found),
                "squidpy": int(np.isfinite(stored["pvalues"]).sum()),
                "both": int(there.sum()),
            },
            "largest_difference_of_a_mean": float(np.abs(stored["means"][row, column] - found["mean"][there]).max()),
            "p": compared(found["pvalue"].to_numpy()[there], stored["pvalues"][row, column]),
            "seconds": {"ours": times, "squidpy": theirs_times[name]},
        }
        print(json.dumps(line, indent=1), flush=True)
        rows.append(line)
    settings = {"complex_policy": "group_min", "threshold": 0.1}
    pairs = resource_of("cellphonedb", data)
    sd.tl.ligrec(adata, "annotation", pairs, **settings)
    taken = later(lambda: sd.tl.ligrec(adata, "annotation", pairs, **settings))
    theirs = pd.read_csv(folder / "liana.csv").set_axis([*"stlr", "mean_", "p"], axis=1)
    merged = adata.uns["ligrec"].astype(dict.fromkeys(("source", "target", "ligand", "receptor"), str))
    merged = merged.merge(theirs, left_on=["source", "target", "ligand", "receptor"], right_on=list("stlr"))
    line = {
        "resource": "cellphonedb, liana's complexes",
        "tests": {"ours": len(adata.uns["ligrec"]), "liana": len(theirs), "both": len(merged)},
        "largest_difference_of_a_mean": float((merged["mean"] - merged["mean_"]).abs().max()),
        "p": compared(merged["pvalue"].to_numpy(), merged["p"].to_numpy()),
        "seconds": {"ours": taken, "liana": theirs_times["liana"]},
    }
    print(json.dumps(line, indent=1), flush=True)
    return [*rows, line]


def shares(tables: list[pd.DataFrame], groups: int) -> dict[str, Any]:
    """What a null gives: shares of p-values up to a level, and in how many shuffles a q-value is at most .05."""
    p = np.concatenate([table["pvalue"] for table in tables])
    family = sum(len(table[["ligand", "receptor"]].drop_duplicates()) * groups**2 for table in tables)
    levels = (0.01, 0.05, 0.2, 0.5)
    return {
        "tested": {f"<= {level}": float((p <= level).mean()) for level in levels} | {"pairs": len(p)},
        "all": {f"<= {level}": float((p <= level).sum() / family) for level in levels} | {"pairs": family},
        "shuffles with q <= .05": sum(bool((table["qvalue"] <= 0.05).any()) for table in tables),
    }


def within(rng: np.random.Generator, strata: np.ndarray) -> np.ndarray:
    """A permutation of the cells within strata."""
    order = rng.permutation(len(strata))
    result = np.empty_like(order)
    result[np.argsort(strata, kind="stable")] = order[np.argsort(strata[order], kind="stable")]
    return result


def cortex(data: Path) -> ad.AnnData:
    adata = ad.read_h5ad(data / "osmfish_cortex" / "osmfish_cortex.h5ad")
    adata = adata[(adata.obs["valid"].astype(int) == 1) & (adata.obs["cell_type"] != "Excluded")].copy()
    adata.X = np.log1p(np.asarray(adata.X.todense()))
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).astype("category")
    return adata


def null(data: Path) -> dict[str, Any]:
    import scdiffx as sd

    rng, found = np.random.default_rng(0), {}
    adata, pairs = blood(data), resource_of("cellphonedb", data)
    tables = []
    for seed in range(20):
        adata.obs["shuffled"] = adata.obs["annotation"].to_numpy()[rng.permutation(adata.n_obs)]
        sd.tl.ligrec(adata, "shuffled", pairs, rng=seed)
        tables.append(adata.uns["ligrec"])
    found["all cells"] = shares(tables, 6)
    adata = cortex(data)
    genes = adata.var_names[np.argsort(-adata.X.mean(0))[:8]]
    four = list(zip(genes[::2], genes[1::2], strict=True))
    values, types = adata.X.copy(), adata.obs["cell_type"].cat.codes.to_numpy()
    for shuffle in ("all", "group"):
        tables = []
        for seed in range(20):
            adata.X = values[rng.permutation(len(values)) if shuffle == "all" else within(rng, types)]
            sd.tl.ligrec(adata, "cell_type", four, neighbors=True, shuffle=shuffle, n_perms=199, rng=seed)
            tables.append(adata.uns["ligrec"])
        found[f"neighbours, {shuffle}"] = shares(tables, int(types.max()) + 1)
    print(json.dumps({"null": found}, indent=1), flush=True)
    return found


def planted(data: Path, n: int = 60) -> dict[str, Any]:
    import scdiffx as sd
    from scdiffx._core.spatial import neighbors_in_space

    adata = cortex(data)
    values, types = adata.X.copy(), adata.obs["cell_type"].cat.codes.to_numpy()
    names = list(adata.obs["cell_type"].cat.categories)
    near = neighbors_in_space(adata.obsm["spatial"]) @ np.eye(len(names))[types]
    touching = [
        (a, b)
        for a in range(len(names))
        for b in range(len(names))
        if a != b and (near[types == a, b] > 0).sum() >= 20 and (near[types == b, a] > 0).sum() >= 20
    ]
    ways = {"all cells": {}, **{f"neighbours, {s}": {"neighbors": True, "shuffle": s} for s in ("all", "group")}}
    common = np.flatnonzero((values > 0).mean(0) > 0.5)
    found: dict[str, Any] = {}
    for kind in ("of no type", "of types"):
        rng, hits = np.random.default_rng(1), {f"{way}, {what}": [] for way in ways for what in ("without", "planted")}
        for seed in range(n):
            a, b = touching[rng.integers(len(touching))]
            ligand, receptor = rng.choice(common, 2, replace=False)
            order = rng.permutation(len(values)) if kind == "of no type" else within(rng, types)
            free = values[order]
            sorted_ = free.copy()
            senders = np.flatnonzero(types == a)
            by_touch = senders[np.argsort(near[senders, b] + rng.uniform(0, 2, len(senders)))]
            sorted_[by_touch, ligand] = np.sort(free[senders, ligand])
            pair = [(adata.var_names[ligand], adata.var_names[receptor])]
            for what, x in (("without", free), ("planted", sorted_)):
                adata.X = x
                for way, settings in ways.items():
                    sd.tl.ligrec(adata, "cell_type", pair, n_perms=199, rng=seed, **settings)
                    table = adata.uns["ligrec"]
                    row = table[(table["source"] == names[a]) & (table["target"] == names[b])]
                    hits[f"{way}, {what}"].append(bool(len(row)) and bool(row["pvalue"].iloc[0] <= 0.05))
        found[kind] = {key: float(np.mean(value)) for key, value in hits.items()}
    found["pairs of types"] = len(touching)
    print(json.dumps({"planted": found}, indent=1), flush=True)
    return found


def cost(data: Path, n: int) -> dict[str, Any]:
    import scdiffx as sd

    adata = blood(data)
    rng, found = np.random.default_rng(0), {}
    pairs = resource_of("cellphonedb", data)
    for cells in (n // 2, n):
        large = adata[rng.integers(adata.n_obs, size=cells)].copy()
        large.obs_names_make_unique()
        large.obsm["spatial"] = rng.uniform(size=(cells, 2))
        for way, settings in (("all cells, 1,000", {}), ("neighbours, 50", {"neighbors": True, "n_perms": 50})):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            taken = seconds(lambda x=large, s=settings: sd.tl.ligrec(x, "annotation", pairs, **s))[1]
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            found[f"{cells} cells, {way}"] = {"seconds": taken, "GB": after, "GB before": before}
    print(json.dumps({"cost": found}, indent=1), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.as_peer:
        as_peer(given.data, given.as_peer)
        return
    if not given.peer:
        parser.error("--peer is needed: a Python with squidpy and liana")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        command = [given.peer, __file__, "--as-peer", folder, "--data", str(given.data)]
        subprocess.run(command, check=True, env=os.environ | threads, stdout=sys.stderr, stderr=subprocess.DEVNULL)
        result: dict[str, Any] = {"agreement": agreement(given.data, Path(folder))}
    result |= {"null": null(given.data), "planted": planted(given.data), "cost": cost(given.data, given.n)}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
