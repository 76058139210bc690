"""How well the influence of left-out cells and samples predicts what a plan gives when it is run anew without them.

    python benchmarks/leave_out.py [--data paul15 worm_embryo] [--cells 20] [--seed 0]

paul15 without 11DC and 19Lymph: normalise, logarithm, 30 components, 15 neighbours, pseudotime from the medoid of 7MEP,
fates: Ery, Mo, Neu, Baso as in fates.py, terminal are the 20 cells of each that are farthest from the root in the
components. worm_embryo: 1,000 variable genes, 30 components, 15 neighbours, pseudotime from the first of the youngest
cells. Targets are means over the clusters (of at least 100 cells; worm_embryo: types). Half of the --cells to leave out
are those of the largest influence (root mean square over the groups), the others random; none is terminal.

Each cell is left out, and what follows is run anew "held", on the graph without the cell; "graph", with neighbours
found anew in the same components; "pca", with components found anew. Predicted by a plan that finds the neighbours, and
in brackets by one on the graph as it is. Printed are, over all cells and groups, the root mean square of the actual
change of the mean target over the cells that stay, its correlation with the predicted one, the slope of actual on
predicted, and the root mean square of the difference as a share of the former: 1 is the error of predicting no change.
"Ranks" is Spearman's correlation over cells of predicted with actual root mean square over groups. Below it the same
for samples: of paul15 four random ones of equal size (the control: nothing is special about one) and one half of the
cells of one cluster, of worm_embryo its batches; by the plan's evaluation, and by the sum of its cells' derivatives.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from fates import KNOWN
from scipy.stats import spearmanr

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HOW = ("graph", "pca", "held")


def paul15(seed: int) -> tuple[ad.AnnData, str, list[str]]:
    adata = ad.read_h5ad(DATA / "paul15" / "paul15.h5ad")
    column, start, fates = KNOWN["paul15"]
    adata = adata[~adata.obs[column].isin(["11DC", "19Lymph"])].copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    reduced = sd.pp.pca(adata, n_comps=30, copy=True).obsm["X_pca"]
    first = np.flatnonzero(adata.obs[column] == start)
    adata.uns["iroot"] = int(first[np.linalg.norm(reduced[first] - reduced[first].mean(0), axis=1).argmin()])
    far = np.linalg.norm(reduced - reduced[adata.uns["iroot"]], axis=1)
    adata.obs["terminal"] = "none"
    for name, clusters in fates.items():
        cells = np.flatnonzero(adata.obs[column].isin(clusters))
        adata.obs.iloc[cells[np.argsort(far[cells])[-20:]], adata.obs.columns.get_loc("terminal")] = name
    rng = np.random.default_rng(seed)
    adata.obs["sample"] = pd.Categorical.from_codes(rng.permutation(adata.n_obs) % 4, ["a", "b", "c", "d"])
    half = (adata.obs[column] == "4Ery").to_numpy() & (rng.random(adata.n_obs) < 0.5)
    adata.obs["half"] = pd.Categorical(np.where(half, "half of 4Ery", None))
    adata.obs["group"] = adata.obs[column].astype(str)
    return adata, "group", ["sample", "half"]


def worm_embryo(seed: int) -> tuple[ad.AnnData, str, list[str]]:
    adata = ad.read_h5ad(DATA / "worm_embryo" / "worm_embryo.h5ad")
    time = adata.obs["embryo.time"].to_numpy(float)
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=1000)
    adata = adata[:, adata.var["highly_variable"].to_numpy()].copy()
    adata.uns["iroot"] = int(np.argmin(time))
    return adata, "cell.type", ["batch"]


def added(target: Any, from_: str, fated: bool, root: str) -> None:
    """The rest of the plan, from components, neighbours or a graph on."""
    if from_ == "pca":
        sd.pp.pca(target, n_comps=30)
    if from_ in ("pca", "graph"):
        sd.pp.neighbors(target)
    sd.tl.pseudotime(target, root=root)
    if fated:
        sd.tl.fate_probabilities(target, ["Ery", "Mo", "Neu", "Baso"], "terminal")


def values(adata: ad.AnnData, fated: bool) -> dict[str, np.ndarray]:
    found = {"dpt_pseudotime": adata.obs["dpt_pseudotime"].to_numpy(np.float64)}
    if fated:
        found |= {f"fate {name}": adata.obsm["lineages_fwd"][:, i] for i, name in enumerate(adata.uns["fate"]["names"])}
    return found


def change(base: ad.AnnData, out: np.ndarray, how: str, fated: bool, groups: pd.DataFrame) -> dict[str, np.ndarray]:
    """Change of the means over the cells that stay (groups,)."""
    part = base[~out].copy()
    added(part, how, fated, base.obs_names[base.uns["iroot"]])
    after, before = values(part, fated), values(base, fated)
    changes = {}
    for name in after:
        moved = after[name] - before[name][~out]
        kept = groups.to_numpy()[~out] * np.isfinite(moved)[:, None]
        changes[name] = np.where(np.isfinite(moved), moved, 0) @ kept / np.maximum(kept.sum(0), 1)
    return changes


def report(predicted: np.ndarray, actual: np.ndarray, ranks: bool = True) -> str:
    ok = np.isfinite(predicted) & np.isfinite(actual)
    p, a = predicted[ok], actual[ok]
    size = np.sqrt((a**2).mean())
    text = (
        f"{size:.1e} r {np.corrcoef(p, a)[0, 1]:.3f} slope {p @ a / (p @ p):.2f} "
        f"error {np.sqrt(((p - a) ** 2).mean()) / size:.2f}"
    )
    if ranks:
        text += f" ranks {spearmanr(*(np.sqrt(np.nanmean(x**2, 1)) for x in (predicted, actual))).statistic:.2f}"
    return text


def run(name: str, n_cells: int, seed: int) -> None:
    base, groupby, samples = {"paul15": paul15, "worm_embryo": worm_embryo}[name](seed)
    fated = name == "paul15"
    root = base.obs_names[base.uns["iroot"]]
    plan = sd.plan(base)
    added(plan, "pca", fated, root)
    labels = base.obs[groupby].astype(str)
    groups = pd.get_dummies(labels, dtype=float)
    groups = groups.loc[:, groups.sum() >= 100]
    targets = [("dpt_pseudotime", "dpt_pseudotime", None)]
    if fated:
        targets += [(f"fate {f}", "lineages_fwd", f) for f in ("Ery",)]
    plan.apply()
    on_graph = sd.plan(base.copy())
    added(on_graph, "held", fated, root)
    plans = {"anew": plan, "held": on_graph}
    cells: dict[tuple[str, str], np.ndarray] = {}
    levels: dict[tuple[str, str], pd.DataFrame] = {}
    for label, target, column in targets:
        settings = {"column": column, "groupby": groupby, "key_added": "found"}
        for kind, one in plans.items():
            begin = time.process_time()
            sd.tl.influence(one, target, leave_out="cells", **settings)
            print(f"{name}, {label}, {kind}: {time.process_time() - begin:.1f} s", flush=True)
            cells[label, kind] = one.adata.obsm.pop("found")[list(groups)].to_numpy()
        for sample in samples:
            sd.tl.influence(plan, target, leave_out=sample, **settings)
            levels[label, sample] = base.uns.pop("found")["change"][list(groups)]

    rng = np.random.default_rng(seed)
    terminal = (base.obs["terminal"] != "none").to_numpy() if fated else np.zeros(base.n_obs, bool)
    tables = [cells[label, "anew"] for label, *_ in targets]
    size = np.nan_to_num(sum((t**2).mean(1) / np.nanmean(t**2) for t in tables))
    order = [i for i in np.argsort(-size) if not terminal[i] and i != base.uns["iroot"]]
    half = n_cells // 2
    chosen = [*order[:half], *rng.choice(order[half:], n_cells - half, replace=False)]
    print(f"{name}: {base.n_obs} cells, {groups.shape[1]} groups")
    for how in HOW:
        found = [change(base, np.arange(base.n_obs) == i, how, fated, groups) for i in chosen]
        for label, *_ in targets:
            actual = np.stack([f[label] for f in found])
            for part, some in (("top", slice(half)), ("random", slice(half, None))):
                texts = [report(cells[label, kind][chosen][some], actual[some]) for kind in plans]
                print(f"  {how:<5} {label:<15} {part:<6} {texts[0]} ({texts[1]})", flush=True)
    for sample in samples:
        column = base.obs[sample].astype("category")
        out = {kind: (column == kind).to_numpy() for kind in column.cat.categories}
        kinds = [kind for kind in out if not out[kind][base.uns["iroot"]]]
        for how in HOW[:2]:
            found = [change(base, out[k], how, fated, groups) for k in kinds]
            for label, *_ in targets:
                actual = np.stack([f[label] for f in found])
                anew = levels[label, sample].loc[[str(k) for k in kinds]].to_numpy()
                summed = np.stack([np.nansum(cells[label, "anew"][out[k]], 0) for k in kinds])
                print(f"  {sample} ({len(kinds)}) {how:<5} {label:<15} evaluated: {report(anew, actual, False)}")
                print(f"        {'':<15} derivatives: {report(summed, actual, False)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["paul15", "worm_embryo"])
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in args.data:
        run(name, args.cells, args.seed)


if __name__ == "__main__":
    main()
