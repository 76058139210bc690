"""Where textbook regulators and effectors of two lineages rank among all genes of paul15, by three methods.

    python benchmarks/attribution.py [--probes 16]

Plan: normalise, logarithm, 1,500 variable genes, 30 components, 15 neighbours, pseudotime from the medoid of 7MEP on
the erythroid side (clusters 1Ery to 7MEP) and from that of 9GMP on the side of monocytes and neutrophils (9GMP to
11DC, 14Mo to 17Neu). The target is the pseudotime, the genes are all 3,451; rank 1 rises most along it. "Distance" is
the correlation with the distance from the root in the same components instead.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SIDES = {
    "erythroid": (["7MEP", *(f"{i}Ery" for i in range(1, 7))], "7MEP", ["Gata1", "Klf1", "Hba-a2", "Car1"]),
    "myeloid": (
        ["9GMP", "10GMP", "14Mo", "15Mo", "16Neu", "17Neu"],
        "9GMP",
        ["Irf8", "Cebpe", "Mpo", "Elane"],
    ),
}


def side(adata: ad.AnnData, clusters: list[str], start: str) -> ad.AnnData:
    part = adata[adata.obs["paul15_clusters"].isin(clusters)].copy()
    copy = part.copy()
    steps(copy)
    sd.pp.neighbors(copy)
    points = copy.obsm["X_pca"]
    first = np.flatnonzero(part.obs["paul15_clusters"] == start)
    centre = points[first].mean(0)
    part.uns["iroot"] = int(first[np.argmin(np.linalg.norm(points[first] - centre, axis=1))])
    part.obs["distance"] = np.linalg.norm(points - points[part.uns["iroot"]], axis=1)
    return part


def steps(target: ad.AnnData) -> None:
    sd.pp.normalize_total(target)
    sd.pp.log1p(target)
    sd.pp.highly_variable_genes(target, n_top_genes=1500)
    sd.pp.pca(target, n_comps=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=16)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = ad.read_h5ad(DATA / "paul15" / "paul15.h5ad")
    for name, (clusters, start, genes) in SIDES.items():
        part = side(adata, clusters, start)
        plan = sd.plan(part)
        steps(plan)
        sd.pp.neighbors(plan)
        sd.tl.pseudotime(plan)
        logs = part.copy()
        sd.pp.normalize_total(logs)
        sd.pp.log1p(logs)
        print(f"{name}: {part.n_obs} cells")
        sd.tl.attribution(logs, "distance")
        show("distance", logs.varm["attribution_distance"]["all_value"], genes, 0.0)
        for method in ("correlation", "sensitivity", "gradient"):
            begin = time.process_time()
            sd.tl.attribution(plan, "dpt_pseudotime", method=method, n_probes=args.probes)
            seconds = time.process_time() - begin
            show(method, part.varm["attribution_dpt_pseudotime"]["all_value"], genes, seconds)


def show(method: str, value: object, genes: list[str], seconds: float) -> None:
    rank = (-value).rank().astype(int)
    ranks = " ".join(f"{gene} {rank[gene]} ({value[gene]:+.3g})" for gene in genes)
    print(f"  {method:<12} {ranks}; first ten {', '.join(rank.sort_values().index[:10])}; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
