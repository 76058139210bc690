from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obs, Obsm, Slot, Uns, X, check_batch, matrix_of, warn_if_not_counts
from scdiffx._steps import Plan, Step, Write, apply, public

if TYPE_CHECKING:
    from anndata import AnnData


@public
def vae(
    adata: AnnData | Plan,
    *,
    batch_key: str | None = None,
    likelihood: str = "nb",
    dispersion: str = "gene",
    n_latent: int = 10,
    genes: Sequence[str] | str | None = None,
    library_size: float = 1e4,
    max_epochs: int | None = None,
    patience: int | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Latent cells and denoised expression from a variational autoencoder of counts.

    scVI's generative model: negative binomial counts whose mean is the cell's total count times a softmax over the
    genes, computed by a network from a latent vector and the batch. Training happens in the call, on minibatches of
    sparse counts, with a tenth of the cells held out to watch it by. Highly variable genes are enough, and faster.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts, or a plan.
    batch_key
        Column of `adata.obs` with the batch; the latent space is then free to ignore it.
    likelihood
        "nb" for negative binomial, "zinb" with extra zeros.
    dispersion
        One for each "gene", or for each gene in each batch: "gene-batch".
    n_latent
        Dimensions of the latent space.
    genes
        Names of genes whose denoised expression is wanted, or "all" for a whole dense layer. By default none.
    library_size
        Total of a cell's denoised expression over all genes.
    max_epochs
        Most passes over the cells; by default as many as 5,000 gradient steps take, but from 10 to 400.
    patience
        Stop after this many epochs without a better bound on the held-out cells, and keep the best weights. By default
        all epochs run and the last weights are kept: they predict held-out molecules and mix batches better.
    layer
        Layer with the counts, instead of `X`.
    key_added
        Key of `obsm` and `uns`, and prefix of the denoised values, instead of "X_vae", "vae" and "vae".
    random_state, rng
        Seed of the initial weights, the held-out cells and the order of the minibatches.
    progress
        Whether to show a progress bar.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["X_vae" | key_added]` : float32 (cells, n_latent)
        Means of the approximate posterior.
    `adata.layers["vae_normalized" | f"{key_added}_normalized"]` : float32 (cells, genes), if `genes` is "all"
        Expected expression, which sums to `library_size` in each cell.
    `adata.obsm["X_vae_normalized" | f"X_{key_added}_normalized"]` : float32 (cells, len(genes)), if `genes` are named
        The same for these genes, in the order of `uns["vae"]["params"]["genes"]`.
    `adata.uns["vae" | key_added]` : dict
        `params`; `net`, the weights by name (``ops.VAE(net=...)`` takes them); `history`, the negative lower bound on
        the training and on the held-out cells and the latter's `validation_nll` part in nats per cell and epoch;
        `validation`, the held-out bound, and `validation_nll`, the held-out negative log likelihood, of the weights
        that were kept.

    Raises
    ------
    ValueError
        If an option is unknown, a number is out of range, there are fewer than ten cells, a batch is missing, or
        values are negative or not finite.
    KeyError
        If `batch_key`, `layer` or a gene does not exist.

    References
    ----------
    Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.vae(adata, genes=["TNFRSF4", "HES4"], n_latent=3, max_epochs=1, progress=False)
    >>> adata.obsm["X_vae"].shape, adata.obsm["X_vae_normalized"].shape
    ((150, 3), (150, 2))
    """
    seed = as_seed(one_rng(rng, random_state))
    data = adata.adata if isinstance(adata, Plan) else adata
    _check_numbers(n_latent, library_size, max_epochs, patience)
    check_batch(data, batch_key)
    matrix = matrix_of(data, layer) if not isinstance(adata, Plan) else None
    columns, named = _columns(data, genes)
    key, entry, prefix = (key_added,) * 3 if key_added is not None else ("X_vae", "vae", "vae")
    if matrix is not None:
        warn_if_not_counts(matrix, "vae")
    params = {"likelihood": likelihood, "dispersion": dispersion, "n_latent": n_latent, "library_size": library_size}
    params |= {} if batch_key is None else {"batch_key": batch_key}
    params |= {} if layer is None else {"layer": layer}
    params |= {} if named is None else {"genes": named}

    def notes(op: ops.VAE, result: ops.VAEResult, args: Any) -> Mapping[Slot, Any]:
        return {Uns(entry): {"params": params, **described(op)}}

    writes = [Write(Obsm(key), lambda op, result: result.latent, np.float32)]
    if columns is not None:
        slot = X(f"{prefix}_normalized") if named is None else Obsm(f"X_{prefix}_normalized")
        writes.append(Write(slot, lambda op, result: result.normalized * library_size, np.float32))
    step = Step(
        "vae",
        ops.VAE(
            columns=None if columns is None else jnp.asarray(columns, jnp.int32),
            n_latent=n_latent,
            likelihood=likelihood,
            dispersion=dispersion,
            training=ops.Training(max_epochs=max_epochs, patience=patience, progress=progress),
        ),
        reads=(X(layer, counts=True), None if batch_key is None else Obs(batch_key, codes=True)),
        writes=tuple(writes),
        message=f"training a variational autoencoder\n    with n_latent={n_latent}",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def described(op: ops.VAE) -> dict[str, Any]:
    """What `uns` holds of a trained autoencoder."""
    if op.net is None:
        return {}
    net = {name: np.asarray(value, np.float32) for name, value in op.net.items()}
    if op.history is None:
        return {"net": net}
    history = {name: np.asarray(values, np.float64) for name, values in op.history.items()}
    kept = int(history.pop("kept"))
    return {
        "net": net,
        "history": history,
        "validation": float(history["validation"][kept]),
        "validation_nll": float(history["validation_nll"][kept]),
    }


def _check_numbers(n_latent: int, library_size: float, max_epochs: int | None, patience: int | None) -> None:
    at_least_one = {"n_latent": n_latent, "max_epochs": max_epochs, "patience": patience}
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if not library_size > 0:
        raise ValueError(f"library_size={library_size!r} must be greater than 0")


def _columns(data: AnnData, genes: Sequence[str] | str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The positions of the genes to decode and, unless they are all, their names; None where there are none."""
    if genes is None:
        return None, None
    if isinstance(genes, str):
        if genes != "all":
            raise ValueError(f"genes={genes!r} must be 'all' or a list of names of genes")
        return np.arange(data.n_vars), None
    names = np.asarray(list(genes), dtype=str)
    positions = data.var_names.get_indexer(names)
    if (positions < 0).any() or not len(names):
        raise KeyError(f"genes {list(names[positions < 0][:5])} are not in `adata.var_names`")
    return positions, names
