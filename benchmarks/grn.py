"""Regulation by ridge regression beside GENIE3, correlation and chance: simulated and measured networks, time.

    python benchmarks/grn.py [--trees 100]

Average precision over all pairs of a factor and another gene, divided by the share of true edges. GENIE3 is a random
forest a gene, each gene scaled to variance 1, importances as reductions of variance that are not normalised
(scikit-learn's; at a node the square root of the factors is tried, as in the paper, which has 1,000 trees). sergio_ds7:
a simulated network of 100 genes, clean, and with Poisson noise of a mean of 10, 3 and 1 counts a gene, as counts and as
logarithms of normalised counts. grn_mdc: dendritic cells against three reference networks (at most 20 trees).
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

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


def ours(x: np.ndarray, names: pd.Index, tfs: np.ndarray) -> tuple[np.ndarray, ad.AnnData]:
    adata = ad.AnnData(x, var=pd.DataFrame(index=names))
    sd.tl.grn(adata, list(names[tfs]), n_edges=x.shape[1] * len(tfs))
    table, weights = adata.uns["grn"], np.zeros((len(tfs), x.shape[1]))
    weights[table["tf"].cat.codes, table["target"].cat.codes] = table["weight"]
    return weights, adata


def ratio(weights: np.ndarray, truth: np.ndarray, tfs: np.ndarray) -> float:
    pairs = np.ones(weights.shape, bool)
    pairs[np.arange(len(tfs)), tfs] = False
    return average_precision_score(truth[pairs], np.abs(weights)[pairs]) / truth[pairs].mean()


def row(what: str, x: np.ndarray, names: pd.Index, tfs: np.ndarray, truths: dict[str, np.ndarray], trees: int) -> None:
    ours(x, names, tfs)  # compiles
    start = time.process_time()
    found, adata = ours(x, names, tfs)
    mine, start = time.process_time() - start, time.process_time()
    forest = genie3(x, tfs, trees)
    theirs = time.process_time() - start
    with np.errstate(all="ignore"):
        correlation = np.nan_to_num(np.corrcoef(x.T)[tfs])
    for name, truth in truths.items():
        scores = " ".join(f"{ratio(w, truth, tfs):9.2f}" for w in (found, forest, correlation))
        print(f"{what + ' ' + name:34s} {scores} {mine:9.2f} {theirs:9.1f}   {adata.uns['grn_params']['penalty']:.2g}")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=100)
    trees = parser.parse_args().trees
    print(f"{'':34s} {'ridge':>9s} {'GENIE3':>9s} {'corr.':>9s} {'CPU s':>9s} {'GENIE3':>9s}   penalty")
    adata = ad.read_h5ad(DATA / "sergio_ds7" / "sergio_ds7.h5ad")
    clean = adata.to_df().to_numpy(np.float64)
    edges = pd.read_csv(DATA / "sergio_ds7" / "gt_GRN.csv", header=None).to_numpy()
    tfs = np.unique(edges[:, 0])
    truth = np.zeros((100, 100), bool)
    truth[edges[:, 0], edges[:, 1]] = True
    known = {"": truth[tfs]}
    row("sergio_ds7, clean", clean, adata.var_names, tfs, known, trees)
    row("sergio_ds7, clean, logarithms", np.log1p(clean), adata.var_names, tfs, known, trees)
    for depth in (10, 3, 1):
        counts = np.random.default_rng(0).poisson(clean / clean.mean() * depth).astype(float)
        row(f"{depth} counts a gene, as they are", counts, adata.var_names, tfs, known, trees)
        total = counts.sum(1, keepdims=True)
        logs = np.log1p(counts / np.maximum(total, 1) * np.median(total))
        row(f"{depth} counts a gene, logarithms", logs, adata.var_names, tfs, known, trees)

    adata = ad.read_h5ad(DATA / "grn_mdc" / "grn_mdc.h5ad")
    x = adata.to_df().to_numpy(np.float64)
    for kind in ("Specific", "Non-Specific", "STRING"):
        names, edges = (pd.read_csv(DATA / "grn_mdc" / f"{kind}_{part}.csv", index_col=0) for part in ("TF", "Label"))
        tfs = np.unique(names["index"].to_numpy())
        truth = np.zeros((adata.n_vars, adata.n_vars), bool)
        truth[edges["TF"], edges["Target"]] = True
        row("grn_mdc,", x, adata.var_names, tfs, {kind: truth[tfs]}, min(trees, 20))


if __name__ == "__main__":
    main()
