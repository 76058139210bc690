"""Fate probabilities: the solver against scipy's GMRES as CellRank calls it, and the fates of known cells.

python benchmarks/fates.py speed --n 50000 --schemes soft hard none [--data ../shared/data] [--json out.json]
python benchmarks/fates.py known [--data ../shared/data] [--json out.json]

"speed": the fuzzy graph of 15 neighbours of upsampled spring_hpc cells, directed by the ranks of diffusion pseudotime
from cell 0; the latest tenth of the cells, in three groups by k-means of diffusion components, is terminal. Seconds of
processor time for the linear system alone (ours with the search for what can be reached, warm). GMRES solves fate by
fate without a preconditioner, with restarts every 20 steps, as CellRank 2.3.3 without PETSc does at rtol=1e-6; smaller
tolerances show what it takes to be exact. It is stopped after 1,000 steps a fate, and timed with one thread of the BLAS
and with as many as it takes by itself, most of whose processor time is waiting. Errors are against scipy's BiCGSTAB at
rtol=1e-14; how far its sums are from 1 is printed.

"known": cells of paul15 and pancreas_velocity whose fate is known from their cluster; the 30 latest cells of each fate
(at most half of them) are terminal, the others are scored by their likeliest fate. Controls: the most frequent fate,
the nearest centroid and the nearest cell of the terminal cells in 30 principal components. On pancreas_velocity there
are walks by velocity too (2,000 genes with at least 20 shared counts, the same graph): to the cells within two steps
along the lists of neighbours, or one, and with none or a fifth of the steps by connectivities instead; with controls:
the same edges without direction (scale 1e-6), and velocities dealt out to other cells (mean of five deals).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import bicgstab, gmres
from spectral import make_graph

from scdiffx._core.runtime import one_blas_thread

MOST_RESTARTS = 50

KNOWN: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "paul15": (
        "paul15_clusters",
        "7MEP",
        {
            "Ery": [f"{i}Ery" for i in range(1, 7)],
            # By markers, not by the names of the clusters; see tutorials/trajectories.ipynb.
            "Mo": ["13Baso", "14Mo"],
            "Neu": ["15Mo", "16Neu"],
            "Baso": ["17Neu"],
        },
    ),
    "pancreas_velocity": ("clusters", "Ductal", {name: [name] for name in ("Alpha", "Beta", "Delta", "Epsilon")}),
}


def cpu(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def with_graph(graph: sp.csr_matrix) -> Any:
    import anndata

    adata = anndata.AnnData(np.zeros((graph.shape[0], 1), np.float32))
    adata.obsp["connectivities"] = adata.obsp["distances"] = graph.astype(np.float32)
    keys = {"connectivities_key": "connectivities", "distances_key": "distances"}
    adata.uns["neighbors"] = keys | {"params": {"n_neighbors": 15, "method": "umap"}}
    return adata


def directed_data(n: int, data: Path) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """The graph, the ranks of pseudotime in [0, 1] and the terminal cells, by fate."""
    from scipy.cluster.vq import kmeans2
    from scipy.stats import rankdata

    import scdiffx as sd

    graph = make_graph(n, data).astype(np.float64)
    adata = with_graph(graph)
    sd.tl.pseudotime(adata, root=0)
    when = (rankdata(adata.obs["dpt_pseudotime"].to_numpy()) - 1) / (n - 1)
    late = np.flatnonzero(when >= 0.9)
    components = adata.obsm["X_diffmap"][late, 1:10]
    terminal = np.full(n, -1)
    terminal[late] = kmeans2(components / components.std(0), 3, seed=0, minit="++")[1]
    return graph, when, terminal


def ours(graph: sp.csr_matrix, when: np.ndarray, terminal: np.ndarray, scheme: str | None) -> tuple[Any, Any]:
    """The transition matrix and the call that solves."""
    import jax
    import jax.numpy as jnp

    from scdiffx import ops
    from scdiffx._core.chain import absorption

    weights, labels, pseudotime = ops.Graph.from_scipy(graph), jnp.asarray(terminal, jnp.int32), jnp.asarray(when)
    op = ops.FateProbabilities(scheme=scheme).init(weights, labels, pseudotime)
    transitions = jax.jit(lambda op, *args: op.transitions(*args))(op, weights, pseudotime)
    return transitions, lambda: jax.block_until_ready(absorption(transitions, labels, 3))


def by_gmres(system: sp.csr_matrix, ends: np.ndarray, tol: float) -> tuple[np.ndarray, int]:
    """The solution fate by fate, and the number of steps."""
    steps = [0]

    def count(_: float) -> None:
        steps[0] += 1

    options: dict[str, Any] = {"maxiter": MOST_RESTARTS, "callback": count, "callback_type": "pr_norm"}
    return np.stack([gmres(system, b, rtol=tol, **options)[0] for b in ends.T], 1), steps[0]


def speed(n: int, schemes: list[str], data: Path) -> list[dict[str, Any]]:
    graph, when, terminal = directed_data(n, data)
    print(f"terminal cells: {np.bincount(terminal[terminal >= 0])}")
    print(f"{'scheme':<6} {'solver':<20} {'cpu s':>7} {'first':>6} {'steps':>6} {'error':>8}")
    rows = []
    for scheme in schemes:
        rows += [{"n": n, "scheme": scheme} | row for row in one_scheme(graph, when, terminal, scheme)]
    return rows


def one_scheme(graph: sp.csr_matrix, when: np.ndarray, terminal: np.ndarray, scheme: str) -> list[dict[str, Any]]:
    transitions, solve = ours(graph, when, terminal, None if scheme == "none" else scheme)
    first, _ = cpu(solve)
    seconds, result = min((cpu(solve) for _ in range(3)), key=lambda pair: pair[0])
    inside = np.flatnonzero((terminal < 0) & np.asarray(result.reaches).any(1))
    found = np.asarray(result.probabilities)[inside]
    matrix = transitions.to_scipy()
    system = (sp.eye(len(inside)) - matrix[inside][:, inside]).tocsr()
    ends = np.stack([np.asarray(matrix[inside][:, terminal == i].sum(1)).ravel() for i in range(3)], 1)
    exact = np.stack([bicgstab(system, b, rtol=1e-14, maxiter=5_000)[0] for b in ends.T], 1)
    caught = 1 - found.sum(1)
    off = np.abs(1 - exact.sum(1) - caught).max()
    print(f"{scheme:<6} reference: sums within {off:.1e}; largest chance to be caught {caught.max():.1e}")
    rows: list[dict[str, Any]] = [
        {"solver": "scdiffx", "cpu_s": seconds, "first_cpu_s": first, "error": float(np.abs(found - exact).max())}
    ]
    print(f"{scheme:<6} {'scdiffx':<20} {seconds:>7.2f} {first:>6.2f} {'':>6} {rows[0]['error']:>8.1e}", flush=True)
    for tol in (1e-6, 1e-8, 1e-10):
        for threads, scope in (("1 thread", one_blas_thread), ("default", contextlib.nullcontext)):
            with scope():
                seconds, (value, steps) = cpu(lambda tol=tol: by_gmres(system, ends, tol))
            error = float(np.abs(value - exact).max())
            solver = f"gmres {tol:g}, {threads}"
            rows.append({"solver": solver, "cpu_s": seconds, "steps": steps, "error": error})
            print(f"{scheme:<6} {solver:<20} {seconds:>7.2f} {'':>6} {steps:>6} {error:>8.1e}", flush=True)
        if error < 1e-6 or steps >= 3 * 20 * MOST_RESTARTS:
            break
    return rows


def prepared(name: str, data: Path) -> Any:
    import anndata

    import scdiffx as sd

    key, root, _ = KNOWN[name]
    adata = anndata.read_h5ad(data / name / f"{name}.h5ad")
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.highly_variable_genes(adata, n_top_genes=2000)
    sd.pp.pca(adata, n_comps=30)
    sd.pp.neighbors(adata, n_neighbors=15)
    inside = np.flatnonzero(adata.obs[key] == root)
    scores = adata.obsm["X_pca"]
    adata.uns["iroot"] = int(inside[((scores[inside] - scores[inside].mean(0)) ** 2).sum(1).argmin()])
    sd.tl.pseudotime(adata)
    return adata


def velocities(adata: Any, mode: str) -> Any:
    """The cells with normalised layers, velocities and the graph; `adata` is the output of `prepared`."""
    import scdiffx as sd

    both = [sp.csr_matrix(adata.layers[layer]) for layer in ("spliced", "unspliced")]
    shared = np.asarray(sum(m.multiply((both[0] > 0).multiply(both[1] > 0)) for m in both).sum(0)).ravel()
    moving = adata[:, shared >= 20].copy()
    for layer in ("spliced", "unspliced"):
        moving.layers[layer] = sp.csr_matrix(moving.layers[layer]).astype(np.float32)
        sd.pp.normalize_total(moving, layer=layer)
    sd.pp.highly_variable_genes(moving, n_top_genes=2000, subset=True)
    sd.tl.velocity(moving, mode=mode)
    return moving


def by_velocity(adata: Any, states: dict[str, list[str]], key: str) -> dict[str, list[np.ndarray]]:
    """The likeliest fates of all cells, by method; one array for each deal of the velocities."""
    import scdiffx as sd

    found: dict[str, list[np.ndarray]] = {}
    for mode in ("stochastic", "dynamical"):
        moving = velocities(adata, mode)
        v, rng = np.asarray(moving.layers["velocity"]), np.random.default_rng(0)
        dealt = [v[rng.permutation(len(v))] for _ in range(5)]
        for reach, (control, layers, scale) in itertools.product(
            (2, 1), (("", [v], 10.0), (", no direction", [v], 1e-6), (", other cells'", dealt, 10.0))
        ):
            for layer in layers:
                moving.layers["velocity"] = layer
                sd.tl.velocity_graph(moving, n_recurse_neighbors=reach)
                for share in (0.0, 0.2):
                    sd.tl.transition_matrix(moving, scale=scale, weight_connectivities=share)
                    sd.tl.fate_probabilities(moving, states, transition_key="velocity_transitions")
                    name = f"{mode} {reach} {share:g}{control}"
                    found.setdefault(name, []).append(np.nan_to_num(moving.obsm["lineages_fwd"]).argmax(1))
                    if not control:
                        looked_for(moving, key, name, "velocity_transitions")
    return found


def looked_for(adata: Any, key: str, name: str, transition_key: str | None = None) -> None:
    import scdiffx as sd

    try:
        sd.tl.fate_probabilities(adata, groupby=key, transition_key=transition_key)
    except ValueError as error:
        print(f"{name:<20} looked for: {error}")
    else:
        print(f"{name:<20} looked for: {adata.obs['term_states_fwd'].value_counts().to_dict()}")


def known(data: Path) -> list[dict[str, Any]]:
    import scdiffx as sd

    rows = []
    print(f"{'data':<18} {'method':<32} {'accuracy':>8} {'balanced':>8}  of each fate")
    for name, (key, _, fates) in KNOWN.items():
        adata = prepared(name, data)
        when, scores = adata.obs["dpt_pseudotime"].to_numpy(), adata.obsm["X_pca"]
        truth, terminal = np.full(adata.n_obs, -1), np.full(adata.n_obs, -1)
        for i, clusters in enumerate(fates.values()):
            cells = np.flatnonzero(adata.obs[key].isin(clusters))
            truth[cells] = i
            terminal[cells[np.argsort(-when[cells])[: min(30, len(cells) // 2)]]] = i
        scored, ends = (truth >= 0) & (terminal < 0), np.flatnonzero(terminal >= 0)
        centres = np.stack([scores[terminal == i].mean(0) for i in range(len(fates))])
        guesses = {
            "most frequent": np.full(adata.n_obs, np.bincount(truth[scored]).argmax()),
            "nearest centroid": ((scores[:, None] - centres) ** 2).sum(2).argmin(1),
            "nearest cell": terminal[ends][((scores[:, None] - scores[ends]) ** 2).sum(2).argmin(1)],
        }
        states = {fate: adata.obs_names[terminal == i].tolist() for i, fate in enumerate(fates)}
        for scheme in ("soft", "hard", None):
            sd.tl.fate_probabilities(adata, states, threshold_scheme=scheme)
            guesses[f"fates, {scheme or 'undirected'}"] = np.nan_to_num(adata.obsm["lineages_fwd"]).argmax(1)
        found = {method: [guess] for method, guess in guesses.items()}
        if name == "pancreas_velocity":
            found |= by_velocity(adata, states, key)
        for method, trials in found.items():
            right = np.mean([guess == truth for guess in trials], axis=0)
            each = [float(right[scored & (truth == i)].mean()) for i in range(len(fates))]
            row = {"data": name, "method": method, "accuracy": float(right[scored].mean()), "each": each}
            rows.append(row | {"balanced": float(np.mean(each)), "cells": int(scored.sum())})
            shown = " ".join(f"{fate} {value:.2f}" for fate, value in zip(fates, each, strict=True))
            print(f"{name:<18} {method:<32} {row['accuracy']:>8.3f} {np.mean(each):>8.3f}  {shown}")
        looked_for(adata, key, name)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "known"])
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--schemes", nargs="+", default=["soft", "hard", "none"], choices=["soft", "hard", "none"])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    import jax

    with jax.enable_x64(True):
        rows = speed(args.n, args.schemes, args.data) if args.part == "speed" else known(args.data)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
