"""Do standard errors by thinning cover what an independent count of the molecules gives?

    python benchmarks/uncertainty.py [--splits 3] [--replicates 12] [--cells 800] [--starts]

The molecules are dealt into two halves; each half gets a pseudotime (1,000 variable genes of the 3,000 most frequent,
30 components, 15 neighbours) and standard errors. Shares of the cells whose two pseudotimes differ by less than 1,
1.645 and 1.96 joint standard errors: .683, .90 and .95 are stated. "se" and "apart" are the median joint standard error
and the root mean square of the differences. --starts counts instead what the solvers of one replicate save when they
start at the eigenvectors of another: products with the matrix, for 50 components and for a diffusion map, all cells.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

import scdiffx as sd
from scdiffx.ops._diffusion import transitions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LEVELS = (1.0, 1.645, 1.96)


def load(name: str, cells: int) -> tuple[ad.AnnData, int]:
    adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    if name == "paul15":
        adata = adata[adata.obs["paul15_clusters"].astype(str).str.contains("Ery|MEP")]
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:cells]]
    frequent = np.sort(np.argsort(-np.asarray(adata.X.sum(0)).ravel())[:3000])
    adata = adata[:, frequent].copy()
    first = adata.obs["paul15_clusters"] == "7MEP" if name == "paul15" else adata.obs["zone"] == 0
    return adata, int(np.flatnonzero(first)[0])


def half(adata: ad.AnnData, x: sp.csr_matrix, root: int, replicates: int) -> tuple[np.ndarray, np.ndarray]:
    one = ad.AnnData(x.astype(np.float32), obs=adata.obs.copy(), var=adata.var.copy())
    plan = sd.plan(one)
    sd.pp.normalize_total(plan)
    sd.pp.log1p(plan)
    sd.pp.highly_variable_genes(plan, n_top_genes=1000)
    sd.pp.pca(plan, n_comps=30)
    sd.pp.neighbors(plan)
    sd.tl.pseudotime(plan, root=root)
    sd.tl.uncertainty(plan, "dpt_pseudotime", n_replicates=replicates, progress=False)
    plan.apply()
    return one.obs["dpt_pseudotime"].to_numpy(np.float64), one.obs["dpt_pseudotime_se"].to_numpy(np.float64)


def starts() -> None:
    """Print products with the covariance and the transition matrix of a replicate, from nothing and from another's."""
    import jax
    import jax.numpy as jnp

    from scdiffx._core.eigsh import eigsh
    from scdiffx._core.graph import Graph

    adata = ad.read_h5ad(DATA / "paul15" / "paul15.h5ad")
    whole, rng = sp.csr_matrix(adata.X), np.random.default_rng(0)
    before: dict[str, jax.Array] = {}
    for replicate in range(3):
        one = ad.AnnData(whole.copy(), obs=adata.obs[[]])
        one.X.data = rng.binomial(whole.data.astype(int), 0.5).astype(np.float32)
        sd.pp.normalize_total(one)
        sd.pp.log1p(one)
        sd.pp.pca(one)
        sd.pp.neighbors(one)
        covariance = np.cov(one.X.toarray().T)
        with jax.enable_x64(True):
            graph = Graph.from_scipy(one.obsp["connectivities"].astype(np.float64))
            cases = {"components": (jnp.asarray(covariance), 50, 1e-5), "diffusion map": (transitions(graph), 15, 1e-7)}
            for name, (matrix, k, tol) in cases.items():
                found = [eigsh(matrix, k, tol=tol)]
                if name in before:
                    found.append(eigsh(matrix, k, tol=tol, start=before[name]))
                before[name] = found[0].vectors
                counts = [f"{int(f.n_matvecs)}{'' if bool(f.converged) else ' (not converged)'}" for f in found]
                print(f"replicate {replicate}, {name}: {', '.join(counts)} products", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--replicates", type=int, default=12)
    parser.add_argument("--cells", type=int, default=800)
    parser.add_argument("--starts", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.starts:
        starts()
        return
    for name in ("moor_villus", "paul15"):
        adata, root = load(name, args.cells)
        whole = sp.csr_matrix(adata.X)
        for split in range(args.splits):
            start = time.process_time()
            rng = np.random.default_rng(split)
            first = whole.copy()
            first.data = rng.binomial(whole.data.astype(int), 0.5).astype(np.float32)
            (a, se_a), (b, se_b) = (half(adata, x.tocsr(), root, args.replicates) for x in (first, whole - first))
            error = np.sqrt(se_a**2 + se_b**2)
            there = error > 0
            within = [float((np.abs(a - b)[there] < level * error[there]).mean()) for level in LEVELS]
            print(
                f"{name:<12} split {split}: within {' '.join(f'{w:.3f}' for w in within)}; se {np.median(error):.3f}, "
                f"apart {np.sqrt(np.mean((a - b) ** 2)):.3f}, correlation {np.corrcoef(a, b)[0, 1]:.3f}; "
                f"{time.process_time() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
