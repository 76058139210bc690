"""The functions of the package as `adata.sd`."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import subprocess
import sys

import pytest

import scdiffx as sd
from helpers import pbmc_counts, same


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_calls_are_those_of_the_functions() -> None:
    bound, by_hand = pbmc_counts(100, 80), pbmc_counts(100, 80)
    assert bound.sd.pp.normalize_total(target_sum=1e3) is None
    sd.pp.normalize_total(by_hand, target_sum=1e3)
    copied = bound.sd.pp.log1p(copy=True)
    sd.pp.log1p(by_hand)
    assert same(copied.X, by_hand.X)
    assert not same(bound.X, by_hand.X)
    assert list(copied.uns["scdiffx"]["history"]) == list(by_hand.uns["scdiffx"]["history"])
    view = copied[:50]
    with pytest.warns(UserWarning, match="view|densifies"):
        view.sd.pp.scale()
    assert not view.is_view


@pytest.mark.parametrize("part", ["pp", "tl", "pl"])
def test_functions_can_be_listed_and_looked_up(part: str) -> None:
    bound = getattr(pbmc_counts(20, 30).sd, part)
    names = set(getattr(sd, part).__all__)
    # What takes a plan, a fit or a reference rather than the AnnData at hand, and a class.
    apart = {
        "pp": set(),
        "tl": {"uncertainty", "influence", "annotation_model", "AnnotationModel"},
        "pl": {"fit", "gradients"},
    }[part]
    assert set(dir(bound)) == names - apart
    for name in dir(bound):
        function = getattr(sd, part).__dict__[name]
        parameters = list(inspect.signature(function).parameters.values())
        assert list(inspect.signature(getattr(bound, name)).parameters.values()) == parameters[1:]
        assert getattr(bound, name).__doc__ == function.__doc__
        assert name in repr(bound)


def test_help_shows_the_call_as_it_is_written() -> None:
    text = pydoc.plain(pydoc.render_doc(pbmc_counts(20, 30).sd.pp.pca))
    assert "pca(" in text
    assert "adata: " not in text
    assert "n_comps: 'int | None' = None" in text


def test_unknown_names_are_refused() -> None:
    accessor = pbmc_counts(20, 30).sd
    with pytest.raises(AttributeError, match=r"`sd.pp` has no 'pac'.*'pca'"):
        accessor.pp.pac  # noqa: B018
    with pytest.raises(AttributeError, match="no 'influence' for an AnnData"):
        accessor.tl.influence  # noqa: B018
    assert dir(accessor) == ["pl", "pp", "tl"]
    assert "normalize_total" in repr(accessor)


def test_an_anndata_that_was_used_can_be_pickled() -> None:
    adata = pbmc_counts(20, 30)
    dir(adata.sd.pp)
    again = pickle.loads(pickle.dumps(adata))
    again.sd.pp.normalize_total()
    assert "scdiffx" in again.uns
    assert "scdiffx" not in adata.uns


@pytest.mark.parametrize("order", [("scdiffx", "anndata"), ("anndata", "scdiffx")])
def test_either_order_of_imports_will_do(order: tuple[str, str]) -> None:
    code = f"""
import sys
import {order[0]}
print("anndata" in sys.modules, end=" ")
import {order[1]}
left = [finder for finder in sys.meta_path if type(finder).__module__.startswith("scdiffx")]
print(anndata.AnnData().sd.pp.__class__.__name__, len(left), type(anndata.__loader__).__name__)
"""
    assert in_new_process(code) == f"{order[0] == 'anndata'} Part 0 SourceFileLoader"
