from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Modality, Obs, Obsm, Slot, Uns, X, check_batch
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.pp._joint_vae import found

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


@public
def vae(
    adata: AnnData | MuData | Plan,
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
    protein_key: str | None = None,
    modalities: Sequence[str] | None = None,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Latent cells and denoised expression from a variational autoencoder of counts, of genes alone or with proteins.

    scVI's generative model: negative binomial counts whose mean is the cell's total count times a softmax over the
    genes, computed by a network from a latent vector and the batch. Training happens in the call, on minibatches of
    sparse counts, with a tenth of the cells held out to watch it by. Highly variable genes are enough, and faster.

    With `protein_key` or `modalities`, genes and surface proteins (CITE-seq) share one latent space, as in totalVI. The
    count of a protein is a mixture of two negative binomials, background and foreground. The background of a cell is
    log-normal, with a prior for each protein in each batch; foreground over background, and the probability of
    foreground, are networks of latent vector and batch. Simpler than totalVI: a cell's total count of genes stands for
    its latent library size, each protein has one dispersion, and every protein has to be measured in every batch.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts, or a plan. With `modalities`, a MuData.
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
        Layer with the counts, instead of `X`; of both modalities, of a MuData.
    key_added
        Key of `obsm` and `uns`, and prefix of the denoised values, instead of "X_vae", "vae" and "vae".
    protein_key
        Key of `adata.obsm` with the raw counts of proteins (cells, proteins): a data frame or an array.
    modalities
        The modalities of a MuData with the genes and with the proteins, in this order, such as ``("rna", "prot")``.
        Results go to the `obsm` and `uns` of the MuData, and the layer of denoised genes to the modality.
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
    `adata.obsm["X_vae_proteins" | f"X_{key_added}_proteins"]` : float32 DataFrame (cells, proteins), with proteins
        Expected counts of proteins without background: the probability of foreground times its mean.
    `adata.obsm["vae_foreground" | f"{key_added}_foreground"]` : float32 DataFrame (cells, proteins), with proteins
        The probability that a protein of a cell is foreground, given its latent vector.
    `adata.uns["vae" | key_added]` : dict
        `params`; `net`, the weights by name (``ops.VAE(net=...)`` or ``ops.JointVAE`` takes them); `history`, the
        negative lower bound on the training and on the held-out cells and the latter's `validation_nll` part in nats
        per cell and epoch; `validation`, the held-out bound, and `validation_nll`, the held-out negative log
        likelihood, of the weights that were kept.

    Raises
    ------
    ValueError
        If an option is unknown, a number is out of range, there are fewer than ten cells, a batch is missing, values
        are negative or not finite, or a modality lacks some of the cells.
    KeyError
        If `batch_key`, `layer`, `protein_key`, a modality or a gene does not exist.
    TypeError
        If a MuData comes without `modalities`.

    References
    ----------
    Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics. Gayoso et al. (2021), Joint
    probabilistic modeling of single-cell multi-omic data with totalVI.

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
    source = found(adata, layer, protein_key, modalities)
    columns, named = _columns(source.genes, genes)
    key, entry, prefix = (key_added,) * 3 if key_added is not None else ("X_vae", "vae", "vae")
    if source.modality is not None and key in data.mdata.mod:  # type: ignore[union-attr]
        raise ValueError(
            f"key_added={key!r} is the name of a modality, whose cells the MuData notes in `obsm[{key!r}]`"
        )
    params = {"likelihood": likelihood, "dispersion": dispersion, "n_latent": n_latent, "library_size": library_size}
    params |= {} if batch_key is None else {"batch_key": batch_key}
    params |= {} if layer is None else {"layer": layer}
    params |= {} if named is None else {"genes": named}

    params |= {} if protein_key is None else {"protein_key": protein_key}
    params |= {} if modalities is None else {"modalities": np.asarray(modalities, dtype=object)}
    params |= {} if source.proteins is None else {"proteins": np.asarray(source.proteins, dtype=object)}

    def notes(op: ops.VAE | ops.JointVAE, result: Any, args: Any) -> Mapping[Slot, Any]:
        return {Uns(entry): {"params": params, **described(op)}}

    writes = [Write(Obsm(key), lambda op, result: result.latent, np.float32)]
    if columns is not None:
        slot: Slot = Obsm(f"X_{prefix}_normalized")
        if named is None:
            slot = X(f"{prefix}_normalized")
            slot = slot if source.modality is None else Modality(source.modality, slot)
        writes.append(Write(slot, lambda op, result: result.normalized * library_size, np.float32))
    if source.proteins is not None:
        level, chance = (Obsm(name, source.proteins, frame=True) for name in _protein_keys(prefix))
        writes.append(Write(level, lambda op, result: result.proteins, np.float32))
        writes.append(Write(chance, lambda op, result: result.foreground, np.float32))
    step = Step(
        "vae",
        (ops.VAE if source.proteins is None else ops.JointVAE)(
            columns=None if columns is None else jnp.asarray(columns, jnp.int32),
            n_latent=n_latent,
            likelihood=likelihood,
            dispersion=dispersion,
            training=ops.Training(max_epochs=max_epochs, patience=patience, progress=progress),
        ),
        reads=(*source.slots, None if batch_key is None else Obs(batch_key, codes=True)),
        writes=tuple(writes),
        message=f"training a variational autoencoder\n    with n_latent={n_latent}",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _protein_keys(prefix: str) -> tuple[str, str]:
    return f"X_{prefix}_proteins", f"{prefix}_foreground"


def described(op: ops.VAE | ops.JointVAE) -> dict[str, Any]:
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
