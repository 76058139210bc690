"""Planted doublets: scdiffx's Scrublet, classifier and SOLO beside scanpy's Scrublet and the depth of the cells.

    python benchmarks/doublets.py [--data pbmc_4271] [--rates 0.05 0.1] [--seeds 0 1 2] [--calibration]
    python benchmarks/doublets.py --method solo [--told 0.05] [the others]

Sums of two random cells are added to the other cells, as they are ("plain"), or thinned to the depth of another cell
("thinned"). Area under the ROC and under the precision-recall curve of each score, in how many of the seeds the
classifier is ahead of both Scrublets by both, and the correlation of the two Scrublets over the cells. scanpy needs
scikit-image for a threshold; it is given one here, which no score depends on. All are left at an expected rate of 5 %.

With --method solo, each seed of `pp.solo` beside scanpy's Scrublet, and what its probabilities are worth when it is
told each of the rates --told ("true" is the planted one): the error of its calibration (mean distance of probability
and planted share, over tenths of the cells by rank weighted alike), its Brier score, that of the best constant, and
the sum of the probabilities over the number of planted doublets.

With --calibration, what the classifier's probabilities are worth when it is told the rate: their sum beside the number
of planted doublets, precision and recall of the cells that it calls, and the planted share in bins of probability.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path

import anndata as ad
import jax
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import average_precision_score, roc_auc_score

import scdiffx as sd

AREAS = (roc_auc_score, average_precision_score)
BINS = (0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.01)
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


def compared(counts: sp.csr_matrix, share: float, thinned: bool, seeds: list[int]) -> None:
    rows, ahead = [], 0
    for seed in seeds:
        adata, truth = planted(counts, share, thinned, seed)
        neighbours, classifier, theirs = (adata.copy() for _ in range(3))
        clock = [time.process_time()]
        sd.pp.scrublet(neighbours)
        clock.append(time.process_time())
        sd.pp.scrublet(classifier, method="classifier")
        clock.append(time.process_time())
        sc.pp.scrublet(theirs, threshold=0.25, verbose=False)
        clock.append(time.process_time())
        scores = [a.obs["doublet_score"] for a in (neighbours, classifier, theirs)]
        areas = [f(truth, s) for s in [*scores, np.asarray(adata.X.sum(1)).ravel()] for f in AREAS]
        ahead += areas[2] > max(areas[0], areas[4]) and areas[3] > max(areas[1], areas[5])
        rows.append([*areas, np.corrcoef(scores[0], scores[2])[0, 1], *np.diff(clock)])
    m = np.mean(rows, axis=0)
    name = f"{share:.0%} {'thinned' if thinned else 'plain'}"
    cells = " ".join(f"{m[i]:>6.3f} {m[i + 1]:>6.3f}" for i in (0, 2, 4, 6))
    times = " ".join(f"{t:>5.1f}" for t in m[9:])
    print(f"{name:<12} {cells} {ahead:>3} of {len(seeds)} {m[8]:>11.3f} {times}", flush=True)


def calibrated(counts: sp.csr_matrix, share: float, thinned: bool, seeds: list[int]) -> None:
    score, doublet, called = [], [], []
    for seed in seeds:
        adata, truth = planted(counts, share, thinned, seed)
        sd.pp.scrublet(adata, method="classifier", expected_doublet_rate=share)
        score.append(adata.obs["doublet_score"])
        called.append(adata.obs["predicted_doublet"])
        doublet.append(truth)
    p, c, t = (np.concatenate(parts) for parts in (score, called, doublet))
    found = (c & t).sum()
    bins = [
        f"{p[inside].mean():.2f}:{t[inside].mean():.2f}" for inside in (np.digitize(p, BINS) == b for b in range(1, 7))
    ]
    name = f"{share:.0%} {'thinned' if thinned else 'plain'}"
    print(
        f"{name:<12} {p.sum() / t.sum():>6.2f} {found / c.sum():>6.2f} {found / t.sum():>6.2f}   {'  '.join(bins)}",
        flush=True,
    )


def solo(counts: sp.csr_matrix, share: float, thinned: bool, seeds: list[int], told: list[str]) -> None:
    """One line a seed: the areas and seconds of SOLO and of scanpy; then one a seed and a rate that it is told."""
    for seed in seeds:
        adata, truth = planted(counts, share, thinned, seed)
        theirs = adata.copy()
        name = f"{share:.0%} {'thinned' if thinned else 'plain':<7} {seed}"
        clock = [time.process_time()]
        sc.pp.scrublet(theirs, threshold=0.25, verbose=False)
        clock.append(time.process_time())
        x, key = sd.ops.Counts.from_scipy(adata.X), jax.random.key(seed)
        op = sd.ops.Solo().init(x, None, key)
        score = np.asarray(op(x).score)
        clock.append(time.process_time())
        areas = np.array(
            [
                [f(truth, s) for f in AREAS]
                for s in (score, theirs.obs["doublet_score"], np.asarray(adata.X.sum(1)).ravel())
            ]
        )
        cells = "  ".join(f"{a:.3f} {b:.3f}" for a, b in areas)
        verdict = "ahead" if (areas[0] >= areas[1]).all() else "behind"
        print(f"{name}   {cells}  {verdict:<6} {' '.join(f'{t:.0f}' for t in np.diff(clock)[::-1])} s", flush=True)
        for rate in told:
            # The autoencoder does not depend on the rate, and the classifier's seed is the same.
            other = sd.ops.Solo(vae=op.vae, doublet_rate=share if rate == "true" else float(rate)).init(x, None, key)
            print(f"{name}   told {rate:<5} {reliability(np.asarray(other(x).score), truth)}", flush=True)


def reliability(score: np.ndarray, truth: np.ndarray) -> str:
    p = score.astype(np.float64)
    tenths = np.array_split(np.argsort(p, kind="stable"), 10)
    error = np.mean([abs(p[part].mean() - truth[part].mean()) for part in tenths])
    share = truth.mean()
    brier, constant = ((p - truth) ** 2).mean(), share * (1 - share)
    return f"error {error:.4f}  Brier {brier:.4f} of {constant:.4f}  sum {p.sum() / truth.sum():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pbmc_4271")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--method", choices=["scrublet", "solo"], default="scrublet")
    parser.add_argument("--told", nargs="*", default=[], help="rates that solo is told, or 'true'")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    counts = sp.csr_matrix(ad.read_h5ad(DATA / args.data / f"{args.data}.h5ad").X)
    if args.method == "solo":
        print(f"{'':<14} {'solo':>11}  {'scanpy':>11}  {'depth':>11}")
        for share, thinned in itertools.product(args.rates, (False, True)):
            solo(counts, share, thinned, args.seeds, args.told)
        return
    if args.calibration:
        print(f"{'':<12} {'sum':>6} {'prec.':>6} {'recall':>6}   probability:planted, in bins of it")
    else:
        names = ("neighbours", "classifier", "scanpy", "depth")
        print(f"{'':<12} {' '.join(f'{n:>13}' for n in names)} {'ahead':>8} {'correlation':>11} {'CPU s':>17}")
    for share, thinned in itertools.product(args.rates, (False, True)):
        (calibrated if args.calibration else compared)(counts, share, thinned, args.seeds)


if __name__ == "__main__":
    main()
