"""Matrices that functions of `sd.pp` and `sd.tl` read: every format, layers, impossible values, data out of memory."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from binding_cases import CASES, Case
from bindings import (
    FORMATS,
    OF_MATRIX,
    REWRITTEN,
    STREAMED,
    assert_refuses,
    assert_wrote,
    call,
    each,
    function_named,
    kind,
    result,
    source,
)
from helpers import contents, same


def small_integers(case: Case) -> sp.csr_matrix:
    """A matrix whose values are the same as integers, float32 and float64, and whose exponentials are finite."""
    matrix = source("counts").X
    matrix.data = np.minimum(matrix.data, 6)
    return matrix


# The others differ from these in what numpy and scipy make of them, and all functions read them by the same few lines.
OTHER_FORMATS = {"normalize_total", "log1p", "scale", "scale_uncentred", "hvg", "hvg_v3", "pca", "split_counts"}
FORMATTED = [
    pytest.param(
        case,
        form,
        marks=[pytest.mark.slow] if case.slow or form not in ("csc_array", "dense") else [],
        id=f"{case.name}-{form}",
    )
    for case in OF_MATRIX
    for form in FORMATS
    if form in ("csc_array", "dense") or case.name in OTHER_FORMATS
]


@functools.cache
def result_of_integers(name: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    adata = source(case.source)
    adata.X = small_integers(case)
    call(case, adata)
    return contents(adata)


@pytest.mark.parametrize(("case", "form"), FORMATTED)
def test_every_matrix_format_gives_the_same(case: Case, form: str) -> None:
    expected = result_of_integers(case.name)
    adata = source(case.source)
    adata.X = given = FORMATS[form](small_integers(case))
    call(case, adata)
    found = contents(adata)
    for path in case.writes:
        a, b = (x[path].toarray() if sp.issparse(x[path]) else x[path] for x in (expected, found))
        if kind(a).startswith("float"):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5 * np.nanmax(np.abs(a)), err_msg=path)
        elif isinstance(a, pd.DataFrame):
            ranked = "gene" in a
            rows = [table.sort_values(["group", "gene"], ignore_index=True) if ranked else table for table in (a, b)]
            pd.testing.assert_frame_equal(*rows, rtol=1e-3, atol=1e-5)
        else:
            assert same(a, b), path
    if "X" in case.writes and case.name != "scale":
        assert type(found["X"]) is type(given)
        assert found["X"].dtype == (given.dtype if given.dtype.kind == "f" else np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csc_array", "dense", "dask"])
def test_velocity_reads_layers_of_every_format(form: str) -> None:
    adata = source("spliced")
    case = next(case for case in CASES if case.name == "velocity_deterministic")
    for layer in ("spliced", "unspliced"):
        if form == "dask":
            array = pytest.importorskip("dask.array", reason="dask is not installed")
            adata.layers[layer] = array.from_array(adata.layers[layer].toarray())
        else:
            adata.layers[layer] = FORMATS[form](adata.layers[layer])
    if form == "dask":
        with pytest.raises(TypeError, match="dask"):
            call(case, adata)
    else:
        call(case, adata)
        np.testing.assert_allclose(adata.layers["velocity"], result(case).layers["velocity"], rtol=1e-4, atol=1e-6)


@each([case for case in OF_MATRIX if "layer" in inspect.signature(function_named(case.function)).parameters])
def test_layer(case: Case) -> None:
    plain, layered = source(case.source), source(case.source)
    layered.layers["here"] = plain.X.copy()
    layered.X = sp.csr_matrix(plain.shape, dtype=np.float32)
    before = contents(layered)
    call(case, layered, layer="here")
    written = {"layers/here" if path == "X" else path: value for path, value in case.writes.items()}
    assert_wrote(before, layered, written)
    found, expected = contents(layered), contents(result(case))
    for path in case.writes:
        if "/params" not in path:
            assert same(found["layers/here" if path == "X" else path], expected[path]), path


def poisoned(case: Case, value: float, form: str) -> tuple[ad.AnnData, str]:
    """The source with one impossible value, and the words of the error that names its place."""
    adata = source(case.source)
    adata.X = FORMATS.get(form, sp.csr_matrix)(adata.X)
    cell, gene = 4, int(adata.X[[4]].nonzero()[1][3])
    if sp.issparse(adata.X):
        matrix = adata.X.tolil()
        matrix[cell, gene] = value
        adata.X = FORMATS.get(form, sp.csr_matrix)(matrix.tocsr())
    else:
        adata.X[cell, gene] = value
    return adata, re.escape(f"cell {adata.obs_names[cell]!r} and gene {adata.var_names[gene]!r}")


@each(OF_MATRIX)
@pytest.mark.parametrize("form", ["csr", "csc_matrix", "dense"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(case: Case, form: str, value: float) -> None:
    adata, where = poisoned(case, value, form)
    assert_refuses(case, adata, ValueError, f"{value}.*{where}.*not finite")


@each([case for case in OF_MATRIX if case.counts])
@pytest.mark.parametrize("form", ["csr", "dense"])
def test_negative_counts_are_refused(case: Case, form: str) -> None:
    adata, where = poisoned(case, -1, form)
    assert_refuses(case, adata, ValueError, f"-1.*{where}.*negative")


@each([case for case in OF_MATRIX if "layer" in inspect.signature(function_named(case.function)).parameters])
def test_unknown_layer(case: Case) -> None:
    assert_refuses(case, source(case.source), KeyError, r"'absent'.*Available: \['spare'\]", layer="absent")


@each(OF_MATRIX)
def test_missing_matrix(case: Case) -> None:
    adata = source(case.source)
    adata.X = None
    assert_refuses(case, adata, ValueError, "None")


@each([case for case in OF_MATRIX if case.name not in STREAMED])
def test_backed_data_are_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "backed.h5ad"
    source(case.source).write_h5ad(path)
    adata = ad.read_h5ad(path, backed="r")
    before = {where: list(getattr(adata, where)) for where in ("obs", "var", "obsm", "varm", "obsp", "uns", "layers")}
    with pytest.raises(TypeError, match="in a file"):
        call(case, adata)
    assert before == {where: list(getattr(adata, where)) for where in before}
    adata.file.close()


@each([case for case in OF_MATRIX if case.name not in STREAMED + REWRITTEN])
def test_dask_is_refused(case: Case) -> None:
    array = pytest.importorskip("dask.array", reason="dask is not installed")
    adata = source(case.source)
    adata.X = array.from_array(adata.X.toarray())
    with pytest.raises(TypeError, match="to_memory"):
        call(case, adata)
