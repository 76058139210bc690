"""Where known genes rank: textbook regulators of two lineages, and planted drivers of a simulated decision.

    python benchmarks/attribution.py known [--probes 16]
    python benchmarks/attribution.py planted [--seeds 0 1 2 3 4 5] [--rates 1 4] [--level 4] [--cellrank PYTHON]

"known": regulators and effectors of two lineages of paul15 by three methods. Plan: normalise, logarithm, 1,500 variable
genes, 30 components, 15 neighbours, pseudotime from the medoid of 7MEP on the erythroid side (clusters 1Ery to 7MEP)
and from that of 9GMP on the side of monocytes and neutrophils (9GMP to 11DC, 14Mo to 17Neu). The target is the
pseudotime, the genes are all 3,451; rank 1 rises most along it. "Distance" is the correlation with the distance from
the root in the same components instead.

"planted": 1,200 cells and 122 genes of a decision. Two drivers a and b inhibit each other,
da = 8 (1 / (1 + (b / .5)^4) - a) dt + .1 dW and the same for b, from a = b = .2 at time 0 to time 1; each cell follows
a path of its own and is measured at a random time, and its fate is the driver that is higher at time 1. 20 targets
follow each driver, dz = r (a^2 / (.25 + a^2) - z) dt, with r uniform between --rates; 20 genes follow time, half of
them up and half down, as logistic curves with the middle anywhere and slopes of 5 to 15; 60 are constant. All have a
level, log-normal about --level molecules (sd .5 of the logarithm), at activity 1, and .05 of it at 0; counts are
negative binomial with dispersion .1 and log-normal cell sizes (sd .3).

Plan: normalise, logarithm, 15 components, 15 neighbours, pseudotime from the earliest cell, fates; terminal are the
cells after time .9 by the driver that is higher in them. Genes are ranked by absolute value for the first fate (the
other's is 1 less it: the same ranking), over all cells and over those before time .5; average precision of the two
drivers among all genes, mean and standard deviation over the seeds. "Oracle" is the correlation with the fate to come,
which no method knows; the default rates were chosen by it, at other rates and levels the drivers are harder to tell.
--cellrank is a Python in which CellRank 2.3 runs: its `compute_lineage_drivers` on the same fates, and on its own from
the same graph, pseudotime and terminal cells by its default kernel.
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
import scipy.sparse as sp
from scipy.stats import rankdata

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
METHODS = ("correlation", "sensitivity", "gradient")
WINDOWS = ("all", "early")
SIDES = {
    "erythroid": (["7MEP", *(f"{i}Ery" for i in range(1, 7))], "7MEP", ["Gata1", "Klf1", "Hba-a2", "Car1"]),
    "myeloid": (
        ["9GMP", "10GMP", "14Mo", "15Mo", "16Neu", "17Neu"],
        "9GMP",
        ["Irf8", "Cebpe", "Mpo", "Elane"],
    ),
}


def side(adata: ad.AnnData, clusters: list[str], start: str) -> ad.AnnData:
    part = adata[adata.obs["paul15_clusters"].isin(clusters)].copy()
    copy = part.copy()
    steps(copy)
    sd.pp.neighbors(copy)
    points = copy.obsm["X_pca"]
    first = np.flatnonzero(part.obs["paul15_clusters"] == start)
    centre = points[first].mean(0)
    part.uns["iroot"] = int(first[np.argmin(np.linalg.norm(points[first] - centre, axis=1))])
    part.obs["distance"] = np.linalg.norm(points - points[part.uns["iroot"]], axis=1)
    return part


def steps(target: ad.AnnData) -> None:
    sd.pp.normalize_total(target)
    sd.pp.log1p(target)
    sd.pp.highly_variable_genes(target, n_top_genes=1500)
    sd.pp.pca(target, n_comps=30)


def known(probes: int) -> None:
    adata = ad.read_h5ad(DATA / "paul15" / "paul15.h5ad")
    for name, (clusters, start, genes) in SIDES.items():
        part = side(adata, clusters, start)
        plan = sd.plan(part)
        steps(plan)
        sd.pp.neighbors(plan)
        sd.tl.pseudotime(plan)
        logs = part.copy()
        sd.pp.normalize_total(logs)
        sd.pp.log1p(logs)
        print(f"{name}: {part.n_obs} cells")
        sd.tl.attribution(logs, "distance")
        show("distance", logs.varm["attribution_distance"]["all_value"], genes, 0.0)
        for method in METHODS:
            begin = time.process_time()
            sd.tl.attribution(plan, "dpt_pseudotime", method=method, n_probes=probes)
            seconds = time.process_time() - begin
            show(method, part.varm["attribution_dpt_pseudotime"]["all_value"], genes, seconds)


def show(method: str, value: object, genes: list[str], seconds: float) -> None:
    rank = (-value).rank().astype(int)
    ranks = " ".join(f"{gene} {rank[gene]} ({value[gene]:+.3g})" for gene in genes)
    print(f"  {method:<12} {ranks}; first ten {', '.join(rank.sort_values().index[:10])}; {seconds:.0f} s", flush=True)


def decision(seed: int, rates: list[float], level: float, cells: int = 1200, steps: int = 200) -> ad.AnnData:
    """Counts of a simulated decision; `obs` holds time, the fate to come and the driver that is higher now."""
    rng = np.random.default_rng(seed)
    when = rng.integers(0, steps, cells)
    rate, owner = rng.uniform(*rates, 40), np.repeat([0, 1], 20)
    driver, follower = np.full((cells, 2), 0.2), np.zeros((cells, 40))
    drivers, followers = np.zeros_like(driver), np.zeros_like(follower)
    for i in range(steps):
        now = when == i
        drivers[now], followers[now] = driver[now], follower[now]
        square = driver[:, owner] ** 2
        follower = follower + rate * (square / (0.25 + square) - follower) / steps
        drift = 8 * (1 / (1 + (driver[:, ::-1] / 0.5) ** 4) - driver)
        driver = np.maximum(driver + drift / steps + 0.1 * rng.normal(size=driver.shape) / np.sqrt(steps), 0)
    times = when / steps
    slope = rng.uniform(5, 15, 20) * np.repeat([1, -1], 10)
    clock = 1 / (1 + np.exp(-slope * (times[:, None] - rng.uniform(0, 1, 20))))
    activity = np.concatenate([drivers, followers, clock, np.ones((cells, 60))], 1)
    levels = rng.lognormal(np.log(level), 0.5, activity.shape[1])
    mean = rng.lognormal(0, 0.3, (cells, 1)) * levels * (0.05 + 0.95 * activity)
    counts = rng.poisson(rng.gamma(10, mean / 10))
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    kinds = np.repeat(["driver", "target", "time", "constant"], [2, 40, 20, 60])
    adata.var_names = [f"{kind}{i}" for i, kind in enumerate(kinds)]
    adata.var["kind"] = kinds
    adata.obs["time"], adata.obs["window"] = times, np.where(times < 0.5, "early", "late")
    adata.obs["fate"], adata.obs["higher"] = driver.argmax(1), drivers.argmax(1)
    return adata


def decided(adata: ad.AnnData) -> sd.Plan:
    """The plan from counts to fates."""
    late, higher = adata.obs["time"] > 0.9, adata.obs["higher"]
    ends = {f"fate{i}": list(adata.obs_names[late & (higher == i)]) for i in range(2)}
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan)
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=15)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=int(adata.obs["time"].argmin()))
    sd.tl.fate_probabilities(plan, ends)
    return plan


def precision(value: np.ndarray, adata: ad.AnnData) -> float:
    """Average precision of the drivers, genes in order of the absolute value."""
    order = np.argsort(-np.abs(np.nan_to_num(value)), kind="stable")
    place = np.flatnonzero((adata.var["kind"] == "driver").to_numpy()[order]) + 1
    return float((np.arange(1, len(place) + 1) / place).mean())


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    n = positive.sum()
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def planted(seeds: list[int], rates: list[float], level: float, probes: int, cellrank: str | None) -> None:
    rows: dict[str, list[float]] = {}
    for seed in seeds:
        adata = decision(seed, rates, level)
        plan = decided(adata)
        begin = time.process_time()
        values = {f"{method}, {window}": ours(plan, method, window, probes) for method in METHODS for window in WINDOWS}
        seconds = time.process_time() - begin
        run = plan.apply(copy=True)
        early, ends = (adata.obs["window"] == "early").to_numpy(), (adata.obs["fate"] == 0).to_numpy()
        for window, cells in zip(WINDOWS, (slice(None), early), strict=True):
            values[f"oracle, {window}"] = correlation(run.X[cells].toarray(), ends[cells])
        if cellrank is not None:
            values |= theirs(run, cellrank)
        for name, value in values.items():
            rows.setdefault(name, []).append(precision(value, adata))
        area = auroc(run.obsm["lineages_fwd"][early, 0], ends[early])
        molecules = np.median(np.asarray(adata.X.sum(1)))
        print(f"seed {seed}: {molecules:.0f} molecules, AUROC of early cells {area:.3f}, {seconds:.0f} s", flush=True)
    for name, found in rows.items():
        each = " ".join(f"{value:.2f}" for value in found)
        print(f"{name:<26} {np.mean(found):.2f} +- {np.std(found):.2f}   ({each})")


def ours(plan: sd.Plan, method: str, window: str, probes: int) -> np.ndarray:
    among = {} if window == "all" else {"groupby": "window", "groups": [window]}
    settings = {"column": 0, "method": method, "n_probes": probes, "key_added": "found"}
    sd.tl.attribution(plan, "lineages_fwd", **settings, **among)
    return plan.adata.varm["found"][f"{window}_value"].to_numpy()


def correlation(x: np.ndarray, truth: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    return centred.T @ (truth - truth.mean()) / np.maximum(np.linalg.norm(centred, axis=0), 1e-12)


THEIRS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import anndata as ad, cellrank as cr
adata = ad.read_h5ad(sys.argv[1])
adata.obs["window"] = adata.obs["window"].astype("category")
ends = adata.obs["term_states_fwd"]
names = list(ends.cat.categories)
kernel = cr.kernels.PseudotimeKernel(adata, time_key="dpt_pseudotime")
kernel.compute_transition_matrix(show_progress_bar=False)
own = cr.estimators.CFLARE(kernel)
own.set_terminal_states({name: list(adata.obs_names[ends == name]) for name in names})
own.compute_fate_probabilities(show_progress_bar=False, use_petsc=False)
same = cr.estimators.CFLARE(kernel)
same._fate_probabilities = cr.Lineage(adata.uns["shared"], names=names)
found = {}
for title, estimator in (("CellRank", same), ("CellRank's own fates", own)):
    for window, among in (("all", {}), ("early", {"cluster_key": "window", "clusters": ["early"]})):
        table = estimator.compute_lineage_drivers(**among, show_progress_bar=False)
        found[f"{title}, {window}"] = [float(v) for v in table.loc[adata.var_names, f"{names[0]}_corr"]]
json.dump(found, open(sys.argv[2], "w"))
"""


def theirs(run: ad.AnnData, python: str) -> dict[str, np.ndarray]:
    """CellRank's correlations with the first fate, in all and in early cells, on these fates and on its own."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "run.h5ad", Path(folder) / "found.json"
        given = ad.AnnData(run.X, obs=run.obs[["window", "dpt_pseudotime", "term_states_fwd"]], var=run.var[[]])
        given.obsp["connectivities"], given.uns["neighbors"] = run.obsp["connectivities"], run.uns["neighbors"]
        given.obsp["distances"], given.uns["shared"] = run.obsp["distances"], run.obsm["lineages_fwd"]
        given.write_h5ad(source)
        subprocess.run([python, "-c", THEIRS, str(source), str(target)], check=True, capture_output=True)
        return {name: np.array(value) for name, value in json.loads(target.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("known", "planted"))
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--rates", type=float, nargs=2, default=[1.0, 4.0])
    parser.add_argument("--level", type=float, default=4.0)
    parser.add_argument("--cellrank", metavar="PYTHON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.mode == "known":
        known(args.probes)
    else:
        planted(args.seeds, args.rates, args.level, args.probes, args.cellrank)


if __name__ == "__main__":
    main()
