"""One plan for integration: gene weights -> components -> Harmony -> soft k-means, fitted without labels.

    python benchmarks/joint_integration.py [--data mixology_sc] [--seeds 0 1 2] [--steps 40] [--json out.json]

The loss is mixing of the batches after Harmony (`batch_mixing`) with what must be kept: soft clusters must still follow
the neighbour graph within each batch, that of the unfitted components (`modularity`). A fifth of the cells chooses.
Learned are Harmony's theta, sigma and ridge; `--learn highly_variable_genes.shift pca.scale harmony` learns gene
weights and scales of components too. Frozen are the same steps with their defaults. Both are judged as `integrate.py`
does: mixing, votes of 15 neighbours for the label, best ARI of six Leiden resolutions, .4 mixing + .6 conservation; and
by the adjusted Rand index of the k-means clusters, of which there are as many as labels. With `--keep halves` what must
be kept is that two halves of a cell's molecules find each other.

`--labels 0.2` tells the fit the labels of a fifth of the cells: cross-entropy of a linear readout of the corrected
components joins the loss. All is then judged on the cells whose labels were hidden, beside linear discriminants of the
same labels, corrected by Harmony in place of components.
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
import optax
import scipy.sparse as sp
from integrate import loaded, scores
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import adjusted_rand_score

import scdiffx as sd
from scdiffx._calls import replay

LEARN = ["harmony"]


def workflow(target: Any, clusters: int) -> None:
    sd.pp.normalize_total(target, target_sum=1e4)
    sd.pp.log1p(target)
    sd.pp.highly_variable_genes(target, n_top_genes=1000, soft=True)
    sd.pp.pca(target, n_comps=30)
    sd.pp.harmony_integrate(target, "batch")
    sd.tl.kmeans(target, n_clusters=clusters, use_rep="X_pca_harmony")


def within_batches(adata: ad.AnnData) -> None:
    """A graph of neighbours within each batch, from the unfitted components, as uns["within"]."""
    plain = adata.copy()
    sd.pp.normalize_total(plain, target_sum=1e4)
    sd.pp.log1p(plain)
    sd.pp.pca(plain, n_comps=30)
    rows, graphs = [], []
    for batch in plain.obs["batch"].cat.categories:
        here = np.flatnonzero(plain.obs["batch"] == batch)
        part = plain[here].copy()
        sd.pp.neighbors(part, n_neighbors=15)
        rows.append(here)
        graphs.append(part.obsp["connectivities"])
    order = np.argsort(np.concatenate(rows))
    adata.obsp["within"] = sp.block_diag(graphs, format="csr")[order][:, order]
    adata.uns["within"] = {"connectivities_key": "within", "distances_key": "within", "params": {}}


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    source = loaded(name)
    whole = ad.AnnData(
        source.layers["counts"].copy(), obs=source.obs[["batch", "label"]].copy(), var=source.var[[]].copy()
    )
    told = np.random.default_rng(seed).random(whole.n_obs) < args.labels
    whole.obs["told"] = whole.obs["label"].astype(object).where(told)
    fitted_on = whole.copy()
    if args.keep == "halves":
        fitted_on = sd.pp.replicates(whole, rng=seed)
        kept = sd.losses.replicate_consistency("X_pca_harmony")
    else:
        within_batches(fitted_on)
        kept = sd.losses.modularity("kmeans_probabilities", "within")
    plan = sd.plan(fitted_on)
    workflow(plan, whole.obs["label"].nunique())
    loss = sd.losses.batch_mixing("X_pca_harmony", "batch") + kept
    if args.labels:
        loss = loss + args.weight * sd.losses.cross_entropy("X_pca_harmony", "told")
    start = time.process_time()
    fitted = sd.fit(
        plan,
        loss,
        learn=args.learn,
        n_steps=args.steps,
        optimizer=optax.adam(args.rate),
        refresh_every=10,
        test=None,
        rng=seed,
        progress=False,
    )
    result: dict[str, Any] = {"adopted": fitted.adopted, "fit CPU s": time.process_time() - start}
    result |= {key: value for key, value in fitted.losses.items() if key.startswith("holdout")}
    result |= {key: float(fitted.params[f"harmony.{key}"].mean()) for key in ("theta", "sigma", "alpha")}
    applied = {"frozen": replay(plan.calls, whole).apply(copy=True), "joint fit": fitted.apply(whole, copy=True)}
    if args.labels:
        applied["discriminants"] = discriminants(applied["frozen"], told)
    for method, data in applied.items():
        judged = data[~told].copy()
        ari = adjusted_rand_score(judged.obs["label"], judged.obs["kmeans"])
        result[method] = [*scores(np.asarray(judged.obsm["X_pca_harmony"]), judged).tolist(), float(ari)]
    return result


def discriminants(frozen: ad.AnnData, told: np.ndarray) -> ad.AnnData:
    """The same steps with linear discriminants of the components in their place."""
    data = frozen.copy()
    z = data.obsm["X_pca"]
    found = LinearDiscriminantAnalysis().fit(z[told], data.obs["label"][told])
    data.obsm["X_pca"] = np.asarray(found.transform(z), np.float32)
    sd.pp.harmony_integrate(data, "batch")
    sd.tl.kmeans(data, n_clusters=data.obs["label"].nunique(), use_rep="X_pca_harmony")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["mixology_sc"], choices=["mixology_sc", "worm_embryo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--learn", nargs="+", default=LEARN)
    parser.add_argument("--keep", default="graph", choices=["graph", "halves"])
    parser.add_argument("--labels", type=float, default=0.0)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    everything = {}
    for name in args.data:
        found = [run(name, seed, args) for seed in args.seeds]
        everything[name] = found
        print(f"\n{name}: mixing, neighbours' vote, best ARI, overall, ARI of k-means")
        methods = [method for method in ("frozen", "joint fit", "discriminants") if method in found[0]]
        for method in methods:
            rows = np.array([r[method] for r in found])
            figures = "  ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(rows.mean(0), rows.std(0), strict=True))
            print(f"{method:>13}: {figures}")
        for r in found:
            print({k: v if isinstance(v, bool) else round(v, 3) for k, v in r.items() if k not in methods})
        if args.json:
            args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
