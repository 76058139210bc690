"""What a joint fit costs: a plan of six steps from counts to pseudotime, and a minibatched one to labels.

    python benchmarks/fit_cost.py [--n 20000] [--genes 2000] [--steps 20] [--batch 512] [--json out.json]

Printed: seconds to the first step (the plan's own run, compilation, one gradient) and of a whole fit of one step (with
the judgement of all parts and fresh structure at its end), wall and CPU, with an empty compilation cache if
XDG_CACHE_HOME is set to a new folder; the evaluation of the loss and of its gradient, CPU seconds, median of five,
warm, and their ratio; the seconds of a step of the loop, refreshes included; the most memory that the process held.
Counts are upsampled from spring_hpc (`pipeline.py`); times and labels are invented: they cost what real ones do.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import numpy as np
from pipeline import counts

import scdiffx as sd
from scdiffx._fit import _training
from scdiffx._fit._split import three_ways
from scdiffx._fit._training import Run
from scdiffx._program import Program


def data(n: int, genes: int) -> ad.AnnData:
    adata = ad.AnnData(counts(n, genes))
    rng = np.random.default_rng(0)
    adata.obs["time"] = np.log1p(np.asarray(adata.X[:, :50].sum(1)).ravel()) + rng.normal(0, 0.1, n)
    adata.obs["label"] = np.digitize(adata.obs["time"], adata.obs["time"].quantile([0.25, 0.5, 0.75])).astype(str)
    return adata


def to_components(adata: ad.AnnData) -> sd._steps.Plan:
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan, target_sum=1e4)
    sd.pp.log1p(plan)
    sd.pp.highly_variable_genes(plan, n_top_genes=1000, soft=True)
    sd.pp.pca(plan, n_comps=50)
    return plan


def to_pseudotime(adata: ad.AnnData) -> sd._steps.Plan:
    plan = to_components(adata)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=0)
    return plan


LEARN = ["highly_variable_genes.shift", "pca", "neighbors"]


def median_cpu(f: Callable[[], Any], repeats: int = 5) -> float:
    jax.block_until_ready(f())
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(f())
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def gradient_cost(adata: ad.AnnData, loss: sd.losses.Loss) -> dict[str, float]:
    """The compiled loss and its gradient, as the loop calls them."""
    run = Run(Program.build(to_pseudotime(adata), LEARN), loss, three_ways(adata, loss, 0.2, 0.2, 0))
    args = (run.start, run.settled, run.program.frozen, run.given)
    forward = median_cpu(lambda: run.judged(*args))
    both = median_cpu(lambda: run._step(*args))
    return {"value, CPU s": forward, "value and gradient, CPU s": both, "ratio": both / forward}


@contextmanager
def first_step() -> Iterator[list[float]]:
    """A list that will hold the wall and the CPU time at the end of the first step of the loop."""
    reached: list[float] = []
    one = _training._Descent._one

    def timed(self: Any, step: int) -> bool:
        going = one(self, step)
        if not reached:
            jax.block_until_ready(self.params)
            reached.extend((time.perf_counter(), time.process_time()))
        return going

    _training._Descent._one = timed
    try:
        yield reached
    finally:
        _training._Descent._one = one


def loop_cost(fit: Callable[[int], Any], steps: int) -> dict[str, float]:
    """The first step, a fit of one step, and what a further step costs."""
    wall, cpu = time.perf_counter(), time.process_time()
    with first_step() as reached:
        fit(1)
    first = {"to the first step, s": reached[0] - wall, "first step, CPU s": reached[1] - cpu}
    first |= {"one step, s": time.perf_counter() - wall, "one step, CPU s": time.process_time() - cpu}
    again = time.perf_counter()
    fit(1)
    once = time.perf_counter() - again
    again = time.perf_counter()
    fit(1 + steps)
    return first | {"a step of the loop, s": (time.perf_counter() - again - once) / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = data(args.n, args.genes)
    of_time, of_label = sd.losses.correlation("dpt_pseudotime", "time"), sd.losses.cross_entropy("X_pca", "label")
    settings = {"progress": False, "refresh_every": 10}
    results: dict[str, dict[str, float]] = {}

    def by_time(steps: int) -> Any:
        return sd.fit(to_pseudotime(adata), of_time, learn=LEARN, n_steps=steps, **settings)

    def by_label(steps: int) -> Any:
        learn = ["highly_variable_genes.shift", "pca"]
        return sd.fit(to_components(adata), of_label, learn=learn, n_steps=steps, batch_size=args.batch, **settings)

    results["six steps, all cells"] = loop_cost(by_time, args.steps)
    results["six steps, one gradient"] = gradient_cost(adata, of_time)
    results[f"four steps, minibatches of {args.batch}"] = loop_cost(by_label, args.steps)
    results["process"] = {"most memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    for name, found in results.items():
        print(f"{name:>36}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
