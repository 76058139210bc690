"""Gene regulatory networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import settings, warn
from scdiffx._slots import Obsm, Slot, Uns, Var, X, available
from scdiffx._steps import Plan, Step, Write, apply

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame, Index

_FEWEST_CELLS = 10
_METHODS = ("ridge", "lasso", "gat")


@public
def grn(
    adata: AnnData | Plan,
    tfs: Sequence[str] | None = None,
    *,
    method: Literal["ridge", "lasso", "gat"] = "ridge",
    prior: DataFrame | None = None,
    penalty: float | None = None,
    n_subsamples: int = 0,
    n_regulators: int = 10,
    n_steps: int = 300,
    n_edges: int = 100_000,
    layer: str | None = None,
    key_added: str = "grn",
    random_state: Any = None,
    copy: bool = False,
    rng: Any = None,
) -> AnnData | None:
    """Infer which transcription factors regulate which genes, by regression, and how active they are.

    Each gene is regressed on all factors but itself, in standardised expression; the weights are signed. With a prior
    network each gene is regressed on the factors that the prior gives it. Ridge regression gives every edge a weight;
    the lasso gives most none. ``method="gat"`` is experimental: graph attention from factors to genes. On simulated
    counts it predicts held-out genes a little better than regression, and finds their factors less well.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), or a plan. Values on any scale; see Notes.
    tfs
        Names of the transcription factors; those that are not in `adata.var_names` are left out, with a warning. By
        default the factors of the `prior`. Nothing is downloaded: lists are at https://humantfs.ccbr.utoronto.ca.
    method
        "ridge" minimises ``|z - Z w|^2 / n + penalty |w|^2``, "lasso" ``|z - Z w|^2 / (2 n) + penalty |w|_1``, as
        scikit-learn's `Lasso` does. "gat" trains graph attention (GATv2) from factors to genes, and a weight is the
        derivative of the predicted gene in the factor, averaged over the cells.
    prior
        A network of possible edges: a table with columns "tf" (or "source") and "target", such as DoRothEA's. Edges
        between genes that are not here do not count.
    penalty
        Of the squared weights, per cell; of the absolute weights for the lasso, where 1 leaves none. By default that of
        eleven from 1e-4 to 10, for the lasso of thirteen from 1 down to 1e-4 (or to where two in a row predict worse),
        with which a random fifth of the cells is predicted best from the others. Not of "gat".
    n_subsamples
        Halves of the cells, an even number such as 50, in which the lasso is repeated at its penalty, to see which
        edges it always chooses.
    n_regulators
        For "gat" without a prior: so many factors of largest ridge weight are tried for each gene.
    n_steps
        For "gat": steps of training, on 64 cells each.
    n_edges
        So many edges of largest absolute weight are in the table.
    layer
        Layer with the values instead of `X`.
    key_added
        Name of the results.
    random_state, rng
        Seed of the choice of held-out cells; give one of the two. Default 0.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.uns["grn" | key_added]` : DataFrame
        `tf`, `target`, `weight` (standard deviations of the target per standard deviation of the factor, the other
        factors as they are) and `sign` (1 activates, -1 represses), by falling absolute weight. With
        `n_subsamples` also `stability`, the share of the halves of the cells in which the edge has a weight.
    `adata.obsm["tf_activity" | f"{key_added}_activity"]` : float32 (cells, tfs)
        Activity of each factor: standardised expression of its targets, weighted by its weights, whose norm is 1.
    `adata.var["grn_r2" | f"{key_added}_r2"]` : float32 (genes,)
        Share of the variance that is predicted in held-out cells, below 0 where the mean would predict better. Edges
        to genes with little of it are guesses. With "gat" the same cells choose when training stops.
    `adata.var["grn_r2_linear" | f"{key_added}_r2_linear"]` : float32 (genes,)
        With "gat" only: the share that ridge regression predicts in the same cells.
    `adata.uns["grn_params" | f"{key_added}_params"]` : dict
        `tfs` (the columns of the activity), `method`, `penalty` and `n_subsamples` (not of "gat"), `n_steps` and
        `n_regulators` (of "gat"), `random_state`, and whether a `prior` was given.

    Raises
    ------
    KeyError
        If the layer or the columns of the prior do not exist, or no factor or no edge of the prior is among the genes.
    ValueError
        If neither factors nor a prior is given, the method is unknown, a number is out of range, `n_subsamples` is
        given without the lasso or a penalty with "gat", there are fewer than ten cells, or values are not finite.

    Notes
    -----
    Regression finds who predicts whom, not who regulates whom: factors that follow the same signal share its weight,
    and cell types alone make genes correlated. On simulated cells of a known network (SERGIO) the ranking is better
    than that of random forests (GENIE3), but for logarithms of noisy normalised counts: there genes respond on a linear
    scale. On dendritic cells against ChIP-seq it is, as all methods there, near random.

    In a plan, the activity is differentiable in expression, and in the penalty or the weights of the network. `ops.GRN`
    and `ops.AttentionGRN` have the weights of the edges, too.

    References
    ----------
    Huynh-Thu et al. (2010), Inferring regulatory networks from expression data using tree-based methods (one regression
    a gene). Hoerl and Kennard (1970), Ridge regression. Badia-i-Mompel et al. (2022), decoupleR (activities as weighted
    means of targets). Tibshirani (1996), Regression shrinkage and selection via the lasso. Meinshausen and Buehlmann
    (2010), Stability selection. Brody, Alon and Yahav (2022), How attentive are graph attention networks? (GATv2).

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.grn(adata, ["SPI1", "IRF8"])
    >>> adata.obsm["tf_activity"].shape, adata.uns["grn"].columns.tolist()
    ((700, 2), ['tf', 'target', 'weight', 'sign'])
    """
    _check(method, penalty, n_subsamples)
    for name, number in {"n_edges": n_edges, "n_regulators": n_regulators, "n_steps": n_steps}.items():
        if number < 1:
            raise ValueError(f"{name}={number!r} must be at least 1")
    data = adata.adata if isinstance(adata, Plan) else adata
    if not data.n_vars:
        raise ValueError("`adata` has no genes")
    if data.n_obs < _FEWEST_CELLS:
        raise ValueError(f"`adata` has {data.n_obs} cells; regression on factors needs at least {_FEWEST_CELLS}")
    seed = as_seed(one_rng(rng, random_state))
    genes = data.var_names
    names, pairs = _network(genes, tfs, prior)
    at = genes.get_indexer(names)
    regulators = None if pairs is None else jnp.asarray(_regulators(pairs, len(genes)))
    params = {
        "tfs": np.asarray(names, object),
        "method": method,
        "random_state": seed,
        "prior": prior is not None,
    }
    buffers: dict[str, Any] = {"tfs": jnp.asarray(at, jnp.int32), "regulators": regulators}
    if method == "gat":
        params |= {"n_steps": n_steps} | ({"n_regulators": n_regulators} if prior is None else {})
        training = ops.GRNTraining(n_regulators=n_regulators, n_steps=n_steps, progress=settings.verbosity >= 2)
        op: ops.GRN | ops.AttentionGRN = ops.AttentionGRN(training=training, **buffers)
    else:
        params |= {"n_subsamples": n_subsamples}
        op = ops.GRN(penalty=penalty, method=method, n_subsamples=n_subsamples, **buffers)

    def notes(op: Any, result: ops.GRNResult, args: Any) -> Mapping[Slot, Any]:
        chosen = {} if method == "gat" else {"penalty": float(op.penalty)}
        stability = None if method == "gat" else op.stability
        table = _table(np.asarray(result.weights), stability, names, genes, n_edges)
        return {Uns(key_added): table, Uns(f"{key_added}_params"): params | chosen}

    activity = Obsm("tf_activity" if key_added == "grn" else f"{key_added}_activity")
    writes = [
        Write(activity, lambda op, result: result.activity, np.float32),
        Write(Var(f"{key_added}_r2"), lambda op, result: op.r2, np.float32),
    ]
    if method == "gat":
        writes.append(Write(Var(f"{key_added}_r2_linear"), lambda op, result: op.r2_linear, np.float32))
    step = Step(
        "grn",
        op,
        reads=(X(layer),),
        writes=tuple(writes),
        message=f"predicting genes from transcription factors ({method})",
        notes=notes,
        precise=True,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _check(method: str, penalty: float | None, n_subsamples: int) -> None:
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown. Available: {_METHODS}")
    if penalty is not None and not penalty > 0:
        raise ValueError(f"penalty={penalty!r} must be None or greater than 0")
    if penalty is not None and method == "gat":
        raise ValueError(f"penalty={penalty!r} is for method='ridge' and 'lasso': graph attention has none")
    if n_subsamples and method != "lasso":
        raise ValueError(f"n_subsamples={n_subsamples!r} needs method='lasso', which chooses edges")


def _network(
    genes: Index, tfs: Sequence[str] | None, prior: DataFrame | None
) -> tuple[list[str], list[tuple[int, int]] | None]:
    """The factors among the genes, and of the prior the edges as (number of the factor, column of the target)."""
    if tfs is None and prior is None:
        raise ValueError("tfs=None needs a prior: give the names of the transcription factors, or a network")
    if isinstance(tfs, str):
        raise ValueError(f"tfs={tfs!r} is one name: give a list")
    edges: list[tuple[str, str]] = []
    if prior is not None:
        source = next((name for name in ("tf", "source") if name in prior), None)
        if source is None or "target" not in prior:
            raise KeyError(f"prior needs columns 'tf' (or 'source') and 'target'. Available: {available(prior)}")
        there = set(genes)
        edges = [
            (a, b) for a, b in zip(prior[source], prior["target"], strict=True) if a in there and b in there and a != b
        ]
    wanted = list(dict.fromkeys(tfs if tfs is not None else [a for a, _ in edges]))
    names = [name for name in wanted if name in genes]
    if not names:
        what = "tfs" if tfs is not None else "the factors of the prior"
        raise KeyError(f"none of {what} is in `adata.var_names`. Available: {available(genes)}")
    if len(names) < len(wanted):
        warn(f"{len(wanted) - len(names)} of {len(wanted)} transcription factors are not in `adata.var_names`")
    if prior is None:
        return names, None
    number = {name: i for i, name in enumerate(names)}
    pairs = sorted({(number[a], genes.get_loc(b)) for a, b in edges if a in number})
    if not pairs:
        raise KeyError("no edge of the prior joins one of the tfs and a gene of `adata.var_names`")
    return names, pairs


def _regulators(pairs: list[tuple[int, int]], n_genes: int) -> np.ndarray:
    """For each gene the numbers of its factors, -1 where it has fewer than the gene with most."""
    tf, gene = np.asarray(pairs, np.int32).T
    counts = np.bincount(gene, minlength=n_genes)
    table = np.full((n_genes, counts.max()), -1, np.int32)
    order = np.argsort(gene, kind="stable")
    rank = np.arange(len(gene)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[gene[order], rank] = tf[order]
    return table


def _table(weights: np.ndarray, stability: Any, names: list[str], genes: Index, n_edges: int) -> DataFrame:
    import pandas as pd

    flat = weights.ravel()
    order = np.argsort(-np.abs(flat), kind="stable")[:n_edges]
    order = order[flat[order] != 0]
    tf, gene = np.unravel_index(order, weights.shape)
    table = pd.DataFrame(
        {
            "tf": pd.Categorical.from_codes(tf, names),
            "target": pd.Categorical.from_codes(gene, genes),
            "weight": flat[order].astype(np.float32),
            "sign": np.sign(flat[order]).astype(np.int8),
        }
    )
    return table if stability is None else table.assign(stability=np.asarray(stability, np.float32).ravel()[order])
