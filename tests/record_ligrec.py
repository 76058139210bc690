"""Record what squidpy makes of ligands and receptors: tests/ops/ligrec_squidpy.npz, for ops/test_ligrec.py.

PYTHON tests/record_ligrec.py DATA, by a Python in which squidpy and liana run, on the folder of shared data. The
recording: squidpy 1.8.2 and liana 1.10.0 (Python 3.13, numpy 2.4.6, pandas 2.3.3), every third pair of CellPhoneDB in
liana's table, 10,000 permutations; cells of soupx_pbmc, counts scaled to 10,000 a cell, log1p. `rows` are those of the
table; "min" is squidpy's, "group" liana's mean and p-value, liana's for pairs of which 10 % of the cells express each
side.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

PERMUTATIONS = 10_000


def main() -> None:
    import liana
    import scanpy as sc
    import squidpy as sq

    data = Path(sys.argv[1])
    table = pd.read_csv(data / "resources" / "liana_omni_resource.csv.gz")
    table = table[table["resource"] == "cellphonedb"].reset_index(drop=True).iloc[::3]
    pairs = table[["source_genesymbol", "target_genesymbol"]].set_axis(["source", "target"], axis=1)
    adata = ad.read_h5ad(data / "soupx_pbmc" / "soupx_pbmc.h5ad")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    adata.obs["annotation"] = adata.obs["annotation"].astype("category")
    settings = {"use_raw": False, "n_perms": PERMUTATIONS, "seed": 0, "n_jobs": 1}

    found = sq.gr.ligrec(adata, "annotation", interactions=pairs.assign(row=pairs.index), copy=True, **settings)
    stored = {
        "rows": found["metadata"]["row"].to_numpy(np.int16),
        "mean": found["means"].to_numpy(),
        "pvalue": found["pvalues"].to_numpy(),
    }

    resource = pairs.set_axis(["ligand", "receptor"], axis=1)
    groups = adata.obs["annotation"].cat.categories
    result = liana.mt.cellphonedb(
        adata, groupby="annotation", resource=resource, expr_prop=0.1, return_all_lrs=False, inplace=False, **settings
    )
    at = {pair: row for row, *pair_ in pairs.itertuples() for pair in [tuple(pair_)]}
    complexes = zip(result["ligand_complex"], result["receptor_complex"], strict=True)
    stored |= {
        "group_rows": np.asarray([at[pair] for pair in complexes], np.int16),
        "group_source": groups.get_indexer(result["source"]).astype(np.int8),
        "group_target": groups.get_indexer(result["target"]).astype(np.int8),
        "group_mean": result["lr_means"].to_numpy(),
        "group_pvalue": result["cellphone_pvals"].to_numpy(),
    }
    np.savez_compressed(Path(__file__).parent / "ops" / "ligrec_squidpy.npz", **stored)


if __name__ == "__main__":
    main()
