"""Ligand-receptor interactions between groups of cells, and whether they exceed those of shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._core.random import as_seed, one_rng
from scdiffx._slots import Genes, Obs, Obsm, Slot, Uns, X, available, check_batch
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._ligrec import COMPLEX_POLICIES, SHUFFLES
from scdiffx.tl._ligrec_input import columns_of, neighbour_slot, pairs_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@public
def ligrec(
    adata: AnnData | SpatialData | Plan,
    cluster_key: str,
    interactions: Any,
    *,
    neighbors: bool | str = False,
    shuffle: Literal["all", "group"] = "all",
    batch_key: str | None = None,
    complex_policy: Literal["min", "group_min"] = "min",
    threshold: float = 0.01,
    n_perms: int = 1000,
    layer: str | None = None,
    random_state: Any = None,
    key_added: str = "ligrec",
    copy: bool = False,
    rng: Any = None,
    table_key: str | None = None,
) -> AnnData | SpatialData | None:
    """Test which ligands and receptors pairs of cell groups express together, among all cells or among neighbours.

    CellPhoneDB's permutation test: the mean of a ligand in a sending group and of its receptor in a receiving group,
    compared with the same mean of shuffled cells. Memory is linear in cells.

    Parameters
    ----------
    adata
        Annotated data (cells x genes), normalised and on a logarithmic scale, or a plan.
    cluster_key
        Labels: a categorical, string or integer column of `obs`; or soft ones, such as estimated abundances of cell
        types: an array or data frame of `obsm` (cells, groups), none negative. Cells without a label do not count.
    interactions
        Pairs of a ligand and a receptor: a data frame with columns `ligand` and `receptor`, or `source_genesymbol` and
        `target_genesymbol`, or `source` and `target` (the first of these that it has); or a sequence of pairs of names.
        Members of a complex are joined by ``"_"``. Names are those of `adata.var_names`, letter case included.
    neighbors
        False: all cells of the two groups count. True: those that neighbour the other group, by
        ``obsp["spatial_connectivities"]`` (of `squidpy.gr.spatial_neighbors`) or, where that is missing, by the 6
        nearest cells in ``obsm["spatial"]``, of the same batch. A name: another matrix of `obsp`. See the notes.
    shuffle
        Which cells change their expression: "all", or, only with `neighbors` and labels of `obs`, those of one "group".
        See the notes.
    batch_key
        Column of `obs` with the slice or sample of each cell: cells are shuffled within these only.
    complex_policy
        Which member stands for a complex. "min", squidpy's: the one with the least mean over all labelled cells, of
        those that the data have. "group_min", CellPhoneDB's: the one with the least mean in the group; interactions
        with a missing member are left out.
    threshold
        Share of the group's cells that must express either side for a pair of groups to be tested, in [0, 1].
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

    `adata.uns["ligrec" | key_added]` : DataFrame
        A row for each test, smallest p-values first: `source` and `target` (sending and receiving group), `ligand` and
        `receptor` (categorical, names as given), `mean` (half the sum of both means), `pvalue` and `qvalue`
        (Benjamini-Hochberg over all pairs of groups of these interactions).
    `adata.uns["ligrec_params" | f"{key_added}_params"]` : dict
        The settings `cluster_key`, `neighbors`, `shuffle`, `batch_key`, `complex_policy`, `threshold`, `n_perms` and
        `random_state`, and the number of `interactions` whose genes the data have.

    Raises
    ------
    KeyError
        If the labels, the batches, the graph, the layer or all genes of the interactions are missing.
    TypeError
        If labels are fractional numbers, or the interactions are no table or sequence of pairs.
    ValueError
        If there are fewer than two groups, soft labels are negative, the graph joins batches, nothing is expressed
        widely enough to be tested, or a setting is out of range.

    Notes
    -----
    With `neighbors` a cell counts once for every edge, in either direction, to a cell of the other group, times its
    weight: means are over the neighbouring pairs of the two groups; with a graph of all pairs they are those without
    one. The expression of whole cells is shuffled, and labels and places stay: shuffled labels would not lie together
    as those of a tissue do, and means of few neighbours would seem to stand out. Among all cells both are the same.

    With "all", a small p-value says that the groups, where they touch, express the pair more than cells at large: a
    group that expresses the ligand everywhere does. With "group" it says that cells that touch the other group express
    more than others of their own. Expression that varies in space for other reasons, such as a gradient across both
    groups, gets small p-values too.

    P-values count permutations that reach the mean, ties and the observed cells included, ``(1 + k) / (1 + n)``;
    squidpy's, ``k / n`` of those that exceed it, can be 0. Only pairs that pass `threshold` have one, and to pass is to
    have a high mean: without any signal more than a twentieth of *these* are below .05. The q-values allow for that:
    pairs of groups of the same interactions that do not pass count as tests with a p-value of 1. No p-value is below
    ``1 / (1 + n)``: where few pairs reach it, only more permutations make q-values smaller. Cells are the unit of the
    test: with several donors, a significant pair may hold for one of them.

    In a plan ``"ligrec"`` names the means (interactions, source, target), for losses such as :func:`scdiffx.losses.l1`;
    they are differentiable in expression and soft labels. A fitted plan can be saved if the interactions are a list.

    References
    ----------
    Efremova et al. (2020), CellPhoneDB: inferring cell-cell communication from combined expression of multi-subunit
    ligand-receptor complexes. Palla et al. (2022), Squidpy: a scalable framework for spatial omics analysis.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> sd.tl.ligrec(adata, "bulk_labels", [("CCL5", "CD2"), ("GZMB", "CD3D")], n_perms=10)
    >>> adata.uns["ligrec"].columns.tolist()[:4]
    ['source', 'target', 'ligand', 'receptor']
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r} must lie between 0 and 1")
    if n_perms < 1:
        raise ValueError(f"n_perms={n_perms!r} must be at least 1")
    if complex_policy not in COMPLEX_POLICIES:
        raise ValueError(f"complex_policy={complex_policy!r} is unknown. Available: {list(COMPLEX_POLICIES)}")
    if shuffle not in SHUFFLES:
        raise ValueError(f"shuffle={shuffle!r} is unknown. Available: {list(SHUFFLES)}")
    labels, names = _groups(adata, cluster_key)
    if shuffle == "group" and (neighbors is False or isinstance(labels, Obsm)):
        raise ValueError("shuffle='group' needs neighbors=, and labels that are a column of `adata.obs`")
    check_batch(data, batch_key)
    strata = None if batch_key is None else data.obs[batch_key].astype("category").cat.codes.to_numpy()
    pairs = pairs_of(interactions)
    genes, sides, kept = columns_of(pairs, data, partial=complex_policy == "min")
    pairs = [pairs[i] for i in kept]
    graph = neighbour_slot(adata, neighbors, strata)
    seed = as_seed(one_rng(rng, random_state))
    params = {
        "cluster_key": cluster_key,
        "neighbors": neighbors,
        "shuffle": shuffle,
        "batch_key": batch_key,
        "complex_policy": complex_policy,
        "threshold": float(threshold),
        "n_perms": n_perms,
        "random_state": seed,
        "interactions": len(pairs),
    }

    def notes(op: ops.LigRec, result: ops.LigRecResult, args: Any) -> Mapping[Slot, Any]:
        found = op.test(*args, strata=strata, shuffle=shuffle, n_perms=n_perms, threshold=threshold, seed=seed)
        if not len(found.pvalue):
            raise ValueError(f"no two groups express both sides of an interaction in threshold={threshold!r} of cells")
        groups = [str(i) for i in range(op.n_groups or 0)] if names is None else names
        table = _table(found, np.asarray(result.mean), pairs, groups)
        return {Uns(key_added): table, Uns(f"{key_added}_params"): params}

    step = Step(
        "ligrec",
        ops.LigRec(
            ligands=sides[0],
            receptors=sides[1],
            n_groups=None if names is None else len(names),
            complex_policy=complex_policy,
        ),
        reads=(Genes(X(layer), genes, dense=False), labels, graph),
        writes=(Write(Uns(key_added), lambda op, result: result.mean),),
        message="testing ligand-receptor interactions",
        notes=notes,
        precise=True,
        rng=seed,
    )
    return apply(adata, step, copy=copy)


def _groups(adata: AnnData | Plan, key: str) -> tuple[Obs | Obsm, list[str] | None]:
    """Where the labels are, and the names of the groups; None where a step of the plan finds the groups."""
    plan = adata if isinstance(adata, Plan) else None
    data: Any = adata.adata if isinstance(adata, Plan) else adata
    if plan is not None and plan.writes(Obs(key)):
        return Obs(key, codes=True), None
    if plan is not None and plan.writes(Obsm(key)):
        return Obsm(key), None
    if key in data.obs:
        column = data.obs[key]
        if column.dtype.kind == "f":
            raise TypeError(f"cluster_key={key!r} names fractional numbers in `adata.obs`; groups need labels")
        names = [str(name) for name in column.astype("category").cat.categories]
        slot: Obs | Obsm = Obs(key, codes=True)
    elif key in data.obsm:
        value = data.obsm[key]
        numbers = np.asarray(value.toarray() if hasattr(value, "toarray") else value)
        if numbers.ndim != 2 or numbers.dtype.kind not in "fiub" or (numbers < 0).any():
            raise ValueError(f"cluster_key={key!r}: `adata.obsm` must hold numbers of at least 0 (cells, groups)")
        names = [str(name) for name in getattr(value, "columns", range(numbers.shape[1]))]
        slot = Obsm(key)
    else:
        raise KeyError(
            f"cluster_key={key!r} is neither in `adata.obs` nor in `adata.obsm`. "
            f"Available: {available([*data.obs, *data.obsm.keys()])}"
        )
    if len(names) < 2:
        raise ValueError(f"cluster_key={key!r} has {len(names)} group(s); two are needed")
    return slot, names


def _table(found: ops.LigRecTest, mean: np.ndarray, pairs: list[tuple[str, str]], groups: list[str]) -> Any:
    import pandas as pd
    from scipy import stats

    means = mean[found.interaction, found.sender, found.receiver]
    order = np.lexsort((-means, found.pvalue))
    family = np.ones(len(np.unique(found.interaction)) * len(groups) ** 2)
    family[: len(order)] = found.pvalue[order]
    columns: dict[str, Any] = {}
    for name, at in (("source", found.sender), ("target", found.receiver)):
        columns[name] = pd.Categorical.from_codes(at[order], categories=groups)
    for side, name in enumerate(("ligand", "receptor")):
        names, codes = np.unique([pair[side] for pair in pairs], return_inverse=True)
        columns[name] = pd.Categorical.from_codes(codes[found.interaction[order]], categories=[str(n) for n in names])
    columns |= {"mean": means[order], "pvalue": found.pvalue[order]}
    columns["qvalue"] = stats.false_discovery_control(family)[: len(order)]
    return pd.DataFrame(columns, index=pd.RangeIndex(len(order)).astype(str))
