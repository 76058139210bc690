"""Integration of batches in an embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Obs, Obsm, Slot, Uns, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData

Numbers = float | Sequence[float]


@public
def harmony_integrate(
    adata: AnnData | Plan,
    key: str | Sequence[str],
    *,
    basis: str = "X_pca",
    adjusted_basis: str = "X_pca_harmony",
    theta: Numbers = 2.0,
    lamb: Numbers | None = None,
    sigma: Numbers = 0.1,
    nclust: int | None = None,
    max_iter_harmony: int = 10,
    max_iter_kmeans: int = 4,
    epsilon_harmony: float = 1e-2,
    alpha: float = 0.2,
    block_size: float = 0.05,
    batch_prop_cutoff: float = 1e-5,
    random_state: Any = None,
    rng: Any = None,
    copy: bool = False,
) -> AnnData | None:
    """Remove batches from an embedding (Harmony 2).

    Cells are assigned softly to clusters in which batches are to be mixed, a ridge regression in each cluster takes
    the batches off the embedding, and both are repeated until the objective of the clustering hardly falls. Agrees
    with harmonypy 2.1 as well as harmonypy agrees with itself from other seeds. Cost and memory are linear in the
    cells.

    Parameters
    ----------
    adata
        Annotated data with an embedding, or a plan.
    key
        Column of `adata.obs` with the batch, or several columns that are corrected together.
    basis
        Key of `adata.obsm` with the embedding.
    adjusted_basis
        Key of `adata.obsm` for the result.
    theta
        Weight of the penalty on clusters in which a batch is over-represented: one number, or one for each column of
        `key`, or one for each batch (the batches of the first column in the order of their categories, then those of
        the next). Larger values mix more.
    lamb
        Ridge penalty of the batches, given like `theta`. Larger values correct less. By default `alpha` times the
        number of cells of a batch that are expected in the cluster.
    sigma
        Width of the soft clusters, one number or one for each cluster.
    nclust
        Number of clusters; default: one for 30 cells, at most 100.
    max_iter_harmony
        Most rounds of clustering and correction.
    max_iter_kmeans
        Passes over the cells in the clustering of each round.
    epsilon_harmony
        Stop when a round lowers the objective by less than this share.
    alpha
        Size of the default ridge penalty; without meaning where `lamb` is given.
    block_size
        Share of the cells that are assigned at once.
    batch_prop_cutoff
        A batch of which less than this share is in a cluster is not corrected there.
    random_state, rng
        Seed of the first clusters and of the order of assignment; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_pca_harmony" | adjusted_basis]` : float32 (cells, dims), float64 where the embedding is
        The embedding without the batches.
    `adata.uns["harmony"]` : dict
        `params`; the `objective` of the start and after each round; `n_rounds`; whether it has `converged`.

    Raises
    ------
    KeyError
        If a column or the embedding does not exist.
    ValueError
        If all cells are of one batch, a batch is missing, a number is out of range, or the embedding is not finite.

    Notes
    -----
    In a plan the number of rounds is that at the default parameters; `theta`, `sigma` and `alpha` (or `lamb`) can be
    learned, and the derivative is exact for that number of rounds. The first clusters and the order of assignment are
    structure, found anew when a fit refreshes. Each column of `key` has its own penalty in the objective, so their
    penalties multiply. harmonypy's `epsilon_cluster` has no counterpart: at its own default of four passes harmonypy
    does not read it either.

    References
    ----------
    Korsunsky et al. (2019), Fast, sensitive and accurate integration of single-cell data with Harmony.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.pp.harmony_integrate(adata, "phase", max_iter_harmony=2)
    >>> adata.obsm["X_pca_harmony"].shape
    (700, 50)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    seed = as_seed(one_rng(rng, random_state))
    keys = [key] if isinstance(key, str) else list(key)
    check_keys(data, keys)
    check_basis(adata, basis)
    positive = {"theta": theta, "sigma": sigma, "alpha": alpha} | ({} if lamb is None else {"lamb": lamb})
    for name, value in positive.items():
        if not (np.isfinite(value).all() and (np.asarray(value) > 0).all()):
            raise ValueError(f"{name}={value!r} must be greater than 0")
    _check_numbers(nclust, max_iter_harmony, max_iter_kmeans, epsilon_harmony, block_size, batch_prop_cutoff)
    if nclust is not None and nclust > data.n_obs:
        raise ValueError(f"nclust={nclust!r}: there are only {data.n_obs} cells")
    params = {"key": np.asarray(keys, dtype=object), "basis": basis, "theta": _plain(theta), "sigma": _plain(sigma)}
    params |= {"alpha": alpha} if lamb is None else {"lamb": _plain(lamb)}

    def notes(op: ops.Harmony, result: ops.HarmonyResult, args: Any) -> Mapping[Slot, Any]:
        rounds = int(result.rounds)
        objective = np.asarray(result.objective, np.float64)[: rounds + 1]
        still = (objective[-2] - objective[-1]) / abs(objective[-2]) < epsilon_harmony
        if not still and rounds == max_iter_harmony:
            warn(f"Harmony stopped after {rounds} rounds before it converged: raise `max_iter_harmony`")
        more = {"nclust": op.nclust, "random_state": seed, "max_iter_harmony": max_iter_harmony}
        entry = {"params": params | more, "objective": objective, "n_rounds": rounds, "converged": bool(still)}
        return {Uns("harmony"): entry}

    step = Step(
        "harmony",
        ops.Harmony(
            theta=_array(theta),
            sigma=_array(sigma),
            alpha=alpha if lamb is None else None,
            lamb=None if lamb is None else _array(lamb),
            nclust=nclust,
            # A call that nothing is to be learned from looks for the end itself; a plan needs a fixed number of rounds.
            rounds=None if isinstance(adata, Plan) else 0,
            settings=ops.HarmonySettings(
                max_iter_harmony, max_iter_kmeans, epsilon_harmony, block_size, batch_prop_cutoff
            ),
        ),
        reads=(Obsm(basis), *(Obs(name, codes=True) for name in keys)),
        writes=(Write(Obsm(adjusted_basis), lambda op, result: result.corrected),),
        message="computing Harmony",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def check_basis(adata: AnnData | Plan, basis: str) -> None:
    """Raise where the embedding is neither there nor made by the plan."""
    data = adata.adata if isinstance(adata, Plan) else adata
    has = adata.has(Obsm(basis)) if isinstance(adata, Plan) else basis in data.obsm
    if not has:
        hint = "; run `sd.pp.pca` first" if basis == "X_pca" else ""
        raise KeyError(f"basis={basis!r} is not in `adata.obsm`. Available: {available(data.obsm.keys())}{hint}")


def check_keys(data: AnnData, keys: list[str]) -> None:
    """Raise where the batch of a cell is unknown in a column, or there is only one in all."""
    if not keys:
        raise ValueError("key=[]: there must be a column")
    for name in keys:
        if name not in data.obs:
            raise KeyError(f"key={name!r} is not in `adata.obs`. Available: {available(data.obs)}")
        missing = data.obs[name].isna().to_numpy()
        if missing.any():
            raise ValueError(f"key={name!r} is missing for {missing.sum()} of {len(missing)} cells")
    if all(data.obs[name].nunique() < 2 for name in keys):
        raise ValueError(f"key={keys!r}: all cells are of one batch, so there is nothing to correct")


def _check_numbers(
    nclust: int | None,
    max_iter_harmony: int,
    max_iter_kmeans: int,
    epsilon_harmony: float,
    block_size: float,
    batch_prop_cutoff: float,
) -> None:
    at_least_one = {"nclust": nclust, "max_iter_harmony": max_iter_harmony, "max_iter_kmeans": max_iter_kmeans}
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if not 0 < block_size <= 1:
        raise ValueError(f"block_size={block_size!r} must be above 0 and at most 1")
    if not math.isfinite(epsilon_harmony):
        raise ValueError(f"epsilon_harmony={epsilon_harmony!r} must be a finite number")
    if not 0 <= batch_prop_cutoff < 1:
        raise ValueError(f"batch_prop_cutoff={batch_prop_cutoff!r} must be from 0 to below 1")


def _array(value: Numbers) -> Any:
    return value if isinstance(value, float | int) else np.asarray(value, np.float64)


def _plain(value: Numbers) -> Any:
    return value if isinstance(value, float | int) else np.asarray(value, np.float64)
