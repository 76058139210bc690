"""What the process needs once: a compilation cache on disk, set up at the first call and never at import."""

from __future__ import annotations

import os
from pathlib import Path

import jax

__all__ = ["cache_folder", "ensure_cache"]

_state = {"done": False}


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
