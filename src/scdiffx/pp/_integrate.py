"""Integration of batches, in an embedding or from counts, by trained networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obs, Obsm, Slot, Uns, X, matrix_of, warn_if_not_counts
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.pp._harmony import check_basis, check_keys

if TYPE_CHECKING:
    from anndata import AnnData

# What is not given, for an embedding and for counts.
_OF_EMBEDDING: dict[str, Any] = {
    "weight": {"mmd": 10.0, "wgan": 1.0},
    "n_latent": None,
    "n_hidden": 64,
    "max_steps": 400,
    "minibatch": 4096,
}
_OF_COUNTS: dict[str, Any] = {
    "weight": {"mmd": 1.0, "wgan": 0.3},
    "n_latent": 10,
    "n_hidden": 128,
    "max_steps": 500,
    "minibatch": 256,
}


@public
def mmd_integrate(
    adata: AnnData | Plan,
    key: str,
    *,
    basis: str | None = "X_pca",
    layer: str | None = None,
    adjusted_basis: str = "X_mmd",
    weight: float | None = None,
    n_latent: int | None = None,
    n_hidden: int | None = None,
    max_steps: int | None = None,
    patience: int = 4,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Experimental: remove batches from an embedding or from counts, by maximum mean discrepancy.

    An autoencoder, trained in the call, whose code of each batch is drawn to that of all cells within soft clusters, by
    the squared maximum mean discrepancy under Gaussian kernels of several widths, so that batches of other composition
    are not made alike. The code of an embedding is the embedding plus what a small network of it and the batch adds,
    which starts at 0; a second network puts the cell back from code and batch. With ``basis=None`` the autoencoder is
    that of :func:`vae`, of counts: the negative binomial likelihood, given the cell's total count and, in the decoder,
    its batch, and the code is the mean of the latent vector. Memory is linear in cells; a step sees at most 4,096 of
    an embedding, 256 of counts.

    It is experimental. On an embedding it mixes and keeps as much as :func:`harmony_integrate` on two of three data
    sets, less on the third, and takes ten times as long. From counts it scores above Harmony on both data sets
    measured, in fifty times the time, but with few seeds (see the measured figures in the documentation).

    Parameters
    ----------
    adata
        Annotated data with an embedding, or a plan.
    key
        Column of `adata.obs` with the batch.
    basis
        Key of `adata.obsm` with the embedding. None integrates counts.
    layer
        Layer with the counts, instead of `X`, with ``basis=None``. Highly variable genes are enough, and faster.
    adjusted_basis
        Key of `adata.obsm` for the result.
    weight
        Of the discrepancy: higher mixes more and keeps less. For an embedding (default 10), beside the squared
        reconstruction error in units of its standard deviation; for counts (default 1), beside the negative likelihood
        bound in units of what training has lowered it by so far on held-out cells.
    n_latent
        Dimensions of the code of counts, default 10. An embedding keeps its own.
    n_hidden
        Units in the hidden layer of each network; default 64 for an embedding, 128 for counts.
    max_steps
        Gradient steps at most; default 400 for an embedding, 500 for counts.
    patience
        Progress is checked every 50 steps; training ends after so many checks without a better objective.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    progress
        Whether to show a progress bar, with the mixing and what is kept of neighbourhoods.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_mmd" | adjusted_basis]` : float (cells, dims)
        The corrected embedding, in the dimensions, units and precision of the embedding; of counts, float32 (cells,
        n_latent).
    `adata.uns["mmd"]` : dict
        `params` and the `history` of the checks: `reconstruction` error (of counts, the negative bound in nats for each
        held-out cell), `discrepancy`, `mixing` (local inverse Simpson's index of the batches, 0 apart to 1 as mixed as
        all cells) and `conservation` (share of 15 neighbours in the own batch that cells keep: those in the embedding,
        or in 30 principal components of log-normalised counts), on at most 4,096 cells; `kept` is the check whose
        networks are used.

    Raises
    ------
    KeyError
        If `key`, `basis` or `layer` does not exist.
    ValueError
        If a batch is missing, there is only one, a setting is not usable, or counts are negative, not finite or of
        fewer than ten cells.
    FloatingPointError
        If training diverges.

    Notes
    -----
    In a plan the networks can be learned further, and derivatives pass to the embedding or the counts. Batches are told
    by their place among the categories: new cells for a fitted plan must have the same categories.

    References
    ----------
    Gretton et al. (2012), A kernel two-sample test. Lotfollahi et al. (2020), Conditional out-of-distribution
    generation for unpaired data using transfer VAE.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> adata.obs["batch"] = np.where(np.arange(150) % 3 == 0, "a", "b")  # in place of real batches
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.mmd_integrate(adata, "batch", n_hidden=8, max_steps=2, progress=False)
    >>> adata.obsm["X_mmd"].shape
    (150, 9)
    """
    settings = _settings("mmd", basis, weight, n_latent, n_hidden, (max_steps, patience), progress)
    source = _source(adata, key, basis, layer, "mmd_integrate")
    op = ops.MMDIntegrate(**settings)
    return _integrate(adata, op, (key, source, adjusted_basis), as_seed(one_rng(rng, random_state)), copy)


@public
def wgan_integrate(
    adata: AnnData | Plan,
    key: str,
    *,
    basis: str | None = "X_pca",
    layer: str | None = None,
    adjusted_basis: str = "X_wgan",
    weight: float | None = None,
    n_latent: int | None = None,
    n_hidden: int | None = None,
    max_steps: int | None = None,
    patience: int = 4,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Experimental: remove batches from an embedding or from counts, by Wasserstein critics.

    As :func:`mmd_integrate`, with critics in place of kernels: for each batch a network is trained to tell its cells
    from all cells, weighted to the batch's shares of soft clusters, under a penalty on slopes other than 1, and the
    autoencoder lowers the differences that they find (a Wasserstein GAN with gradient penalty). Training ends by the
    same criterion, which does not rest on the critics: reconstruction error plus ten times the discrepancy (of counts,
    the discrepancy in the units of `weight`).

    It is experimental. On an embedding it mixes and keeps as much as :func:`harmony_integrate` on two of three data
    sets, less on the third, and takes ten times as long. From counts it scores above Harmony on both data sets
    measured, in fifty times the time, but with few seeds (see the measured figures in the documentation).

    Parameters
    ----------
    adata
        Annotated data with an embedding, or a plan.
    key
        Column of `adata.obs` with the batch.
    basis
        Key of `adata.obsm` with the embedding. None integrates counts.
    layer
        Layer with the counts, instead of `X`, with ``basis=None``. Highly variable genes are enough, and faster.
    adjusted_basis
        Key of `adata.obsm` for the result.
    weight
        Of the distances that the critics find: higher mixes more and keeps less. For an embedding (default 1), beside
        the squared reconstruction error in units of its standard deviation; for counts (default 0.3), beside the
        negative likelihood bound in units of what training has lowered it by so far on held-out cells.
    n_latent
        Dimensions of the code of counts, default 10. An embedding keeps its own.
    n_hidden
        Units in the hidden layer of each network of the autoencoder; default 64 for an embedding, 128 for counts.
    max_steps
        Steps of the autoencoder at most, default 400 for an embedding, 500 for counts; the critics make three for each.
    patience
        Progress is checked every 50 steps; training ends after so many checks without a better objective.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    progress
        Whether to show a progress bar, with the mixing and what is kept of neighbourhoods.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_wgan" | adjusted_basis]` : float (cells, dims)
        The corrected embedding, in the dimensions, units and precision of the embedding; of counts, float32 (cells,
        n_latent).
    `adata.uns["wgan"]` : dict
        `params` and the `history` of the checks: `reconstruction` error (of counts, the negative bound in nats for each
        held-out cell), `discrepancy`, `mixing` (local inverse Simpson's index of the batches, 0 apart to 1 as mixed as
        all cells) and `conservation` (share of 15 neighbours in the own batch that cells keep: those in the embedding,
        or in 30 principal components of log-normalised counts), on at most 4,096 cells; `kept` is the check whose
        networks are used.

    Raises
    ------
    KeyError
        If `key`, `basis` or `layer` does not exist.
    ValueError
        If a batch is missing, there is only one, a setting is not usable, or counts are negative, not finite or of
        fewer than ten cells.
    FloatingPointError
        If training diverges.

    Notes
    -----
    In a plan the networks can be learned further, and derivatives pass to the embedding or the counts. Batches are told
    by their place among the categories: new cells for a fitted plan must have the same categories.

    References
    ----------
    Gulrajani et al. (2017), Improved training of Wasserstein GANs.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> adata.obs["batch"] = np.where(np.arange(150) % 3 == 0, "a", "b")  # in place of real batches
    >>> sd.pp.pca(adata, n_comps=9)
    >>> sd.pp.wgan_integrate(adata, "batch", n_hidden=8, max_steps=2, progress=False)
    >>> adata.obsm["X_wgan"].shape
    (150, 9)
    """
    settings = _settings("wgan", basis, weight, n_latent, n_hidden, (max_steps, patience), progress)
    source = _source(adata, key, basis, layer, "wgan_integrate")
    op = ops.WGANIntegrate(**settings)
    return _integrate(adata, op, (key, source, adjusted_basis), as_seed(one_rng(rng, random_state)), copy)


def _settings(
    name: str,
    basis: str | None,
    weight: float | None,
    n_latent: int | None,
    n_hidden: int | None,
    limits: tuple[int | None, int],
    progress: bool,
) -> dict[str, Any]:
    """The settings of the operator: what is not given depends on whether it meets an embedding or counts."""
    usual = _OF_COUNTS if basis is None else _OF_EMBEDDING
    if basis is not None and n_latent is not None:
        raise ValueError(f"n_latent={n_latent!r} is for counts: pass `basis=None`; an embedding keeps its dimensions")
    weight = usual["weight"][name] if weight is None else weight
    numbers: dict[str, Any] = {"n_latent": n_latent, "n_hidden": n_hidden, "max_steps": limits[0]}
    numbers = {part: usual[part] if value is None else value for part, value in numbers.items()}
    for part, value in (numbers | {"patience": limits[1]}).items():
        if value is not None and value < 1:
            raise ValueError(f"{part}={value!r} must be at least 1")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight={weight!r} must be greater than 0")
    training = ops.IntegrationTraining(
        max_steps=numbers.pop("max_steps"), minibatch=usual["minibatch"], patience=limits[1], progress=progress
    )
    return {"weight": float(weight), "training": training, **numbers}


def _source(adata: AnnData | Plan, key: str, basis: str | None, layer: str | None, name: str) -> Obsm | X:
    """Where the embedding or the counts are, checked."""
    data = adata.adata if isinstance(adata, Plan) else adata
    check_keys(data, [key])
    if basis is None:
        if not isinstance(adata, Plan):
            warn_if_not_counts(matrix_of(data, layer), name)
        return X(layer, counts=True)
    if layer is not None:
        raise ValueError(f"layer={layer!r} is read with `basis=None` only, and basis={basis!r}")
    check_basis(adata, basis)
    return Obsm(basis)


def _integrate(
    adata: AnnData | Plan,
    op: ops.MMDIntegrate | ops.WGANIntegrate,
    places: tuple[str, Obsm | X, str],
    seed: int,
    copy: bool,
) -> AnnData | None:
    key, source, adjusted_basis = places
    name = "mmd" if isinstance(op, ops.MMDIntegrate) else "wgan"
    params: dict[str, Any] = {"key": key, "weight": op.weight, "n_hidden": op.n_hidden, "random_state": seed}
    params |= {"max_steps": op.training.max_steps, "patience": op.training.patience}
    if isinstance(source, Obsm):
        params["basis"] = source.key
    else:
        params |= {"n_latent": op.n_latent} | ({} if source.layer is None else {"layer": source.layer})

    def notes(op: ops.MMDIntegrate, result: ops.IntegrationResult, args: Any) -> Mapping[Slot, Any]:
        entry: dict[str, Any] = {"params": params}
        if op.history is not None:
            entry["history"] = {part: np.asarray(value, np.float64) for part, value in op.history.items()}
            entry["history"]["kept"] = int(op.history["kept"])
        return {Uns(name): entry}

    dtype = None if isinstance(source, Obsm) else np.float32
    step = Step(
        f"{name}_integrate",
        op,
        reads=(source, Obs(key, codes=True)),
        writes=(Write(Obsm(adjusted_basis), lambda op, result: result.corrected, dtype),),
        message=f"training an autoencoder ({name})",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)
