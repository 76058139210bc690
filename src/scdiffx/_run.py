"""The main job: from a matrix to clusters and pseudotime, with figures and a summary."""

from __future__ import annotations

import platform
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from scdiffx import __version__
from scdiffx._input import Source, prepared
from scdiffx._slots import matrix_of
from scdiffx.pp._pca import default_keys
from scdiffx.tl._pseudotime import root_index

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["InputError", "Options", "run"]

MIN_CELLS = 20
MIN_GENES = 3
_STEPS = 9
_PACKAGES = ("jax", "anndata", "scanpy", "numpy", "scipy")


class InputError(Exception):
    """What was asked for cannot be done; the message is for the person who asked."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `python -m scdiffx run`, by the names of the command line."""

    file: Path | None = None
    out: Path = Path("scdiffx-out")
    layer: str | None = None
    n_top_genes: int = 2000
    n_comps: int | None = None
    n_neighbors: int = 15
    resolution: float = 1.0
    root: str | None = None
    root_group: str | None = None
    seed: int = 0
    figures: bool = True
    quiet: bool = False


@dataclass
class Clock:
    """Times the steps, shows where the job is, and turns what a step cannot do into an `InputError`."""

    bar: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.bar.set_description(f"{name:<18}")
        start = time.perf_counter()
        try:
            yield
        except (ValueError, KeyError, OSError) as error:
            # str of a KeyError is the repr of its message
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise InputError(f"{name}: {message}") from error
        self.seconds[name] = time.perf_counter() - start
        self.bar.update()


def run(options: Options) -> str:
    """Analyse a file, or the data set that scanpy ships, and write results into a folder; returns the summary.

    Writes `result.h5ad`, `summary.txt` and, unless switched off, `variance.png`, `clusters.png` and `pseudotime.png`.

    Raises
    ------
    InputError
        If the input cannot be read or analysed, or the folder cannot be written.
    """
    from scdiffx._log import progress_bar

    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        bar = progress_bar(_STEPS, "", not options.quiet)
        try:
            clock = Clock(bar)
            with clock.step("read"):
                options.out.mkdir(parents=True, exist_ok=True)
                source, name = _read(options)
            facts = _analyse(source, options, clock)
            with clock.step("write"):
                files = _write(source.adata, options)
        finally:
            bar.close()
    notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    times = {**clock.seconds, "total": time.perf_counter() - start}
    files = [options.out / "summary.txt", *files]
    summary = _summary(name, facts, times, files, notes)
    files[0].write_text(summary + "\n", encoding="utf-8")
    return summary


def _read(options: Options) -> tuple[Source, str]:
    if options.file is None:
        from scdiffx import datasets

        return prepared(datasets.pbmc68k_counts(), options.layer), (
            "700 blood cells that ship with scanpy (pbmc68k_reduced); counts recovered from its logarithms, "
            "as `scdiffx.datasets.pbmc68k_counts` describes"
        )
    path = options.file
    if not path.exists():
        raise InputError(f"there is no file {path}")
    import anndata

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*names are not unique", UserWarning)
            adata = anndata.read_h5ad(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read as an h5ad file: {error}") from error
    for names in ("obs", "var"):
        if not getattr(adata, f"{names}_names").is_unique:
            getattr(adata, f"{names}_names_make_unique")()
            warnings.warn(f"{names}_names were not unique; numbers were appended", UserWarning, stacklevel=2)
    if adata.n_obs < MIN_CELLS or adata.n_vars < MIN_GENES:
        raise InputError(
            f"{path} has {adata.n_obs} cells and {adata.n_vars} genes; "
            f"the analysis needs at least {MIN_CELLS} cells and {MIN_GENES} genes"
        )
    return prepared(adata, options.layer), str(path)


def _analyse(source: Source, options: Options, clock: Clock) -> dict[str, str]:
    """Run the steps on the AnnData; returns what the summary says about them."""
    from scdiffx import pp, tl

    adata = source.adata
    facts = {"cells": f"{adata.n_obs}", "genes": f"{adata.n_vars}"}
    candidates, rule = root_candidates(adata, options.root, options.root_group)
    with clock.step("normalise"):
        facts["matrix"] = f"{source.held}; {_normalise(adata, source.kind)}"
    with clock.step("variable genes"):
        pp.highly_variable_genes(adata, n_top_genes=min(options.n_top_genes, adata.n_vars))
        every = (
            f" (all, as there are no more than {options.n_top_genes})" if adata.n_vars <= options.n_top_genes else ""
        )
        facts["variable genes"] = f"{adata.var['highly_variable'].sum()} of {adata.n_vars}{every}"
    with clock.step("pca"):
        pp.pca(adata, options.n_comps)
        share = adata.uns[default_keys()[2]]["variance_ratio"]
        facts["components"] = f"{len(share)}, with {share.sum():.1%} of the variance of these genes"
    with clock.step("neighbours"):
        pp.neighbors(adata, min(options.n_neighbors, adata.n_obs), use_rep=default_keys()[0], rng=options.seed)
        parts = connected_components(adata.obsp["connectivities"], directed=False)[0]
        facts["neighbours"] = f"{adata.uns['neighbors']['params']['n_neighbors']} a cell; connected parts: {parts}"
    with clock.step("leiden"):
        tl.leiden(adata, options.resolution, rng=options.seed)
        facts["clusters"] = _clusters(adata, options.resolution)
    with clock.step("diffusion map"):
        tl.diffmap(adata)
    with clock.step("pseudotime"):
        root = choose_root(adata, candidates)
        tl.pseudotime(adata, root=root)
        facts["root"] = f"{adata.obs_names[root]} (index {root}): {rule}"
        facts["pseudotime"] = _reach(adata.obs["dpt_pseudotime"].to_numpy())
    return facts


def _normalise(adata: AnnData, kind: str) -> str:
    """Bring X to logarithms of normalised values; returns what was done."""
    from scdiffx import pp

    if kind == "log":
        adata.uns.setdefault("log1p", {})
        return "used as they are"
    adata.uns.pop("log1p", None)
    done = "log1p taken"
    if kind != "normalised":
        adata.layers["counts"] = matrix_of(adata).copy()
        pp.normalize_total(adata)
        done = "each cell scaled to the median total, then log1p taken; layers['counts'] keeps what X held"
    pp.log1p(adata)
    return done


def root_candidates(adata: AnnData, root: str | None, group: str | None) -> tuple[np.ndarray | None, str]:
    """The cells that the root can be chosen from, and the words for it; None where nothing is known.

    Given by name or index, or as a group ``KEY=VALUE`` of obs, or by ``uns["iroot"]``, in this order.
    """
    if root is not None:
        if root in adata.obs_names:
            return np.array([adata.obs_names.get_loc(root)]), "given by name"
        if root.isdecimal() and int(root) < adata.n_obs:
            return np.array([int(root)]), "given by index"
        raise InputError(f"--root {root}: neither a cell name nor an index below {adata.n_obs}")
    if group is not None:
        return _members(adata, group), f"the cell of {group} nearest to the group's mean in the principal components"
    if "iroot" in adata.uns:
        return np.array([root_index(adata, None)]), "uns['iroot'] of the input"
    return None, (
        "arbitrary, an extreme cell of the first diffusion component that is not stationary; "
        "choose a biological start with --root or --root-group"
    )


def _members(adata: AnnData, group: str) -> np.ndarray:
    key, equals, value = group.partition("=")
    if not equals:
        raise InputError(f"--root-group {group}: expected KEY=VALUE")
    if key not in adata.obs:
        raise InputError(f"--root-group {group}: {key!r} is not in obs. Available: {list(adata.obs)}")
    names = adata.obs[key].astype(str)
    members = np.flatnonzero(names == value)
    if not len(members):
        raise InputError(f"--root-group {group}: no such group. Available: {sorted(names.unique())[:40]}")
    return members


def choose_root(adata: AnnData, candidates: np.ndarray | None) -> int:
    """The root among the candidates: nearest to their mean in the principal components.

    With None, the cell with the largest absolute value in the first diffusion component that is not stationary, in the
    largest connected part of the graph.
    """
    if candidates is None:
        return _extreme_cell(adata)
    points = np.asarray(adata.obsm[default_keys()[0]])[candidates]
    return int(candidates[np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1))])


def _extreme_cell(adata: AnnData) -> int:
    n_parts, part = connected_components(adata.obsp["connectivities"], directed=False)
    largest = np.flatnonzero(part == np.bincount(part).argmax())
    # Each connected part has a stationary component. Of the rest, the first that lives on the largest part.
    moving = np.asarray(adata.obsm["X_diffmap"], np.float64)[:, n_parts:]
    if not moving.shape[1]:
        return int(largest[0])
    here = np.square(moving[largest]).sum(axis=0) / np.square(moving).sum(axis=0)
    column = int(np.argmax(here > 0.5)) if (here > 0.5).any() else int(np.argmax(here))
    return int(largest[np.argmax(np.abs(moving[largest, column]))])


def _clusters(adata: AnnData, resolution: float) -> str:
    sizes = adata.obs["leiden"].value_counts(sort=False)
    lines = [f"{len(sizes)} (Leiden, resolution {resolution:g}), with cells"]
    return "\n".join([*lines, *(f"{name:>4} {size:>8}  {size / adata.n_obs:6.1%}" for name, size in sizes.items())])


def _reach(time: np.ndarray) -> str:
    finite = time[np.isfinite(time)]
    lost = len(time) - len(finite)
    text = f"reaches {len(finite)} of {len(time)} cells; median {np.median(finite):.3f} of 1"
    return text if not lost else f"{text}; the other {lost} are not connected to the root, their pseudotime is infinite"


def _write(adata: AnnData, options: Options) -> list[Path]:
    files = []
    if options.figures:
        from scdiffx.pl._report import save_figures

        files = save_figures(adata, options.out, variance_ratio=adata.uns[default_keys()[2]]["variance_ratio"])
    import anndata

    # Newer files hold text in a form that anndata 0.12 reads, but writes only on demand.
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(options.out / "result.h5ad")
    return [options.out / "result.h5ad", *files]


def _summary(name: str, facts: dict[str, str], times: dict[str, float], files: list[Path], notes: list[str]) -> str:
    import jax

    devices = jax.devices()
    device = f"{devices[0].platform} ({devices[0].device_kind})" if devices[0].platform != "cpu" else "cpu"
    versions = [f"Python {platform.python_version()}", *(f"{p} {metadata.version(p)}" for p in _PACKAGES)]
    rows = {
        "input": name,
        **facts,
        "seconds": "\n".join(["loading and compiling included", *(f"{k:<16} {v:6.1f}" for k, v in times.items())]),
        "device": device if len(devices) == 1 else f"{device}, 1 of {len(devices)}",
        "versions": ", ".join(versions),
        "files": "\n".join(str(path) for path in files),
        **({"warnings": "\n".join(notes)} if notes else {}),
    }
    lines = [f"scdiffx {__version__}"]
    for title, text in rows.items():
        for i, line in enumerate(text.split("\n")):
            lines += textwrap.wrap(
                line,
                110,
                initial_indent=f"{title if i == 0 else '':<16}",
                subsequent_indent=" " * 16,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
            )
    return "\n".join(lines)
