"""Switches along the villus: fits beside scipy's, p-values on permuted orders, where known genes switch, time.

    python benchmarks/switch_de.py [--permutations 6]

Genes of moor_villus found in at least 3 cells, along the published zone. "Scipy" is `least_squares` on all three
parameters from 18 starts, for 100 genes. Permuted orders: shares of p-values below a level (they should equal it) and
the Kolmogorov-Smirnov distance to the uniform distribution, for switchDE's chi-squared with 2 degrees of freedom and
for the calibrated p-values, on the zone and on a continuous order, by how many cells a gene is found in.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import stats

import scdiffx as sd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KNOWN = {"tip": ["Apoa4", "Ada", "Nt5e", "Slc28a2"], "bottom": ["Reg1", "Nlrp6", "Reg3b", "Il18"]}


def villus() -> ad.AnnData:
    adata = ad.read_h5ad(DATA / "moor_villus" / "moor_villus.h5ad")
    adata.var["cells"] = np.asarray((adata.X > 0).sum(0)).ravel()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    adata.obs["zone"] = adata.obs["zone"].astype(float)
    return adata[:, adata.var["cells"] >= 3].copy()


def against_scipy(adata: ad.AnnData) -> None:
    from ops.test_switch import best_by_scipy

    chosen = np.random.default_rng(0).choice(np.flatnonzero(adata.var["cells"] >= 20), 100, replace=False)
    part = adata[:, chosen].copy()
    start = time.process_time()
    sd.tl.switch_de(part, "zone", n_permutations=0)
    ours, start = time.process_time() - start, time.process_time()
    t, x = part.obs["zone"].to_numpy(), part.X.toarray().astype(np.float64)
    found = [best_by_scipy(x[:, i], t) for i in range(100)]
    theirs = time.process_time() - start
    statistic = np.array([len(t) * np.log(len(t) * x[:, i].var() / found[i][0]) for i in range(100)])
    mine = -2 * np.log(np.maximum(part.var["switch_pval"].to_numpy(), 1e-300))
    shown = mine < 1300
    gap = (mine - statistic)[shown]
    both = np.column_stack([part.var["switch_strength"], part.var["switch_time"]])
    same = np.isclose(both, [f[1][1:] for f in found], rtol=1e-3).all(1)
    print(
        f"scipy, 100 genes: statistic ours minus theirs from {gap.min():.2g} to {gap.max():.2g}; strength and time "
        f"within 1e-3 for {same.sum()}; {ours:.1f} s (compiling included) against {theirs:.1f} s"
    )


def permuted(adata: ad.AnnData, times: int) -> None:
    rng = np.random.default_rng(1)
    part = adata[:, ::6].copy()
    print(f"{'order':<11} {'cells':<8} {'p-values':<11} {'KS':>6} " + " ".join(f"{'<' + str(v):>8}" for v in LEVELS))
    for order in ("zone", "continuous"):
        values = part.obs["zone"].to_numpy() if order == "zone" else rng.uniform(size=part.n_obs)
        found: dict[str, list[np.ndarray]] = {"chi-squared": [], "calibrated": []}
        for _ in range(times):
            part.obs["order"] = rng.permutation(values)
            for name, n in (("chi-squared", 0), ("calibrated", 20)):
                sd.tl.switch_de(part, "order", n_permutations=n)
                found[name].append(part.var["switch_pval"].to_numpy())
        for low, high in ((3, 20), (20, 100), (100, 2000)):
            genes = ((part.var["cells"] >= low) & (part.var["cells"] < high)).to_numpy()
            for name, all_p in found.items():
                p = np.concatenate([one[genes] for one in all_p])
                shares = " ".join(f"{(p < level).mean():8.4f}" for level in LEVELS)
                ks = stats.kstest(p, "uniform").statistic
                print(f"{order:<11} {f'{low}-{high}':<8} {name:<11} {ks:6.3f} {shares}", flush=True)


LEVELS = (0.2, 0.05, 0.01, 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--permutations", type=int, default=6)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = villus()
    against_scipy(adata)
    for run in ("first", "again"):
        start = time.process_time()
        sd.tl.switch_de(adata, "zone")
        print(f"all {adata.n_obs} x {adata.n_vars}, {run}: {time.process_time() - start:.1f} s")
    var = adata.var
    print(f"q < .05: {(var['switch_qval'] < 0.05).sum()} genes; unconverged {adata.uns['switch']['unconverged']}")
    for place, genes in KNOWN.items():
        for gene in genes:
            row = var.loc[gene]
            print(
                f"{place:<7} {gene:<8} time {row['switch_time']:.2f} strength {row['switch_strength']:6.2f} "
                f"q {row['switch_qval']:.2g}, rank {1 + (var['switch_pval'] < row['switch_pval']).sum()}"
            )
    permuted(adata, args.permutations)


if __name__ == "__main__":
    main()
