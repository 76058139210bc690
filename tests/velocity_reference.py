"""What scVelo gave for the velocities of pancreas_velocity, and the data that it was given."""

from __future__ import annotations

import functools
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

# scVelo 0.3.4 (Python 3.11, numpy 2.2.6, pandas 2.3.3, scanpy 1.11.5) on pancreas_velocity: `filter_and_normalize`
# with 20 shared counts, 2,000 highly variable genes, scanpy's 30 components, 30 neighbours and UMAP; then `moments`,
# and `velocity` ("det", "sto", "dyn"), `velocity_graph`, `velocity_embedding` and `latent_time` at their defaults
# (`gene_count_corr`, by which scVelo corrects roots after its own preprocessing, was removed before the last).
RECORDED = Path(__file__).parent / "ops" / "velocity_scvelo.npz"


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as stored:
        return {name: stored[name] for name in stored.files}


def bits(name: str, n: int = 2000) -> np.ndarray:
    return np.unpackbits(recorded()[name])[:n].astype(bool)


def rows(name: str, n: int) -> sp.csr_matrix:
    parts = (recorded()[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return sp.csr_matrix(tuple(parts), shape=(len(recorded()["cells"]), n))


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-3) -> None:
    """Equal to the tolerance, relative to the largest value of the gene or vector."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-5 * scale)


@functools.cache
def _normalised(data_dir: Path) -> ad.AnnData:
    path = data_dir / "pancreas_velocity" / "pancreas_velocity.h5ad"
    if not path.exists():
        pytest.skip(f"the data set pancreas_velocity is not at {path}")
    r = recorded()
    adata = ad.read_h5ad(path)[:, r["genes"]].copy()
    for layer in ("spliced", "unspliced"):
        scaled = sp.diags(r[f"{layer}_factor"]) @ sp.csr_matrix(adata.layers[layer]).astype(np.float32)
        adata.layers[layer] = scaled.tocsr().astype(np.float32)
    n, k = r["knn"].shape
    near = sp.csr_matrix((np.ones(n * k, np.float32), r["knn"].ravel().astype(int), np.arange(0, n * k + 1, k)))
    near.sort_indices()
    adata.obsp["distances"] = near
    weights = near.maximum(near.T).tolil() * np.float32(0.3)
    weights[tuple(r["no_weight"].T)] = 0  # a few had underflown
    adata.obsp["connectivities"] = weights.tocsr()
    adata.uns["neighbors"] = {"connectivities_key": "connectivities", "distances_key": "distances", "params": {}}
    adata.obsm["X_umap"] = r["umap"]
    return adata


def normalised(data_dir: Path) -> ad.AnnData:
    """739 cells x 2000 genes: the layers, the graph and the embedding that scVelo was given. A fresh copy."""
    return _normalised(data_dir).copy()
