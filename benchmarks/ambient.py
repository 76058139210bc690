"""Ambient RNA: planted fractions, clean cells and a real soup, beside SoupX's automatic estimate.

    python benchmarks/ambient.py [planted] [clean] [soup] [size] [--seeds 0 1]

planted: a fraction drawn from 2 to 30 % for each cell is thinned away and as many molecules of the soup are added, so
depths stay. Correlation and mean absolute error of the fractions over the cells, with known types ("types") and with
clusters found by the method ("clusters"), beside SoupX's one level for all cells (autoEstCont, in numpy below, told the
types; "-" where it finds no marker) and the best constant, which is told the mean. "told" is the maximum of the Poisson
likelihood that is told the soup and each type's composition before planting: natural variation and depth alone stand
between it and the truth. Real cells hold a soup of their own, of unknown size. "cleaned" cells had SoupX's own
correction before planting, at the level it estimates (at 10 % where it finds no marker), so that the planted fraction
is nearly all there is; in the others what was there before counts as error. The soup is that of the data set, or the
average cell, and the methods are given 500,000 molecules of it.

clean: the mean fraction found in cells without planted soup: simulated ones and cleaned ones. "raw" are real cells.

soup: soupx_pbmc with its measured soup. Falls of immunoglobulins and haemoglobins where they are not made, of markers
where they are made, and the exactness of native + removed = observed. A burst is a count that a cell half of which is
soup would hold with probability 1e-6; these are doublets and misplaced cells, whose molecules are their own.

size: processor time and memory of 20,000 cells x 20,000 genes of six known types with 3,000 molecules each.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp
from neighbors import peak_mib, reset_peak
from scipy import stats

import scdiffx as sd

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {"soupx_pbmc": "annotation", "paul15": "paul15_clusters", "pbmc_4271": "label", "mixology_sc": "type"}
IMMUNOGLOBULINS = "IGKC IGHM IGHD IGHA1 IGHA2 IGHG1 IGHG2 IGHG3 IGHG4 IGLC2 IGLC3 JCHAIN"
HAEMOGLOBINS = "HBB HBA1 HBA2 HBD"
MARKERS = {
    "T_CD4": "CD3D CD3E IL7R TRAC",
    "T_CD8": "CD3D CD3E CD8A CD8B TRAC",
    "B": "CD79A MS4A1 CD79B IGKC IGHM IGLC2",
    "MNP": "LYZ S100A8 S100A9 CST3 FCN1",
    "NK": "GNLY NKG7 KLRD1 PRF1",
}


class Cells(NamedTuple):
    """Counts, type codes, soup, and the counts before planting with the fractions planted."""

    counts: sp.csr_matrix
    types: np.ndarray
    soup: np.ndarray
    before: sp.csr_matrix
    truth: np.ndarray


def read(name: str) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Counts, type codes and the soup: the measured one where there is one."""
    adata = ad.read_h5ad(DATA / name / f"{name}.h5ad")
    if name == "mixology_sc":
        adata = adata[adata.obs["batch"].astype(str).str.contains("5cl")].copy()
        adata.obs["type"] = adata.obs["cell_line_demuxlet"].astype(str) + adata.obs["batch"].astype(str)
    counts = sp.csr_matrix(adata.X).astype(np.float64)
    types = np.unique(adata.obs[SETS[name]].astype(str), return_inverse=True)[1]
    soup = adata.var["soup_profile"].to_numpy(np.float64) if "soup_profile" in adata.var else average(counts)
    return counts, types, soup


def average(counts: sp.csr_matrix) -> np.ndarray:
    return np.asarray(counts.sum(0)).ravel() / counts.sum()


def by_type(counts: sp.csr_matrix, types: np.ndarray) -> np.ndarray:
    member = sp.csr_matrix((np.ones(len(types)), (types, np.arange(len(types)))))
    return np.asarray((member @ counts).todense())


def planted(counts: sp.csr_matrix, types: np.ndarray, soup: np.ndarray, seed: int) -> Cells:
    rng = np.random.default_rng(seed)
    depth = np.asarray(counts.sum(1)).ravel()
    fraction = rng.uniform(0.02, 0.3, len(depth))
    kept = counts.copy()
    kept.data = rng.binomial(counts.data.astype(int), np.repeat(1 - fraction, np.diff(counts.indptr))).astype(float)
    added = sp.vstack([sp.csr_matrix(rng.multinomial(n, soup)) for n in rng.poisson(depth * fraction)]).tocsr()
    total = sp.csr_matrix(kept + added)
    truth = np.asarray(added.sum(1)).ravel() / np.maximum(np.asarray(total.sum(1)).ravel(), 1)
    return Cells(total, types, rng.multinomial(500_000, soup) / 500_000, counts, truth)


def adjusted(p: np.ndarray) -> np.ndarray:
    return stats.false_discovery_control(p, axis=0)


def soupx(counts: sp.csr_matrix, types: np.ndarray, soup: np.ndarray) -> float | None:
    """SoupX 1.6: autoEstCont with its defaults. None where it finds no marker."""
    n, k = counts.shape[0], types.max() + 1
    found = counts.copy()
    found.data = (found.data > 0.9).astype(float)
    observed, size = by_type(found, types), np.bincount(types, minlength=k)
    score = observed / size[:, None] * np.log(n / np.maximum(observed.sum(0), 1))
    rare = adjusted(stats.hypergeom.sf(observed - 1, n, observed.sum(0)[None], size[:, None]).T).T < 0.01
    best = np.where(rare & (observed > 0), score, -1).max(0)
    genes = np.flatnonzero((best > 1) & (soup > np.quantile(soup, 0.9)))
    genes = genes[np.argsort(-best[genes], kind="stable")][:100]
    if not len(genes):
        return None
    depth = np.asarray(counts.sum(1)).ravel()
    part = counts[:, genes].toarray()
    native = adjusted(stats.poisson.sf(part - 1, depth[:, None] * soup[genes] * 0.8)) < 0.2
    totals = by_type(counts, types)
    use = by_type(sp.csr_matrix(native.astype(float)), types) == 0
    if not use.any():
        return None
    seen, expected = totals[:, genes][use], (totals.sum(1)[:, None] * soup[genes])[use]
    v = (0.1 / 0.05) ** 2
    shape = 1 + v**-2 / 2 * (1 + np.sqrt(1 + 4 * v))
    scale = 0.05 / (shape - 1)
    grid = np.arange(0.01, 0.8, 0.001)
    density = [stats.gamma.pdf(g, shape + seen, scale=scale / (1 + scale * expected)).mean() for g in grid]
    return float(grid[np.argmax(density)])


def cleaned(counts: sp.csr_matrix, types: np.ndarray, soup: np.ndarray) -> sp.csr_matrix:
    """SoupX's correction: its level of the soup's counts is subtracted in each type, and dealt to its cells."""
    level = soupx(counts, types, soup) or 0.1
    totals = by_type(counts, types)
    expected = level * totals.sum(1, keepdims=True) * soup
    keep = np.clip(1 - expected / np.where(totals > 0, totals, 1), 0, 1)
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    new = counts.copy()
    new.data = (
        np.random.default_rng(0).binomial(counts.data.astype(int), keep[types[row], counts.indices]).astype(float)
    )
    new.eliminate_zeros()
    return new


def simulated(de_prob: float, de_fac_loc: float, de_fac_scale: float) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    adata = sd.datasets.splatter(
        1000, 3000, lib_loc=8.5, group_prob=[0.2] * 5, de_prob=de_prob, de_fac_loc=de_fac_loc, de_fac_scale=de_fac_scale
    )
    counts = sp.csr_matrix(adata.X).astype(np.float64)
    return counts, adata.obs["group"].cat.codes.to_numpy(np.int64), average(counts)


def told(cells: Cells) -> np.ndarray:
    native = by_type(cells.before, cells.types) + 1e-9
    native /= native.sum(1, keepdims=True)
    grid = np.linspace(0, 0.6, 121)
    found = np.zeros(len(cells.types))
    for c, p in enumerate(native):
        own = cells.types == c
        mixture = np.log((1 - grid[:, None]) * p + grid[:, None] * cells.soup)
        found[own] = grid[(cells.counts[own] @ mixture.T).argmax(1)]
    return found


def ours(cells: Cells, types: bool) -> np.ndarray:
    adata = ad.AnnData(cells.counts.astype(np.float32))
    adata.obs["type"] = cells.types.astype(str)
    sd.pp.remove_ambient(adata, empty_profile=cells.soup, groupby="type" if types else None)
    return adata.obs["ambient_fraction"].to_numpy(np.float64)


def bases() -> Iterator[tuple[str, tuple[sp.csr_matrix, np.ndarray, np.ndarray]]]:
    for name in SETS:
        counts, types, soup = read(name)
        new = cleaned(counts, types, soup)
        yield f"{name}, cleaned", (new, types, soup if name == "soupx_pbmc" else average(new))
        yield f"{name}, raw", (counts, types, soup)
    yield "splatter, distinct groups", simulated(0.2, 1.5, 1.0)
    yield "splatter, default groups", simulated(0.1, 0.1, 0.4)


def show_planted(seeds: list[int]) -> None:
    print(f"{'correlation / error':<26} {'types':>13} {'clusters':>13} {'told':>13} {'SoupX':>7} {'constant':>8}")
    for name, base in bases():
        rows = []
        for seed in seeds:
            cells = planted(*base, seed)
            level, t = soupx(cells.counts, cells.types, cells.soup), cells.truth
            row: list[float] = []
            for f in (ours(cells, types=True), ours(cells, types=False), told(cells)):
                row += [np.corrcoef(f, t)[0, 1] if f.std() > 0 else 0, np.abs(f - t).mean()]
            rows.append([*row, np.nan if level is None else np.abs(level - t).mean(), np.abs(t - t.mean()).mean()])
        m = np.mean(rows, axis=0)
        pairs = " ".join(f"{m[i]:>6.3f} {m[i + 1]:>6.3f}" for i in (0, 2, 4))
        print(f"{name:<26} {pairs} {'-' if np.isnan(m[6]) else f'{m[6]:.3f}':>7} {m[7]:>8.3f}", flush=True)


def show_clean() -> None:
    print(f"{'mean fraction':<26} {'types':>7} {'clusters':>9} {'SoupX':>7}")
    for name, (counts, types, soup) in bases():
        cells = Cells(counts, types, soup, counts, np.zeros(len(types)))
        level = soupx(counts, types, soup)
        row = [ours(cells, types=True).mean(), ours(cells, types=False).mean()]
        print(f"{name:<26} {row[0]:>7.3f} {row[1]:>9.3f} {'-' if level is None else f'{level:.3f}':>7}", flush=True)


def fall(before: np.ndarray, after: np.ndarray) -> str:
    return f"{1 - after.sum() / before.sum():.1%} of {before.sum():,.0f}" if before.sum() else "none there"


def show_soup() -> None:
    adata = ad.read_h5ad(DATA / "soupx_pbmc" / "soupx_pbmc.h5ad")
    soup, labels = adata.var["soup_profile"].to_numpy(), adata.obs["annotation"].astype(str).to_numpy()
    counts = sp.csr_matrix(adata.X).astype(np.float64)
    depth = np.asarray(counts.sum(1))
    away = np.isin(labels, ["T_CD4", "T_CD8", "NK", "MNP"])
    level = soupx(counts, np.unique(labels, return_inverse=True)[1], soup) or 0
    results = {"SoupX's formula": cleaned(counts, np.unique(labels, return_inverse=True)[1], soup)}
    print(f"SoupX's level {level:.3f}")
    for name, settings in {
        "types": {"groupby": "annotation"},
        "clusters": {},
        "types, integers": {"groupby": "annotation", "integers": True},
        "types, average cell": {"groupby": "annotation", "empty_profile": None},
    }.items():
        clock = time.process_time()
        result = sd.pp.remove_ambient(adata, **{"empty_profile": soup, **settings}, copy=True)
        clock = time.process_time() - clock
        native = result.layers["decontaminated"]
        exact = ((native + (adata.X - native)) != adata.X).nnz == 0 and native.data.min() >= 0
        exact &= (adata.X - native).data.min() >= 0
        print(f"{name}: mean {result.obs['ambient_fraction'].mean():.3f}, exact {exact}, {clock:.1f} s")
        results[name] = sp.csr_matrix(native).astype(np.float64)
    for name, native in results.items():
        print(name)
        for what, genes in {"immunoglobulins": IMMUNOGLOBULINS, "haemoglobins": HAEMOGLOBINS}.items():
            at = adata.var_names.get_indexer([g for g in genes.split() if g in adata.var_names])
            before, after = (m[away][:, at].toarray() for m in (counts, native))
            burst = stats.poisson.sf(before - 1, 0.5 * depth[away] * soup[at]) < 1e-6
            rest = fall(before[~burst], after[~burst])
            print(f"  {what:<16} {fall(before, after)}; without {burst.sum()} bursts {rest}", end="; ")
            falls = [f"{t} {fall(*(m[labels == t][:, at] for m in (counts, native)))}" for t in sorted({*labels[away]})]
            print(", ".join(falls))
        for cell_type, genes in MARKERS.items():
            at = adata.var_names.get_indexer(genes.split())
            lost = [1 - native[labels == cell_type][:, i].sum() / counts[labels == cell_type][:, i].sum() for i in at]
            print(f"  markers of {cell_type:<6} {max(lost):.1%} at most")


def show_size(n: int = 20_000, genes: int = 20_000, types: int = 6, molecules: int = 3_000) -> None:
    rng = np.random.default_rng(0)
    profile = rng.gamma(0.2, 1, (types, genes))
    profile /= profile.sum(1, keepdims=True)
    codes = rng.integers(types, size=n)
    adata = ad.AnnData(
        sp.vstack([sp.csr_matrix(rng.multinomial(molecules, profile[c]), dtype=np.float32) for c in codes])
    )
    adata.obs["type"] = codes.astype(str)
    reset_peak()
    before, clock = peak_mib(), time.process_time()
    sd.pp.remove_ambient(adata, groupby="type")
    seconds = time.process_time() - clock
    print(
        f"{adata.X.nnz:,} values: {seconds:.0f} s, peak {peak_mib():,.0f} MiB, {before:,.0f} at the start of the call"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["planted", "clean", "soup"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for part in args.parts:
        {"planted": lambda: show_planted(args.seeds), "clean": show_clean, "soup": show_soup, "size": show_size}[part]()


if __name__ == "__main__":
    main()
