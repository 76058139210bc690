"""The count VAE beside scvi-tools: held-out likelihood, structure of the latent space, batch mixing, CPU seconds.

Counts are thinned: 80 % of the molecules train, the rest is what the likelihood is of. Both tools get the same files
and are scored by the same code. scvi-tools needs its own environment, so it runs in steps:

    python benchmarks/vae.py prepare runs --seeds 0 1
    python benchmarks/vae.py fit runs --tool scdiffx
    /path/to/scvi-environment/bin/python benchmarks/vae.py fit runs --tool scvi-tools
    python benchmarks/vae.py score runs --json vae.json
    python benchmarks/vae.py speed runs --tool scdiffx          # the same with --tool scvi-tools

Every process uses one thread where it can be told to; run it with `taskset -c 0` for equal conditions.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"pbmc_4271": ("label", None), "mixology_sc": ("cell_line_demuxlet", "batch")}
N_GENES = 2000
KEPT = 0.8
SPEED_SHAPE = (20_000, 2_000)


def prepare(folder: Path, seeds: list[int]) -> None:
    import scanpy as sc

    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, batch) in SETS.items():
        for seed in seeds:
            adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
            counts = sp.csr_matrix(adata.X).astype(np.int64)
            kept = counts.copy()
            kept.data = np.random.default_rng(seed).binomial(counts.data, KEPT)
            held = counts - kept
            kept.eliminate_zeros()
            held.eliminate_zeros()
            adata.X = kept.astype(np.float32)
            adata.layers["held"] = held.astype(np.float32)
            if adata.n_vars > N_GENES:
                sc.pp.highly_variable_genes(
                    adata, n_top_genes=N_GENES, flavor="seurat_v3", batch_key=batch, subset=True
                )
            adata.uns = {}
            adata.write_h5ad(folder / f"{name}_{seed}.h5ad")
    rng = np.random.default_rng(0)
    n, genes = SPEED_SHAPE
    profile = rng.gamma(0.15, 1, (1, genes)) * np.exp(rng.normal(0, 1, (8, genes)))
    blocks = [
        sp.csr_matrix(rng.poisson(profile[rng.integers(8, size=1000)] * rng.lognormal(0, 0.3, (1000, 1))))
        for _ in range(n // 1000)
    ]
    sp.save_npz(folder / "speed.npz", sp.vstack(blocks).tocsr().astype(np.float32))


def fit_scdiffx(adata: ad.AnnData, batch: str | None, seed: int, likelihood: str, **settings: Any) -> dict[str, Any]:
    import scdiffx as sd

    sd.pp.vae(
        adata, batch_key=batch, likelihood=likelihood, rng=seed, genes="all", library_size=1, progress=False, **settings
    )
    found = adata.uns["vae"]
    return {
        "latent": adata.obsm["X_vae"],
        "rate": adata.layers["vae_normalized"],
        "theta": np.exp(found["net"]["log_theta"]),
        "epochs": len(found["history"]["train"]),
        "version": version("scdiffx"),
    }


def fit_scvi(adata: ad.AnnData, batch: str | None, seed: int, likelihood: str, **settings: Any) -> dict[str, Any]:
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    adata.X = sp.csr_matrix(adata.X)
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch)
    model = scvi.model.SCVI(adata, gene_likelihood=likelihood)
    model.train(accelerator="cpu", enable_progress_bar=False, **settings)
    return {
        "latent": model.get_latent_representation(),
        # At the posterior mean, as the other tool: `get_normalized_expression` draws a sample.
        "rate": rate_at_mean(model),
        "theta": torch.exp(model.module.px_r).detach().numpy()[None],
        "epochs": len(model.history["elbo_train"]) if "elbo_train" in model.history else -1,
        "version": version("scvi-tools"),
    }


def rate_at_mean(model: Any) -> np.ndarray:
    import torch

    parts = []
    with torch.no_grad():
        for tensors in model._make_data_loader(adata=model.adata, batch_size=512):
            inference = model.module.inference(**model.module._get_inference_input(tensors))
            inference["z"] = inference["qz"].loc
            generative = model.module.generative(**model.module._get_generative_input(tensors, inference))
            parts.append(generative["px"].scale.numpy())
    return np.concatenate(parts)


TOOLS = {"scdiffx": fit_scdiffx, "scvi-tools": fit_scvi}


def fit(folder: Path, tool: str, likelihood: str, only: str | None) -> None:
    for path in sorted(folder.glob("*.h5ad")):
        name, seed = path.stem.rsplit("_", 1)
        out = folder / f"{path.stem}.{tool}.{likelihood}.npz"
        if out.exists() or (only is not None and only not in path.stem):
            continue
        adata = ad.read_h5ad(path)
        start = time.process_time()
        found = TOOLS[tool](adata, SETS[name][1], int(seed), likelihood)
        np.savez(out, seconds=time.process_time() - start, **found)
        print(out.name, f"{time.process_time() - start:.1f} s CPU, {found['epochs']} epochs", flush=True)


def score(folder: Path, target: Path | None) -> None:
    rows = []
    for path in sorted(folder.glob("*_*.npz")):
        stem, tool, likelihood = path.name.removesuffix(".npz").split(".")
        name = stem.rsplit("_", 1)[0]
        adata = ad.read_h5ad(folder / f"{stem}.h5ad")
        with np.load(path) as found:
            row = {"data": stem, "tool": tool, "likelihood": likelihood, "version": str(found["version"])}
            row |= {"epochs": int(found["epochs"]), "cpu_seconds": round(float(found["seconds"]), 1)}
            row |= held_out(adata.layers["held"].toarray(), found["rate"], found["theta"])
            row |= structure(found["latent"], *(None if k is None else adata.obs[k].astype(str) for k in SETS[name]))
        rows.append(row)
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if target is not None:
        target.write_text(json.dumps(rows, indent=1))


def held_out(held: np.ndarray, rate: np.ndarray, theta: np.ndarray) -> dict[str, float]:
    """Mean log likelihood of the molecules that were not trained on, in nats per cell, as Poisson and as NB."""
    mu = np.maximum(rate.astype(np.float64), 1e-12)
    mu *= held.sum(1, keepdims=True) / mu.sum(1, keepdims=True)
    constant = gammaln(held + 1)
    theta = np.clip(theta.astype(np.float64), 1e-4, 1e5)
    nb = (
        gammaln(held + theta) - gammaln(theta) + theta * np.log(theta / (theta + mu)) + held * np.log(mu / (theta + mu))
    )
    return {
        "held_poisson": float((held * np.log(mu) - mu - constant).sum(1).mean()),
        "held_nb": float((nb - constant).sum(1).mean()),
    }


def structure(latent: np.ndarray, labels: Any, batches: Any) -> dict[str, float]:
    """Agreement of the latent space with labels, and how evenly its neighbourhoods mix the batches (1 is even)."""
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

    known = labels.notna().to_numpy() & (labels != "nan").to_numpy()
    accuracy = cross_val_score(KNeighborsClassifier(15), latent[known], labels[known], cv=5).mean()
    adata = ad.AnnData(np.zeros((len(latent), 1), np.float32), obsm={"z": latent})
    sc.pp.neighbors(adata, use_rep="z")
    aris = {}
    for resolution in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        sc.tl.leiden(adata, resolution, flavor="igraph", n_iterations=2, directed=False)
        aris[resolution] = adjusted_rand_score(labels[known], adata.obs["leiden"][known])
    found = {"knn_accuracy": float(accuracy), "ari_at_1": float(aris[1.0]), "ari_best": float(max(aris.values()))}
    if batches is not None:
        near = NearestNeighbors(n_neighbors=30).fit(latent).kneighbors(return_distance=False)
        codes = np.unique(batches, return_inverse=True)[1]
        share = np.eye(codes.max() + 1)[codes[near]].mean(1)
        found["ilisi"] = float(((1 / (share**2).sum(1) - 1) / codes.max()).mean())
    return found


def speed(folder: Path, tool: str, likelihood: str) -> None:
    counts = sp.load_npz(folder / "speed.npz")
    seconds = []
    # The first call compiles or loads; the difference of the others is that of four epochs.
    for epochs in (1, 1, 5):
        adata = ad.AnnData(counts.copy())
        start = time.process_time()
        run = train_scdiffx if tool == "scdiffx" else train_scvi
        run(adata, likelihood, max_epochs=epochs)
        seconds.append(time.process_time() - start)
    print(f"{tool} {likelihood}: {(seconds[2] - seconds[1]) / 4:.2f} CPU s an epoch, first call {seconds[0]:.1f} s")


def train_scdiffx(adata: ad.AnnData, likelihood: str, **settings: Any) -> None:
    import scdiffx as sd

    sd.pp.vae(adata, likelihood=likelihood, progress=False, **settings)


def train_scvi(adata: ad.AnnData, likelihood: str, **settings: Any) -> None:
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.model.SCVI.setup_anndata(adata)
    scvi.model.SCVI(adata, gene_likelihood=likelihood).train(
        accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=1, **settings
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "fit", "score", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tool", choices=list(TOOLS), default="scdiffx")
    parser.add_argument("--likelihood", choices=["nb", "zinb"], default="nb")
    parser.add_argument("--only", help="part of the name of the data to fit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.command == "prepare":
        prepare(options.folder, options.seeds)
    elif options.command == "fit":
        fit(options.folder, options.tool, options.likelihood, options.only)
    elif options.command == "score":
        score(options.folder, options.json)
    else:
        speed(options.folder, options.tool, options.likelihood)


if __name__ == "__main__":
    main()
