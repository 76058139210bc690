from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Connectivities, Distances, Obsm, Slot, Uns, available, preset
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._umap import STARTS
from scdiffx.ops._umap_start import curve

if TYPE_CHECKING:
    from anndata import AnnData


@public
def umap(
    adata: AnnData | Plan,
    *,
    min_dist: float = 0.5,
    spread: float = 1.0,
    n_components: int = 2,
    maxiter: int | None = None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    negative_sample_rate: int = 5,
    init_pos: str | np.ndarray = "spectral",
    random_state: Any = None,
    a: float | None = None,
    b: float | None = None,
    key_added: str | None = None,
    neighbors_key: str = "neighbors",
    densmap: bool = False,
    dens_lambda: float = 2.0,
    dens_frac: float = 0.3,
    dens_var_shift: float = 0.1,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Lay out the neighbour graph in few dimensions by UMAP.

    umap-learn's sampling of edges and of random cells, with all cells moving together: the same similarities, schedule
    and learning rates, and layouts that keep as much of the neighbourhoods, but not the same coordinates.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a neighbour graph.
    min_dist
        Distance in the layout up to which cells count as at the same place.
    spread
        Scale of the layout: distances over which similarities decay.
    n_components
        Dimensions of the layout.
    maxiter
        Number of epochs; by default 500, and 200 above 10,000 cells; with `densmap`, 200 more.
    alpha
        First learning rate; it falls linearly to 0.
    gamma
        Weight of the repulsion.
    negative_sample_rate
        Number of random cells that push for each edge that pulls.
    init_pos
        The start: "spectral" from the spectrum of the graph, "random", a key of `obsm`, or coordinates
        (cells, n_components).
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    a, b
        Parameters of the similarities ``1 / (1 + a d^(2b))``; by default those that suit `min_dist` and `spread`.
    key_added
        Key of both `obsm` and `uns` instead of "X_umap" and "umap".
    neighbors_key
        Key of `adata.uns` that describes the graph.
    densmap
        Whether the layout is to keep local densities too (densMAP).
    dens_lambda, dens_frac, dens_var_shift
        Weight of the densities, the share of epochs (the last ones) in which they count, and what is added to the
        variance of the local radii; only with `densmap`.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_umap" | key_added]` : float32 (cells, n_components)
        Coordinates.
    `adata.uns["umap" | key_added]` : dict
        `params`: `a`, `b`, and the `random_state` where it is not 0. With `densmap`, `density_correlation`: that of the
        log local radii in the data and in the layout.

    Raises
    ------
    KeyError
        If `init_pos` is neither a method nor a key of `obsm`.
    ValueError
        If there is no neighbour graph or it has no edges, there are fewer than `n_components` + 2 cells, a setting is
        not usable, or `adata` is a plan: hundreds of random steps have no useful derivative. Lay out what
        ``fitted.apply`` returns, or use :func:`parametric_umap`.

    References
    ----------
    McInnes, Healy and Melville (2018), UMAP: uniform manifold approximation and projection for dimension reduction.
    Narayan, Berger and Cho (2021), Assessing single-cell transcriptomic variability through density-preserving data
    visualization.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.umap(adata, maxiter=20)
    >>> adata.obsm["X_umap"].shape
    (700, 2)
    """
    if isinstance(adata, Plan):
        raise ValueError(
            "`umap` cannot be part of a plan: its layout has no derivative. Call it on `fitted.apply(...)`, or put "
            "`sd.tl.parametric_umap` into the plan"
        )
    _check(min_dist, spread, n_components, maxiter, alpha, gamma, negative_sample_rate, a, b)
    density = _density(dens_lambda, dens_frac, dens_var_shift) if densmap else None
    seed = as_seed(one_rng(rng, random_state))
    if a is None or b is None:
        a, b = curve(min_dist, spread)
    method, start = _start(adata, init_pos, n_components)
    key = key_added or ("umap" if preset() == "ScanpyV2Preview" else "X_umap")
    entry = key_added or "umap"
    params = {"a": float(a), "b": float(b), **({"random_state": seed} if seed else {})}

    def notes(op: ops.UMAP, result: ops.UMAPResult, args: Any) -> Mapping[Slot, Any]:
        if op.density is None:
            return {Uns(entry): {"params": params}}
        known = np.asarray(op.density.radius, np.float64)
        found = np.corrcoef(known, np.asarray(result.radius, np.float64))[0, 1]
        return {Uns(entry): {"params": params, "density_correlation": float(found)}}

    step = Step(
        "umap",
        ops.UMAP(
            start=start,
            density=density,
            a=float(a),
            b=float(b),
            n_components=n_components,
            n_epochs=maxiter,
            settings=ops.UMAPSettings(float(alpha), float(gamma), negative_sample_rate, method),
        ),
        reads=(Connectivities(neighbors_key), Distances(neighbors_key) if densmap else None),
        writes=(Write(Obsm(key), lambda op, result: result.embedding, np.float32),),
        message="computing UMAP",
        notes=notes,
        compiled=False,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _check(
    min_dist: float,
    spread: float,
    n_components: int,
    maxiter: int | None,
    alpha: float,
    gamma: float,
    negative_sample_rate: int,
    a: float | None,
    b: float | None,
) -> None:
    for name, value in (("spread", spread), ("alpha", alpha), ("a", a), ("b", b)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    for name, value in (("min_dist", min_dist), ("gamma", gamma)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} must not be negative")
    if min_dist > spread:
        raise ValueError(f"min_dist={min_dist!r} must not be greater than spread={spread!r}")
    for name, count, least in (
        ("n_components", n_components, 1),
        ("maxiter", maxiter, 1),
        ("negative_sample_rate", negative_sample_rate, 1),
    ):
        if count is not None and count < least:
            raise ValueError(f"{name}={count!r} must be at least {least}")


def _density(weight: float, share: float, shift: float) -> ops.UMAPDensity:
    for name, value in (("dens_lambda", weight), ("dens_var_shift", shift)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    if not 0 < share <= 1:
        raise ValueError(f"dens_frac={share!r} must be greater than 0 and at most 1")
    return ops.UMAPDensity(float(weight), float(share), float(shift))


def _start(adata: AnnData, init_pos: Any, dims: int) -> tuple[str, Any]:
    """The method of the start, and the coordinates where they are given."""
    if isinstance(init_pos, str):
        if init_pos in adata.obsm:
            given = Obsm(init_pos).read(adata)
        elif init_pos in STARTS:
            return init_pos, None
        elif init_pos == "paga":
            raise ValueError("init_pos='paga' is not offered: pass coordinates (cells, n_components) instead")
        else:
            raise KeyError(
                f"init_pos={init_pos!r} is neither one of {list(STARTS)} nor in `adata.obsm`: "
                f"{available(adata.obsm.keys())}"
            )
    else:
        given = np.asarray(init_pos, np.float64)
    if given.shape != (adata.n_obs, dims):
        raise ValueError(f"init_pos has shape {given.shape} and must have {(adata.n_obs, dims)}")
    if not np.isfinite(given).all():
        raise ValueError("init_pos holds values that are not finite")
    return "spectral", jnp.asarray(given, jnp.float32)
