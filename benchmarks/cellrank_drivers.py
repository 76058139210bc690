"""CellRank's lineage drivers on paul15, to stand beside `tl.attribution` in `tutorials/trajectories.ipynb`.

    python benchmarks/cellrank_drivers.py prepare paul15_ordered.h5ad      # with scdiffx: the tutorial's first steps
    python benchmarks/cellrank_drivers.py rank paul15_ordered.h5ad         # with CellRank 2, scdiffx is not needed

"rank" computes fates by CellRank's pseudotime kernel (soft scheme) and terminal cells of "prepare", and from them
drivers (Pearson's correlation, Fisher's transformation), and writes `tutorials/paul15_drivers_cellrank.csv`: for each
fate and textbook gene the correlation, its rank among all genes and the q-value. The largest difference of the fates
from those that "prepare" has computed is printed.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "paul15" / "paul15.h5ad"
# By markers, not by the names of the clusters; see the tutorial.
SIDES = {"Ery": ["1Ery", "2Ery"], "Mo": ["13Baso", "14Mo"], "Neu": ["15Mo", "16Neu"], "Baso": ["17Neu"]}
MOST = 30
GENES = {
    "Ery": ["Gata1", "Klf1", "Epor", "Gfi1b", "Car1", "Hba-a2"],
    "Mo": ["Irf8", "Csf1r", "Ly86"],
    "Neu": ["Cebpe", "Gfi1", "Mpo", "Elane", "Gstm1"],
    "Baso": ["Gata2", "Lmo4", "Prss34", "Mcpt8"],
}


def prepare(path: str) -> None:
    import scdiffx as sd

    adata = ad.read_h5ad(DATA)
    adata = adata[~adata.obs["paul15_clusters"].isin(["11DC", "19Lymph"])].copy()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=1500)
    sd.pp.pca(adata, n_comps=30)
    sd.pp.neighbors(adata)
    stem = np.flatnonzero(adata.obs["paul15_clusters"] == "7MEP")
    points = adata.obsm["X_pca"][stem]
    sd.tl.pseudotime(adata, root=int(stem[np.linalg.norm(points - points.mean(0), axis=1).argmin()]))
    time = adata.obs["dpt_pseudotime"]
    latest = {}
    for name, groups in SIDES.items():
        cells = time[adata.obs["paul15_clusters"].isin(groups)]
        latest[name] = list(cells.nlargest(min(MOST, len(cells) // 2)).index)
    sd.tl.fate_probabilities(adata, latest)
    adata.uns = {"neighbors": dict(adata.uns["neighbors"])}
    adata.write_h5ad(path)


def rank(path: str) -> None:
    import cellrank as cr

    adata = ad.read_h5ad(path)
    fates, state = np.asarray(adata.obsm.pop("lineages_fwd")), adata.obs.pop("term_states_fwd")
    kernel = cr.kernels.PseudotimeKernel(adata, time_key="dpt_pseudotime")
    kernel.compute_transition_matrix(threshold_scheme="soft")
    estimator = cr.estimators.GPCCA(kernel)
    estimator.set_terminal_states({name: list(state.index[state == name]) for name in SIDES})
    estimator.compute_fate_probabilities(solver="gmres", use_petsc=False, tol=1e-12)
    theirs = estimator.fate_probabilities
    gap = np.abs(np.stack([np.asarray(theirs[name]).ravel() for name in SIDES], 1) - fates).max()
    print(f"CellRank {cr.__version__}: largest difference of the fates {gap:.1e}")
    drivers = estimator.compute_lineage_drivers()
    rows = []
    for fate, genes in GENES.items():
        order = drivers[f"{fate}_corr"].rank(ascending=False)
        for gene in genes:
            found = drivers.loc[gene]
            values = {"correlation": found[f"{fate}_corr"], "rank": int(order[gene]), "qval": found[f"{fate}_qval"]}
            rows.append({"fate": fate, "gene": gene, **values})
    table = pd.DataFrame(rows)
    table.to_csv(ROOT / "tutorials" / "paul15_drivers_cellrank.csv", index=False, float_format="%.6g")
    print(table.to_string())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"prepare": prepare, "rank": rank}[sys.argv[1]](sys.argv[2])
