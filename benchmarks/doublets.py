"""Planted doublets: scdiffx's Scrublet beside scanpy's and beside the depth of the cells.

    python benchmarks/doublets.py [--rates 0.05 0.1] [--seeds 0 1 2]

Sums of two random cells of pbmc_4271 are added to the other cells, as they are ("plain"), or thinned to the depth of
another cell ("thinned"). Area under the ROC and under the precision-recall curve of each score, and the correlation of
both scores over the cells. scanpy needs scikit-image for a threshold; it is given one here, which no score depends on.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import average_precision_score, roc_auc_score

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def planted(counts: sp.csr_matrix, share: float, thinned: bool, seed: int) -> tuple[ad.AnnData, np.ndarray]:
    """Cells with doublets among them, `share` of the total, and which they are."""
    rng = np.random.default_rng(seed)
    n = counts.shape[0]
    doublets = round(n * share / (1 + share))
    order = rng.permutation(n)
    first, second, rest = order[:doublets], order[doublets : 2 * doublets], order[2 * doublets :]
    made = sp.csr_matrix(counts[first] + counts[second])
    if thinned:
        depth, own = (np.asarray(m.sum(1)).ravel() for m in (counts[rng.permutation(n)[:doublets]], made))
        keep = np.repeat(np.minimum(depth / own, 1), np.diff(made.indptr))
        made.data = rng.binomial(made.data.astype(int), keep).astype(np.float32)
        made.eliminate_zeros()
    truth = np.r_[np.zeros(len(rest), bool), np.ones(doublets, bool)]
    return ad.AnnData(sp.vstack([counts[rest], made]).tocsr().astype(np.float32)), truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    counts = sp.csr_matrix(ad.read_h5ad(DATA / "pbmc_4271" / "pbmc_4271.h5ad").X)
    print(f"{'':<22} {'scdiffx':>13} {'scanpy':>13} {'depth':>13} {'correlation':>11} {'CPU s':>11}")
    for share, thinned in itertools.product(args.rates, (False, True)):
        rows = []
        for seed in args.seeds:
            adata, truth = planted(counts, share, thinned, seed)
            theirs = adata.copy()
            clock = [time.process_time()]
            sd.pp.scrublet(adata)
            clock.append(time.process_time())
            sc.pp.scrublet(theirs, threshold=0.25, verbose=False)
            clock.append(time.process_time())
            scores = [adata.obs["doublet_score"], theirs.obs["doublet_score"], np.asarray(adata.X.sum(1)).ravel()]
            areas = [f(truth, s) for s in scores for f in (roc_auc_score, average_precision_score)]
            rows.append([*areas, np.corrcoef(scores[0], scores[1])[0, 1], *np.diff(clock)])
        m = np.mean(rows, axis=0)
        name = f"{share:.0%} {'thinned' if thinned else 'plain'}"
        cells = " ".join(f"{m[i]:>6.3f} {m[i + 1]:>6.3f}" for i in (0, 2, 4))
        print(f"{name:<22} {cells} {m[6]:>11.3f} {m[7]:>5.1f} {m[8]:>5.1f}", flush=True)


if __name__ == "__main__":
    main()
