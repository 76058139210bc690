"""What the binding tests share: the cells they call functions on, the calls and their results, and what was written."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdiffx as sd
from binding_cases import CASES, Case
from helpers import changed, compilations, contents, pbmc_counts, same

CELLS, GENES = 150, 120
FUNCTIONS = sorted({case.function for case in CASES})
OF_MATRIX = [case for case in CASES if case.matrix]
OF_GRAPH = [case for case in CASES if case.source in ("graph", "rooted")]


def each(cases: list[Case]) -> Any:
    marked = [pytest.param(case, marks=pytest.mark.slow) if case.slow else case for case in cases]
    return pytest.mark.parametrize("case", marked, ids=lambda case: case.name)


def function_named(name: str) -> Callable[..., Any]:
    part, attribute = name.split(".")
    return getattr(getattr(sd, part), attribute)


@functools.cache
def _source(name: str) -> ad.AnnData:
    if name == "counts":
        adata = pbmc_counts(CELLS, GENES)
        adata.obs["batch"] = np.where(np.arange(CELLS) % 3 == 0, "first", "second")
        adata.obs["quality"] = np.linspace(0, 1, CELLS)
        adata.layers["spare"] = adata.X.copy()
        return adata
    earlier, step = {
        "log": ("counts", lambda a: (sd.pp.normalize_total(a), sd.pp.log1p(a))),
        "selected": ("log", lambda a: sd.pp.highly_variable_genes(a, n_top_genes=60)),
        "reduced": ("log", lambda a: sd.pp.pca(a, n_comps=9)),
        "graph": ("reduced", lambda a: sd.pp.neighbors(a, n_neighbors=9)),
        "placed": ("reduced", lambda a: a.obsm.update(spatial=np.asarray(a.obsm["X_pca"][:, 1::-1]))),
        "log_placed": ("log", lambda a: a.obsm.update(spatial=source("reduced").obsm["X_pca"][:, :2])),
        "pieces": ("counts", lambda a: a.obsm.update(spatial=source("reduced").obsm["X_pca"][:, :2])),
        "labelled": ("log", with_known),
        "known": ("counts", with_known),
        "timed": ("reduced", lambda a: a.obs.insert(0, "day", np.arange(CELLS) % 2 * 1.5)),
        "coupled": ("timed", lambda a: sd.tl.ot_trajectory(a, "day")),
        "spliced": ("graph", with_unspliced),
        "stained": ("counts", with_proteins),
        "moving": ("spliced", lambda a: sd.tl.velocity(a, mode="deterministic", min_r2=-9.0)),
        "directed": ("moving", sd.tl.velocity_graph),
        "with_times": ("spliced", timed),
        "rooted": ("graph", lambda a: a.uns.update(iroot=3)),
    }[name]
    adata = source(earlier)
    step(adata)
    return adata


def with_known(adata: ad.AnnData) -> None:
    adata.obs.insert(0, "known", adata.obs["cell_type"].where(np.arange(CELLS) % 3 > 0))


def with_unspliced(adata: ad.AnnData) -> None:
    """Layers of spliced counts, and of unspliced ones that lag behind in some cells."""
    adata.layers["spliced"] = adata.X.copy()
    lag = sp.diags(np.linspace(0.2, 0.6, CELLS)).astype(np.float32)
    adata.layers["unspliced"] = sp.csr_matrix(lag @ adata.X, dtype=np.float32)


def with_proteins(adata: ad.AnnData) -> None:
    """Counts of three proteins, each high in some types of cells."""
    types = adata.obs["cell_type"].cat.codes.to_numpy()[:, None]
    counts = np.random.default_rng(0).poisson(np.where(types % 3 == np.arange(3), 80, 6)).astype(np.float32)
    adata.obsm["protein"] = pd.DataFrame(counts, index=adata.obs_names, columns=["CD3", "CD19", "CD14"])


def timed(adata: ad.AnnData) -> None:
    sd.tl.velocity(adata, mode="dynamical", min_r2=-9.0)
    sd.tl.velocity_graph(adata)


def source(name: str) -> ad.AnnData:
    """Blood cells with real label names such as "CD4+/CD45RO+ Memory", as the named step of a workflow leaves them."""
    return _source(name).copy()


def call(case: Case, adata: ad.AnnData, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function_named(case.function)(adata, **{**case.kwargs, **kwargs})


@functools.cache
def _result(name: str) -> tuple[ad.AnnData, list[str]]:
    case = next(case for case in CASES if case.name == name)
    adata = source(case.source)
    with compilations() as programs:
        assert call(case, adata) is None
    return adata, programs


def result(case: Case) -> ad.AnnData:
    """The AnnData after the call; not to be written to."""
    return _result(case.name)[0]


def kind(value: Any) -> str:
    if isinstance(value, str) and value == "mapping":
        return value
    return str(value.dtype) if hasattr(value, "dtype") else type(value).__name__


def top_paths(paths: set[str]) -> set[str]:
    return {re.sub("/params/.*", "/params", path) for path in paths}


def assert_wrote(before: Mapping[str, Any], adata: ad.AnnData, expected: Mapping[str, str]) -> None:
    after = contents(adata)
    assert top_paths(changed(before, after)) - HISTORY == set(expected)
    assert_one_call_more(before, after)
    assert {path: kind(after[path]) for path in expected} == dict(expected)


HISTORY = {"uns/scdiffx", "uns/scdiffx/history"} | {
    f"uns/scdiffx/session{part}" for part in ("", "/scdiffx", "/jax", "/platform")
}


def assert_one_call_more(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Every call adds one entry to the history, the same keys for all functions."""
    assert set(after) >= HISTORY
    lines = list(after["uns/scdiffx/history"])
    assert lines[:-1] == list(before.get("uns/scdiffx/history", []))


def assert_equal(a: ad.AnnData, b: ad.AnnData, rtol: float = 0.0) -> None:
    """Whether two AnnData hold the same, whichever calls made it."""
    left, right = ({p: v for p, v in contents(x).items() if p not in HISTORY} for x in (a, b))
    assert set(left) == set(right)
    different = [path for path in left if not same(left[path], right[path], rtol=rtol)]
    assert not different


def assert_refuses(
    case: Case, adata: ad.AnnData, error: type[Exception], match: str | None = None, **kwargs: Any
) -> None:
    before = contents(adata)
    with pytest.raises(error, match=match):
        call(case, adata, **kwargs)
    assert not changed(before, contents(adata))


FORMATS: dict[str, Callable[[sp.csr_matrix], Any]] = {
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": lambda m: m.toarray(),
    "dense_fortran": lambda m: np.asfortranarray(m.toarray()),
    "csr_float64": lambda m: m.astype(np.float64),
    "dense_float64": lambda m: m.toarray().astype(np.float64),
    "csr_int": lambda m: m.astype(np.int32),
    "dense_int": lambda m: m.toarray().astype(np.int64),
}


# What these read passes in blocks of rows (tests/test_out_of_core.py); all others need the matrix in memory.
STREAMED = ("hvg", "hvg_batches", "hvg_v3", "pca", "pca_masked", "magic_genes", "ligrec")
REWRITTEN = ("normalize_total", "log1p")


def documented_arguments(case: Case) -> dict[str, str]:
    """The arguments that name keys, given or by default, as they stand in the Returns section."""
    parameters = inspect.signature(function_named(case.function)).parameters
    given = {name: parameter.default for name, parameter in parameters.items()} | dict(case.kwargs)
    return {name: value for name, value in given.items() if isinstance(value, str)}
