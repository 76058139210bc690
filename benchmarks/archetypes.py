"""Archetypes of known RNA mixtures, beside ParTIpy, memberships of clusters, and what explains the curve.

    python benchmarks/archetypes.py [--data ../shared/data] [--partipy PYTHON] [--seeds 5] [--n 50000]
        [--json out.json] [--plot out.png]

mixology_rnamix: RNA of three cell lines mixed in known proportions, 15 to 100 % each, two protocols. For each protocol
alone and both together: 30 principal components of 2,000 variable genes, three archetypes, matched to the lines by the
permutation with the smallest error. Correlation of weights and proportions by line, root mean square error, explained
variance, mean and range over seeds; then the number that the curve chooses, and the spread over bootstraps. Controls:
memberships of 3-means at its default temperature and at the temperature that fits the truth best, and the mean
proportions for all. --partipy is a Python in which ParTIpy 0.2.0 runs; it gets the same components. The last part times
one start on upsampled spring_hpc cells (50 components, 5 archetypes), a second call, in seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from itertools import permutations
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from neighbors import upsampled

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LINES = ["H2228_prop", "H1975_prop", "HCC827_prop"]
PROTOCOLS = {"celseq2": ["RNAmix_celseq2"], "sortseq": ["RNAmix_sortseq"], "both": ["RNAmix_celseq2", "RNAmix_sortseq"]}
TEMPERATURES = 4.0 ** np.arange(7)
THEIRS = """
import sys, numpy as np
from partipy.arch import AA
x = np.load(sys.argv[1])
runs = [AA(3, seed=seed).fit(x) for seed in range(int(sys.argv[3]))]
np.savez(sys.argv[2], weights=[run.A for run in runs], positions=[run.Z for run in runs])
"""


def components(protocols: list[str], data: Path) -> ad.AnnData:
    adata = ad.read_h5ad(data / "mixology_rnamix" / "mixology_rnamix.h5ad")
    adata = adata[adata.obs["batch"].isin(protocols).to_numpy()].copy()
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=2000)
    sd.pp.pca(adata, n_comps=30)
    return adata


def score(weights: np.ndarray, truth: np.ndarray) -> list[float]:
    """Correlations by line and the root mean square error."""
    tried = [weights[:, order] for order in permutations(range(3))]
    best = min(tried, key=lambda w: float(((w - truth) ** 2).sum()))
    correlation = [float(np.corrcoef(best[:, i], truth[:, i])[0, 1]) for i in range(3)]
    return [*correlation, float(np.sqrt(((best - truth) ** 2).mean()))]


def explained(x: np.ndarray, weights: np.ndarray, positions: np.ndarray) -> float:
    x, weights, positions = (np.asarray(a, np.float64) for a in (x, weights, positions))
    return float(1 - ((x - weights @ positions) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def by_partipy(x: np.ndarray, python: str, seeds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/x.npy", f"{folder}/out.npz"
        np.save(source, x)
        subprocess.run([python, "-c", THEIRS, source, target, str(seeds)], check=True)
        found = np.load(target)
        return list(zip(found["weights"], found["positions"], strict=True))


def known(name: str, given: argparse.Namespace) -> dict[str, Any]:
    adata = components(PROTOCOLS[name], given.data)
    x, truth = np.asarray(adata.obsm["X_pca"]), adata.obs[LINES].to_numpy(float)
    runs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"archetypes": []}
    for seed in range(given.seeds):
        sd.tl.archetypes(adata, 3, random_state=seed, n_bootstrap=0)
        runs["archetypes"].append((adata.obsm["archetype_weights"], adata.uns["archetypes"]["positions"]))
    if given.partipy:
        runs["ParTIpy"] = by_partipy(x, given.partipy, given.seeds)
    rows: dict[str, Any] = {
        method: [[*score(w, truth), explained(x, w, z)] for w, z in found] for method, found in runs.items()
    }
    sd.tl.kmeans(adata, 3)
    rows["3-means"] = [score(adata.obsm["kmeans_probabilities"], truth)]
    start, softer = adata.uns["kmeans"]["temperature"], []
    for factor in TEMPERATURES:
        sd.tl.kmeans(adata, 3, temperature=start * factor)
        softer.append(score(adata.obsm["kmeans_probabilities"], truth))
    rows["3-means, best temperature"] = [min(softer, key=lambda row: row[3])]
    rows["mean proportions"] = [[np.nan] * 3 + [float(np.sqrt(((truth - truth.mean(0)) ** 2).mean()))]]
    print(f"{name}, {len(x)} cells")
    for method, found in rows.items():
        mean, low, high = (f(np.array(found), axis=0) for f in (np.mean, np.min, np.max))
        line = f"  {method:<26} r {mean[0]:.3f} {mean[1]:.3f} {mean[2]:.3f}  error {mean[3]:.4f}"
        if len(mean) > 4:
            line += f" ({low[3]:.4f} to {high[3]:.4f})  explained {mean[4]:.4f} ({low[4]:.4f} to {high[4]:.4f})"
        print(line, flush=True)
    sd.tl.archetypes(adata)
    entry = adata.uns["archetypes"]
    chosen = adata.obsm["archetype_weights"].shape[1]
    print(f"  chosen: {chosen}; curve {np.round(entry['curve'], 3)}")
    sd.tl.archetypes(adata, 3)
    spread = adata.uns["archetypes"]["spread"]
    print(f"  spread of three over bootstraps {np.round(spread, 3)}")
    if given.plot and name == "celseq2":
        plotted(adata, given.plot)
    return {"protocol": name, "rows": rows, "chosen": chosen, "curve": list(entry["curve"]), "spread": list(spread)}


def plotted(adata: ad.AnnData, path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    sd.pl.archetypes(adata, ax=axes[0])
    sd.pl.archetypes(adata, color="HCC827_prop", ax=axes[1])
    axes[0].figure.savefig(path, dpi=80)


def cost(n: int, data: Path) -> dict[str, float]:
    z = upsampled(n, data / "spring_hpc" / "spring_hpc.h5ad").astype(np.float32)
    adata = ad.AnnData(np.zeros((n, 1), np.float32), obsm={"X_pca": z})
    for _ in range(2):
        start = time.process_time()
        sd.tl.archetypes(adata, 5, n_init=1, n_bootstrap=0)
        seconds = time.process_time() - start
    print(f"{n} x {z.shape[1]}, 5 archetypes, one start: {seconds:.1f} s", flush=True)
    return {"n": n, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--partipy", default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [known(name, given) for name in PROTOCOLS] + [cost(n, given.data) for n in (given.n // 2, given.n)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
