"""Regulation by ridge regression and the lasso beside GENIE3, correlation and chance: simulated and measured networks.

    python benchmarks/grn.py [--trees 100] [--halves 50] [--gat] [--only sergio_ds7 | grn_mdc]

Average precision over all pairs of a factor and another gene, divided by the share of true edges. GENIE3 is a random
forest a gene, each gene scaled to variance 1, importances as reductions of variance that are not normalised
(scikit-learn's; at a node the square root of the factors is tried, as in the paper, which has 1,000 trees). sergio_ds7:
a simulated network of 100 genes, clean, and with Poisson noise of a mean of 10, 3 and 1 counts a gene, as counts and as
logarithms of normalised counts. grn_mdc: dendritic cells against three reference networks (at most 20 trees). With
`--trees 0` there is no GENIE3. `stab.` ranks the edges by the share of so many halves of the cells in which the lasso
chooses them, equal ones by their weight. `--gat` adds graph attention. CPU seconds, warm (the network's are not).
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import average_precision_score

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def genie3(x: np.ndarray, tfs: np.ndarray, trees: int) -> np.ndarray:
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    weights = np.zeros((len(tfs), x.shape[1]))
    for gene in range(x.shape[1]):
        others = tfs != gene
        forest = RandomForestRegressor(trees, max_features="sqrt", random_state=0, n_jobs=1)
        forest.fit(z[:, tfs[others]], z[:, gene])
        trees_ = [tree.tree_.compute_feature_importances(normalize=False) for tree in forest.estimators_]
        weights[others, gene] = np.mean(trees_, 0)
    return weights


class Found(NamedTuple):
    scores: dict[str, np.ndarray]
    seconds: float
    penalty: float
    r2: float
    edges: float


def ours(x: np.ndarray, names: pd.Index, tfs: np.ndarray, **settings: Any) -> Found:
    """Weights, and where there are halves the stability."""
    adata = ad.AnnData(x, var=pd.DataFrame(index=names))
    start = time.process_time()
    sd.tl.grn(adata, list(names[tfs]), n_edges=x.shape[1] * len(tfs), **settings)
    seconds = time.process_time() - start
    table, scores = adata.uns["grn"], {}
    at = table["tf"].cat.codes, table["target"].cat.codes
    for name in ("weight", "stability"):
        if name in table:
            scores[name] = np.zeros((len(tfs), x.shape[1]))
            scores[name][at] = np.abs(table[name])
    if "stability" in scores:
        scores["stability"] += 1e-6 * scores["weight"]
    r2, penalty = float(adata.var["grn_r2"].mean()), adata.uns["grn_params"].get("penalty", np.nan)
    return Found(scores, seconds, penalty, r2, float((scores["weight"] > 0).mean()))


def ratio(weights: np.ndarray, truth: np.ndarray, tfs: np.ndarray) -> float:
    pairs = np.ones(weights.shape, bool)
    pairs[np.arange(len(tfs)), tfs] = False
    return average_precision_score(truth[pairs], np.abs(weights)[pairs]) / truth[pairs].mean()


def row(
    what: str, x: np.ndarray, names: pd.Index, tfs: np.ndarray, truth: np.ndarray, args: argparse.Namespace
) -> None:
    methods: dict[str, dict[str, Any]] = {"ridge": {}, "lasso": {"method": "lasso"}}
    if args.gat:
        methods["gat"] = {"method": "gat"}
    found = {}
    for name, settings in methods.items():
        if name != "gat":
            ours(x, names, tfs, **settings)  # compiles
        found[name] = ours(x, names, tfs, **settings)
    with np.errstate(all="ignore"):
        scores = {name: f.scores["weight"] for name, f in found.items()}
        scores["corr."] = np.nan_to_num(np.corrcoef(x.T)[tfs])
    if args.halves:
        found["halves"] = ours(x, names, tfs, method="lasso", penalty=found["lasso"].penalty, n_subsamples=args.halves)
        scores["stab."] = found["halves"].scores["stability"]
    start = time.process_time()
    if args.trees:
        scores["GENIE3"] = genie3(x, tfs, args.trees)
    forest = time.process_time() - start
    print(f"{what:32s}", " ".join(f"{name} {ratio(w, truth, tfs):.2f}" for name, w in scores.items()))
    for name, f in found.items():
        print(f"{'':8s}{name}: penalty {f.penalty:.2g} r2 {f.r2:.4f} edges {f.edges:.2f} {f.seconds:.2f} s")
    print(f"{'':8s}GENIE3: {forest:.1f} s", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--halves", type=int, default=50)
    parser.add_argument("--gat", action="store_true")
    parser.add_argument("--only", choices=("sergio_ds7", "grn_mdc"))
    args = parser.parse_args()
    if args.only != "grn_mdc":
        simulated(args)
    if args.only != "sergio_ds7":
        measured(args)


def simulated(args: argparse.Namespace) -> None:
    adata = ad.read_h5ad(DATA / "sergio_ds7" / "sergio_ds7.h5ad")
    clean = adata.to_df().to_numpy(np.float64)
    edges = pd.read_csv(DATA / "sergio_ds7" / "gt_GRN.csv", header=None).to_numpy()
    tfs = np.unique(edges[:, 0])
    truth = np.zeros((100, 100), bool)
    truth[edges[:, 0], edges[:, 1]] = True
    known = truth[tfs]
    row("sergio_ds7, clean", clean, adata.var_names, tfs, known, args)
    row("sergio_ds7, clean, logarithms", np.log1p(clean), adata.var_names, tfs, known, args)
    for depth in (10, 3, 1):
        counts = np.random.default_rng(0).poisson(clean / clean.mean() * depth).astype(float)
        row(f"{depth} counts a gene, as they are", counts, adata.var_names, tfs, known, args)
        total = counts.sum(1, keepdims=True)
        logs = np.log1p(counts / np.maximum(total, 1) * np.median(total))
        row(f"{depth} counts a gene, logarithms", logs, adata.var_names, tfs, known, args)


def measured(args: argparse.Namespace) -> None:
    adata = ad.read_h5ad(DATA / "grn_mdc" / "grn_mdc.h5ad")
    x = adata.to_df().to_numpy(np.float64)
    args.trees = min(args.trees, 20)
    for kind in ("Specific", "Non-Specific", "STRING"):
        names, edges = (pd.read_csv(DATA / "grn_mdc" / f"{kind}_{part}.csv", index_col=0) for part in ("TF", "Label"))
        tfs = np.unique(names["index"].to_numpy())
        truth = np.zeros((adata.n_vars, adata.n_vars), bool)
        truth[edges["TF"], edges["Target"]] = True
        row(f"grn_mdc, {kind}", x, adata.var_names, tfs, truth[tfs], args)


if __name__ == "__main__":
    main()
