from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Obsm, Slot, Uns, X, genes_at, matrix_of, warn_if_not_counts
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData


@public
def denoise(
    adata: AnnData | Plan,
    genes: Sequence[str] | None = None,
    *,
    max_epochs: int | None = None,
    patience: int | None = 20,
    layer: str | None = None,
    key_added: str | None = None,
    random_state: Any = None,
    rng: Any = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Expected counts from a transformer over genes, trained to predict some molecules of a cell from its others.

    Tokens are genes with their counts; learned inducing points attend to a cell's tokens, so the cost is linear in
    tokens and cells. Training happens in the call: in each minibatch the molecules of a cell are dealt out binomially,
    the network sees 40 to 90 % of them with up to 30 % of the genes hidden, and the Poisson likelihood of the rest is
    raised. A tenth of the cells is held out; the weights that predict their molecules best are kept. For the result
    the network sees all molecules of a cell: thinning leaves shares as they are, and the network is told the depth.
    Highly variable genes are enough, and faster.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with raw counts, or a plan.
    genes
        Names of the genes to denoise. By default all of them, which fills a dense layer. The network is trained on
        all genes in either case, of which the 2,048 most variable are its input; a cell shows at most the 1,024 of
        them with the largest counts.
    max_epochs
        Most passes over the cells; by default as many as 1,500 gradient steps take, but from 10 to 300.
    patience
        Stop after this many epochs without a better likelihood on the held-out cells; None for never.
    layer
        Layer with the counts, instead of `X`.
    key_added
        Name of the layer (with `genes`, of ``obsm[f"X_{key_added}"]``) and of the entry in `uns`, instead of
        "denoised" and "denoise".
    random_state, rng
        Seed of the initial weights, the held-out cells, the minibatches and the dealing of molecules.
    progress
        Whether to show a progress bar.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.layers["denoised" | key_added]` : float32 (cells, genes), dense
        Without `genes`: expected counts, which sum to the cell's own total.
    `adata.obsm["X_denoised" | f"X_{key_added}"]` : float32 (cells, len(genes))
        With `genes`: their expected counts, in the order asked for.
    `adata.uns["denoise" | key_added]` : dict
        `params` (with `genes`, their names); `net`, the weights by name, and `tokens`, the positions of the genes that
        are input (``ops.Denoise(net=..., tokens=...)`` takes both); `history`, the Poisson deviance per molecule of
        the unseen molecules on the training and on the held-out cells in each epoch;
        `validation`, the held-out one of the weights that were kept, and `validation_gene_mean`, that of the genes'
        mean shares on the same molecules, from which training starts.

    Raises
    ------
    ValueError
        If a number is out of range, there are fewer than ten cells or no molecules, or values are negative or not
        finite.
    KeyError
        If `layer` or a gene does not exist.

    References
    ----------
    Lee et al. (2019), Set Transformer; Batson et al. (2019), Molecular cross-validation for single-cell RNA-seq.

    Examples
    --------
    >>> import scdiffx as sd
    >>> adata = sd.datasets.pbmc68k_counts()[:150, :120].copy()
    >>> sd.pp.denoise(adata, genes=["TNFRSF4", "HES4"], max_epochs=1, progress=False)
    >>> adata.obsm["X_denoised"].shape
    (150, 2)
    """
    seed = as_seed(one_rng(rng, random_state))
    data = adata.adata if isinstance(adata, Plan) else adata
    for name, value in {"max_epochs": max_epochs, "patience": patience}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if not isinstance(adata, Plan):
        warn_if_not_counts(matrix_of(adata, layer), "denoise")
    entry, target = ("denoise", "denoised") if key_added is None else (key_added, key_added)
    params: dict[str, Any] = {"random_state": seed} | ({} if layer is None else {"layer": layer})
    params |= {name: v for name, v in {"max_epochs": max_epochs, "patience": patience}.items() if v is not None}
    slot: Slot = X(target)
    columns = None
    if genes is not None:
        names = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        columns, slot = jnp.asarray(genes_at(data, names), jnp.int32), Obsm(f"X_{target}")
        params["genes"] = np.asarray(names, dtype=object)

    def notes(op: ops.Denoise, result: ops.DenoiseResult, args: Any) -> Mapping[Slot, Any]:
        return {Uns(entry): {"params": params, **_described(op)}}

    step = Step(
        "denoise",
        ops.Denoise(
            columns=columns,
            training=ops.DenoiseTraining(max_epochs=max_epochs, patience=patience, progress=progress),
        ),
        reads=(X(layer, counts=True),),
        writes=(Write(slot, lambda op, result: result.denoised, np.float32),),
        message="training a transformer to denoise counts",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _described(op: ops.Denoise) -> dict[str, Any]:
    """What `uns` holds of a trained denoiser."""
    if op.net is None or op.tokens is None:
        return {}
    found: dict[str, Any] = {
        "net": {name: np.asarray(value, np.float32) for name, value in op.net.items()},
        "tokens": np.asarray(op.tokens),
    }
    if op.history is None:
        return found
    history = {name: np.asarray(values, np.float64) for name, values in op.history.items()}
    kept, start = int(history.pop("kept")), float(history.pop("start"))
    validation = start if kept < 0 else float(history["validation"][kept])
    return found | {"history": history, "validation": validation, "validation_gene_mean": start}
