"""Fates: where random walks on the cell graph end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from scdiffx import ops
from scdiffx._calls import public
from scdiffx._log import warn
from scdiffx._slots import Connectivities, Labels, Obs, Obsm, Obsp, Slot, Uns, available
from scdiffx._steps import Plan, Step, Write, apply
from scdiffx.ops._fate_probabilities import PRIMINGS, SCHEMES
from scdiffx.tl._diffmap import weights_of

if TYPE_CHECKING:
    from anndata import AnnData

# Matplotlib's ten colours, then lighter ones.
_COLORS = [
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7", "#dbdb8d", "#9edae5"),
]


@public
def fate_probabilities(
    adata: AnnData | Plan,
    terminal_states: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    groupby: str | None = None,
    *,
    time_key: str = "dpt_pseudotime",
    threshold_scheme: str | None = "soft",
    frac_to_keep: float = 0.3,
    b: float = 10.0,
    nu: float = 0.5,
    transition_key: str | None = None,
    priming: str = "kl_divergence",
    neighbors_key: str = "neighbors",
    weights: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compute the probability of each cell to end in each terminal state.

    Absorption probabilities of a random walk on the neighbour graph, directed by pseudotime, or of a given transition
    matrix. On the same transition matrix and terminal states they equal CellRank 2's, which are the same linear system,
    where CellRank's solver converges; on chains that hold walks for long it may not, and this one goes on until the
    probabilities sum to 1. The keys are CellRank's.

    Parameters
    ----------
    adata
        Annotated data (cells x genes) with a neighbour graph, or a plan.
    terminal_states
        Names of groups in `groupby`, all of whose cells are terminal, or a dictionary of names and cell names. By
        default they are looked for (see the notes).
    groupby
        Categorical or string column of `obs` with the groups; where states are looked for, they are named by it.
    time_key
        Column of `obs` with pseudotime. Where it is infinite, walks have no direction.
    threshold_scheme
        How pseudotime directs the graph: "soft" scales the weights of edges that lead back by dt to
        ``2 / (1 + exp(b dt))^(1 / nu)``, which is differentiable in pseudotime; "hard", CellRank's default, removes
        them, except for the strongest edges of each cell. None walks on the undirected graph.
    frac_to_keep
        With "hard": the share of a cell's edges, its strongest, that stay wherever they lead; at most 30.
    b, nu
        With "soft": the growth rate and the asymmetry of the weights. `b` is per unit of pseudotime.
    transition_key
        Key of `obsp` with transition probabilities (or weights: rows are divided by their sums) to use instead of the
        graph, such as "velocity_transitions" of `sd.tl.transition_matrix`; then settings of pseudotime have no meaning
        and must be left alone.
    priming
        How far a cell is on its way: "kl_divergence" of its fates from the average of all cells, or "entropy", the lack
        of it.
    neighbors_key
        Key of `adata.uns` that describes the graph.
    weights
        Column of `obs` with a weight of at least 0 for each cell, such as "cell_weight" of `sd.pp.cell_weights`: steps
        to the cell are so many times as likely, and none lead to a cell of weight 0 (below 1e-6), whose own fates are
        where it would go. By default all cells count as 1. In a plan derivatives reach the weights.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Sets:

    `adata.obsm["lineages_fwd"]` : float64 (cells, states)
        Probabilities, in the order of `terminal_states`; rows sum to 1. They are conditional on ending in one of the
        states, which matters only where walks can be caught elsewhere (a warning says so). NaN for cells that can
        reach none.
    `adata.obs["term_states_fwd"]` : categorical (cells,)
        The state of terminal cells, missing for the others.
    `adata.obs["priming_degree_fwd"]` : float64 (cells,)
        Priming from 0 (naive) to 1 (committed).
    `adata.uns["term_states_fwd_colors"]` : array of str (states,)
        Their colours: those of `groupby` where it has colours.
    `adata.uns["fate"]` : dict
        `params`; `names` and `colors` of the states; `n_unreaching`: how many cells cannot reach each.

    Raises
    ------
    KeyError
        If a group, cell, column or matrix does not exist.
    TypeError
        If pseudotime or weights are not numbers.
    ValueError
        If there is no graph, states are empty, overlap, or leave no cell, a number is out of range, a weight is
        negative or not finite, or no state was found.

    Notes
    -----
    Terminal states are looked for as in Palantir: cells that hold an outlying share of the walks (on the "hard" scheme,
    whatever the other), joined to states by their connections, of at least 5 cells and later than the median cell; 30
    cells of each are terminal. The length of the walks (20 steps) was chosen on two data sets. Check the result, or
    give the states. In a plan and with weights they have to be given.

    Fates directed by velocity: ``sd.tl.velocity(adata)``, ``sd.tl.velocity_graph(adata)``,
    ``sd.tl.transition_matrix(adata, weight_connectivities=0.2)``, and this function with
    ``transition_key="velocity_transitions"``; in a plan derivatives reach the layers through all of them. Where
    walks have no pseudotime no state is too early: on a pancreas stationary progenitors were among those found, so
    give the states. Steps that stay in a cell change no fate.

    Priming is CellRank's, but that a probability of exactly 0 adds nothing to the divergence, as its definition says
    (CellRank takes 1 for all of such a cell).

    In a plan, `b` and `nu` can be learned, and derivatives reach pseudotime and the graph.

    References
    ----------
    Lange et al. (2022), CellRank for directed single-cell fate mapping; Weiler et al. (2024), CellRank 2: unified fate
    mapping in multiview single-cell data; Setty et al. (2019), Characterization of cell fate probabilities in
    single-cell data with Palantir; Stassen et al. (2021), Generalized and scalable trajectory inference in single-cell
    omics data with VIA; Velten et al. (2017), Human haematopoietic stem cell lineage commitment is a continuous
    process.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scdiffx as sd
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> sd.tl.pseudotime(adata, root=0)
    >>> sd.tl.fate_probabilities(adata, ["CD19+ B", "CD14+ Monocyte"], groupby="bulk_labels")
    >>> adata.obsm["lineages_fwd"].shape, list(adata.uns["fate"]["names"])
    ((700, 2), ['CD19+ B', 'CD14+ Monocyte'])
    """
    data = adata.adata if isinstance(adata, Plan) else adata
    if data.n_obs < 2:
        raise ValueError(f"`adata` has {data.n_obs} cell(s); fates need cells that are terminal and cells that are not")
    _check(time_key, threshold_scheme, frac_to_keep, b, nu, transition_key, priming)
    scheme = threshold_scheme if transition_key is None else None
    graph = Connectivities(neighbors_key) if transition_key is None else Obsp(transition_key)
    time = Obs(time_key) if scheme is not None else None
    if time is not None and not (adata.has(time) if isinstance(adata, Plan) else time.exists(adata)):
        raise KeyError(
            f"time_key={time_key!r} is not in `adata.obs`. Available: {available(data.obs)}; run `sd.tl.pseudotime` "
            "first, or pass `threshold_scheme=None` for undirected walks or `transition_key=`"
        )
    if time is not None and time.exists(data):
        _check_time(data, time_key)
    weighted = weights_of(adata, weights)
    if terminal_states is None:
        if isinstance(adata, Plan):
            raise ValueError("terminal_states=None: in a plan the terminal states have to be given")
        if weights is not None:
            raise ValueError(f"terminal_states=None: with weights={weights!r} the terminal states have to be given")
        names, codes = _found(data, groupby, graph, time, frac_to_keep, neighbors_key)
    else:
        names, codes = _given(data, terminal_states, groupby)
    colors = _colors(data, names, groupby)
    params = {
        **({"transition_key": transition_key} if transition_key is not None else {"neighbors_key": neighbors_key}),
        **({"threshold_scheme": scheme, "time_key": time_key} if scheme is not None else {}),
        **({"frac_to_keep": frac_to_keep} if scheme == "hard" else {}),
        **({"b": b, "nu": nu} if scheme == "soft" else {}),
        **({"weights": weights} if weights is not None else {}),
        "priming": priming,
    }

    def check(op: ops.FateProbabilities, result: ops.FateProbabilitiesResult) -> None:
        _warn(result, names, codes)

    def notes(op: ops.FateProbabilities, result: ops.FateProbabilitiesResult, args: Any) -> Mapping[Slot, Any]:
        import pandas as pd

        entry = {
            "params": params,
            "names": np.asarray(names, dtype=object),
            "colors": np.asarray(colors, dtype=object),
            "n_unreaching": (~np.asarray(result.reaches)[codes < 0]).sum(0),
        }
        return {
            Obs("term_states_fwd"): pd.Categorical.from_codes(codes, categories=names),
            Uns("term_states_fwd_colors"): np.asarray(colors, dtype=object),
            Uns("fate"): entry,
        }

    step = Step(
        "fate_probabilities",
        ops.FateProbabilities(b=float(b), nu=float(nu), scheme=scheme, frac_to_keep=frac_to_keep, priming=priming),
        reads=(graph, Labels(codes), time, weighted),
        writes=(
            Write(Obsm("lineages_fwd", tuple(names)), lambda op, result: result.probabilities, np.float64),
            Write(Obs("priming_degree_fwd"), lambda op, result: result.priming, np.float64),
        ),
        message="computing fate probabilities",
        notes=notes,
        check=check,
        precise=True,
    )
    return apply(adata, step, copy=copy)


def _check(
    time_key: str,
    threshold_scheme: str | None,
    frac_to_keep: float,
    b: float,
    nu: float,
    transition_key: str | None,
    priming: str,
) -> None:
    if threshold_scheme is not None and threshold_scheme not in SCHEMES:
        raise ValueError(f"threshold_scheme={threshold_scheme!r} is unknown. Available: {[*SCHEMES, None]}")
    if priming not in PRIMINGS:
        raise ValueError(f"priming={priming!r} is unknown. Available: {list(PRIMINGS)}")
    if not 0 <= frac_to_keep <= 1:
        raise ValueError(f"frac_to_keep={frac_to_keep!r} must lie between 0 and 1")
    for name, value in (("b", b), ("nu", nu)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be a finite number greater than 0")
    changed = {
        "time_key": time_key != "dpt_pseudotime",
        "threshold_scheme": threshold_scheme != "soft",
        "frac_to_keep": frac_to_keep != 0.3,
        "b": b != 10,
        "nu": nu != 0.5,
    }
    if transition_key is not None and any(changed.values()):
        names = [name for name, is_changed in changed.items() if is_changed]
        raise ValueError(f"transition_key={transition_key!r} is a transition matrix, so {names} have no meaning")


def _check_time(data: AnnData, time_key: str) -> None:
    column = data.obs[time_key]
    if column.dtype.kind not in "fiu":
        raise TypeError(f"time_key={time_key!r}: `adata.obs[{time_key!r}]` holds {column.dtype}, not numbers")
    if missing := int(np.isnan(column.to_numpy(np.float64)).sum()):
        raise ValueError(f"time_key={time_key!r}: pseudotime is NaN for {missing} cells")


def _groups(data: AnnData, groupby: str) -> Any:
    if groupby not in data.obs:
        raise KeyError(f"groupby={groupby!r} is not in `adata.obs`. Available: {available(data.obs)}")
    return data.obs[groupby].astype("category")


def _given(
    data: AnnData, terminal_states: Sequence[str] | Mapping[str, Sequence[str]], groupby: str | None
) -> tuple[list[str], np.ndarray]:
    """Names of the states, and for each cell the number of its state or -1."""
    codes = np.full(data.n_obs, -1, np.int32)
    if isinstance(terminal_states, Mapping):
        members = {str(name): data.obs_names.get_indexer_for(list(cells)) for name, cells in terminal_states.items()}
        for name, cells in members.items():
            if (cells < 0).any():
                absent = [cell for cell, at in zip(terminal_states[name], cells, strict=True) if at < 0]
                raise KeyError(f"terminal_states[{name!r}]: {available(absent)} are not in `adata.obs_names`")
    else:
        if groupby is None:
            raise ValueError("terminal_states names groups: pass `groupby=`, the column of `obs` that holds them")
        wanted = [terminal_states] if isinstance(terminal_states, str) else [str(name) for name in terminal_states]
        groups = _groups(data, groupby).cat
        there = [str(name) for name in groups.categories]
        absent = [name for name in wanted if name not in there]
        if absent:
            raise KeyError(f"{absent} are not groups of `adata.obs[{groupby!r}]`. Available: {available(there)}")
        members = {name: np.flatnonzero(groups.codes.to_numpy() == there.index(name)) for name in wanted}
    for i, (name, cells) in enumerate(members.items()):
        if not len(cells):
            raise ValueError(f"terminal_states: {name!r} has no cells")
        if (codes[cells] >= 0).any():
            raise ValueError(f"terminal_states: {name!r} shares cells with another state")
        codes[cells] = i
    if not members or (codes >= 0).all():
        raise ValueError(f"terminal_states={list(members)}: there must be a state, and cells outside of all states")
    return list(members), codes


def _found(
    data: AnnData, groupby: str | None, graph: Slot, time: Obs | None, frac_to_keep: float, neighbors_key: str
) -> tuple[list[str], np.ndarray]:
    """States that were looked for, named by the groups of most of their cells."""
    if time is None and isinstance(graph, Connectivities):
        raise ValueError("terminal_states=None: undirected walks gather nowhere; name the states, or give a direction")
    with jax.enable_x64(True):
        weights = graph.read(data)
        when = None if time is None else time.read(data).astype(np.float64)
        nowhere = Labels(np.full(data.n_obs, -1)).read(data)
        op = ops.FateProbabilities(scheme=None if time is None else "hard", frac_to_keep=frac_to_keep)
        transitions = op.init(weights, nowhere).transitions(weights, when)
        connected = weights if time is not None else Connectivities(neighbors_key).read(data)
        codes = ops.terminal_states(transitions, connected, None if when is None else np.asarray(when))
    if (codes < 0).all():
        raise ValueError("terminal_states=None: no terminal state was found; give them with `terminal_states=`")
    if groupby is None:
        return [str(i) for i in range(codes.max() + 1)], codes
    labels = _groups(data, groupby)
    best = [labels[codes == i].value_counts().index[0] for i in range(codes.max() + 1)]
    plain = [str(name) for name in best]
    return [n if plain.count(n) == 1 else f"{n}_{plain[:i].count(n) + 1}" for i, n in enumerate(plain)], codes


def _colors(data: AnnData, names: list[str], groupby: str | None) -> list[str]:
    """The saved colours of the groups, or those that plots give to groups without any; without groups, the palette."""
    groups = [] if groupby is None else [str(name) for name in _groups(data, groupby).cat.categories]
    saved = [] if groupby is None else list(data.uns.get(f"{groupby}_colors", []))
    palette = saved if len(saved) >= len(groups) > 0 else [_COLORS[i % len(_COLORS)] for i in range(len(groups))]
    known = dict(zip(groups, palette, strict=False))
    plain = [name if name in known else name.rsplit("_", 1)[0] for name in names]
    return [str(known.get(name, _COLORS[i % len(_COLORS)])) for i, name in enumerate(plain)]


def _warn(result: ops.FateProbabilitiesResult, names: list[str], codes: np.ndarray) -> None:
    reaches, absorbed = np.asarray(result.reaches), np.asarray(result.absorbed)
    transient = codes < 0
    lost = int((transient & ~reaches.any(1)).sum())
    if lost:
        warn(f"{lost} of {len(codes)} cells can reach no terminal state: their probabilities are NaN")
    missed = (~reaches[transient & reaches.any(1)]).sum(0)
    if missed.any():
        parts = [f"{name!r} ({count} cells)" for name, count in zip(names, missed, strict=True) if count]
        warn(f"not every terminal state can be reached from all cells; probability 0 there: {', '.join(parts)}")
    caught = transient & reaches.any(1) & (absorbed < 1 - 1e-6)
    if caught.any():
        warn(
            f"walks of {caught.sum()} cells can be caught where no terminal state is reached, with a chance of up to "
            f"{1 - absorbed[caught].min():.2g}: their probabilities are those of the other walks"
        )
    if not bool(result.converged):
        warn(
            "the solver stopped before the probabilities summed to 1: walks are held for too long. More terminal "
            "states, a smaller `b`, or `threshold_scheme='hard'` help"
        )
