"""Communication between neighbouring cells: which ligands around them change cells that have the receptor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._log import warn
from scdiffx._slots import Genes, Obs, Obsm, Slot, Uns, X, available, check_batch, check_finite, matrix_of
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.tl._ligrec_input import columns_of, neighbour_slot, pairs_of

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame
    from spatialdata import SpatialData

_METHODS = ("linear", "gat")
_MODELS = ("own", "types", "linear", "gat")


@public
def communication(
    adata: AnnData | SpatialData | Plan,
    interactions: Any,
    *,
    groupby: str | None = None,
    method: Literal["linear", "gat"] = "linear",
    neighbors: bool | str = True,
    batch_key: str | None = None,
    targets: Sequence[str] | None = None,
    n_genes: int = 1000,
    n_programs: int = 10,
    n_perms: int = 200,
    layer: str | None = None,
    random_state: Any = None,
    key_added: str = "communication",
    copy: bool = False,
    rng: Any = None,
    table_key: str | None = None,
) -> AnnData | SpatialData | None:
    """Find which ligands of their neighbours change the expression of cells that bear the receptor.

    Where `tl.ligrec` asks who expresses both sides, this asks for a response. The signal of a pair is a cell's receptor
    times the mean of the ligand over its neighbours. A pair is tested by what other genes of the receivers change with
    it, beyond the cell's own state, the types around it and the ligand itself, against senders that change places.
    Programs of the genes that respond are predicted in parts of the tissue that are held out. The cost is linear in
    cells.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), normalised and on a logarithmic scale, with places; or a plan.
    interactions
        Pairs of a ligand and a receptor, as for :func:`scdiffx.tl.ligrec`; a complex, joined by ``"_"``, has as much as
        its scarcest member, and all members must be there.
    groupby
        Column of `obs` with types of cells. Recommended: without it, what types differ by and where they lie counts as
        a response.
    method
        "linear": ridge regression. "gat" (experimental): a network with graph attention (GATv2), whose edges carry the
        products of ligand and receptor, on top of it. On planted signals it did not predict better than "linear".
    neighbors
        True: neighbours by ``obsp["spatial_connectivities"]`` (of `squidpy.gr.spatial_neighbors`) or, where that is
        missing, the 6 nearest cells in ``obsm["spatial"]``, of the same batch. A name: another matrix of `obsp`.
    batch_key
        Column of `obs` with the slice or sample of each cell: senders change places within these only.
    targets
        Names of genes that may respond. By default the `n_genes` most variable; never the ligands and receptors.
    n_genes
        See `targets`. Variances are those of the values that `adata` holds.
    n_programs
        Number of programs to predict, at most.
    n_perms
        Number of permutations.
    layer
        Layer to use rather than `X`.
    random_state, rng
        Seed: an integer, a numpy generator or a JAX key; give one of the two. Default 0.
    key_added
        Name of the results.
    copy
        Return a copy instead of writing to `adata`: of a SpatialData, one that shares everything but the table.
    table_key
        Name of the table where `adata` is a SpatialData, which needs it if it has several. Coordinates are those of the
        table's `obsm`, not of shapes.

    Returns
    -------
    None, or the copy. Sets:

    `adata.uns["communication" | key_added]` : DataFrame
        A row for each pair whose genes the data have, smallest p-values first: `ligand` and `receptor` (categorical,
        names as given); `statistic` (mean over genes of by how much squared z-scores exceed 4), `pvalue`, `qvalue`
        (Benjamini-Hochberg); `gain`, the share of the genes' variance that the pair adds in held-out cells; and
        `importance`, the share of the programs' that the model of all pairs loses there without it. Both may be below
        0.
    `adata.uns["communication_groups" | f"{key_added}_groups"]` : DataFrame
        With `groupby`: `ligand`, `receptor`, `source`, `target`, and `importance` of the pair where only cells of
        `source` send and only those of `target` receive; largest first. A description, without a test.
    `adata.obsm["X_communication" | f"X_{key_added}"]` : float32 (cells, programs)
        What neighbours add to the predicted programs of each cell.
    `adata.uns["communication_params" | f"{key_added}_params"]` : dict
        The settings `method`, `neighbors`, `groupby`, `batch_key`, `n_genes`, `n_programs`, `n_perms` and
        `random_state`; the number of `interactions` whose genes the data have; and in `r2` and `r2_test` the shares of
        the variance of programs that are predicted in held-out cells, over all parts and in the first one: by the
        cell's `own` type and expression, by the `types` around it too (as NCEM does), by ligands and pairs too
        (`linear`), and by the network (`gat`, in `r2_test` alone).

    Raises
    ------
    KeyError
        If labels, batches, graph, layer, targets or all genes of the interactions are missing.
    TypeError
        If the interactions are no table or sequence of pairs, or `groupby` names fractional numbers.
    ValueError
        If a setting is out of range, the graph joins batches, there are fewer than 50 cells, or no targets are left.

    Warns
    -----
    UserWarning
        If in held-out cells the pairs predict no better than types alone.

    Notes
    -----
    Cells are held out in blocks: stretches of an order of the graph in which neighbours are near each other. Of five
    parts each is held out once; another one chooses penalties, and the remaining three yield programs and coefficients.

    Senders change places with cells of their own type and batch, with all their ligands. P-values are shares of
    permutations, ``(1 + k) / (1 + n)``; where fewer than 10 reach the statistic, the tail of a gamma distribution of
    the permutations' mean and variance. They are calibrated where a cell's ligands do not depend on its place;
    expression that varies smoothly in space within a type, for whatever reason, can make pairs significant. Receivers
    with the receptor must respond more than those without: a ligand that changes all cells alike is not found, nor one
    that lies everywhere alike. It is regression: what goes with a ligand, unmeasured, gets its credit.

    In a plan results are differentiable in expression.

    References
    ----------
    Fischer, Schaar and Theis (2023), Modeling intercellular communication in tissues using spatial graphs of cells
    (NCEM). Brody, Alon and Yahav (2022), How attentive are graph attention networks? (GATv2).

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> adata.obsm["spatial"] = adata.obsm["X_umap"]  # in place of coordinates in a tissue
    >>> pairs = [("CCL5", "CD2"), ("GZMB", "CD3D")]
    >>> sd.tl.communication(adata, pairs, n_genes=50, n_programs=2, n_perms=2)
    >>> adata.obsm["X_communication"].shape
    (700, 2)
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is not available. Available: {list(_METHODS)}")
    for name, value in (("n_genes", n_genes), ("n_programs", n_programs), ("n_perms", n_perms)):
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if neighbors is False:
        raise ValueError("neighbors=False: communication needs neighbours; `tl.ligrec` can do without")
    labels, names = _types(adata, groupby)
    check_batch(data, batch_key)
    strata = None if batch_key is None else data.obs[batch_key].astype("category").cat.codes.to_numpy()
    pairs = pairs_of(interactions)
    columns, sides, kept = columns_of(pairs, data, partial=False)
    pairs = [pairs[i] for i in kept]
    chosen = _targets(data, columns, targets, n_genes, layer)
    graph = neighbour_slot(adata, neighbors, strata)
    seed = as_seed(one_rng(rng, random_state))
    params = {
        "method": method,
        "neighbors": neighbors,
        "n_genes": len(chosen),
        "n_programs": n_programs,
        "n_perms": n_perms,
        "random_state": seed,
        "interactions": len(pairs),
        **({} if groupby is None else {"groupby": groupby}),
        **({} if batch_key is None else {"batch_key": batch_key}),
    }

    def notes(op: ops.Communication, result: ops.CommunicationResult, args: Any) -> Mapping[Slot, Any]:
        assert op.fit is not None
        if op.fit.r2[2] <= op.fit.r2[1]:
            warn("in held-out cells ligands and receptors predict no better than types alone: see `r2` of the params")
        found = op.test(*args, strata=strata, n_perms=n_perms, seed=seed)
        scores = {
            name: dict(zip(_MODELS, np.asarray(getattr(op.fit, name), np.float64).tolist(), strict=False))
            for name in ("r2", "r2_test")
        }
        written: dict[Slot, Any] = {
            Uns(key_added): _table(found, np.asarray(op.fit.importance), pairs),
            Uns(f"{key_added}_params"): params | scores,
        }
        if groupby is not None:
            between = np.asarray(op.fit.between)
            groups = [str(i) for i in range(between.shape[1])] if names is None else names
            written[Uns(f"{key_added}_groups")] = _group_table(between, pairs, groups)
        return written

    step = Step(
        "communication",
        ops.Communication(
            ligands=sides[0],
            receptors=sides[1],
            n_groups=1 if groupby is None else None if names is None else len(names),
            settings=ops.CommunicationSettings(n_programs=n_programs, attention=method == "gat"),
        ),
        reads=(Genes(X(layer), (*columns, *chosen), dense=False), graph, labels),
        writes=(Write(Obsm(f"X_{key_added}"), lambda op, result: result.effect, np.float32),),
        message="finding responses to neighbours",
        notes=notes,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _types(adata: AnnData | Plan, groupby: str | None) -> tuple[Obs | None, list[str] | None]:
    """Where the types are, and their names; None where a step of the plan finds them."""
    if groupby is None:
        return None, None
    slot = Obs(groupby, codes=True)
    if isinstance(adata, Plan) and adata.writes(Obs(groupby)):
        return slot, None
    data: Any = adata.adata if isinstance(adata, Plan) else adata
    if groupby not in data.obs:
        raise KeyError(f"groupby={groupby!r} is not in `adata.obs`. Available: {available(data.obs)}")
    column = data.obs[groupby]
    if column.dtype.kind == "f":
        raise TypeError(f"groupby={groupby!r} names fractional numbers in `adata.obs`; types need labels")
    if missing := int(column.isna().sum()):
        raise ValueError(f"groupby={groupby!r} is missing for {missing} of {len(column)} cells")
    return slot, [str(name) for name in column.astype("category").cat.categories]


def _targets(
    data: Any, columns: tuple[int, ...], targets: Sequence[str] | None, n_genes: int, layer: str | None
) -> list[int]:
    """Positions of the genes that may respond."""
    if isinstance(targets, str):
        raise TypeError(f"targets={targets!r} is one name: give a list")
    if targets is not None:
        at = data.var_names.get_indexer(list(targets))
        if (at < 0).all():
            raise KeyError(f"none of targets is in `adata.var_names`. Available: {available(data.var_names)}")
        return [int(i) for i in np.unique(at[at >= 0]) if i not in set(columns)]
    try:
        matrix = matrix_of(data, layer)
    except KeyError:  # an earlier step of the plan will write the layer
        matrix = matrix_of(data, None)
    check_finite(matrix, data.obs_names, data.var_names)
    square = matrix.multiply(matrix) if hasattr(matrix, "multiply") else np.square(matrix)
    variance = np.asarray(square.mean(0)).ravel() - np.asarray(matrix.mean(0)).ravel() ** 2
    variance[list(columns)] = -np.inf
    order = np.argsort(-np.nan_to_num(variance, nan=-np.inf), kind="stable")
    return [int(i) for i in np.sort(order[: min(n_genes, len(order) - len(columns))])]


def _named(pairs: list[tuple[str, str]], at: np.ndarray) -> dict[str, Any]:
    import pandas as pd

    found = {}
    for side, name in enumerate(("ligand", "receptor")):
        names, codes = np.unique([pair[side] for pair in pairs], return_inverse=True)
        found[name] = pd.Categorical.from_codes(codes[at], categories=[str(n) for n in names])
    return found


def _table(found: ops.CommunicationTest, importance: np.ndarray, pairs: list[tuple[str, str]]) -> DataFrame:
    import pandas as pd
    from scipy import stats

    order = np.lexsort((-found.statistic, found.pvalue))
    numbers = {
        "statistic": found.statistic,
        "pvalue": found.pvalue,
        "qvalue": stats.false_discovery_control(found.pvalue),
        "gain": found.gain,
        "importance": importance,
    }
    columns = _named(pairs, order) | {name: np.asarray(v, np.float64)[order] for name, v in numbers.items()}
    return pd.DataFrame(columns, index=pd.RangeIndex(len(order)).astype(str))


def _group_table(between: np.ndarray, pairs: list[tuple[str, str]], groups: list[str]) -> DataFrame:
    import pandas as pd

    order = np.argsort(-between.ravel(), kind="stable")
    order = order[between.ravel()[order] != 0]
    pair, source, target = np.unravel_index(order, between.shape)
    columns = _named(pairs, pair)
    columns |= {
        "source": pd.Categorical.from_codes(source, groups),
        "target": pd.Categorical.from_codes(target, groups),
    }
    columns["importance"] = np.asarray(between.ravel()[order], np.float64)
    return pd.DataFrame(columns, index=pd.RangeIndex(len(order)).astype(str))
