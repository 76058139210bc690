"""Simulated beside real counts: how far six statistics are from those of the data, for Splatter's model and a Poisson.

    python benchmarks/simulate.py [--sets paul15 pbmc_4271 mixology_rnamix ifnb_2k] [--seeds 0 1 2]

Two-sample Kolmogorov-Smirnov statistics (0 is equal, 1 is apart) of mean, variance and share of zeros of genes, library
size and share of zeros of cells, and rank correlations of pairs of the 150 most frequent genes; and the area under the
ROC of a classifier (30 principal components of the logarithms, nearest neighbours) that tells simulated from real cells
(.5 is best). "Poisson" has each gene's mean, "with sizes" the library sizes of the very cells too. "New genes" are
drawn from Splatter's distributions, fitted; "cells alike" keeps each gene's own mean and variation; "groups" has those
of the known groups, "clusters" of Leiden clusters at resolution 2.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GROUPS = {"paul15": "paul15_clusters", "pbmc_4271": "label", "mixology_rnamix": "mix", "ifnb_2k": "condition"}


def features(x: Any) -> list[np.ndarray]:
    x = sp.csr_matrix(x, dtype=np.float64)
    mean, square = (np.asarray(m.mean(0)).ravel() for m in (x, x.multiply(x)))
    rank = stats.rankdata(x[:, np.argsort(-mean)[:150]].toarray(), axis=0)
    zeros = 1 - np.bincount(x.indices, minlength=x.shape[1]) / x.shape[0]
    size, empty = np.asarray(x.sum(1)).ravel(), 1 - np.diff(x.indptr) / x.shape[1]
    return [mean, square - mean**2, zeros, size, empty, np.corrcoef(rank.T)[np.triu_indices(150, 1)]]


def told_apart(a: Any, b: Any) -> float:
    x = sp.vstack([sp.csr_matrix(a), sp.csr_matrix(b)]).astype(np.float64).tocsr()
    logs = sp.diags(1e4 / np.maximum(np.asarray(x.sum(1)).ravel(), 1)) @ x
    frequent = np.argsort(-np.asarray(x.mean(0)).ravel())[:1000]
    z = PCA(30, random_state=0).fit_transform(logs.log1p()[:, frequent].toarray())
    y = np.r_[np.zeros(a.shape[0]), np.ones(b.shape[0])]
    order = np.random.default_rng(0).permutation(len(y))
    guess = cross_val_predict(KNeighborsClassifier(15), z[order], y[order], cv=5, method="predict_proba")
    return float(roc_auc_score(y[order], guess[:, 1]))


def clusters(adata: ad.AnnData) -> Any:
    copy = adata.copy()
    sd.pp.normalize_total(copy)
    sd.pp.log1p(copy)
    sd.pp.highly_variable_genes(copy, n_top_genes=min(2000, copy.n_vars))
    sd.pp.pca(copy, n_comps=30)
    sd.pp.neighbors(copy)
    sd.tl.leiden(copy, resolution=2.0)
    return copy.obs["leiden"]


def ways(adata: ad.AnnData, groups: str, seed: int) -> dict[str, Callable[[], Any]]:
    size, total = (np.asarray(adata.X.sum(axis)).ravel() for axis in (1, 0))
    share, rng = total / total.sum(), np.random.default_rng(seed)
    return {
        "Poisson": lambda: rng.poisson(np.broadcast_to(share * size.mean(), adata.shape)),
        "with sizes": lambda: rng.poisson(share * rng.choice(size, len(size))[:, None]),
        "new genes": lambda: sd.tl.simulate(adata, n_vars=adata.n_vars, rng=seed).X,
        "cells alike": lambda: sd.tl.simulate(adata, rng=seed).X,
        "clusters": lambda: sd.tl.simulate(adata, groupby="cluster", rng=seed).X,
        "groups": lambda: sd.tl.simulate(adata, groupby=groups, rng=seed).X,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'':<28} {'mean':>7} {'var':>7} {'zeros':>7} {'size':>7} {'empty':>7} {'corr':>7} {'AUC':>7} {'CPU s':>6}")
    for name in args.sets:
        adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
        adata.X = sp.csr_matrix(adata.X).astype(np.float32)
        adata.obs["cluster"] = clusters(adata)
        real = features(adata.X)
        for way in ways(adata, GROUPS[name], 0):
            rows = []
            for seed in args.seeds:
                start = time.process_time()
                made = ways(adata, GROUPS[name], seed)[way]()
                seconds = time.process_time() - start
                gaps = [stats.ks_2samp(a, b).statistic for a, b in zip(real, features(made), strict=True)]
                # New genes are other genes: a classifier that sees both knows at once.
                apart = np.nan if way == "new genes" else told_apart(adata.X, made)
                rows.append([*gaps, apart, seconds])
            shown = np.mean(rows, 0)
            print(
                f"{name:<16} {way:<11} " + " ".join(f"{v:7.3f}" for v in shown[:-1]) + f" {shown[-1]:6.1f}", flush=True
            )


if __name__ == "__main__":
    main()
