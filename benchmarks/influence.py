"""How well the influence of a setting predicts what a plan gives when it is run anew with another.

    python benchmarks/influence.py [--data paul15 moor_villus planted] [--changes 0.01 0.1]

Data: the erythroid side of paul15 and "planted" of attribution.py with its plan (seed 0), 800 cells of moor_villus
(root: the first cell of zone 0). Plan otherwise: normalise, logarithm, 1,000 variable genes, 30 components, 15
neighbours, pseudotime. Each knob is raised by the changes, and the plan is run anew: "held" with all that it had found,
"graph" with neighbours found anew, "anew" with everything found anew. Printed are the root mean square of the actual
change, its correlation with the predicted one, and the root mean square of their difference as a share of the former:
1 is the error of predicting no change.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
from attribution import SIDES, decided, decision, side

import scdiffx as sd
from scdiffx._core.fields import replace
from scdiffx._steps import initialised, restructured

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def ordered(adata: ad.AnnData, root: int) -> sd.Plan:
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan)
    sd.pp.log1p(plan)
    sd.pp.highly_variable_genes(plan, n_top_genes=1000)
    sd.pp.pca(plan, n_comps=30)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=root)
    return plan


def plans(name: str) -> tuple[sd.Plan, list[tuple[str, int | None]]]:
    """A plan, and the targets with their columns."""
    if name == "planted":
        return decided(decision(0, [1.0, 4.0], 4.0)), [("dpt_pseudotime", None), ("lineages_fwd", 0)]
    whole = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    if name == "moor_villus":
        chosen = np.sort(np.random.default_rng(0).choice(whole.n_obs, 800, replace=False))
        part = whole[chosen].copy()
        return ordered(part, int(np.flatnonzero(part.obs["zone"] == 0)[0])), [("dpt_pseudotime", None)]
    part = side(whole, *SIDES["erythroid"][:2])
    return ordered(part, part.uns["iroot"]), [("dpt_pseudotime", None)]


def rerun(plan: sd.Plan, ops: list[Any], name: str, value: float, how: str) -> dict[Any, Any]:
    """All values of the plan run anew with another value of a parameter."""
    step, field = name.rsplit(".", 1)
    at = next(i for i, s in enumerate(plan.steps) if s.name == step)
    used = [s.op for s in plan.steps] if how == "anew" else list(ops)
    with jax.enable_x64(True):
        used[at] = replace(used[at], **{field: jnp.asarray(value, jnp.float32)})
    prepare = {"held": lambda op, args, key: op, "graph": restructured, "anew": initialised}[how]
    return plan.run(ops=used, prepare=prepare)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["paul15", "moor_villus", "planted"])
    parser.add_argument("--changes", type=float, nargs="+", default=[0.01, 0.1])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in args.data:
        plan, targets = plans(name)
        ops, _, values = plan.run()
        for target, column in targets:
            begin = time.process_time()
            sd.tl.influence(plan, target, column=column, key_added="influence")
            seconds = time.process_time() - begin
            slot = plan.slot(target)
            print(f"{name}, {target}: {plan.adata.n_obs} cells, influence {seconds:.1f} s")
            for knob, value in plan.adata.uns["influence"]["values"].items():
                for change in args.changes:
                    predicted = plan.adata.obsm["influence"][knob].to_numpy() * value * change
                    found = []
                    for how in ("held", "graph", "anew"):
                        after = rerun(plan, ops, knob, value * (1 + change), how)
                        moved = np.asarray(after[slot], np.float64) - np.asarray(values[slot], np.float64)
                        moved = moved if column is None else moved[:, column]
                        ok = np.isfinite(moved) & np.isfinite(predicted)
                        size = np.sqrt((moved[ok] ** 2).mean())
                        off = np.sqrt(((predicted - moved)[ok] ** 2).mean())
                        r = np.corrcoef(predicted[ok], moved[ok])[0, 1]
                        found.append(f"{how} {size:.1e} r {r:.3f} error {off / size:.3f}")
                    print(f"  {knob:<28} {value:.4g} +{change:.0%}: " + "; ".join(found), flush=True)


if __name__ == "__main__":
    main()
