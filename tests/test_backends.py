"""Our functions behind the dispatcher that scanpy is to have: a host of scanpy's own functions, dispatched."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

import scdiffx as sd
from helpers import contents, pbmc_counts, same
from scdiffx._backends import SCANPY

dispatch = pytest.importorskip("scverse_backends", reason="scverse-backends needs Python 3.12")
testing = pytest.importorskip("scverse_backends.testing", reason="scverse-backends needs Python 3.12")


def theirs(name: str) -> Callable[..., Any]:
    places = (sc.pp, sc.tl, sc.external.pp)
    return next(getattr(place, name) for place in places if hasattr(place, name))


@pytest.fixture(scope="module")
def dispatcher() -> Any:
    trusted = {"jax": {"aliases": ["scdiffx"], "package": "scdiffx"}}
    return dispatch.BackendDispatcher(entrypoint_group="scanpy.backends", host_name="scanpy", trusted_backends=trusted)


@pytest.fixture(scope="module")
def host(dispatcher: Any) -> SimpleNamespace:
    made = SimpleNamespace(**{name: dispatcher.backend_dispatch(theirs(name)) for name in [*SCANPY, "combat"]})
    dispatcher.discover()
    return made


@pytest.fixture(scope="module")
def _stages() -> dict[str, ad.AnnData]:
    counts = pbmc_counts(300, 400)
    counts.obs["batch"] = np.where(np.arange(300) % 3 == 0, "first", "second")
    logs = counts.copy()
    sc.pp.normalize_total(logs)
    sc.pp.log1p(logs)
    graph = logs.copy()
    sc.pp.pca(graph, n_comps=10)
    sd.pp.neighbors(graph, 12)
    graph.uns["iroot"] = 3
    sc.tl.diffmap(graph)
    return {"counts": counts, "logs": logs, "graph": graph}


# The call, the data it is for, keys to compare with scanpy's (up to signs where they are components), and settings of
# scanpy's call that make the two comparable. Without keys, the functions' own tests compare the numbers, for scanpy's
# are compiled for many seconds or drawn: here the keys, and ours called directly.
CALLS: Mapping[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "normalize_total": ("counts", {"target_sum": 1e4}, ("X",)),
    "log1p": ("counts", {"base": 2}, ("X", "uns/log1p/base")),
    "scale": ("logs", {"max_value": 3}, ("X", "var/mean", "var/std")),
    "highly_variable_genes": ("logs", {"n_top_genes": 50}, ("var/highly_variable", "var/dispersions_norm")),
    "pca": ("logs", {"n_comps": 5}, ("obsm/X_pca", "varm/PCs", "uns/pca/variance")),
    "neighbors": ("graph", {"n_neighbors": 9, "method": "gauss"}, ("obsp/distances", "obsp/connectivities")),
    "leiden": ("graph", {"flavor": "igraph", "directed": False, "n_iterations": -1}, ("obs/leiden",)),
    "diffmap": ("graph", {"n_comps": 8}, ("uns/diffmap_evals", "obsm/X_diffmap")),
    "dpt": ("graph", {"n_dcs": 6}, ("obs/dpt_pseudotime",)),
    "scrublet": ("counts", {"threshold": 0.3, "verbose": True}, ()),
    "harmony_integrate": ("graph", {"key": "batch"}, ()),
    "umap": ("graph", {"maxiter": 3}, ()),
}


def compared(name: str, host: SimpleNamespace, stages: dict[str, ad.AnnData]) -> Callable[[str], None]:
    """The check of one function that a host hands to the conformance test."""
    stage, settings, keys = CALLS[name]

    def check(backend: str) -> None:
        ours, reference = stages[stage].copy(), stages[stage].copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert getattr(host, name)(ours, backend=backend, **settings) is None
            if keys:
                getattr(host, name)(reference, backend="cpu", **settings)
            else:
                getattr(getattr(sd, SCANPY[name]), name)(
                    reference, **{k: v for k, v in settings.items() if k != "verbose"}
                )
        found, expected = contents(ours), contents(reference)
        for key in keys:
            a, b = aligned(found[key], expected[key], key)
            assert same(a, b, rtol=1e-4, atol=1e-4), key
        assert {key for key in expected if "/params" not in key} <= set(found)
        if not keys:
            assert not [key for key in expected if not same(found[key], expected[key])]

    return check


def aligned(ours: Any, theirs: Any, key: str) -> tuple[Any, Any]:
    """Arrays of one precision, with components of one sign; clusters numbered as they come."""
    if key in ("obsm/X_pca", "varm/PCs", "obsm/X_diffmap"):
        sign = np.sign((ours * theirs).sum(axis=0))
        return np.asarray(ours * sign, np.float64), np.asarray(theirs, np.float64)
    if key == "obs/leiden":
        return pd.factorize(ours)[0], pd.factorize(theirs)[0]
    if hasattr(ours, "astype") and ours.dtype.kind == "f":
        return ours.astype(np.float64), theirs.astype(np.float64)
    return ours, theirs


SLOW = {"umap", "scrublet", "harmony_integrate", "dpt", "highly_variable_genes"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCANPY]
)
def test_the_function_conforms(name: str, dispatcher: Any, host: Any, _stages: dict[str, ad.AnnData]) -> None:
    tests = {name: compared(name, host, _stages)}
    found = testing.run_conformance(backend_name="scdiffx", tests=tests, get_backend=dispatcher.get_backend)
    assert found == {name: "PASSED"}


def test_every_function_has_a_call() -> None:
    assert set(CALLS) == set(SCANPY)
    (found,) = entry_points(group="scanpy.backends", name="jax")
    assert set(dir(found.load())) == {"name", "aliases", *SCANPY}


def test_scanpys_settings_choose_the_backend(dispatcher: Any, host: Any, _stages: dict[str, ad.AnnData]) -> None:
    adata = _stages["counts"].copy()
    with dispatcher.settings.use_backend("jax"):
        host.normalize_total(adata)
        host.combat(_stages["logs"].copy(), key="batch")  # not ours: scanpy's own is called
    assert len(adata.uns["scdiffx"]["history"]) == 1


def test_docs_and_signatures_of_the_host_show_our_parameters(host: Any) -> None:
    assert {"soft", "backend", "check_values"} <= set(inspect.signature(host.highly_variable_genes).parameters)
    assert "soft (jax)" in host.highly_variable_genes.__doc__


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("log1p", {"chunked": True}, "chunked=True of 'log1p' is not offered.*backend='cpu'"),
        ("normalize_total", {"inplace": False}, "inplace=False"),
        ("scale", {"mask_obs": np.ones(300, bool)}, "mask_obs="),
        ("dpt", {"n_branchings": 1}, "n_branchings=1"),
        ("leiden", {"flavor": "leidenalg"}, "flavor='leidenalg'"),
        ("umap", {"init_pos": "paga"}, "paga"),
        ("neighbors", {"knn": False}, "knn=False"),
    ],
)
def test_what_we_do_not_offer_is_refused(
    name: str, settings: dict[str, Any], match: str, host: Any, _stages: dict[str, ad.AnnData]
) -> None:
    adata = _stages["graph"].copy()
    before = contents(adata)
    with pytest.raises(ValueError, match=match):
        getattr(host, name)(adata, backend="jax", **settings)
    assert all(same(value, contents(adata)[key]) for key, value in before.items())


def test_what_is_at_the_default_of_the_host_passes(host: Any, _stages: dict[str, ad.AnnData]) -> None:
    adata = _stages["graph"].copy()
    host.neighbors(adata, n_neighbors=9, method="gauss", metric=None, knn=True, random_state=0, backend="jax")
    host.leiden(adata, neighbors_key=None, flavor=None, backend="jax")
    with pytest.raises(TypeError, match="unheard"):
        host.leiden(adata, unheard=1, backend="jax")
    with pytest.raises(TypeError, match="must be an AnnData"):
        host.log1p(np.ones((3, 3)), backend="jax")
