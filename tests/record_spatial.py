"""Record squidpy's spatial graphs of some cells: tests/ops/spatial_squidpy.npz, for ops/test_spatial_domains.py.

PYTHON tests/record_spatial.py [DATA], by a Python in which squidpy runs. The recording: squidpy 1.8.2 (Python 3.11) on
every eighth valid cell of osmfish_cortex: six nearest neighbours, all within 1,500 pixels, and both by slice, for two
slices that are interleaved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

HERE = Path(__file__).parent


def main() -> None:
    import squidpy as sq

    data = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "shared" / "data"
    whole = ad.read_h5ad(data / "osmfish_cortex" / "osmfish_cortex.h5ad")
    whole = whole[(whole.obs["valid"].astype(str) == "1").to_numpy()][::8]
    adata = ad.AnnData(np.zeros((whole.n_obs, 1), np.float32), obsm={"spatial": np.asarray(whole.obsm["spatial"])})
    adata.obs["slice"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 2, "odd", "even"))
    stored = {"coordinates": adata.obsm["spatial"].astype(np.float32)}
    for name, settings in {
        "knn": {"n_neighs": 6},
        "radius": {"radius": 1500.0},
        "knn_slices": {"n_neighs": 6, "library_key": "slice"},
        "radius_slices": {"radius": 1500.0, "library_key": "slice"},
    }.items():
        sq.gr.spatial_neighbors(adata, coord_type="generic", **settings)
        graph = sp.csr_matrix(adata.obsp["spatial_connectivities"])
        graph.sort_indices()
        assert (graph.data == 1).all()
        stored |= {f"{name}_indices": graph.indices.astype(np.int16), f"{name}_indptr": graph.indptr.astype(np.int16)}
    np.savez_compressed(HERE / "ops" / "spatial_squidpy.npz", **stored)


if __name__ == "__main__":
    main()
