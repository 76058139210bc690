"""The cells that `run.py` gives to both sides: upsampled from measured ones, and prepared as far as a function needs.

An input is named in `INPUTS`. Each is made once for a number of cells and kept as a file, which the measured processes
read. Preparing is scdiffx's, whose keys are scanpy's; what is compared never prepares its own input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GENES, CHUNK, NEAR = 2000, 10_000, 10
# Column of known groups, and the layers that hold counts beside X.
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pbmc_4271": ("label", ()),
    "paul15": ("paul15_clusters", ()),
    "dlpfc_151510": ("layer", ()),
    "soupx_pbmc": ("annotation", ()),
    "pancreas_velocity": ("clusters", ("spliced", "unspliced")),
}


def source(name: str, data: Path = DATA) -> ad.AnnData:
    """Measured counts with `obs["label"]`; drawn from a gamma-Poisson model where the file is absent."""
    path = data / name / f"{name}.h5ad"
    if not path.exists():
        return made_up(name)
    adata = ad.read_h5ad(path)
    label, layers = SOURCES[name]
    adata.obs["label"] = adata.obs[label].astype(str).to_numpy(object)
    adata = adata[~adata.obs["label"].isin(["nan", "NA"]).to_numpy()]
    new = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32), obs=adata.obs[["label"]], var=adata.var[[]])
    for layer in layers:
        new.layers[layer] = sp.csr_matrix(adata.layers[layer], dtype=np.float32)
    if "spatial" in adata.obsm:
        new.obsm["spatial"] = np.asarray(adata.obsm["spatial"], np.float32)[:, :2]
    return new


def made_up(name: str, n: int = 600, genes: int = 200, groups: int = 6) -> ad.AnnData:
    """Groups of cells in a gamma-Poisson model, with whatever the data set of this name would have."""
    rng = np.random.default_rng(0)
    group = rng.integers(groups, size=n)
    mean = rng.gamma(0.5, size=genes) * np.exp(rng.normal(size=(groups, genes)))
    rate = 1500 * mean[group] / mean.sum(1)[group, None] * rng.gamma(10, 0.1, (n, 1))
    obs = pd.DataFrame({"label": [f"type {g}" for g in group]}, index=[f"cell {i}" for i in range(n)])
    new = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs)
    for layer in SOURCES[name][1]:
        new.layers[layer] = sp.csr_matrix(rng.poisson(rate / 2).astype(np.float32))
    new.obsm["spatial"] = (rng.uniform(size=(n, 2)) + np.stack([group % 3, group // 3], 1)).astype(np.float32)
    return new


def upsampled(n: int, name: str = "pbmc_4271", data: Path = DATA, seed: int = 0) -> ad.AnnData:
    """Counts of n cells: a mixture of a cell and one of its 10 nearest, its depth redrawn, Poisson sampled.

    `obs["label"]` is that of the cell; `obs["batch"]` is one of three invented ones, each with its own factor on every
    gene. At most 2,000 genes, those of the largest dispersion.
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    cells, rng = source(name, data), np.random.default_rng(seed)
    depth = np.asarray(cells.X.sum(1)).ravel()
    logged = sp.csr_matrix(cells.X.multiply((np.median(depth) / depth)[:, None]))
    logged.data = np.log1p(logged.data)
    mean = np.asarray(logged.mean(0)).ravel()
    spread = np.asarray(logged.multiply(logged).mean(0)).ravel() - mean**2
    genes = np.sort(np.argsort(-spread / (mean + 0.05))[:GENES])
    z = PCA(30, random_state=0).fit_transform(logged[:, genes].toarray())
    near = NearestNeighbors(n_neighbors=NEAR + 1).fit(z).kneighbors(return_distance=False)
    first, batch = rng.integers(0, cells.n_obs, n), rng.integers(0, 3, n)
    second, share = near[first, rng.integers(1, NEAR + 1, n)], rng.random((n, 1), np.float32)
    scale = (rng.choice(depth, n) / depth[first])[:, None].astype(np.float32) ** 0.5
    factor = np.exp(rng.normal(0, 0.15, (3, len(genes)))).astype(np.float32)

    def drawn(counts: sp.csr_matrix) -> sp.csr_matrix:
        counts, blocks = sp.csr_matrix(counts)[:, genes].toarray(), []
        for start in range(0, n, CHUNK):
            at = slice(start, start + CHUNK)
            rate = share[at] * counts[first[at]] + (1 - share[at]) * counts[second[at]]
            blocks.append(sp.csr_matrix(rng.poisson(rate * scale[at] * factor[batch[at]]).astype(np.float32)))
        return sp.vstack(blocks).tocsr()

    new = ad.AnnData(drawn(cells.X), obs=pd.DataFrame(index=[f"cell {i}" for i in range(n)]))
    new.var_names = cells.var_names[genes].astype(str)
    new.obs["label"] = pd.Categorical(cells.obs["label"].to_numpy(str)[first])
    new.obs["batch"] = pd.Categorical(batch.astype(str))
    for layer in SOURCES[name][1]:
        new.layers[layer] = drawn(cells.layers[layer])
    if "spatial" in cells.obsm:
        place = cells.obsm["spatial"]
        step = np.median(NearestNeighbors(n_neighbors=2).fit(place).kneighbors()[0][:, 0])
        new.obsm["spatial"] = (place[first] + rng.uniform(-0.5, 0.5, (n, 2)) * step).astype(np.float32)
    # Cells and genes without a count would make functions of both sides warn or fail.
    full = np.asarray(new.X.sum(0)).ravel() > 0
    return new[np.asarray(new.X.sum(1)).ravel() > 0, full].copy()


def logged(adata: ad.AnnData) -> ad.AnnData:
    adata.layers["counts"] = adata.X.copy()
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    return adata


def components(adata: ad.AnnData) -> ad.AnnData:
    sd.pp.pca(logged(adata), n_comps=min(50, adata.n_vars - 1, adata.n_obs - 1))
    return adata


def graph(adata: ad.AnnData) -> ad.AnnData:
    sd.pp.neighbors(components(adata), n_neighbors=15)
    adata.uns["iroot"] = int(np.argmin(adata.obsm["X_pca"][:, 0]))
    return adata


def doublets(adata: ad.AnnData) -> ad.AnnData:
    from doublets import planted

    new, truth = planted(adata.X, 0.08, True, 0)
    new.obs_names = [f"cell {i}" for i in range(new.n_obs)]
    new.obs["doublet"] = truth
    return new


def soup(adata: ad.AnnData) -> ad.AnnData:
    """Soup in cells that were cleaned of their own before: taking that out, too, would count as an error."""
    from ambient import average, cleaned, planted

    types, counts = adata.obs["label"].cat.codes.to_numpy(), adata.X.astype(np.float64)
    cells = planted(cleaned(counts, types, average(counts)), types, average(counts), 0)
    new = ad.AnnData(cells.counts.astype(np.float32), obs=adata.obs[["label"]])
    new.layers["truth"], new.var["soup"], new.obs["ambient"] = cells.before.astype(np.float32), cells.soup, cells.truth
    return new


def half_known(adata: ad.AnnData) -> ad.AnnData:
    """A tenth of the labels known, at least five of a type; the other cells are the query."""
    adata, rng = components(adata), np.random.default_rng(0)
    label = adata.obs["label"].astype(str).to_numpy(object)
    known = rng.random(adata.n_obs) < 0.1
    for name in set(label):
        known[np.flatnonzero(label == name)[:5]] = True
    adata.obs["known"] = pd.Categorical(np.where(known, label, None))
    return adata


def trajectory(adata: ad.AnnData) -> ad.AnnData:
    """Pseudotime from a root, three terminal groups, and two time points that overlap in it."""
    graph(adata)
    sd.tl.pseudotime(adata)
    time = adata.obs["dpt_pseudotime"].to_numpy()
    late = adata.obs["dpt_pseudotime"].groupby(adata.obs["label"], observed=True).median().nlargest(3).index
    last = (adata.obs["dpt_pseudotime"].groupby(adata.obs["label"], observed=True).rank(pct=True) > 0.8).to_numpy()
    label = adata.obs["label"].astype(str).to_numpy(object)
    adata.obs["terminal"] = pd.Categorical(np.where(last & np.isin(label, list(late)), label, None))
    rank = time.argsort().argsort() / len(time)
    adata.obs["day"] = (rank + np.random.default_rng(0).normal(0, 0.1, len(rank)) > 0.5).astype(float)
    return adata


def fates(adata: ad.AnnData) -> ad.AnnData:
    trajectory(adata)
    sd.tl.fate_probabilities(adata, list(adata.obs["terminal"].cat.categories), "terminal")
    adata.obsm["lineages_fwd"] = np.asarray(adata.obsm["lineages_fwd"])
    return adata


def rna(adata: ad.AnnData) -> ad.AnnData:
    """Spliced and unspliced counts scaled by depth, components of the logarithms, and 30 neighbours."""
    for layer in (None, "spliced", "unspliced"):
        sd.pp.normalize_total(adata, layer=layer)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=30)
    sd.pp.neighbors(adata, n_neighbors=30)
    return adata


def few_genes(adata: ad.AnnData) -> ad.AnnData:
    return rna(adata)[:, :300].copy()


def velocities(adata: ad.AnnData) -> ad.AnnData:
    sd.tl.velocity(rna(adata))
    return adata


def cosines(adata: ad.AnnData) -> ad.AnnData:
    sd.tl.velocity_graph(velocities(adata))
    return adata


def dynamics(adata: ad.AnnData) -> ad.AnnData:
    adata = few_genes(adata)
    sd.tl.velocity(adata, mode="dynamical")
    sd.tl.velocity_graph(adata)
    return adata


def slices(adata: ad.AnnData) -> ad.AnnData:
    """Two draws from one tissue, the second turned by 30 degrees."""
    from align_slices import turn

    adata.obs["slice"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 2, "b", "a"))
    place, second = adata.obsm["spatial"].copy(), (adata.obs["slice"] == "b").to_numpy()
    adata.obsm["truth"] = place.copy()
    place[second] = place[second] @ turn(30).T
    adata.obsm["spatial"] = place
    return logged(adata)


def network(n: int, data: Path = DATA) -> ad.AnnData:
    """Logarithms of counts, ten a gene, of cells of a simulated network; who regulates whom is in `uns["edges"]`.

    Where sergio_ds7 is absent 80 genes follow one each of 20 factors.
    """
    rng, folder = np.random.default_rng(0), data / "sergio_ds7"
    if folder.exists():
        rate = ad.read_h5ad(folder / "sergio_ds7.h5ad").to_df().to_numpy(np.float64)
        edges = pd.read_csv(folder / "gt_GRN.csv", header=None).to_numpy(np.int64)
        rate = rate[rng.integers(0, len(rate), n)]
    else:
        factors = rng.gamma(2, size=(n, 20))
        rate, edges = np.tile(factors, 5), np.stack([np.arange(80) % 20, np.arange(20, 100)], 1)
    new = ad.AnnData(sp.csr_matrix(rng.poisson(rate / rate.mean() * 10).astype(np.float32)))
    new.uns["edges"] = edges
    return logged(new)


# The name of an input: the data set that its cells come from, and how they are prepared.
INPUTS: dict[str, tuple[str, Callable[[ad.AnnData], ad.AnnData]]] = {
    "counts": ("pbmc_4271", lambda adata: adata),
    "logged": ("pbmc_4271", logged),
    "components": ("pbmc_4271", components),
    "graph": ("pbmc_4271", graph),
    "doublets": ("pbmc_4271", doublets),
    "soup": ("pbmc_4271", soup),
    "half known": ("pbmc_4271", half_known),
    "named genes": ("soupx_pbmc", logged),
    "trajectory": ("paul15", trajectory),
    "fates": ("paul15", fates),
    "rna": ("pancreas_velocity", rna),
    "few genes": ("pancreas_velocity", few_genes),
    "velocities": ("pancreas_velocity", velocities),
    "cosines": ("pancreas_velocity", cosines),
    "dynamics": ("pancreas_velocity", dynamics),
    "tissue": ("dlpfc_151510", components),
    "slices": ("dlpfc_151510", slices),
}


# Those of other cells.
MADE: dict[str, Callable[[int, Path], ad.AnnData]] = {"network": network}


def prepared(name: str, n: int, folder: Path, data: Path = DATA) -> Path:
    """The file of an input of about n cells, made where it is not in the folder yet."""
    path = folder / f"{name.replace(' ', '_')}_{n}.h5ad"
    if not path.exists():
        if name in MADE:
            made = MADE[name](n, data)
        else:
            origin, prepare = INPUTS[name]
            made = prepare(upsampled(n, origin, data))
        made.write_h5ad(path)
    return path


def described(data: Path = DATA) -> dict[str, Any]:
    """Which of the data sets were measured ones."""
    return {name: "upsampled" if (data / name).exists() else "gamma-Poisson model" for name in SOURCES}
