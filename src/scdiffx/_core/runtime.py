"""What the process needs once: a compilation cache on disk, set up at the first call and never at import."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

__all__ = ["cache_folder", "ensure_cache", "one_blas_thread"]

_state = {"done": False}


@functools.cache
def _blas() -> Any:
    import scipy.linalg  # noqa: F401  # its LAPACK is the one that JAX calls on the CPU
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """A scope in which LAPACK works on one thread.

    JAX calls it for the small dense matrices inside iterations. OpenBLAS's threads and JAX's own then wait for each
    other, busily: an eigendecomposition of a 60 x 60 matrix takes 40 ms of processor time instead of 0.3 ms. And how
    OpenBLAS shares work out depends on what else runs at that moment: the last digits of eigenvectors differed from
    call to call.
    """
    with _blas().limit(limits=1, user_api="blas"):
        yield


def cache_folder() -> Path | None:
    """Where compiled programs are kept: SCDIFFX_CACHE, else the user's cache folder; None when switched off with ''."""
    chosen = os.environ.get("SCDIFFX_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "scdiffx" / "compiled"


def ensure_cache() -> None:
    """Turn on JAX's persistent compilation cache unless the user set one up or SCDIFFX_CACHE is empty."""
    if _state["done"]:
        return
    _state["done"] = True
    folder = cache_folder()
    if folder is None or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # A read-only home must not stop an analysis; `scdiffx doctor` reports it.
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default keeps only what took a second to compile; the delays users feel are sums of shorter ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
