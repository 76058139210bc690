"""The fit of :class:`scdiffx.ops.Communication`: programs, the linear model, the network, and their held-out scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from scdiffx._core.graph import Graph
from scdiffx.ops import _communication_models as models
from scdiffx.ops._communication_features import Seen
from scdiffx.ops._communication_net import Message, Net, change, trained
from scdiffx.ops._communication_test import basis_of, folds_of, standardised, z_scores

__all__ = ["CommunicationFit", "CommunicationSettings", "fit_all", "folds", "message"]


class CommunicationSettings(NamedTuple):
    """How programs are found and predicted.

    `n_programs` directions of expression are predicted; each of `n_folds` parts of the cells is held out once, and the
    next one chooses penalties. With `attention` a network of width `n_hidden` reads `n_edge_features` pairs on the
    edges; it is trained for `n_steps` steps, or until `patience` looks at the validation cells, ten steps apart, find
    it no better.
    """

    n_programs: int = 10
    n_folds: int = 5
    attention: bool = False
    n_edge_features: int = 16
    n_hidden: int = 16
    n_steps: int = 300
    patience: int = 5
    learning_rate: float = 2e-3
    decay: float = 0.1
    dropout: float = 0.3
    progress: bool = False


class CommunicationFit(NamedTuple):
    """What `init` estimates.

    `axes` and `shift` make programs of genes; `centre`, `scale`, `intercept` and `coefficients` are the linear model's.
    `r2` (models): shares of the programs' variance that are predicted in held-out cells by the cell itself, by the
    types around it too, and by the pairs too; `r2_test` the same, and that of the network, in the first held-out part.
    `importance` (pairs) is what the linear model loses without a pair, `between` (pairs, groups, groups) without it
    from one group to another. `attended` is what the network loses, in the first held-out part, without each of the
    `edge_pairs` on its edges; `history` its errors in training and validation cells.
    """

    axes: Float[Array | np.ndarray, "genes programs"]
    shift: Float[Array | np.ndarray, " programs"]
    centre: Float[Array | np.ndarray, " features"]
    scale: Float[Array | np.ndarray, " features"]
    intercept: Float[Array | np.ndarray, " programs"]
    coefficients: Float[Array | np.ndarray, "features programs"]
    r2: Float[Array | np.ndarray, " models"]
    r2_test: Float[Array | np.ndarray, " models_and_network"]
    importance: Float[Array | np.ndarray, " pairs"]
    between: Float[Array | np.ndarray, "pairs groups groups"]
    edge_pairs: Int[Array | np.ndarray, " edge_features"]
    edge_scale: Float[Array | np.ndarray, " edge_features"]
    attended: Float[Array | np.ndarray, " edge_features"]
    history: Float[Array | np.ndarray, "two checks"]


def folds(graph: Graph, n_folds: int, seed: int) -> Int[np.ndarray, " cells"]:
    return folds_of(np.asarray(graph.pattern.order), n_folds, np.random.default_rng([seed, 1]))


def message(f: CommunicationFit, features: Any, sent: Any, borne: Any) -> Message:
    """What the network reads of the standardised features and the signals."""
    at, pairs = f.edge_pairs, sent.shape[1]
    first = features.shape[1] - 2 * pairs
    return Message(features[:, :first], sent[:, at], borne[:, at], f.edge_scale, features[:, first + pairs :][:, at])


def fit_all(
    s: CommunicationSettings, n_genes: int, seen: Seen, graph: Graph, seed: int
) -> tuple[CommunicationFit, Net | None]:
    """The linear model of all cells, or with attention that of the training cells and the network on top of it."""
    fold = folds(graph, s.n_folds, seed)
    found = models.evaluate(seen.signals, seen.blocks, seen.y, seen.controls, fold, seen.member, s.n_programs)
    split = models.split_of(fold, 0)
    axes = models.programs_of(seen.signals, seen.y, seen.controls, split.train, s.n_programs)
    z, features = seen.y @ axes, np.concatenate(seen.blocks, 1)
    model = models.fitted(seen.blocks, z, split)
    r2 = [models.r2(z, model.predicted(features, i), model.intercept, split.test) for i in range(len(models.MODELS))]
    at, edge_scale = np.zeros(0, np.int32), np.zeros(0)
    if s.attention:
        at, edge_scale = _edge_features(seen, split.train, s.n_edge_features)
    else:
        axes = models.programs_of(seen.signals, seen.y, seen.controls, np.ones(len(z), bool), s.n_programs)
        model = models.refitted(seen.blocks, seen.y @ axes, model.penalties)
    whole = np.zeros((n_genes, axes.shape[1]))
    whole[seen.targets] = axes / seen.size[:, None]
    fit = CommunicationFit(
        whole,
        (seen.mean / seen.size) @ axes,
        *model[:3],
        model.coefficients[-1],
        found.r2,
        np.asarray(r2),
        found.importance,
        found.between,
        at,
        edge_scale,
        np.zeros(0),
        np.zeros((2, 0)),
    )
    return _attending(s, fit, seen, graph, z, split, seed) if s.attention else (fit, None)


def _edge_features(seen: Seen, cells: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs with which genes change most in the training cells, and what standardises them on edges."""
    basis = basis_of(seen.controls[cells])
    s = seen.signals
    z = z_scores(s._replace(borne=s.borne[cells], walk=s.walk[cells]), standardised(seen.y[cells], basis), basis)
    at = np.argsort(-np.maximum(z**2 - 4, 0).sum(1), kind="stable")[:most].astype(np.int32)
    edges = s.walk.tocoo()
    squares = np.asarray([np.mean((s.sent[edges.col, k] * s.borne[edges.row, k]) ** 2) for k in at])
    return at, 1 / np.sqrt(np.maximum(squares, 1e-12))


def _attending(
    s: CommunicationSettings, fit: CommunicationFit, seen: Seen, graph: Graph, z: Any, split: models.Split, seed: int
) -> tuple[CommunicationFit, Net]:
    features = (np.concatenate(seen.blocks, 1) - fit.centre) / fit.scale
    linear = features @ fit.coefficients + fit.intercept
    present = np.asarray(graph.values) != 0
    signals = seen.signals
    with jax.enable_x64(False):
        m = Message(*(np.asarray(a, np.float32) for a in message(fit, features, signals.sent, signals.borne)))
        net, history = trained(graph.pattern, m, present, z - linear, split, s, seed)
        add = jax.jit(change)
        r2 = models.r2(z, linear + np.asarray(add(net, graph.pattern, m, present)), fit.intercept, split.test)
        lost, pairs = [], signals.sent.shape[1]
        for i, pair in enumerate(fit.edge_pairs):
            column = len(fit.centre) - pairs + pair
            part = np.outer(features[:, column], fit.coefficients[column])
            without = m._replace(sent=m.sent * (np.arange(len(fit.edge_pairs)) != i), summed=m.summed.copy())
            without.summed[:, i] = 0
            left = linear - part + np.asarray(add(net, graph.pattern, without, present))
            lost.append(r2 - models.r2(z, left, fit.intercept, split.test))
    scores = np.append(fit.r2_test, r2)
    return fit._replace(r2_test=scores, attended=np.asarray(lost), history=history), net
