"""What a result of `run.py` is worth: numbers of one side against a truth, and numbers of both against each other.

A score takes the input and what a side found, and returns named numbers; an agreement takes what both found. Nearest
cells are found here by all distances of 1,000 cells, never by the code on trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

Found = Mapping[str, Any]
Score = Callable[[ad.AnnData, Found], dict[str, float]]
Agreement = Callable[[Found, Found], dict[str, float]]


def dense(x: Any) -> np.ndarray:
    return np.asarray(x.todense() if sp.issparse(x) else x, np.float64)


def some_nearest(z: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Some cells, and the k nearest of each among all others."""
    from neighbors import exact_sample

    z = np.asarray(z, np.float64)
    some, near = exact_sample(z, k + 1)
    # The cell itself is among its nearest, in whatever place.
    return some, np.stack([np.r_[row[row != cell], row[row == cell]][:k] for cell, row in zip(some, near, strict=True)])


def purity(adata: ad.AnnData, z: np.ndarray, k: int = 15) -> float:
    """The share of cells that have the label of most of their nearest cells."""
    some, near = some_nearest(z, min(k, len(z) - 1))
    label = adata.obs["label"].cat.codes.to_numpy()
    return float(
        np.mean([np.bincount(label[row]).argmax() == label[cell] for cell, row in zip(some, near, strict=True)])
    )


def lisi(adata: ad.AnnData, z: np.ndarray, k: int = 60) -> float:
    """The effective number of batches among the nearest cells, over that of a perfect mixture."""
    batch = adata.obs["batch"].cat.codes.to_numpy()
    share = np.bincount(batch) / len(batch)
    _, near = some_nearest(z, min(k, len(z) - 1))
    counts = [np.bincount(batch[row], minlength=len(share)) / near.shape[1] for row in near]
    return float(np.mean(1 / (np.square(counts)).sum(1)) * (share**2).sum())


def mixing(adata: ad.AnnData, found: Found) -> dict[str, float]:
    return {"kNN label accuracy": purity(adata, found["z"]), "batch LISI": lisi(adata, found["z"])}


def label_accuracy(adata: ad.AnnData, found: Found) -> dict[str, float]:
    return {"kNN label accuracy": purity(adata, found["z"])}


def recall(adata: ad.AnnData, found: Found) -> dict[str, float]:
    some, near = some_nearest(adata.obsm["X_pca"], 14)
    graph = sp.csr_matrix(found["distances"])
    hits = [np.isin(row, graph[cell].indices).mean() for cell, row in zip(some, near, strict=True)]
    return {"recall": float(np.mean(hits))}


def explained(adata: ad.AnnData, found: Found) -> dict[str, float]:
    x = adata.X
    total = float(np.asarray(x.multiply(x).mean(0)).sum() - np.square(np.asarray(x.mean(0))).sum())
    return {"explained variance": float(np.asarray(found["z"], np.float64).var(0).sum()) / total}


def layout(adata: ad.AnnData, found: Found) -> dict[str, float]:
    from layout import kept

    trust, shared = kept(np.asarray(adata.obsm["X_pca"]), np.asarray(found["z"]))
    return {"trustworthiness": float(trust), "neighbours kept": float(shared)}


def clusters(adata: ad.AnnData, found: Found) -> dict[str, float]:
    from sklearn.metrics import adjusted_rand_score

    return {"ARI": float(adjusted_rand_score(adata.obs["label"], found["labels"]))}


def partition(adata: ad.AnnData, found: Found) -> dict[str, float]:
    graph, label = sp.coo_matrix(adata.obsp["connectivities"]), np.unique(found["labels"], return_inverse=True)[1]
    degree = np.asarray(graph.sum(1)).ravel()
    inside = graph.data[label[graph.row] == label[graph.col]].sum() / graph.data.sum()
    by_chance = np.square(np.bincount(label, degree) / degree.sum()).sum()
    return {"modularity": float(inside - by_chance), **clusters(adata, found)}


def inertia(adata: ad.AnnData, found: Found) -> dict[str, float]:
    """Mean squared distance to the mean of the cluster, over the variance; means over the runs."""
    z = np.asarray(adata.obsm["X_pca"], np.float64)

    def of(labels: Any) -> float:
        label = np.unique(labels, return_inverse=True)[1]
        centre = np.stack([np.bincount(label, column) for column in z.T], 1) / np.bincount(label)[:, None]
        return float(np.square(z - centre[label]).sum(1).mean() / z.var(0).sum())

    runs = found["runs"]
    return {
        "inertia": float(np.mean([of(labels) for labels in runs])),
        "ARI": float(np.mean([clusters(adata, {"labels": labels})["ARI"] for labels in runs])),
    }


def hull(adata: ad.AnnData, found: Found) -> dict[str, float]:
    from archetypes import explained as share

    return {"explained": share(adata.obsm["X_pca"], found["weights"], found["positions"])}


def doublets(adata: ad.AnnData, found: Found) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = adata.obs["doublet"]
    return {
        "AUROC": float(roc_auc_score(truth, found["score"])),
        "AUPRC": float(average_precision_score(truth, found["score"])),
    }


def cleaned(adata: ad.AnnData, found: Found) -> dict[str, float]:
    """Error of the profiles of types after cleaning, over that before; mean error of the share taken from a cell."""
    code = adata.obs["label"].cat.codes.to_numpy()
    member = sp.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))))

    def profiles(x: Any) -> np.ndarray:
        total = dense(member @ sp.csr_matrix(x))
        return total / total.sum(1, keepdims=True)

    truth = profiles(adata.layers["truth"])
    after, before = (np.abs(profiles(x) - truth).sum() for x in (found["x"], adata.X))
    share = 1 - np.asarray(found["x"].sum(1)).ravel() / np.asarray(adata.X.sum(1)).ravel()
    return {"error left": float(after / before), "error of shares": float(np.abs(share - adata.obs["ambient"]).mean())}


def edges(adata: ad.AnnData, found: Found) -> dict[str, float]:
    """Average precision over all pairs of a factor and another gene, over the share of true edges."""
    from grn import ratio

    edge = np.asarray(adata.uns["edges"])
    factors, truth = np.unique(edge[:, 0]), np.zeros((adata.n_vars, adata.n_vars), bool)
    truth[edge[:, 0], edge[:, 1]] = True
    return {"precision over chance": float(ratio(found["x"], truth[factors], factors))}


def annotated(adata: ad.AnnData, found: Found) -> dict[str, float]:
    from sklearn.metrics import f1_score

    query = adata.obs["known"].isna().to_numpy() if "known" in adata.obs else np.ones(adata.n_obs, bool)
    truth = adata.obs["label"].astype(str).to_numpy()[query]
    return {"macro-F1": float(f1_score(truth, np.asarray(found["labels"], str)[query], average="macro"))}


def aligned(adata: ad.AnnData, found: Found) -> dict[str, float]:
    """Root mean square distance from the true place after the best rigid motion of both slices together, in spots."""
    from align_slices import spacing

    truth, place = (np.asarray(x, np.float64) for x in (adata.obsm["truth"], found["z"]))
    u, _, v = np.linalg.svd((place - place.mean(0)).T @ (truth - truth.mean(0)))
    off = (place - place.mean(0)) @ u @ v - (truth - truth.mean(0))
    return {"error in spots": float(np.sqrt(np.square(off).sum(1).mean()) / spacing(truth))}


def nothing(adata: ad.AnnData, found: Found) -> dict[str, float]:
    return {}


# Agreements: what one side found beside the other.


def difference(a: Found, b: Found) -> dict[str, float]:
    """The largest difference over the largest value."""
    x, y = a["x"], b["x"]
    gap = abs(x - y)
    return {"largest difference": float(gap.max() / abs(y).max())}


def correlation(a: Found, b: Found) -> dict[str, float]:
    x, y = (dense(v["x"]).ravel() for v in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    return {"correlation": float(np.corrcoef(x[finite], y[finite])[0, 1])}


def pairs(a: Found, b: Found) -> dict[str, float]:
    """Means and p-values of the pairs of genes in pairs of groups that both have tested."""

    def named(values: Any) -> dict[tuple[str, ...], float]:
        # squidpy writes genes in capitals.
        return {tuple(str(part).upper() for part in name): value for name, value in values.items()}

    (x, p), (y, q) = ((named(found["x"]), named(found["p"])) for found in (a, b))
    names = sorted(x.keys() & y.keys())
    return {
        "tested by both": len(names) / max(len(x.keys() | y.keys()), 1),
        "largest difference of a mean": max(abs(x[name] - y[name]) for name in names),
        "largest difference of a p-value": max(abs(p[name] - q[name]) for name in names),
    }


def rank_correlation(a: Found, b: Found) -> dict[str, float]:
    from scipy.stats import spearmanr

    x, y = (dense(v["x"]).ravel() for v in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    return {"rank correlation": float(spearmanr(x[finite], y[finite])[0])}


def overlap(a: Found, b: Found) -> dict[str, float]:
    x, y = (set(np.flatnonzero(v["x"])) for v in (a, b))
    return {"shared": len(x & y) / max(len(y), 1)}


def columns(a: Found, b: Found) -> dict[str, float]:
    """The smallest correlation of a column, whatever its sign."""
    x, y = dense(a["z"]), dense(b["z"])
    n = min(x.shape[1], y.shape[1])
    found = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(n) if x[:, i].std() and y[:, i].std()]
    return {"smallest correlation of a column": float(np.abs(found).min())}


def same_labels(a: Found, b: Found) -> dict[str, float]:
    from sklearn.metrics import adjusted_rand_score

    return {"ARI of both": float(adjusted_rand_score(a["labels"], b["labels"]))}


def none(a: Found, b: Found) -> dict[str, float]:
    return {}
