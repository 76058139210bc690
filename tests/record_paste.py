"""Record POT's couplings of two real slices, of all and of a part: tests/ops/align_slices_pot.npz.

PYTHON tests/record_paste.py paste_breast.h5ad, by a Python in which POT runs. The file also holds the input: the spots
in the middle of two sections of the breast cancer that PASTE comes with (BSD licence), and their most frequent genes.
The recording: POT 0.9.7.post1 (Python 3.11).
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np

SPOTS, GENES, ALPHA, SHARE = (64, 56), 150, 0.1, 0.7


def main() -> None:
    import ot

    adata = ad.read_h5ad(sys.argv[1])
    counts, spots = [], []
    for name, n in zip(("slice1", "slice2"), SPOTS, strict=True):
        one = adata[adata.obs["slice"] == name]
        at = np.asarray(one.obsm["spatial"], np.float64)
        near = np.sort(np.argsort(np.linalg.norm(at - at.mean(0), axis=1))[:n])
        counts.append(one.X[near].toarray())
        spots.append(at[near])
    frequent = np.sort(np.argsort(-sum(x.sum(0) for x in counts))[:GENES])
    counts = [x[:, frequent] for x in counts]
    a, b = ((x + 0.01) / (x + 0.01).sum(1, keepdims=True) for x in counts)
    cost = (a * np.log(a)).sum(1)[:, None] - a @ np.log(b).T
    squared = [ot.dist(x, x) for x in spots]
    near = np.mean([np.median(np.sqrt(np.where(d > 0, d, np.inf).min(1))) for d in squared])
    scale = 2 * np.sqrt(np.mean([d.mean() for d in squared])) * near
    plan, log = ot.gromov.fused_gromov_wasserstein(
        cost, squared[0] / scale, squared[1] / scale, alpha=ALPHA, log=True, tol_rel=1e-12, tol_abs=1e-12
    )
    part = ot.gromov.partial_fused_gromov_wasserstein(
        cost, squared[0] / scale, squared[1] / scale, alpha=ALPHA, m=SHARE, tol=1e-12
    )
    np.savez_compressed(
        Path(__file__).parent / "ops" / "align_slices_pot.npz",
        counts=np.concatenate(counts).astype(np.uint16),
        spatial=np.concatenate(spots),
        plan=plan.astype(np.float32),
        objective=log["fgw_dist"],
        part=part.astype(np.float32),
        scale=scale,
    )


if __name__ == "__main__":
    main()
