"""Semi-supervised annotation beside scvi-tools' scANVI and neighbours in principal components: few labels, many cells.

    python benchmarks/semi_supervised.py --peer PYTHON [--data ../shared/data] [--sets NAME ...] [--shares 0.01 0.05]
        [--seeds 0 1 2] [--steps 2000] [--unseen] [--json out.json]

Of each type a share of the cells (at least two) has its label, drawn anew for each seed; the others are annotated and
scored. `--peer` is a Python with scvi-tools 1.4; it gets the same counts (2,000 variable genes where there are more),
batches, labels, minibatches, likelihood (negative binomial) and epochs: as many for the autoencoder as `--steps`
gradient steps take, and a tenth of that with labels. Its autoencoder is trained once for all shares, as ours is here;
`sd.tl.annotate` trains it in the call. kNN: neighbours in 30 principal components of logarithms of all cells. Macro-F1
is of the most probable type, before any cell is unassigned; the expected calibration error is over 15 bins. "unseen":
with the largest share, no cell of each type in turn has its label; the share of its cells that is unassigned, and of
the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

if sys.argv[1:2] != ["--as-peer"]:
    import jax

    import scdiffx as sd
    from scdiffx import ops
    from scdiffx._core.fields import replace
    from scdiffx.ops._logistic_annotation import calibration_error

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"pbmc_4271": ("label", None), "cite_cbmc": ("label", None), "mixology_sc": ("cell_line_demuxlet", "batch")}
N_GENES = 2000
BATCH_SIZE = 128


def read(name: str, data: Path) -> ad.AnnData:
    column, batch = SETS[name]
    adata = ad.read_h5ad(data / name / f"{name}.h5ad")
    adata = adata[adata.obs[column].notna().to_numpy()].copy()
    adata.X = sp.csr_matrix(adata.X).astype(np.float32)
    logs = adata.copy()
    sd.pp.normalize_total(logs, target_sum=1e4)
    sd.pp.log1p(logs)
    if adata.n_vars > N_GENES:
        sd.pp.highly_variable_genes(logs, n_top_genes=N_GENES, batch_key=batch)
        kept = logs.var["highly_variable"].to_numpy()
        adata, logs = adata[:, kept].copy(), logs[:, kept].copy()
    sd.pp.pca(logs, n_comps=30)
    types = np.unique(adata.obs[column].astype(str), return_inverse=True)[1]
    batches = np.zeros(adata.n_obs, int) if batch is None else np.unique(adata.obs[batch], return_inverse=True)[1]
    obs = adata.obs[[]].assign(type=types, batch=batches)
    return ad.AnnData(adata.X, obs=obs, obsm={"X_pca": logs.obsm["X_pca"]})


def masked(types: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The labels that are given away, -1 for the others."""
    rng = np.random.default_rng(seed)
    found = np.full(len(types), -1, np.int32)
    for code in np.unique(types):
        members = rng.permutation(np.flatnonzero(types == code))
        found[members[: max(2, round(share * len(members)))]] = code
    return found


def peer(
    python: str, adata: ad.AnnData, labels: dict[str, np.ndarray], seed: int, epochs: int
) -> dict[str, tuple[np.ndarray, float]]:
    """For each set of labels scANVI's probabilities and the seconds of processor time after the autoencoder."""
    with tempfile.TemporaryDirectory() as folder:
        bare = ad.AnnData(adata.X, obs=adata.obs.astype(str))
        for name, codes in labels.items():
            bare.obs[name] = codes.astype(str)
        bare.write_h5ad(f"{folder}/cells.h5ad")
        arguments = [python, __file__, "--as-peer", folder, str(seed), str(epochs), *labels]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(arguments, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = {}
        for name in labels:
            with np.load(f"{folder}/{name}.npz", allow_pickle=False) as stored:
                found[name] = stored["chance"], float(stored["seconds"])
        return found


def as_peer(folder: str, seed: str, epochs: str, *names: str) -> None:
    """What runs in the peer's Python."""
    import scvi
    import torch

    torch.set_num_threads(1)
    adata = ad.read_h5ad(f"{folder}/cells.h5ad")
    adata.X = sp.csr_matrix(adata.X)
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": BATCH_SIZE}
    scvi.settings.seed = int(seed)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    start = scvi.model.SCVI(adata, gene_likelihood="nb")
    start.train(max_epochs=int(epochs), **settings)
    for name in names:
        scvi.settings.seed = int(seed)
        begun = time.process_time()
        model = scvi.model.SCANVI.from_scvi_model(start, unlabeled_category="-1", labels_key=name)
        model.train(max_epochs=labelled_epochs(int(epochs)), n_samples_per_label=100, **settings)
        table = model.predict(soft=True)
        chance = table[sorted(table.columns, key=int)].to_numpy()
        np.savez(f"{folder}/{name}.npz", chance=chance, seconds=time.process_time() - begun)


def labelled_epochs(epochs: int) -> int:
    return -(-epochs // 10)


def ours(x: Any, batch: np.ndarray, codes: np.ndarray, vae: Any, seed: int) -> tuple[Any, Any, float]:
    begun = time.process_time()
    op = ops.SemiSupervisedVAE(vae=vae).init(x, batch, codes, key=jax.random.key(seed))
    found = jax.jit(lambda op: op(x, batch, codes))(op)
    return op, jax.tree.map(np.asarray, found), time.process_time() - begun


def start(adata: ad.AnnData, seed: int, epochs: int) -> tuple[Any, np.ndarray, Any]:
    """Counts, batches and the trained autoencoder."""
    x, batch = ops.Counts.from_scipy(adata.X), adata.obs["batch"].to_numpy(np.int32)
    vae = ops.VAE(training=ops.Training(max_epochs=epochs, batch_size=BATCH_SIZE))
    vae = vae.init(x, batch, key=jax.random.key(seed))
    return x, batch, replace(vae, history=None)


def score(chance: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    told = chance.argmax(1)
    return {
        "F1": f1_score(truth, told, average="macro"),
        "ECE": calibration_error(chance.max(1), told == truth),
    }


def quality(name: str, adata: ad.AnnData, shares: list[float], seed: int, given: Any) -> list[dict[str, Any]]:
    types = adata.obs["type"].to_numpy()
    epochs = max(1, round(given.steps / (adata.n_obs // BATCH_SIZE)))
    labels = {f"share_{share}": masked(types, share, seed) for share in shares}
    theirs = peer(given.peer, adata, labels, seed, epochs)
    x, batch, vae = start(adata, seed, epochs)
    rows = []
    for key, codes in labels.items():
        query = codes < 0
        op, found, seconds = ours(x, batch, codes, vae, seed)
        row: dict[str, Any] = {"set": name, "labels": key, "seed": seed, "labelled": int((~query).sum())}
        row |= {"epochs": epochs, "labelled_epochs": labelled_epochs(epochs)}
        told = {"ours": found.probabilities, "scANVI": theirs[key][0]}
        for kind, chance in told.items():
            row |= {f"{part} {kind}": v for part, v in score(chance[query], types[query]).items()}
        for k in (1, 5, 15):
            near = KNeighborsClassifier(min(k, int((~query).sum()))).fit(adata.obsm["X_pca"][~query], codes[~query])
            row[f"F1 {k}NN"] = f1_score(types[query], near.predict(adata.obsm["X_pca"][query]), average="macro")
        row |= {"held-out accuracy": float(op.around.accuracy), "temperature": float(op.temperature)}
        row |= {
            "unlike": float((found.distance[query] > 1).mean()),
            "unassigned": float((found.types[query] < 0).mean()),
        }
        row |= {"seconds ours": seconds, "seconds scANVI": theirs[key][1]}
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        rows.append(row)
    return rows


def unseen(name: str, adata: ad.AnnData, share: float, seed: int, given: Any) -> list[dict[str, Any]]:
    """Each type in turn has no labels."""
    types = adata.obs["type"].to_numpy()
    epochs = max(1, round(given.steps / (adata.n_obs // BATCH_SIZE)))
    x, batch, vae = start(adata, seed, epochs)
    codes, rows = masked(types, share, seed), []
    for gone in np.unique(types):
        left = np.where(codes == gone, -1, codes - (codes > gone)).astype(np.int32)
        _, found, _ = ours(x, batch, left, vae, seed)
        new, away = types == gone, found.types < 0
        known = (left < 0) & ~new
        row: dict[str, Any] = {"set": name, "without": int(gone), "cells": int(new.sum())}
        row |= {"unassigned": float(away[new].mean()), "unassigned of the known": float(away[known].mean())}
        row |= {"by probability alone": float((found.probabilities[new].max(1) < 0.5).mean())}
        row |= {"unlike": float((found.distance[left < 0] > 1).mean())}
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--as-peer"]:
        as_peer(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--unseen", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in given.sets:
        adata = read(name, given.data)
        for seed in given.seeds:
            rows += quality(name, adata, given.shares, seed, given)
        if given.unseen:
            rows += unseen(name, adata, max(given.shares), given.seeds[0], given)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
