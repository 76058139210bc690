"""What every public function of `sd.pp` and `sd.tl` owes the AnnData it is given; `binding_cases.py` has the table."""

from __future__ import annotations

import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import numpy as np
import pytest
import scipy.sparse as sp

import bindings
import record_array_support
import scdiffx as sd
import test_contract
from binding_cases import CASES, Case
from bindings import (
    CELLS,
    FUNCTIONS,
    GENES,
    _result,
    _source,
    assert_equal,
    assert_refuses,
    assert_wrote,
    call,
    documented_arguments,
    each,
    function_named,
    result,
    source,
)
from documented import assert_documented, assert_shapes, entries
from helpers import changed, compilations, contents, same


def test_every_public_function_has_a_case() -> None:
    public = {f"{part}.{name}" for part in ("pp", "tl") for name in getattr(sd, part).__all__}
    # Two return new cells, two take a plan only, two are a model and make one: they have tests of their own.
    apart = {"pp.replicates", "tl.simulate", "tl.ot_interpolate", "tl.uncertainty", "tl.influence"}
    apart |= {"tl.annotation_model", "tl.AnnotationModel"}
    assert public - apart == set(FUNCTIONS)


@each(CASES)
def test_only_the_documented_keys_change(case: Case) -> None:
    assert_wrote(contents(_source(case.source)), result(case), case.writes)
    function, arguments = function_named(case.function), documented_arguments(case)
    assert_documented(function, case.writes, **arguments)
    assert_shapes(function, result(case), case.writes, **arguments)
    if case.keyed is not None:
        assert_documented(function, case.keyed, **{**arguments, "key_added": "mine"})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_documented_key_is_written(name: str) -> None:
    function = function_named(name)
    # A second name of a function shares its cases.
    said = inspect.getdoc(function)
    cases = [case for case in CASES if inspect.getdoc(function_named(case.function)) == said]
    for number, entry in enumerate(entries(function, documented_arguments(cases[0]))):
        if entry.where == "X" or entry.names:
            calls = [entries(function, documented_arguments(case))[number] for case in cases]
            found = any(call.matches(path) for call, case in zip(calls, cases, strict=True) for path in case.writes)
            assert found, f"no case of {name} writes {entry.where}{list(entry.names)}"


@each(CASES)
def test_written_values_live_on_the_host(case: Case) -> None:
    found = contents(result(case))
    assert not [path for path, value in found.items() if isinstance(value, jax.Array)]


# Searches in which the host decides between short programs.
MANY_PROGRAMS = {"align_slices": 100, "velocity_dynamical": 110}


@each(CASES)
def test_a_first_call_compiles_few_programs(case: Case) -> None:
    """What is computed outside of compiled functions costs a program for each operation."""
    programs = _result(case.name)[1]
    assert len(programs) <= MANY_PROGRAMS.get(case.name, 70), sorted(programs)


@each(CASES)
def test_copy_leaves_the_original_alone(case: Case) -> None:
    adata = source(case.source)
    before = contents(adata)
    expected = result(case)
    with compilations() as programs:
        copied = call(case, adata, copy=True)
    assert not programs, "a second call on like data compiled anew"
    assert not changed(before, contents(adata))
    assert copied is not adata
    assert_equal(copied, expected)


@each(CASES)
def test_a_view_becomes_actual_and_its_parent_stays(case: Case) -> None:
    parent = source(case.source)
    before = contents(parent)
    # Couplings and velocity graphs are between all cells in their order. Elsewhere a view of the same size: it compiles
    # nothing anew.
    of_all = case.source in ("coupled", "directed", "with_times")
    view = parent[:, np.arange(GENES) != 2] if of_all else parent[np.arange(CELLS)[::-1]]
    alone = view.copy()
    with pytest.warns(UserWarning, match="view") as caught:
        function_named(case.function)(view, **case.kwargs)
    assert {w.filename for w in caught if "view" in str(w.message)} == {__file__}
    assert not view.is_view
    assert not changed(before, contents(parent))
    call(case, alone)
    assert_equal(view, alone)


@each([case for case in CASES if "key_added" in inspect.signature(function_named(case.function)).parameters])
def test_key_added(case: Case) -> None:
    adata = source(case.source)
    if case.keyed is not None:
        before = contents(adata)
        call(case, adata, key_added="mine")
        assert_wrote(before, adata, case.keyed)
    else:
        assert any(other.keyed is not None for other in CASES if other.function == case.function)


@each(CASES)
def test_what_is_written_can_be_changed(case: Case) -> None:
    adata = result(case)
    values = [adata.X, *adata.layers.values(), *adata.obsm.values(), *adata.varm.values(), *adata.obsp.values()]
    values += [
        value for key in case.writes if key.startswith("uns/") and (value := at_path(adata.uns, key)) is not None
    ]
    for value in values:
        for part in (value.data, value.indices, value.indptr) if sp.issparse(value) else (value,):
            assert not isinstance(part, np.ndarray) or part.flags.writeable


def at_path(uns: Any, path: str) -> Any:
    return functools.reduce(lambda part, key: part[key], path.split("/")[1:], uns)


@each(CASES)
@pytest.mark.parametrize("form", ["h5ad", pytest.param("zarr", marks=pytest.mark.slow)])
def test_round_trip_through_files(case: Case, form: str, tmp_path: Path) -> None:
    written = result(case).copy()
    path = tmp_path / f"written.{form}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(written, f"write_{form}")(path)
        back = getattr(ad, f"read_{form}")(path)
    assert any("/" in name for name in back.obs["cell_type"].cat.categories)
    left, right = contents(written), contents(back)
    assert set(left) == set(right)
    for path in case.writes:
        assert same(left[path], right[path]), path


@each([case for case in CASES if "rng" in inspect.signature(function_named(case.function)).parameters])
def test_seeds(case: Case) -> None:
    adata = source(case.source)
    assert_refuses(case, adata, TypeError, "not both", rng=0, random_state=0)
    assert_refuses(case, adata, TypeError, "rng='seed'", rng="seed")
    assert_refuses(case, adata, ValueError, "negative", random_state=-1)
    seeds = [{"rng": 7}, {"random_state": 7}, {"rng": jax.random.key(7)}]
    copies = [call(case, adata, copy=True, **seed) for seed in seeds]
    for other in copies[1:]:
        assert_equal(copies[0], other)


def test_neighbors_falls_back_to_pca_once() -> None:
    adata, by_hand = source("log"), source("log")
    with pytest.warns(UserWarning, match="Falling back to preprocessing") as caught:
        sd.pp.neighbors(adata, n_neighbors=9)
    assert caught[0].filename == __file__
    sd.pp.pca(by_hand)
    sd.pp.neighbors(by_hand, n_neighbors=9)
    assert_equal(adata, by_hand)
    view = source("log")[:100]
    with pytest.warns(UserWarning, match="view|Falling") as caught:
        sd.pp.neighbors(view, n_neighbors=9)
    assert {w.filename for w in caught} == {__file__}


def test_root_by_name_by_number_and_by_iroot_agree() -> None:
    adata = source("graph")
    results = [sd.tl.pseudotime(adata, root=root, copy=True) for root in (3, adata.obs_names[3], np.int64(3))]
    adata.uns["iroot"] = np.int64(3)
    results.append(sd.tl.dpt(adata, copy=True))
    for other in results[1:]:
        assert same(results[0].obs["dpt_pseudotime"], other.obs["dpt_pseudotime"])
        assert other.uns["iroot"] == 3


def test_warnings_that_scanpy_gives() -> None:
    adata = source("counts")
    adata.X[5] = 0
    adata.X.eliminate_zeros()
    with pytest.warns(UserWarning, match="Some cells have zero counts") as caught:
        sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    with pytest.warns(UserWarning, match="already log-transformed") as again:
        sd.pp.log1p(adata, copy=True)
    with pytest.warns(UserWarning, match="expects raw count data") as counts:
        sd.pp.highly_variable_genes(adata, flavor="seurat_v3", copy=True)
    with pytest.warns(UserWarning, match="densifies") as dense:
        sd.pp.scale(adata)
    assert {w.filename for r in (caught, again, counts, dense) for w in r} == {__file__}


def test_subset_keeps_the_selected_genes() -> None:
    whole, part = source("log"), source("log")
    sd.pp.highly_variable_genes(whole, n_top_genes=40)
    sd.pp.highly_variable_genes(part, n_top_genes=40, subset=True)
    assert list(part.var_names) == list(whole.var_names[whole.var["highly_variable"]])
    assert same(part.X, whole.X[:, whole.var["highly_variable"].to_numpy()])


def test_array_support_has_the_rows_of_quick_cases() -> None:
    quick = [case for case in CASES if not case.slow]
    found = record_array_support.rows(quick, bindings, test_contract)
    assert set(found) <= set(record_array_support.PAGE.read_text().splitlines())


@pytest.mark.slow
def test_the_page_on_array_support_is_up_to_date() -> None:
    assert record_array_support.PAGE.read_text() == record_array_support.page(bindings, test_contract)
