from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obs, Slot, Uns, X, check_batch, matrix_of, warn_if_not_counts
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def solo(
    adata: AnnData | Plan,
    *,
    batch_key: str | None = None,
    doublet_rate: float = 0.05,
    doublet_ratio: float = 2.0,
    threshold: float = 0.5,
    n_latent: int = 10,
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Probability of each cell to be a doublet, from a classifier in the latent space of a count autoencoder.

    Trains :func:`vae` on the counts, simulates doublets by adding up pairs of cells, and trains a network on latent
    vectors and log depth to tell them from the cells, with early stopping. Two of three simulated doublets are thinned
    to the depth of another cell, so that doublets without many molecules are found too.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts, or a plan.
    batch_key
        Column of `adata.obs` with the batch: doublets form within one, and the autoencoder corrects for it.
    doublet_rate
        Expected share of doublets, between 0 and 1. The probabilities add up to the geometric mean of it and of what
        the classifier finds itself.
    doublet_ratio
        Simulated doublets for each cell.
    threshold
        Probability above which a cell is called a doublet, between 0 and 1.
    n_latent
        Dimensions of the latent space.
    max_epochs
        Most passes over the cells for the autoencoder; the default is that of :func:`vae`.
    layer
        Layer with the counts, instead of `X`.
    random_state, rng
        Seed of the simulation and of both trainings.
    progress
        Whether to show progress bars.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obs["solo_score"]` : float32 (cells,)
        Probability in [0, 1].
    `adata.obs["solo_predicted_doublet"]` : bool (cells,)
        Whether it is above the threshold.
    `adata.uns["solo"]` : dict
        `params`; `history`, the cross-entropy on the `train` and `validation` parts every ten steps; `estimated_rate`,
        the mean probability.

    Raises
    ------
    ValueError
        If a number is out of range, there are fewer than ten cells, a batch is missing or has one cell, or values are
        negative or not finite.
    KeyError
        If `batch_key` or `layer` does not exist.

    References
    ----------
    Bernstein et al. (2020), Solo: doublet identification in single-cell RNA-seq via semi-supervised deep learning.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> adata.obs["batch"] = np.where(np.arange(150) % 3 == 0, "a", "b")  # in place of real batches
    >>> sd.pp.solo(adata, batch_key="batch", max_epochs=2, progress=False)
    >>> bool(adata.obs["solo_score"].between(0, 1).all())
    True
    """
    seed = as_seed(one_rng(rng, random_state))
    for name, value in {"doublet_rate": doublet_rate, "threshold": threshold}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r} must lie between 0 and 1")
    if not doublet_ratio > 0:
        raise ValueError(f"doublet_ratio={doublet_ratio!r} must be greater than 0")
    for name, number in {"n_latent": n_latent, "max_epochs": max_epochs}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number!r} must be at least 1")
    check_batch(adata.adata if isinstance(adata, Plan) else adata, batch_key)
    if not isinstance(adata, Plan):
        warn_if_not_counts(matrix_of(adata, layer), "solo")
    params: dict[str, Any] = {"doublet_rate": doublet_rate, "doublet_ratio": doublet_ratio, "threshold": threshold}
    params |= {"n_latent": n_latent} | ({} if batch_key is None else {"batch_key": batch_key})

    def notes(op: ops.Solo, result: ops.SoloResult, args: Any) -> Mapping[Slot, Any]:
        history = {name: np.asarray(values, np.float64) for name, values in (op.history or {}).items()}
        rate = float(np.asarray(result.score).mean())
        return {Uns("solo"): {"params": params, "history": history, "estimated_rate": rate}}

    step = Step(
        "solo",
        ops.Solo(
            vae=ops.VAE(n_latent=n_latent, training=ops.Training(max_epochs=max_epochs, progress=progress)),
            doublet_rate=doublet_rate,
            doublet_ratio=doublet_ratio,
            progress=progress,
        ),
        reads=(X(layer, counts=True), None if batch_key is None else Obs(batch_key, codes=True)),
        writes=(
            Write(Obs("solo_score"), lambda op, result: result.score, np.float32),
            Write(Obs("solo_predicted_doublet"), lambda op, result: result.score > threshold),
        ),
        message="finding doublets",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)
