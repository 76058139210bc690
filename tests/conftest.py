"""Fixtures of all tests: real data, read once and handed out as copies, and the float64 scope."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile many programs and run each a few times on little data: XLA optimises none, and workers and runs share
# even the smallest.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scdiffx" / "compiled-by-tests"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where in Python each operation stands makes programs larger, and their compilation a little slower.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
# Numba optimises as little, by which scanpy and umap-learn compile for half a minute.
os.environ.setdefault("NUMBA_OPT", "0")

import anndata as ad
import jax
import pytest
import scipy.linalg  # noqa: F401  # loads the BLAS that is limited here
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core: more threads of theirs would wait for each other, busily.
    threadpool_limits(1, user_api="blas")


def _read(name: str) -> ad.AnnData:
    path = DATA / name / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"the data set {name} is not at ../shared/data/{name}/{name}.h5ad beside the repository")
    return ad.read_h5ad(path)


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over what was imported: it is much, and stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Drop what a file has compiled: a program holds several memory maps, of which Linux allows a process 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets beside the repository."""
    if not DATA.is_dir():
        pytest.skip("there is no folder ../shared/data beside the repository")
    return DATA


@pytest.fixture(scope="session")
def _paul15() -> ad.AnnData:
    return _read("paul15")


@pytest.fixture(scope="session")
def _worm_embryo() -> ad.AnnData:
    return _read("worm_embryo")


@pytest.fixture(scope="session")
def _pbmc68k_reduced() -> ad.AnnData:
    import scanpy as sc

    return sc.datasets.pbmc68k_reduced()


@pytest.fixture
def paul15(_paul15: ad.AnnData) -> ad.AnnData:
    """2730 cells x 3451 genes, counts; `obs["paul15_clusters"]`. A fresh copy."""
    return _paul15.copy()


@pytest.fixture
def worm_embryo(_worm_embryo: ad.AnnData) -> ad.AnnData:
    """1805 cells x 10000 genes, counts; `obs["embryo.time"]` in minutes. A fresh copy."""
    return _worm_embryo.copy()


@pytest.fixture
def pbmc68k_reduced(_pbmc68k_reduced: ad.AnnData) -> ad.AnnData:
    """700 cells x 765 genes, scaled values with a graph; ships with scanpy, so it is there everywhere. A fresh copy."""
    return _pbmc68k_reduced.copy()


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield
