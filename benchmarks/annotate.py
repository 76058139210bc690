"""Annotation beside CellTypist, a kNN and nearest centroids: halves of known cells, calibration, unseen types, batches.

    python benchmarks/annotate.py --peer PYTHON [--data ../shared/data] [--sets NAME ...] [--seeds 3] [--json out.json]

Half of the cells of each type (stratified, one split a seed) are the reference, the other half the query, in logarithms
of counts normalised to 10,000. `--peer` is a Python with celltypist 1.7.1 and scikit-learn < 1.8 (celltypist passes an
argument that newer ones refuse); it trains on the same half with CellTypist's defaults. kNN: 15 neighbours in 30
principal components of 2,000 variable genes of both halves. Macro-F1 counts every type alike and takes the most
probable type, before any cell is unassigned. "unseen": each type in turn is left out of the reference of the first
seed; the share of its cells that is unassigned, by ours and by probabilities below 0.5 alone (ours, and CellTypist's
"prob match"), beside the share of known cells that is. "batch": each batch of mixology_sc annotates each other one that
has no type beside its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

if sys.argv[1:2] != ["--as-peer"]:
    import scdiffx as sd
    from scdiffx.ops._logistic_annotation import calibration_error

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"pbmc_4271": "label", "cite_cbmc": "label", "mixology_sc": "cell_line_demuxlet"}


def read(name: str, data: Path) -> ad.AnnData:
    adata = ad.read_h5ad(data / name / f"{name}.h5ad")
    labels = adata.obs[SETS[name]]
    adata = adata[labels.notna().to_numpy()].copy()
    adata.obs["type"] = adata.obs[SETS[name]].astype(str).to_numpy(object)
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    return adata


def peer(python: str, reference: ad.AnnData, query: ad.AnnData) -> tuple[np.ndarray, np.ndarray, float]:
    """CellTypist's types, its probabilities of these, and the seconds of processor time of its training."""
    with tempfile.TemporaryDirectory() as folder:
        for part, adata in (("reference", reference), ("query", query)):
            bare = ad.AnnData(adata.X, obs=adata.obs[["type"]].astype(str), var=adata.var[[]])
            bare.write_h5ad(f"{folder}/{part}.h5ad")
        subprocess.run([python, __file__, "--as-peer", folder], check=True, stdout=subprocess.DEVNULL)
        with np.load(f"{folder}/found.npz", allow_pickle=False) as found:
            return found["types"], found["probability"], float(found["seconds"])


def as_peer(folder: str) -> None:
    """What runs in the peer's Python."""
    import celltypist

    reference, query = (ad.read_h5ad(f"{folder}/{part}.h5ad") for part in ("reference", "query"))
    start = time.process_time()
    model = celltypist.train(reference, "type", check_expression=False, n_jobs=1)
    seconds = time.process_time() - start
    found = celltypist.annotate(query, model=model)
    types = found.predicted_labels["predicted_labels"].astype(str).to_numpy().astype(str)
    best = found.probability_matrix.to_numpy().max(1)
    np.savez(f"{folder}/found.npz", types=types, probability=best, seconds=seconds)


def ours(reference: ad.AnnData, query: ad.AnnData, **settings: Any) -> tuple[ad.AnnData, np.ndarray, np.ndarray, float]:
    start = time.process_time()
    found = sd.tl.annotate(query, labels_key="type", reference=reference, copy=True, **settings)
    seconds = time.process_time() - start
    table = found.obsm["annotation_probabilities"].to_numpy()
    return found, found.uns["annotation"]["names"][table.argmax(1)].astype(str), table.max(1), seconds


def baselines(reference: ad.AnnData, query: ad.AnnData) -> dict[str, np.ndarray]:
    both = ad.concat([reference, query])
    sd.pp.highly_variable_genes(both, n_top_genes=2000)
    sd.pp.pca(both, n_comps=30)
    z, n = both.obsm["X_pca"], reference.n_obs
    kinds = {"kNN": KNeighborsClassifier(15), "nearest centroid": NearestCentroid()}
    labels = reference.obs["type"].to_numpy(str)
    return {name: kind.fit(z[:n], labels).predict(z[n:]) for name, kind in kinds.items()}


def halves(adata: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    a, b = train_test_split(np.arange(adata.n_obs), test_size=0.5, stratify=adata.obs["type"], random_state=seed)
    return adata[np.sort(a)].copy(), adata[np.sort(b)].copy()


def quality(name: str, data: Path, seeds: int, python: str) -> dict[str, Any]:
    adata = read(name, data)
    scores: dict[str, list[float]] = {}
    for seed in range(seeds):
        reference, query = halves(adata, seed)
        truth = query.obs["type"].to_numpy(str)
        found, types, chance, seconds = ours(reference, query)
        fixed = ours(reference, query, penalty=1.0)[1]
        theirs, their_chance, their_seconds = peer(python, reference, query)
        told = {"ours": types, "ours, penalty=1": fixed, "CellTypist": theirs, **baselines(reference, query)}
        row = {f"F1 {kind}": f1_score(truth, labels, average="macro") for kind, labels in told.items()}
        row |= {"ECE ours": calibration_error(chance, types == truth)}
        row |= {"ECE CellTypist": calibration_error(their_chance, theirs == truth)}
        row |= {"same as CellTypist": float((types == theirs).mean())}
        row |= {key: found.uns["annotation"][key] for key in ("penalty", "unlike", "unassigned", "accuracy")}
        row |= {"seconds": seconds, "seconds CellTypist": their_seconds}
        for key, value in row.items():
            scores.setdefault(key, []).append(float(value))
    print(f"{name}, {adata.n_obs} cells, {adata.obs['type'].nunique()} types, {seeds} seeds")
    for key, values in scores.items():
        print(f"  {key:<22} mean {np.mean(values):.4f}  " + " ".join(f"{v:.4f}" for v in values), flush=True)
    return {"set": name, "scores": scores}


def unseen(name: str, data: Path, python: str) -> dict[str, Any]:
    """Each type in turn is left out of the reference."""
    reference, query = halves(read(name, data), 0)
    rows = {}
    for gone in sorted(set(query.obs["type"])):
        left = reference[(reference.obs["type"] != gone).to_numpy()].copy()
        found, _, chance, _ = ours(left, query)
        their_chance = peer(python, left, query)[1]
        new = (query.obs["type"] == gone).to_numpy()
        told = {
            "ours": found.obs["annotation_confidence"].to_numpy() < 0.5,
            "probability alone": chance < 0.5,
            "CellTypist": their_chance <= 0.5,
        }
        row = {kind: [float(away[new].mean()), float(away[~new].mean())] for kind, away in told.items()}
        rows[gone] = row | {"cells": int(new.sum()), "unlike": found.uns["annotation"]["unlike"]}
        shares = ", ".join(f"{kind} {a:.2f} (known {b:.3f})" for kind, (a, b) in row.items())
        print(f"  {name} without {gone} ({new.sum()} cells): unassigned by {shares}", flush=True)
    for kind in ("ours", "probability alone", "CellTypist"):
        mean = np.mean([row[kind] for row in rows.values()], axis=0)
        print(f"  {name}, mean over types: {kind} {mean[0]:.3f} of the unseen, {mean[1]:.3f} of the known")
    return {"set": name, "unseen": rows}


def batches(data: Path, python: str) -> dict[str, Any]:
    adata = read("mixology_sc", data)
    names = adata.obs["batch"].astype(str).to_numpy()
    rows = {}
    for there in sorted(set(names)):
        reference = adata[names == there].copy()
        for here in sorted(set(names) - {there}):
            query = adata[names == here].copy()
            if set(query.obs["type"]) - set(reference.obs["type"]):
                continue
            truth = query.obs["type"].to_numpy(str)
            found, types, chance, _ = ours(reference, query)
            theirs = peer(python, reference, query)[0]
            sure = (found.obs["annotation"] != "unassigned").to_numpy()
            right = types == truth
            row = {
                "accuracy": float(right.mean()),
                "CellTypist": float((theirs == truth).mean()),
                "unlike": found.uns["annotation"]["unlike"],
                "unassigned": float(1 - sure.mean()),
                "wrong and assigned": float((sure & ~right).mean()),
                "ECE": calibration_error(chance, right),
            }
            rows[f"{there} -> {here}"] = row
            print(f"  {there} -> {here}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    return {"set": "mixology_sc", "batches": rows}


def main() -> None:
    if sys.argv[1:2] == ["--as-peer"]:
        as_peer(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [quality(name, given.data, given.seeds, given.peer) for name in given.sets]
    rows += [unseen(name, given.data, given.peer) for name in given.sets]
    if "mixology_sc" in given.sets:
        rows.append(batches(given.data, given.peer))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
