"""Doublets by a logistic classifier of cells against simulated doublets, on features that tell the two apart."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Int

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, operator, replace, static
from scdiffx._core.knn import nearest
from scdiffx._core.random import as_seed
from scdiffx.ops._co_expression import co_expressed, co_expression
from scdiffx.ops._normalize import Log1p, NormalizeTotal
from scdiffx.ops._pca import PCA
from scdiffx.ops._scrublet import CHUNK, distances, n_voters, soft_votes

__all__ = ["DoubletClassifier", "DoubletClassifierResult"]

_VARIABLE = 1000  # genes, of largest variance, that components are found of
_WIDTHS = (0.125, 0.25, 0.5, 1.0)  # neighbourhoods, as shares of the widest
_ROUNDS = 3
_STEPS = 50  # of Newton's method, which needs about ten
_HALVINGS = 10
_ROWS = 4096  # doublets that are drawn at once


class DoubletClassifierResult(NamedTuple):
    """`score` of the cells (cells,) and of the simulated doublets (doublets,): probabilities, with the cells' log odds.

    `features` (standardised) and `coordinates` are of the cells, then of the doublets. `weights` are the classifier's,
    its intercept last.
    """

    score: Float[Array, " cells"]
    simulated: Float[Array, " doublets"]
    log_odds: Float[Array, " cells"]
    features: Float[Array, "all features"]
    weights: Float[Array, " features_and_one"]
    coordinates: Float[Array, "all comps"]


class Reference(NamedTuple):
    """What is estimated from the cells once.

    The variable genes, their mean logarithms and loadings and the total that cells are brought to; the genes of the
    pairs, and how surprising it is to find a pair in one cell.
    """

    genes: Int[Array, " variable"]
    mean: Float[Array, " variable"]
    loadings: Float[Array, "variable comps"]
    target: Float[Array, ""]
    paired: Int[Array, " paired"]
    surprise: Float[Array, "paired paired"]


class Simulation(NamedTuple):
    """The doublets, as a recipe: a value of a doublet is a share of what two places of the cells' matrix hold.

    `kept` is the share of all molecules that is left of a doublet, `share` that in each variable gene, `first` and
    `second` are places among the stored values. `present` holds the logarithms of the number of genes and of the
    co-expression of cells and doublets, `indices` their neighbours, `singlet` which cells the doublets are compared
    with.
    """

    parents: Int[Array, "doublets 2"]
    kept: Float[Array, " doublets"]
    share: C.Counts
    first: C.Counts
    second: C.Counts
    present: Float[Array, "all 2"]
    indices: Int[Array, "all k"]
    singlet: Bool[Array, " cells"]


@operator
class DoubletClassifier:
    """Logistic regression of cells against simulated doublets, as in scDblFinder (Germain et al. 2022).

    The features of a cell: log depth, log number of genes, log co-expression of gene pairs that mostly exclude each
    other (cxds: Bais and Kostka 2020), the log odds of a simulated doublet among its neighbours in neighbourhoods of
    four sizes and weighted by distance, and principal components of the log-normalised variable genes.

    `init` chooses genes, fits the projection and draws the pairs of cells whose sums are the doublets; every other sum
    is thinned to the depth of another cell, so that depth alone does not decide. The classifier is fitted three times,
    each time without the cells that looked most like doublets before, as many as are expected. Its odds are moved from
    the share of doublets in training to `rate`, the expected share among the cells.

    The last fit is part of the call. Derivatives go through it by the implicit rule, and reach the counts through
    depth, components, distances and the doublets' parents. Which genes are present, which molecules of a doublet are
    kept, who the neighbours are and which cells are left out is discrete. With ``temperature=0`` neighbours are
    counted; above 0 their votes fade over that share of the distance to the last one, and are differentiable too.

    `n_neighbors` is the widest neighbourhood, counted among the cells alone; `penalty` the classifier's ridge.
    """

    reference: Reference | None = buffer(default=None)
    simulation: Simulation | None = buffer(default=None, structure=True)
    n_comps: int = static(default=30)
    n_neighbors: int | None = static(default=None)
    doublet_ratio: float = static(default=2.0)
    rate: float = static(default=0.05)
    temperature: float = static(default=0.0)
    penalty: float = static(default=1.0)

    @property
    def parents(self) -> Int[Array, "doublets 2"] | None:
        """The cells that each simulated doublet is the sum of; None before `init`."""
        return None if self.simulation is None else self.simulation.parents

    def init(self, x: C.Matrix, key: Array | None = None) -> DoubletClassifier:
        n = x.shape[0]
        doublets = int(n * self.doublet_ratio)
        if n < 2:
            raise ValueError("there is one cell: doublets are sums of two")
        if doublets < 1:
            raise ValueError(f"doublet_ratio={self.doublet_ratio} of {n} cells is no doublet at all")
        seed = 0 if key is None else as_seed(key)
        reference = _reference(x, self.n_comps) if self.reference is None else self.reference
        simulation = _simulated(x, reference, doublets, np.random.default_rng(seed))
        op = replace(self, reference=reference, simulation=simulation)
        z = np.asarray(_coordinates(op, x)[0])
        most = n_voters(n, doublets, self.n_neighbors) + 1
        candidates = min(most if self.temperature == 0 else 2 * most, len(z))
        simulation = simulation._replace(indices=jnp.asarray(nearest(z, candidates, seed=seed)[0], jnp.int32))
        features = _features(op, simulation, x)[0]
        for _ in range(_ROUNDS - 1):
            odds = np.asarray(_log_odds(features, _solved(features, simulation.singlet, self.penalty)))[:n]
            left_out = np.argsort(-odds, kind="stable")[: min(round(self.rate * n), n - 1)]
            singlet = np.ones(n, bool)
            singlet[left_out] = False
            simulation = simulation._replace(singlet=jnp.asarray(singlet))
        return replace(op, simulation=simulation)

    def __call__(self, x: C.Matrix) -> DoubletClassifierResult:
        if self.simulation is None:
            raise ValueError("DoubletClassifier needs its simulation: call `op = op.init(x)` first")
        n = x.shape[0]
        features, z = self._features(self.simulation, x)
        weights = fitted(features, self.simulation.singlet, self.penalty)
        # From as many doublets as were simulated for each singlet to as many as are expected.
        singlets = self.simulation.singlet.sum().astype(features.dtype)
        prior = jnp.log(self.rate / (1 - self.rate) * singlets / (len(features) - n))
        odds = _log_odds(features, weights) + prior
        score = jax.nn.sigmoid(odds)
        return DoubletClassifierResult(score[:n], score[n:], odds[:n], features, weights, z)

    def _coordinates(self, x: C.Matrix) -> tuple[Float[Array, "all comps"], Float[Array, " all"]]:
        """Principal coordinates and depths of the cells, then of the doublets."""
        if self.reference is None or self.simulation is None:
            raise ValueError("DoubletClassifier needs its simulation: call `op = op.init(x)` first")
        genes, mean, loadings, target = self.reference[:4]
        parents, kept, share, first, second = self.simulation[:5]
        depth = C.row_sums(x)
        depths = depth, kept.astype(x.dtype) * (depth[parents[:, 0]] + depth[parents[:, 1]])
        values = (x.data if isinstance(x, C.Counts) else x).ravel()
        one, other = (values.at[part.data].get(mode="fill", fill_value=0) for part in (first, second))
        doublets = share.with_data(share.data.astype(x.dtype) * (one + other))
        projected = [
            _projected(part, target / jnp.where(own > 0, own, 1), loadings.astype(x.dtype))
            for part, own in zip((C.take_columns(x, genes), doublets), depths, strict=True)
        ]
        return jnp.concatenate(projected) - mean @ loadings, jnp.concatenate(depths)

    def _features(self, simulation: Simulation, x: C.Matrix) -> tuple[Array, Array]:
        """Standardised features, and coordinates."""
        n = x.shape[0]
        z, depth = self._coordinates(x)
        near = self._neighbourhoods(z, simulation.indices, n)
        features = jnp.concatenate([jnp.log1p(depth)[:, None], simulation.present.astype(z.dtype), near, z], 1)
        centred = features - features.mean(0)
        variance = (centred**2).mean(0)
        varies = variance > jnp.finfo(z.dtype).eps * (features**2).mean(0)
        return centred / jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 1), z

    def _neighbourhoods(self, z: Array, indices: Array, n: int) -> Float[Array, "all widths_and_one"]:
        """Log odds of a doublet among the nearest neighbours, without the point itself."""
        widest = min(n_voters(n, len(z) - n, self.n_neighbors), indices.shape[1] - 1)
        sizes = sorted({max(1, round(share * widest)) for share in _WIDTHS})

        def one(args: tuple[Array, Array]) -> Array:
            own, near = args
            distance, doublet = distances(own, z[near]), near >= n
            votes = [
                (jnp.arange(len(near)) <= k).astype(z.dtype)
                if self.temperature == 0
                else soft_votes(distance, k, self.temperature)
                for k in sizes
            ]
            middle = distance[(widest + 1) // 2]
            votes.append(votes[-1] * jnp.exp(-((distance / jnp.where(middle > 0, middle, 1)) ** 2)))
            others = jnp.stack(votes)[:, 1:]
            found = jnp.where(doublet[1:], others, 0).sum(1)
            return jnp.log((found + 1) / (others.sum(1) - found + 1))

        return jax.lax.map(jax.checkpoint(one), (z, indices), batch_size=CHUNK)


def _projected(x: C.Matrix, factor: Array, loadings: Array) -> Float[Array, "rows comps"]:
    """log1p(factor * x) @ loadings, with one block at a time in between."""
    if not isinstance(x, C.Counts):
        return C.matmul(Log1p()(C.scale_rows(x, factor)), loadings)
    n, genes = x.shape
    blocks, rows = x.data.shape[0], x.block_rows
    padded = jnp.pad(factor, (0, blocks * rows - n)).reshape(blocks, rows)

    def one(part: tuple[Array, Array, Array]) -> Array:
        data, position, own = part
        block = C.Counts(data[None], position[None], (rows, genes), rows)
        return C.matmul(Log1p()(C.scale_rows(block, own)), loadings)

    return jax.lax.map(jax.checkpoint(one), (x.data, x.position, padded)).reshape(blocks * rows, -1)[:n]


def _reference(x: C.Matrix, n_comps: int) -> Reference:
    normalise = NormalizeTotal().init(x)
    log = Log1p()(normalise(x).x)
    mean, variance = (np.asarray(moment) for moment in C.column_moments(log)[:2])
    genes = np.argsort(-variance, kind="stable")[:_VARIABLE]
    # A constant gene has the variance that rounding leaves.
    genes = np.sort(genes[variance[genes] > np.finfo(variance.dtype).eps * mean[genes] ** 2])
    n_comps = min(n_comps, len(genes) - 1, x.shape[0] - 1)
    if n_comps < 1:
        raise ValueError(f"there are {len(genes)} variable genes: too few for principal components")
    log = C.take_columns(log, jnp.asarray(genes, jnp.int32))
    pca = PCA(n_comps=n_comps).init(log)
    if pca.components is None or pca.mean is None:
        raise RuntimeError("the projection has no components")
    paired, surprise = co_expression(x)
    target = jnp.asarray(normalise.target_sum, x.dtype)
    return Reference(jnp.asarray(genes, jnp.int32), pca.mean, pca.components, target, paired, surprise)


def _on_host(x: C.Matrix) -> tuple[Any, Any]:
    """The counts as CSR, and the same matrix with one plus the place of each among the stored values."""
    data = np.asarray(x.data if isinstance(x, C.Counts) else x)
    if isinstance(x, C.Counts):
        position = np.asarray(x.position)
        block, slot = np.nonzero((position < x.block_rows * x.shape[1]) & (data != 0))
        at = position[block, slot]
        rows, columns = block * x.block_rows + at // x.shape[1], at % x.shape[1]
    else:
        block, slot = rows, columns = np.nonzero(data)
    places = block * data.shape[1] + slot + 1
    if data.size > np.iinfo(np.int32).max:
        raise ValueError(f"{data.size} stored values are more than can be numbered: score batches by themselves")
    counts, numbers = (sp.csr_matrix((v, (rows, columns)), shape=x.shape) for v in (data[block, slot], places))
    return counts, numbers


def _simulated(x: C.Matrix, reference: Reference, doublets: int, rng: np.random.Generator) -> Simulation:
    """Draw the doublets: sums of two different cells; every other is thinned to the depth of another cell."""
    n = x.shape[0]
    counts, numbers = _on_host(x)
    genes, paired = np.asarray(reference.genes), np.asarray(reference.paired)
    # The place of the first parent's value will be the real part of a sum, that of the second's the imaginary.
    numbers = numbers[:, genes].astype(np.complex128)
    depth = np.asarray(counts.sum(1), np.float64).ravel()
    first = rng.integers(0, n, doublets)
    second = (first + rng.integers(1, n, doublets)) % n
    total = np.maximum(depth[first] + depth[second], np.finfo(np.float32).tiny)
    other = depth[rng.integers(0, n, doublets)]
    thin = np.where(np.arange(doublets) % 2 == 1, np.minimum(other / total, 1), 1)
    kept, n_genes = np.ones(doublets), np.zeros(doublets)
    shares, places, presence = [], [], []
    for start in range(0, doublets, _ROWS):
        rows = slice(start, start + _ROWS)
        made = sp.csr_matrix(counts[first[rows]] + counts[second[rows]])
        share = _share_kept(made, thin[rows], rng)
        left = made.copy()
        left.data = left.data * share
        left.eliminate_zeros()
        kept[rows], n_genes[rows] = np.asarray(left.sum(1)).ravel() / total[rows], np.diff(left.indptr)
        presence.append(left[:, paired])
        made.data = share
        made, both = made[:, genes], sp.csr_matrix(numbers[first[rows]] + 1j * numbers[second[rows]])
        for part in (made, both):
            part.sort_indices()
        both.data = np.where(made.data > 0, both.data, 0)
        for part in (made, both):
            part.eliminate_zeros()
        shares.append(made)
        places.append(both)
    cells = co_expressed(C.take_columns(x, reference.paired), reference.surprise)
    pairs = co_expressed(C.Counts.from_scipy(sp.vstack(presence), x.dtype), reference.surprise)
    genes_found = jnp.asarray(np.r_[np.diff(counts.indptr), n_genes], x.dtype)
    at = sp.csr_matrix(sp.vstack(places))
    return Simulation(
        parents=jnp.asarray(np.stack([first, second], 1), jnp.int32),
        kept=jnp.asarray(kept, x.dtype),
        share=C.Counts.from_scipy(sp.vstack(shares), x.dtype),
        first=_places(at, at.data.real),
        second=_places(at, at.data.imag),
        present=jnp.log1p(jnp.stack([genes_found, jnp.concatenate([cells, pairs])], 1)),
        indices=jnp.zeros((n + doublets, 1), jnp.int32),
        singlet=jnp.ones(n, bool),
    )


def _places(pattern: Any, numbers: np.ndarray) -> C.Counts:
    """Places among the stored values; that of a value that is not there lies past their end."""
    places = np.where(numbers > 0, numbers - 1, np.iinfo(np.int32).max)
    return C.Counts.from_scipy(sp.csr_matrix((places, pattern.indices, pattern.indptr), pattern.shape), np.int32)


def _share_kept(made: Any, thin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The share of each stored count that binomial thinning leaves; whole rows stay whole."""
    per_value = np.repeat(thin, np.diff(made.indptr))
    whole = np.rint(made.data).astype(np.int64)
    left = rng.binomial(whole, per_value) / np.maximum(whole, 1)
    return np.where(per_value == 1, 1, left)


def _log_odds(features: Array, weights: Array) -> Array:
    return features @ weights[:-1] + weights[-1]


def _problem(features: Array, singlet: Array, penalty: float) -> tuple[Array, Array, Array, Array]:
    """Features with a constant, labels, which points count, and the ridge, which spares the constant."""
    doublets = len(features) - len(singlet)
    data = jnp.concatenate([features, jnp.ones((len(features), 1), features.dtype)], 1)
    label = (jnp.arange(len(features)) >= len(singlet)).astype(features.dtype)
    counted = jnp.concatenate([singlet, jnp.ones(doublets, bool)]).astype(features.dtype)
    ridge = jnp.full(data.shape[1], penalty, features.dtype).at[-1].set(0)
    return data, label, counted, ridge


def _slope(w: Array, problem: tuple[Array, ...]) -> Array:
    data, label, counted, ridge = problem
    return data.T @ (counted * (jax.nn.sigmoid(data @ w) - label)) + ridge * w


def _curvature(w: Array, problem: tuple[Array, ...]) -> Array:
    data, _, counted, ridge = problem
    p = jax.nn.sigmoid(data @ w)
    # Where a probability is 0 or 1 in the working precision, the constant would have no curvature.
    floor = jnp.finfo(data.dtype).eps * counted.sum()
    return (data * (counted * p * (1 - p))[:, None]).T @ data + jnp.diag(jnp.maximum(ridge, floor))


def _cost(w: Array, problem: tuple[Array, ...]) -> Array:
    data, label, counted, ridge = problem
    odds = data @ w
    return (counted * (jax.nn.softplus(odds) - label * odds)).sum() + (ridge * w**2).sum() / 2


@partial(jax.jit, static_argnames="penalty")
def _solved(features: Array, singlet: Array, penalty: float) -> Float[Array, " features_and_one"]:
    """The weights, by Newton's method with halved steps."""
    problem = _problem(features, singlet, penalty)
    sizes = 0.5 ** jnp.arange(_HALVINGS, dtype=features.dtype)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[2] > 0) & (state[1] < _STEPS)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, count, _ = state
        slope = _slope(w, problem)
        way = jnp.linalg.solve(_curvature(w, problem), slope)
        costs = jax.lax.map(lambda size: _cost(w - size * way, problem), sizes)
        before = _cost(w, problem)
        # What is left to gain, until rounding hides it.
        gain = jnp.where(slope @ way > jnp.finfo(w.dtype).eps * before, before - costs.min(), 0)
        return jnp.where(gain > 0, w - sizes[jnp.argmin(costs)] * way, w), count + 1, gain

    start = jnp.zeros(features.shape[1] + 1, features.dtype)
    return jax.lax.while_loop(unfinished, step, (start, jnp.asarray(0), jnp.asarray(1, features.dtype)))[0]


@jax.jit
def _coordinates(op: DoubletClassifier, x: C.Matrix) -> tuple[Array, Array]:
    return op._coordinates(x)


@jax.jit
def _features(op: DoubletClassifier, simulation: Simulation, x: C.Matrix) -> tuple[Array, Array]:
    return op._features(simulation, x)


def fitted(
    features: Float[Array, "all features"], singlet: Bool[Array, " cells"], penalty: float
) -> Float[Array, " features_and_one"]:
    """Weights of ridge logistic regression: rows after those of the cells are doublets, cells not `singlet` are absent.

    One more Newton step from the solution, whose own derivatives are dropped, has the derivative that the implicit
    function theorem gives.
    """
    still = jax.lax.stop_gradient(features)
    weights = jax.lax.stop_gradient(_solved(still, singlet, penalty))
    curvature = _curvature(weights, _problem(still, singlet, penalty))
    slope = _slope(weights, _problem(features, singlet, penalty))
    return weights - jnp.linalg.solve(curvature, slope)
