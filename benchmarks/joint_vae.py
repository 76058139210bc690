"""The VAE of genes and proteins beside that of genes, PCAs, and both side by side, on the blood cells of cite_cbmc.

    python benchmarks/joint_vae.py --seeds 0 1 2 --json joint.json

The file has proteins as Seurat's CLR of counts, standardised. Each protein is one increasing function of its counts, so
that these can be found again; `counts_again` checks that they are integers and give the file's values back.

Scores: agreement with the labels (which were found from genes), and how much of the log counts of proteins 15
neighbours explain, of five that every method saw and of the five that none did, drawn anew for each seed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from scipy.optimize import brentq
from vae import DATA, structure

N_COMPS = 30
K = 15


def _misfit(rate: float, values: np.ndarray) -> float:
    """How far the steps of exp(rate * values) are from multiples of their median."""
    steps = np.diff(np.exp(rate * values))
    return float(np.abs(steps / np.median(steps) - np.round(steps / np.median(steps))).mean())


def counts_again(column: np.ndarray) -> np.ndarray:
    """The counts n of a protein, given (log1p(n / c) - mean) / std with c = exp(mean(log1p(n)))."""
    values, which, times = np.unique(column.astype(np.float64), return_inverse=True, return_counts=True)
    # Where most cells are, nearly every count occurs: there exp(std * value) has equal steps.
    width = min(80, len(values) // 3)
    start = int(np.convolve(times, np.ones(width), "valid").argmax())
    middle = values[start : start + width]
    rate = min(np.linspace(0.05, 3, 6000), key=lambda s: _misfit(s, middle))
    for reach in (1e-3, 1e-5):
        rate = min(np.linspace(rate - reach, rate + reach, 401), key=lambda s: _misfit(s, middle))
    step = np.median(np.diff(np.exp(rate * middle)))
    for share in np.linspace(0, 1, 30):
        # Outwards, where counts are missing: numbers by the last fit, then a better fit.
        part = values[int(start * (1 - share)) : int(start + width + (len(values) - start - width) * share)]
        powers = np.exp(rate * part)
        for _ in range(3):
            number = np.round((powers - powers[width // 2]) / step)
            design = np.stack([np.ones_like(number), number, -part * powers], 1) / powers[:, None]
            _, step, more = np.linalg.lstsq(design, np.ones_like(number), rcond=None)[0]
            rate += more
            powers = np.exp(rate * part)
    powers = np.exp(rate * values)
    number = np.round((powers - powers[0]) / step)
    lowest = brentq(lambda n: np.exp(np.log1p(n + number[which]).mean()) + n - powers[0] / step, -0.9, 1e5)
    counts = (round(lowest) + number)[which]
    logs = np.log1p(counts / np.exp(np.log1p(counts).mean()))
    back = (logs - logs.mean()) / logs.std(ddof=1)
    if abs(lowest - round(lowest)) > 0.01 or np.abs(back - column).max() > 1e-5:
        raise ValueError(f"no counts give these values: lowest {lowest}, off by {np.abs(back - column).max()}")
    return counts


def loaded() -> ad.AnnData:
    adata = ad.read_h5ad(DATA / "cite_cbmc" / "cite_cbmc.h5ad")
    columns = np.asarray(adata.obsm["protein"]).T
    adata.obsm["protein"] = np.stack([counts_again(column) for column in columns], 1).astype(np.float32)
    return adata


def vae_of(adata: ad.AnnData, proteins: np.ndarray | None, seed: int) -> np.ndarray:
    import scdiffx as sd

    data = ad.AnnData(adata.X, obsm={} if proteins is None else {"protein": proteins})
    sd.pp.vae(data, protein_key=None if proteins is None else "protein", rng=seed, progress=False)
    return np.asarray(data.obsm["X_vae"])


def pca_of_genes(adata: ad.AnnData) -> np.ndarray:
    import scanpy as sc

    data = ad.AnnData(adata.X.copy())
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    sc.pp.pca(data, n_comps=N_COMPS)
    return np.asarray(data.obsm["X_pca"])


def pca_of_proteins(proteins: np.ndarray) -> np.ndarray:
    """All components of standardised log counts."""
    logs = np.log1p(proteins.astype(np.float64))
    left, size, _ = np.linalg.svd((logs - logs.mean(0)) / logs.std(0), full_matrices=False)
    return left * size


def beside(*parts: np.ndarray) -> np.ndarray:
    """Side by side, with the same variance in all."""
    return np.concatenate([part / np.sqrt(part.var(0).sum()) for part in parts], 1)


def explained(latent: np.ndarray, proteins: np.ndarray) -> float:
    """Share of the variance of log counts that the mean of the nearest other cells explains; mean over proteins."""
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=K).fit(latent).kneighbors(return_distance=False)
    logs = np.log1p(proteins)
    return float((1 - ((logs - logs[near].mean(1)) ** 2).mean(0) / logs.var(0)).mean())


def made(adata: ad.AnnData, genes: dict[str, np.ndarray], proteins: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Every representation of the cells, given the two that see genes alone."""
    markers = pca_of_proteins(proteins)
    return genes | {
        "PCA of proteins": markers,
        "both PCAs": beside(genes["PCA of genes"], markers),
        "VAE of genes, PCA of proteins": beside(genes["VAE of genes"], markers),
        "joint VAE": vae_of(adata, proteins, seed),
    }


def scores(adata: ad.AnnData, seed: int) -> list[dict[str, Any]]:
    proteins = adata.obsm["protein"]
    order = np.random.default_rng(seed).permutation(proteins.shape[1])
    seen, unseen = proteins[:, np.sort(order[:5])], proteins[:, np.sort(order[5:])]
    start = time.process_time()
    genes = {"PCA of genes": pca_of_genes(adata), "VAE of genes": vae_of(adata, None, seed)}
    middle = time.process_time()
    whole = made(adata, genes, proteins, seed)
    print(f"seed {seed}: genes {middle - start:.0f} s, with proteins {time.process_time() - middle:.0f} s", flush=True)
    half = made(adata, genes, seen, seed)
    labels = adata.obs["label"].astype(str)
    rows = []
    for name, latent in whole.items():
        row = {"seed": seed, "method": name, **structure(latent, labels, None)}
        row |= {"seen": explained(half[name], seen), "unseen": explained(half[name], unseen)}
        rows.append(row)
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = loaded()
    rows = [row for seed in options.seeds for row in scores(adata, seed)]
    for name in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == name]
        numbers = [key for key in found[0] if key not in ("seed", "method")]
        mean = {key: np.mean([row[key] for row in found]) for key in numbers}
        std = {key: np.std([row[key] for row in found], ddof=1) if len(found) > 1 else 0 for key in numbers}
        print(name, *(f"{key} {mean[key]:.3f}±{std[key]:.3f}" for key in numbers), sep="  ")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
