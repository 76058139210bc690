"""Integration of batches in an embedding by trained networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obs, Obsm, Slot, Uns
from scdiffx._steps import Plan, Step, Write, apply, public
from scdiffx.pp._harmony import check_basis, check_keys

if TYPE_CHECKING:
    from anndata import AnnData


@public
def mmd_integrate(
    adata: AnnData | Plan,
    key: str,
    *,
    basis: str = "X_pca",
    adjusted_basis: str = "X_mmd",
    weight: float = 10.0,
    n_hidden: int = 64,
    max_steps: int = 400,
    patience: int = 4,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Experimental: remove batches from an embedding by maximum mean discrepancy.

    An autoencoder of the embedding, trained in the call. Its code is the embedding plus what a small network of it and
    the batch adds, which starts at 0; a second network puts the cell back from code and batch. The code of each batch
    is drawn to that of all cells within soft clusters, by the squared maximum mean discrepancy under Gaussian kernels
    of several widths, so that batches of other composition are not made alike. Memory is linear in cells; a step sees
    at most 4,096 of them.

    It is experimental: beside :func:`harmony_integrate` it mixes and keeps as much on two of three data sets, less on
    the third, and takes ten times as long (see the measured figures in the documentation). To integrate counts, use
    :func:`vae` with a `batch_key`.

    Parameters
    ----------
    adata
        Annotated data with an embedding, or a plan.
    key
        Column of `adata.obs` with the batch.
    basis
        Key of `adata.obsm` with the embedding.
    adjusted_basis
        Key of `adata.obsm` for the result.
    weight
        Of the discrepancy, beside the squared reconstruction error in units of the embedding's standard deviation:
        higher mixes more and keeps less.
    n_hidden
        Units in the hidden layer of each network.
    max_steps
        Gradient steps at most.
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
        The corrected embedding, in the dimensions, units and precision of the embedding.
    `adata.uns["mmd"]` : dict
        `params` and the `history` of the checks: `reconstruction` error, `discrepancy`, `mixing` (local inverse
        Simpson's index of the batches, 0 apart to 1 as mixed as all cells) and `conservation` (share of 15 neighbours
        in the own batch that cells keep), on at most 4,096 cells; `kept` is the check whose networks are used.

    Raises
    ------
    KeyError
        If `key` or `basis` does not exist.
    ValueError
        If a batch is missing, there is only one, or a setting is not usable.
    FloatingPointError
        If training diverges.

    Notes
    -----
    In a plan the networks can be learned further, and derivatives pass to the embedding. Batches are told by their
    place among the categories: new cells for a fitted plan must have the same categories.

    References
    ----------
    Gretton et al. (2012), A kernel two-sample test. Lotfollahi et al. (2020), Conditional out-of-distribution
    generation for unpaired data using transfer VAE.
    """
    training = _training(weight, n_hidden, max_steps, patience, progress)
    op = ops.MMDIntegrate(weight=float(weight), n_hidden=n_hidden, training=training)
    return _integrate(adata, "mmd", op, key, basis, adjusted_basis, as_seed(one_rng(rng, random_state)), copy)


@public
def wgan_integrate(
    adata: AnnData | Plan,
    key: str,
    *,
    basis: str = "X_pca",
    adjusted_basis: str = "X_wgan",
    weight: float = 1.0,
    n_hidden: int = 64,
    max_steps: int = 400,
    patience: int = 4,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Experimental: remove batches from an embedding by Wasserstein critics.

    As :func:`mmd_integrate`, with critics in place of kernels: for each batch a network is trained to tell its cells
    from all cells, weighted to the batch's shares of soft clusters, under a penalty on slopes other than 1, and the
    autoencoder lowers the differences that they find (a Wasserstein GAN with gradient penalty). Training ends by the
    same criterion, which does not rest on the critics: reconstruction error plus ten times the discrepancy.

    It is experimental: beside :func:`harmony_integrate` it mixes and keeps as much on two of three data sets, less on
    the third, and takes ten times as long (see the measured figures in the documentation). To integrate counts, use
    :func:`vae` with a `batch_key`.

    Parameters
    ----------
    adata
        Annotated data with an embedding, or a plan.
    key
        Column of `adata.obs` with the batch.
    basis
        Key of `adata.obsm` with the embedding.
    adjusted_basis
        Key of `adata.obsm` for the result.
    weight
        Of the distances that the critics find, beside the squared reconstruction error in units of the embedding's
        standard deviation: higher mixes more and keeps less.
    n_hidden
        Units in the hidden layer of each network of the autoencoder.
    max_steps
        Steps of the autoencoder at most; the critics make three for each.
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
        The corrected embedding, in the dimensions, units and precision of the embedding.
    `adata.uns["wgan"]` : dict
        `params` and the `history` of the checks: `reconstruction` error, `discrepancy`, `mixing` (local inverse
        Simpson's index of the batches, 0 apart to 1 as mixed as all cells) and `conservation` (share of 15 neighbours
        in the own batch that cells keep), on at most 4,096 cells; `kept` is the check whose networks are used.

    Raises
    ------
    KeyError
        If `key` or `basis` does not exist.
    ValueError
        If a batch is missing, there is only one, or a setting is not usable.
    FloatingPointError
        If training diverges.

    Notes
    -----
    In a plan the networks can be learned further, and derivatives pass to the embedding. Batches are told by their
    place among the categories: new cells for a fitted plan must have the same categories.

    References
    ----------
    Gulrajani et al. (2017), Improved training of Wasserstein GANs.
    """
    training = _training(weight, n_hidden, max_steps, patience, progress)
    op = ops.WGANIntegrate(weight=float(weight), n_hidden=n_hidden, training=training)
    return _integrate(adata, "wgan", op, key, basis, adjusted_basis, as_seed(one_rng(rng, random_state)), copy)


def _training(weight: float, n_hidden: int, max_steps: int, patience: int, progress: bool) -> ops.IntegrationTraining:
    for name, value in {"n_hidden": n_hidden, "max_steps": max_steps, "patience": patience}.items():
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight={weight!r} must be greater than 0")
    return ops.IntegrationTraining(max_steps=max_steps, patience=patience, progress=progress)


def _integrate(
    adata: AnnData | Plan,
    name: str,
    op: ops.MMDIntegrate | ops.WGANIntegrate,
    key: str,
    basis: str,
    adjusted_basis: str,
    seed: int,
    copy: bool,
) -> AnnData | None:
    data = adata.adata if isinstance(adata, Plan) else adata
    check_keys(data, [key])
    check_basis(adata, basis)
    settings = {"weight": op.weight, "n_hidden": op.n_hidden, "random_state": seed}
    params = {"key": key, "basis": basis, "max_steps": op.training.max_steps, "patience": op.training.patience}

    def notes(op: ops.MMDIntegrate, result: ops.IntegrationResult, args: Any) -> Mapping[Slot, Any]:
        entry: dict[str, Any] = {"params": params | settings}
        if op.history is not None:
            entry["history"] = {part: np.asarray(value, np.float64) for part, value in op.history.items()}
            entry["history"]["kept"] = int(op.history["kept"])
        return {Uns(name): entry}

    step = Step(
        f"{name}_integrate",
        op,
        reads=(Obsm(basis), Obs(key, codes=True)),
        writes=(Write(Obsm(adjusted_basis), lambda op, result: result.corrected),),
        message=f"training an autoencoder ({name})",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)
