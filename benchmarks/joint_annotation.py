"""Joint fits for annotation under compression, beside their controls: few components, few genes, few labels.

    python benchmarks/joint_annotation.py [--sets NAME ...] [--seeds 0 1 2] [--steps 100] [--json out.json]

Of each type three fifths of the cells train, a fifth chooses and a fifth is the test set; all methods have the same
cells and end in the same classifiers, trained on the cells that are not in the test set. The 2,000 most variable genes
and the frozen components come from all cells, without labels. Macro-F1 of the test cells:

- components: of frozen PCA, of the joint fit of the projection, and of linear discriminants with shrinkage (at most
  types - 1 of them), by logistic regression and by 15 neighbours;
- genes: the most variable, those with the highest F of an analysis of variance, the markers of each type in turn, those
  of the largest weights in the direct predictor, and those of the largest weights fitted under a budget; by logistic
  regression on their logarithms;
- few labels: ten components where only a share of the labels is known, half of which train and half choose.

The direct predictor is logistic regression on all genes, its penalty chosen like the fit. Rates of the optimisers were
chosen by the cross-entropy of the cells that choose in pbmc_4271 with seed 0, and used as they are everywhere else.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import numpy as np
import optax
import scipy.sparse as sp
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"pbmc_4271": "label", "cite_cbmc": "label", "paul15": "paul15_clusters", "mixology_sc": "cell_line_demuxlet"}
MOST_CELLS = 4000
COMPONENTS = (5, 10, 50)
GENES = (50, 100, 200)
PENALTIES = (1e-3, 1e-2, 1e-1)


def read(name: str, data: Path) -> ad.AnnData:
    adata = ad.read_h5ad(data / name / f"{name}.h5ad")
    if adata.n_obs > MOST_CELLS + 500:
        cells = np.random.default_rng(0).choice(adata.n_obs, MOST_CELLS, replace=False)
        adata = adata[np.sort(cells)].copy()
    adata.X = sp.csr_matrix(adata.X).astype(np.float32)
    sd.pp.normalize_total(adata, target_sum=1e4)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars), subset=True)
    adata.obs["type"] = adata.obs[SETS[name]].astype(str)
    return adata


class Cells:
    """Labels, and who trains, chooses and is the test set."""

    def __init__(self, adata: ad.AnnData, seed: int, known: float = 1.0) -> None:
        self.adata = adata
        self.types = adata.obs["type"].to_numpy()
        rest, test = self._dealt(np.arange(adata.n_obs), 0.2, seed)
        if known < 1:
            rest = self._some_of_each(rest, known, seed)
        train, choose = self._dealt(rest, 0.25 if known == 1 else 0.5, seed)
        self.train, self.choose, self.test = (self._mask(cells) for cells in (train, choose, test))
        self.known = self.train | self.choose
        adata.obs["known"] = np.where(self.known, self.types, None)

    def _dealt(self, cells: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return train_test_split(cells, test_size=share, stratify=self.types[cells], random_state=seed)

    def _some_of_each(self, cells: np.ndarray, share: float, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        of_each = [rng.permutation(cells[self.types[cells] == t]) for t in np.unique(self.types)]
        return np.concatenate([members[: max(4, round(share * len(members)))] for members in of_each])

    def _mask(self, cells: np.ndarray) -> np.ndarray:
        mask = np.zeros(self.adata.n_obs, bool)
        mask[cells] = True
        return mask

    def scores(self, z: np.ndarray, fit_on: np.ndarray | None = None, on: np.ndarray | None = None) -> dict[str, float]:
        """Macro-F1 by both classifiers."""
        fit_on, on = self.known if fit_on is None else fit_on, self.test if on is None else on
        models = {
            "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
            "kNN": KNeighborsClassifier(min(15, int(fit_on.sum()))),
        }
        return {
            name: f1_score(self.types[on], model.fit(z[fit_on], self.types[fit_on]).predict(z[on]), average="macro")
            for name, model in models.items()
        }


def frozen_and_joint(cells: Cells, n_comps: int, steps: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Components of the plan as it is and as fitted, and whether the fit was adopted."""
    plan = sd.plan(cells.adata)
    sd.pp.pca(plan, n_comps=n_comps)
    fitted = sd.fit(
        plan,
        sd.losses.cross_entropy("X_pca", "known"),
        # Loadings are about 0.02 each, so steps have to be small beside that.
        optimizer=optax.adam(1e-3),
        n_steps=steps,
        patience=30,
        refresh_every=0,
        holdout=cells.choose,
        test=cells.test,
        progress=False,
    )
    both = [fit.apply(copy=True).obsm["X_pca"] for fit in (plan, fitted)]
    return both[0], both[1], fitted.adopted


def discriminants(cells: Cells, x: np.ndarray) -> np.ndarray:
    known, varies = cells.known, x[cells.known].std(0) > 0
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    return model.fit(x[known][:, varies], cells.types[known]).transform(x[:, varies])


def direct(cells: Cells, x: np.ndarray) -> tuple[float, np.ndarray]:
    """Macro-F1 of logistic regression on all genes, and the size of each gene's weights in it."""
    z = StandardScaler().fit(x[cells.known]).transform(x)

    def model(penalty: float, on: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=penalty, max_iter=200).fit(z[on], cells.types[on])

    def loss(penalty: float) -> float:
        fitted = model(penalty, cells.train)
        chance = fitted.predict_proba(z[cells.choose])
        place = np.searchsorted(fitted.classes_, cells.types[cells.choose])
        return float(-np.log(chance[np.arange(len(chance)), place]).mean())

    best = model(min(PENALTIES, key=loss), cells.known)
    told = best.predict(z[cells.test])
    return f1_score(cells.types[cells.test], told, average="macro"), np.linalg.norm(best.coef_, axis=0)


def markers(cells: Cells, x: np.ndarray) -> np.ndarray:
    """Genes in the order in which the types take turns to name their best, by Welch's t against the rest."""
    x, types = x[cells.known], cells.types[cells.known]
    ranked = []
    for t in np.unique(types):
        one, rest = x[types == t], x[types != t]
        error = np.sqrt(one.var(0) / len(one) + rest.var(0) / len(rest))
        ranked.append(np.argsort(-(one.mean(0) - rest.mean(0)) / np.maximum(error, 1e-9)))
    turns = np.stack(ranked, 1).ravel()
    return turns[np.sort(np.unique(turns, return_index=True)[1])]


def gates(cells: Cells, n_genes: int, steps: int) -> tuple[np.ndarray, bool]:
    """Weights of the genes, fitted with the projection under a budget."""
    plan = sd.plan(cells.adata)
    sd.pp.highly_variable_genes(plan, n_top_genes=1000, soft=True)
    sd.pp.pca(plan, n_comps=20)

    def parts(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "gates" if "highly_variable_genes" in jax.tree_util.keystr(path) else "rest", params
        )

    # All gates are open at first, far over the budget: without a limit Adam would long remember so steep a slope.
    gate = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    fitted = sd.fit(
        plan,
        sd.losses.cross_entropy("X_pca", "known") + 10 * sd.losses.budget("gene_weight", n_genes),
        learn=["highly_variable_genes.shift", "pca.shift"],
        # Wide gates: a gene that does not vary much can still be let in.
        schedules={"highly_variable_genes.temperature": lambda step: 5.0},
        optimizer=optax.multi_transform({"gates": gate, "rest": optax.adam(0.01)}, parts),
        n_steps=steps,
        refresh_every=0,
        holdout=cells.choose,
        test=cells.test,
        progress=False,
    )
    return fitted.apply(copy=True).var["gene_weight"].to_numpy(), fitted.adopted


def by_components(cells: Cells, x: np.ndarray, steps: int, components: tuple[int, ...], row: dict[str, Any]) -> None:
    most = discriminants(cells, x)
    for n_comps in components:
        frozen, joint, adopted = frozen_and_joint(cells, n_comps, steps)
        row[f"adopted {n_comps}"] = adopted
        for name, z in (("PCA", frozen), ("joint", joint), ("LDA", most[:, :n_comps])):
            row |= {f"{name} {n_comps} {by}": f1 for by, f1 in cells.scores(z).items()}


def by_genes(cells: Cells, x: np.ndarray, steps: int, sizes: np.ndarray, row: dict[str, Any]) -> None:
    known = cells.known
    with np.errstate(invalid="ignore", divide="ignore"):
        anova = np.nan_to_num(f_classif(x[known], cells.types[known])[0])
    variable = cells.adata.var["dispersions_norm"].fillna(-np.inf).to_numpy()
    orders = {"HVG": np.argsort(-variable), "ANOVA": np.argsort(-anova), "markers": markers(cells, x)}
    orders["weights"] = np.argsort(-sizes)
    for n_genes in GENES:
        weight, row[f"adopted {n_genes} genes"] = gates(cells, n_genes, steps)
        for name, order in (orders | {"joint": np.argsort(-weight)}).items():
            row[f"{name} {n_genes} genes"] = cells.scores(x[:, order[:n_genes]])["logistic"]


def run(name: str, adata: ad.AnnData, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    begun = time.process_time()
    x = adata.X.toarray()
    row: dict[str, Any] = {"set": name, "seed": seed}
    cells = Cells(adata, seed)
    row["direct"], sizes = direct(cells, x)
    by_components(cells, x, given.steps, COMPONENTS, row)
    by_genes(cells, x, given.steps, sizes, row)
    poor: dict[str, Any] = {}
    cells = Cells(adata, seed, given.known)
    poor["direct"] = direct(cells, x)[0]
    by_components(cells, x, given.steps, (10,), poor)
    row |= {f"few labels: {key}": value for key, value in poor.items()}
    row |= {"few labels: cells": int(cells.known.sum()), "CPU s": time.process_time() - begun}
    print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def summary(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        print(f"\n{name}: macro-F1 of {len(of_set)} seeds, mean and standard deviation")
        for key, value in of_set[0].items():
            if isinstance(value, float):
                values = [row[key] for row in of_set]
                print(f"{key:>36}: {np.mean(values):.3f} +- {np.std(values, ddof=min(1, len(values) - 1)):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--known", type=float, default=0.05, help="share of the labels where they are few")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    data = {name: read(name, given.data) for name in given.sets}
    for seed in given.seeds:
        for name, adata in data.items():
            rows.append(run(name, adata, seed, given))
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))
    summary(rows)


if __name__ == "__main__":
    main()
