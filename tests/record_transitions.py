"""Record what scVelo makes of a velocity graph: tests/ops/transitions_scvelo.npz, for ops/test_transition_matrix.py.

PYTHON tests/record_transitions.py VELOCITY.h5ad, by a Python in which scVelo runs, on a file with scVelo's graph. The
recording: scVelo 0.3.4 (Python 3.11, numpy 2.2.6, scipy 1.17.1), the deterministic velocities of pancreas_velocity that
`velocity_reference` describes, with the graph cut to every eighth cell.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp


def main() -> None:
    import scvelo as scv

    whole = ad.read_h5ad(sys.argv[1])
    cells = np.arange(0, whole.n_obs, 8)
    adata = ad.AnnData(np.zeros((len(cells), 1), np.float32))
    stored = {}
    for key in ("velocity_graph", "velocity_graph_neg"):
        adata.uns[key] = stored[key] = sp.csr_matrix(whole.uns[key])[cells][:, cells]
    for name, settings in (("default", {}), ("plain", {"self_transitions": False, "scale": 4})):
        stored[name] = sp.csr_matrix(scv.utils.get_transition_matrix(adata, **settings))
    parts = {f"{name}_{part}": getattr(m, part) for name, m in stored.items() for part in ("data", "indices", "indptr")}
    small = {name: x if x.dtype.kind == "f" else x.astype(np.int16) for name, x in parts.items()}
    np.savez_compressed(Path(__file__).parent / "ops" / "transitions_scvelo.npz", **small)


if __name__ == "__main__":
    main()
