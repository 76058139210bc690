"""RNA velocity beside scVelo: agreement, quality with controls, and processor seconds.

    python benchmarks/velocity.py [--data pancreas_velocity|sergio_ds7] [--scvelo PYTHON] [--genes 2000]

--scvelo is a Python in which scVelo 0.3.4 runs (numpy 2.2, pandas 2.3, scanpy 1.11); it gets the same layers, graph and
embedding. Without it, only this package's lines are printed. Quality is cross-boundary direction correctness (CBDir:
the mean cosine between the velocity of a cell and the way to its neighbours in the next state, over the known
transitions; 1 is best) and in-cluster coherence (mean cosine with the velocities of neighbours in the same state), both
in the embedding; the latter alone says nothing. Controls: velocities reversed, and dealt out to other cells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PANCREAS = [
    ("Ductal", "Ngn3 low EP"),
    ("Ngn3 low EP", "Ngn3 high EP"),
    ("Ngn3 high EP", "Pre-endocrine"),
    *(("Pre-endocrine", end) for end in ("Alpha", "Beta", "Delta", "Epsilon")),
]
THEIRS = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import anndata as ad, scipy.sparse as sp, scvelo as scv
ad.settings.allow_write_nullable_strings = True
scv.settings.verbosity = 0
source, target, mode, genes = sys.argv[1:]
adata, clock = ad.read_h5ad(source), [time.process_time()]
scv.pp.moments(adata, n_neighbors=None)
clock.append(time.process_time())
if mode == "dynamical":
    scv.tl.recover_dynamics(adata, var_names=json.loads(genes), n_jobs=1, show_progress_bar=False)
scv.tl.velocity(adata, mode=mode)
clock.append(time.process_time())
scv.tl.velocity_graph(adata, n_jobs=1, show_progress_bar=False)
clock.append(time.process_time())
adata.obsp["theirs"] = sp.csr_matrix(scv.utils.get_transition_matrix(adata))
for basis in ("umap", "pca"):
    scv.tl.velocity_embedding(adata, basis=basis)
if mode == "dynamical":
    scv.tl.latent_time(adata)
adata.uns["seconds"] = [b - a for a, b in zip(clock, clock[1:])]
adata.write_h5ad(target)
"""


def normalised(name: str, n_genes: int) -> tuple[ad.AnnData, str, list[tuple[str, str]]]:
    """Layers normalised by depth, 30 components, 30 neighbours, UMAP; the column of states, and their transitions."""
    adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    for layer in ("spliced", "unspliced"):
        adata.layers[layer] = sp.csr_matrix(adata.layers[layer]).astype(np.float32)
    if name == "sergio_ds7":
        tree = np.atleast_2d(np.loadtxt(DATA / name / "bMat.tab"))
        types = sorted(adata.obs["cell_type"].astype(str).unique())
        edges = [(types[i], types[j]) for i, j in zip(*np.nonzero(tree), strict=True)]
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).astype("category")
        key = "cell_type"
    else:
        both = [adata.layers[layer] for layer in ("spliced", "unspliced")]
        shared = np.asarray(sum(m.multiply((both[0] > 0).multiply(both[1] > 0)) for m in both).sum(0)).ravel()
        adata = adata[:, shared >= 20].copy()
        key, edges = "clusters", PANCREAS
        for layer in (None, "spliced", "unspliced"):
            sd.pp.normalize_total(adata, layer=layer)
    sd.pp.log1p(adata)
    if adata.n_vars > n_genes:
        sd.pp.highly_variable_genes(adata, n_top_genes=n_genes, subset=True)
    sc.pp.pca(adata, n_comps=30)
    sc.pp.neighbors(adata, n_neighbors=30, n_pcs=30)
    sc.tl.umap(adata, random_state=0)
    return adata, key, edges


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def quality(adata: ad.AnnData, basis: str, key: str, edges: list[tuple[str, str]]) -> tuple[float, float]:
    """CBDir and in-cluster coherence in the embedding."""
    z, v = np.asarray(adata.obsm[f"X_{basis}"]), unit(np.nan_to_num(adata.obsm[f"velocity_{basis}"]))
    near, state = adata.obsp["connectivities"].tocsr(), adata.obs[key].astype(str).to_numpy()
    lists = [near[i].indices for i in range(adata.n_obs)]
    direction = []
    for source, target in edges:
        scores = []
        for i in np.flatnonzero(state == source):
            ahead = lists[i][state[lists[i]] == target]
            if len(ahead):
                scores.append(float((unit(z[ahead] - z[i]) @ v[i]).mean()))
        if scores:
            direction.append(np.mean(scores))
    coherent = [
        [
            float((v[same] @ v[i]).mean())
            for i in np.flatnonzero(state == s)
            if len(same := lists[i][state[lists[i]] == s])
        ]
        for s in np.unique(state)
    ]
    return float(np.mean(direction)), float(np.mean([np.mean(c) for c in coherent if c]))


def ours(adata: ad.AnnData, mode: str) -> tuple[ad.AnnData, list[float]]:
    """The whole chain, and the processor seconds of velocities and graph, once the code is compiled."""
    for _ in range(2):
        found, clock = adata.copy(), [time.process_time()]
        sd.tl.velocity(found, mode=mode)
        clock.append(time.process_time())
        sd.tl.velocity_graph(found)
        clock.append(time.process_time())
    project(found)
    if mode == "dynamical":
        sd.tl.latent_time(found)
    return found, list(np.diff(clock))


def project(adata: ad.AnnData) -> None:
    for basis in ("umap", "pca"):
        sd.tl.velocity_embedding(adata, basis=basis)


def control(adata: ad.AnnData, change: str) -> ad.AnnData:
    """The same with other velocities: reversed, or those of other cells."""
    other, v = adata.copy(), np.asarray(adata.layers["velocity"])
    other.layers["velocity"] = -v if change == "reversed" else v[np.random.default_rng(0).permutation(len(v))]
    sd.tl.velocity_graph(other)
    project(other)
    return other


def theirs(adata: ad.AnnData, mode: str, python: str, genes: list[str]) -> ad.AnnData:
    with tempfile.TemporaryDirectory() as folder:
        source, target = (str(Path(folder) / name) for name in ("source.h5ad", "target.h5ad"))
        plain = ad.AnnData(adata.X, obs=adata.obs.copy(), var=adata.var[[]].copy(), obsm=dict(adata.obsm))
        plain.layers.update({layer: adata.layers[layer] for layer in ("spliced", "unspliced")})
        plain.obsp.update(dict(adata.obsp))
        plain.uns["neighbors"] = adata.uns["neighbors"]
        for frame in (plain.obs, plain.var):
            frame.index = frame.index.astype(object)
        plain.write_h5ad(source)
        subprocess.run([python, "-c", THEIRS, source, target, mode, json.dumps(genes)], check=True)
        return ad.read_h5ad(target)


def agreement(a: ad.AnnData, b: ad.AnnData, mode: str) -> str:
    names = ("fit_alpha", "fit_gamma") if mode == "dynamical" else ("velocity_gamma", "velocity_r2")
    parts = []
    for name in names:
        x, y = a.var[name].to_numpy(), b.var[name].to_numpy()
        both = np.isfinite(x) & np.isfinite(y) & (y != 0)
        off = np.abs(x[both] / y[both] - 1)
        parts.append(f"{name} off by {np.median(off):.1e} (median), {np.percentile(off, 99):.1e} (99th percentile)")
    x, y = (np.nan_to_num(np.asarray(adata.layers["velocity"], np.float64)) for adata in (a, b))
    parts.append(f"velocity cosine {(x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()):.4f}")
    parts.append(f"graph off by {abs(a.uns['velocity_graph'] - b.uns['velocity_graph']).max():.1e}")
    sd.tl.transition_matrix(b, key_added="ours")
    parts.append(f"transitions on scVelo's graph off by {abs(b.obsp['ours'] - b.obsp['theirs']).max():.1e}")
    if mode == "dynamical":
        parts.append(f"latent time correlation {np.corrcoef(a.obs['latent_time'], b.obs['latent_time'])[0, 1]:.4f}")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pancreas_velocity", choices=["pancreas_velocity", "sergio_ds7"])
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--scvelo", default=None)
    parser.add_argument("--modes", nargs="+", default=["deterministic", "stochastic", "dynamical"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    adata, key, edges = normalised(options.data, options.genes)
    print(f"{options.data}: {adata.n_obs} cells x {adata.n_vars} genes")
    print(f"{'':<28} {'CBDir umap  pca':>17} {'coherence umap  pca':>21} {'velocity':>9} {'graph':>7} s")
    for mode in options.modes:
        found, seconds = ours(adata, mode)
        rows = [(f"{mode}", found, seconds)]
        rows += [(f"  {change}", control(found, change), None) for change in ("reversed", "other cells'")]
        other = None
        if options.scvelo is not None:
            genes = list(found.var_names[np.isfinite(found.var["fit_alpha"])]) if mode == "dynamical" else []
            other = theirs(adata, mode, options.scvelo, genes)
            rows.append(("  scVelo", other, list(other.uns["seconds"][1:])))
        for name, result, spent in rows:
            scores = [quality(result, basis, key, edges) for basis in ("umap", "pca")]
            clock = "" if spent is None else f"{spent[0]:>9.2f} {spent[1]:>7.2f}"
            cells = f"{scores[0][0]:>11.3f} {scores[1][0]:>5.3f} {scores[0][1]:>15.3f} {scores[1][1]:>5.3f}"
            print(f"{name:<28} {cells} {clock}", flush=True)
        if other is not None:
            print(f"  {agreement(found, other, mode)}", flush=True)


if __name__ == "__main__":
    main()
