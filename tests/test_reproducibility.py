"""The same seed gives the same numbers, to rounding, in another process and on other numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from threadpoolctl import threadpool_info

import scdiffx as sd
from helpers import pbmc_counts

_CELLS = 1100  # more than one block of rows


def _chain(adata: ad.AnnData) -> dict[str, Any]:
    """Normalised values to pseudotime."""
    sd.pp.normalize_total(adata)
    sd.pp.log1p(adata)
    sd.pp.pca(adata, n_comps=30)
    sd.pp.neighbors(adata, rng=1)
    sd.tl.pseudotime(adata, root=0)
    return {
        "normalised": adata.X.data,
        "variance": adata.uns["pca"]["variance"],
        "pca": adata.obsm["X_pca"],
        "pseudotime": adata.obs["dpt_pseudotime"].to_numpy(),
    }


def _small(adata: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(adata.X[:_CELLS, :500].copy())


_CHILD = """
import os, sys
import numpy as np
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, set(cores[:int(sys.argv[1])]))
import anndata as ad
import test_reproducibility as t
np.savez(sys.argv[3], **t._chain(t._small(ad.read_h5ad(sys.argv[2]))))
"""


def _in_process(data: Path, cores: int, out: Path) -> dict[str, np.ndarray]:
    """The results from a process of its own, on the first `cores` cores."""
    command = [sys.executable, "-c", _CHILD, str(cores), str(data), str(out)]
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.slow
def test_processes_and_threads_agree_to_rounding(data_dir: Path, tmp_path: Path) -> None:
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a choice between one core and two")
    data = data_dir / "paul15" / "paul15.h5ad"
    # Processes apart in their threads are apart in all that two of one number are: one pair shows both.
    two, one = (_in_process(data, n, tmp_path / f"{n}.npz") for n in (2, 1))
    # Matrix products of some shapes add up in another order on another number of threads, and on a busy machine.
    assert one["normalised"].tobytes() == two["normalised"].tobytes()
    off = {name: np.abs(one[name] - two[name]).max() / np.abs(two[name]).max() for name in ("variance", "pca")}
    assert off["variance"] < 1e-5
    assert off["pca"] < 1e-3
    np.testing.assert_allclose(one["pseudotime"], two["pseudotime"], atol=0.02)


_threads: list[int] = []


def _note_threads() -> None:
    _threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")


@sd.ops.operator
class _Noting:
    """Notes on how many threads LAPACK works where an operator is prepared and where it is called."""

    slope: Any = sd.ops.learnable(default=1.0)

    def init(self, z: Any, key: Any = None) -> _Noting:
        _note_threads()
        return self

    def __call__(self, z: Any) -> Any:
        _note_threads()
        return z * self.slope


def test_lapack_works_on_one_thread() -> None:
    # On more, how OpenBLAS shares work out depends on the load, and the last digits of eigenvectors with it.
    adata = pbmc_counts(60, 20)
    adata.obsm["X_z"] = adata.X.toarray()[:, :3]
    for use in (lambda data: sd.step(data, _Noting(), reads="obsm/X_z", writes="obsm/X_new"), _fit_and_look):
        _threads.clear()
        use(adata)
        assert len(_threads) >= 2
        assert set(_threads) == {1}


def _fit_and_look(adata: ad.AnnData) -> None:
    plan = sd.plan(adata)
    sd.step(plan, _Noting(), reads="obsm/X_z", writes="obsm/X_new")
    loss = sd.losses.l1("X_new")
    sd.fit(plan, loss, n_steps=2, progress=False)
    n = len(_threads)
    sd.metrics.gradient_flow(plan, loss)
    assert len(_threads) > n
