"""Record what phate makes of blood cells: tests/ops/phate_phate.npz, for ops/test_phate.py.

PYTHON tests/record_phate.py 10x_pbmc68k_reduced.h5ad, by a Python in which phate runs, on the file of scanpy's
`datasets.pbmc68k_reduced`. The recording: phate 2.0.0, graphtools 2.1.0 (Python 3.11), every second cell.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np

RUNS = {
    "default": {},
    "again": {"random_state": 1},
    "smacof": {"mds_solver": "smacof"},
    "classic": {"mds": "classic"},
    "root": {"gamma": 0, "t": 5, "knn": 9, "decay": 10},
    "landmarks": {"n_landmark": 100},
}


def main() -> None:
    import phate

    z = np.asarray(ad.read_h5ad(sys.argv[1]).obsm["X_pca"], np.float64)[::2]
    stored: dict[str, np.ndarray] = {}
    for name, settings in RUNS.items():
        op = phate.PHATE(**{"random_state": 0, "n_pca": None, "verbose": 0, "n_jobs": 1, **settings})
        stored[name] = op.fit_transform(z).astype(np.float32)
        if op.optimal_t is not None:
            stored[f"{name}_t"] = np.asarray(op.optimal_t)
            stored[f"{name}_entropy"] = op._von_neumann_entropy()[1]
    np.savez_compressed(Path(__file__).parent / "ops" / "phate_phate.npz", **stored)


if __name__ == "__main__":
    main()
