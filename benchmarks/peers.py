"""What a user would call instead, where that takes more than one line.

Each function takes the input, as a copy of its own, and returns what is judged. Nothing is imported before it is
called, so that a peer's process holds the peer alone. `**settings` are those that both sides are given in `cases.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

Result = dict[str, Any]


def harmonypy(adata: Any) -> Result:
    from harmony import harmonypy_of

    return {"z": harmonypy_of(adata, "batch")}


def magic_impute(adata: Any) -> Result:
    import magic

    op = magic.MAGIC(n_pca=adata.obsm["X_pca"].shape[1], random_state=0, n_jobs=1, verbose=0)
    return {"x": np.asarray(op.fit_transform(adata.X))[:, :200]}


def parametric_umap(adata: Any) -> Result:
    from umap.parametric_umap import ParametricUMAP

    return {"z": ParametricUMAP(random_state=0).fit_transform(np.asarray(adata.obsm["X_pca"]))}


def phate(adata: Any) -> Result:
    import phate

    op = phate.PHATE(n_pca=None, random_state=0, n_jobs=1, verbose=0)
    return {"z": op.fit_transform(np.asarray(adata.obsm["X_pca"], np.float64))}


def scikit_kmeans(adata: Any, k: int, n_init: int) -> Result:
    from sklearn.cluster import KMeans

    z = np.asarray(adata.obsm["X_pca"])
    runs = [KMeans(k, n_init=n_init, random_state=seed).fit(z).labels_ for seed in range(5)]
    return {"runs": runs, "labels": runs[0]}


def partipy(adata: Any, k: int, n_init: int) -> Result:
    from partipy.arch import AA

    runs = [AA(k, seed=seed).fit(np.asarray(adata.obsm["X_pca"], np.float64)) for seed in range(n_init)]
    best = min(runs, key=lambda run: np.square(adata.obsm["X_pca"] - run.A @ run.Z).sum())
    return {"weights": best.A, "positions": best.Z}


def scanpy_dpt(adata: Any) -> Result:
    import scanpy as sc

    sc.tl.diffmap(adata)
    sc.tl.dpt(adata)
    return {"x": adata.obs["dpt_pseudotime"].to_numpy()}


def palantir(adata: Any) -> Result:
    import palantir

    palantir.utils.run_diffusion_maps(adata, pca_key="X_pca")
    palantir.utils.determine_multiscale_space(adata)
    root = adata.obs_names[adata.uns["iroot"]]
    found = palantir.core.run_palantir(adata, root, use_early_cell_as_start=True, n_jobs=1)
    return {"x": found.pseudotime.to_numpy()}


def scikit_domains(adata: Any, k: int) -> Result:
    """The mean of the cells within eight hops and a tied mixture, as `spatial_domains.py` has it."""
    from sklearn.neighbors import kneighbors_graph
    from spatial_domains import baseline

    near = kneighbors_graph(np.asarray(adata.obsm["spatial"], np.float64), 6)
    return {"labels": baseline(np.asarray(adata.obsm["X_pca"], np.float64), near, 8, k, 0)}


def pot_slices(adata: Any) -> Result:
    """PASTE's problem solved by POT, and the rotation that follows."""
    import ot
    from align_slices import ALPHA, costs, procrustes

    second = (adata.obs["slice"] == "b").to_numpy()
    place, x = np.asarray(adata.obsm["spatial"], np.float64).copy(), np.expm1(adata.X)
    parts = [np.asarray(x[side].todense(), np.float64) for side in (~second, second)]
    m, c, d = costs(place[~second], place[second], *parts)
    plan = ot.gromov.fused_gromov_wasserstein(m, c, d, alpha=ALPHA)
    rotation, shift = procrustes(plan, place[~second], place[second])
    place[second] = place[second] @ rotation.T + shift
    return {"z": place}


def halves(adata: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Components of the earlier and of the later cells, and the types of the later ones, one column each."""
    later = (adata.obs["day"] == 1).to_numpy()
    kind = adata.obs["label"].cat.codes.to_numpy()[later]
    z = np.asarray(adata.obsm["X_pca"], np.float64)
    return z[~later], z[later], np.eye(len(adata.obs["label"].cat.categories))[kind]


def pot_sinkhorn(adata: Any) -> Result:
    import ot

    x, y, kind = halves(adata)
    cost = ot.dist(x, y)
    plan = ot.sinkhorn(np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)), cost / cost.mean(), 0.05)
    return {"x": plan @ kind / plan.sum(1, keepdims=True)}


def ott_sinkhorn(adata: Any) -> Result:
    import jax.numpy as jnp
    from ott.geometry import pointcloud
    from ott.solvers import linear

    x, y, kind = (jnp.asarray(v, jnp.float32) for v in halves(adata))
    found = linear.solve(pointcloud.PointCloud(x, y, epsilon=0.05, scale_cost="mean"))
    fate = np.asarray(found.apply(kind.T, axis=1)).T
    return {"x": fate / fate.sum(1, keepdims=True)}


def cellrank_kernel(adata: Any) -> Any:
    import cellrank as cr

    kernel = cr.kernels.PseudotimeKernel(adata, time_key="dpt_pseudotime")
    return kernel.compute_transition_matrix(threshold_scheme="soft", show_progress_bar=False)


def cellrank_fates(adata: Any) -> Result:
    import cellrank as cr

    estimator, ends = cr.estimators.CFLARE(cellrank_kernel(adata)), adata.obs["terminal"]
    estimator.set_terminal_states({name: list(adata.obs_names[ends == name]) for name in ends.cat.categories})
    # Its default, GMRES without a preconditioner, stops before the rows sum to 1, and then refuses its own result.
    estimator.compute_fate_probabilities(solver="direct", show_progress_bar=False, use_petsc=False)
    return {"z": np.asarray(estimator.fate_probabilities)}


def cellrank_drivers(adata: Any) -> Result:
    import cellrank as cr

    estimator, names = cr.estimators.CFLARE(cellrank_kernel(adata)), list(adata.obs["terminal"].cat.categories)
    estimator._fate_probabilities = cr.Lineage(np.asarray(adata.obsm["lineages_fwd"]), names=names)
    table = estimator.compute_lineage_drivers(show_progress_bar=False)
    return {"x": table.loc[adata.var_names, f"{names[0]}_corr"].to_numpy()}


def scvelo_velocity(adata: Any, mode: str) -> Result:
    import scvelo as scv

    scv.settings.verbosity = 0
    scv.pp.moments(adata, n_neighbors=None, n_pcs=None)
    if mode == "dynamical":
        scv.tl.recover_dynamics(adata, var_names="all", n_jobs=1, show_progress_bar=False)
    scv.tl.velocity(adata, mode=mode)
    return {"x": adata.layers["velocity"]}


def scvelo_graph(adata: Any) -> Result:
    import scvelo as scv

    scv.settings.verbosity = 0
    scv.tl.velocity_graph(adata, n_jobs=1, show_progress_bar=False)
    return {"x": adata.uns["velocity_graph"]}


def scvelo_transitions(adata: Any) -> Result:
    import scvelo as scv

    scv.settings.verbosity = 0
    return {"x": sp.csr_matrix(scv.utils.get_transition_matrix(adata))}


def scvelo_embedding(adata: Any) -> Result:
    import scvelo as scv

    scv.settings.verbosity = 0
    scv.tl.velocity_embedding(adata, basis="pca")
    return {"x": adata.obsm["velocity_pca"]}


def scvelo_latent_time(adata: Any) -> Result:
    import scvelo as scv

    scv.settings.verbosity = 0
    scv.tl.latent_time(adata)
    return {"x": adata.obs["latent_time"].to_numpy()}


def squidpy_ligrec(adata: Any, pairs: Any, n_perms: int) -> Result:
    import squidpy as sq

    settings = {"n_perms": n_perms, "copy": True, "show_progress_bar": False, "use_raw": False, "n_jobs": 1}
    found = sq.gr.ligrec(adata, "label", interactions=pairs, seed=0, **settings)
    tested = found["pvalues"].astype(float).stack([0, 1], future_stack=True).dropna()
    return {"x": found["means"].astype(float).stack([0, 1], future_stack=True)[tested.index], "p": tested}


def genie3(adata: Any, trees: int) -> Result:
    from grn import genie3 as forests

    factors = np.unique(np.asarray(adata.uns["edges"])[:, 0])
    return {"x": forests(np.asarray(adata.X.todense(), np.float64), factors, trees)}


def scipy_distances(adata: Any, genes: int) -> Result:
    """Kolmogorov and Smirnov's statistic of each gene, of one type and all other cells."""
    from scipy.stats import ks_2samp

    x, first = np.asarray(adata.X[:, :genes].todense()), (adata.obs["label"].cat.codes == 0).to_numpy()
    return {"x": np.array([ks_2samp(column[first], column[~first], method="asymp").statistic for column in x.T])}


def soupx(adata: Any) -> Result:
    """SoupX's estimate and correction, as `ambient.py` has them in NumPy."""
    from ambient import cleaned

    types = adata.obs["label"].cat.codes.to_numpy()
    return {"x": cleaned(sp.csr_matrix(adata.X, dtype=np.float64), types, adata.var["soup"].to_numpy())}


def celltypist(adata: Any) -> Result:
    import celltypist

    known = adata.obs["known"].notna().to_numpy()
    reference = adata[known].copy()
    reference.obs["known"] = reference.obs["known"].astype(str)
    model = celltypist.train(reference, "known", check_expression=False, n_jobs=1)
    return {"labels": celltypist.annotate(adata, model=model).predicted_labels["predicted_labels"].to_numpy(str)}


def scvi_model(adata: Any, epochs: int) -> Any:
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, gene_likelihood="nb")
    model.train(accelerator="cpu", enable_progress_bar=False, max_epochs=epochs)
    return model


def scvi(adata: Any, epochs: int) -> Result:
    return {"z": scvi_model(adata, epochs).get_latent_representation()}


def cellassign(adata: Any, markers: dict[str, list[str]], epochs: int) -> Result:
    import pandas as pd
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = 0
    genes = [g for g in dict.fromkeys(gene for own in markers.values() for gene in own) if g in adata.var_names]
    table = pd.DataFrame({t: [int(g in own) for g in genes] for t, own in markers.items()}, index=genes)
    total = np.asarray(adata.layers["counts"].sum(1)).ravel()
    adata = adata[:, genes].copy()
    adata.X, adata.obs["size"] = adata.layers["counts"], total / total.mean()
    scvi.external.CellAssign.setup_anndata(adata, size_factor_key="size")
    model = scvi.external.CellAssign(adata, table)
    model.train(accelerator="cpu", enable_progress_bar=False, max_epochs=epochs)
    return {"labels": model.predict().idxmax(axis=1).to_numpy(str)}


def scvi_solo(adata: Any, epochs: int) -> Result:
    import scvi

    solo = scvi.external.SOLO.from_scvi_model(scvi_model(adata, epochs))
    solo.train(accelerator="cpu", enable_progress_bar=False, max_epochs=epochs)
    return {"score": solo.predict()["doublet"].to_numpy()}


def scvi_scanvi(adata: Any, epochs: int) -> Result:
    """scVI's passes without labels and then a tenth as many with them, as ours has it."""
    import scvi

    adata.X = adata.layers["counts"]
    adata.obs["given"] = adata.obs["known"].astype(str).where(adata.obs["known"].notna(), "unknown")
    model = scvi.model.SCANVI.from_scvi_model(scvi_model(adata, epochs), "unknown", labels_key="given")
    model.train(accelerator="cpu", enable_progress_bar=False, max_epochs=max(epochs // 10, 1))
    return {"labels": model.predict()}
