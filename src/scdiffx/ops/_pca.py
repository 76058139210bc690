"""Principal components: exact and differentiable, or a learnable projection that starts at them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scdiffx._core import counts as C
from scdiffx._core.fields import buffer, learnable, operator, replace, static
from scdiffx._core.spectral import eigenpairs

__all__ = ["PCA", "PCAResult"]

# Above this many genes the covariance matrix is applied block by block and never formed.
MAX_GRAM_GENES = 4096


class PCAResult(NamedTuple):
    """Scores (cells, comps), loadings (genes, comps), variance (comps,) and its share of the total (comps,)."""

    scores: Float[Array, "cells comps"]
    components: Float[Array, "genes comps"]
    variance: Float[Array, " comps"]
    variance_ratio: Float[Array, " comps"]


@partial(jax.tree_util.register_dataclass, data_fields=["x", "mean"], meta_fields=[])
class Covariance:
    """The covariance of the genes as a linear operator: blocks of cells are densified as they pass."""

    def __init__(self, x: C.Matrix, mean: Array) -> None:
        self.x = x
        self.mean = mean

    @property
    def shape(self) -> tuple[int, int]:
        return (self.x.shape[1], self.x.shape[1])

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def __matmul__(self, v: Array) -> Array:
        def step(total: Array, block: Array, mask: Array) -> Array:
            centred = (block - self.mean) * mask[:, None]
            return total + centred.T @ (centred @ v)

        return C.fold_rows(self.x, step, jnp.zeros_like(v), adds=True) / max(C.n_rows(self.x) - 1, 1)


@operator
class PCA:
    """Project the cells on the leading eigenvectors of the gene covariance (Pearson 1901).

    Uninitialised, or with ``anchored=False``, the components are computed anew from each input; derivatives go through
    the eigenvectors by perturbation theory, exact also for components of equal variance wherever the loss does not
    depend on their rotation. After `init` with ``anchored=True`` the centre and the components stay, so that
    minibatches and new cells meet one fixed projection, to which the learnable `shift` (zero at first) is added. Each
    column of the scores is multiplied by its learnable `scale` (1 at first): how much that component counts.

    `weight` multiplies the genes before projection; `mask` selects genes, once and for all at `init`.

    Examples
    --------
    >>> import numpy as np
    >>> import scdiffx as sd
    >>> x = np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32)
    >>> op = sd.ops.PCA(n_comps=3).init(x)
    >>> op(x).scores.shape, op.scale.shape
    ((60, 3), (3,))
    """

    shift: Array | None = learnable(default=None)
    scale: Array | None = learnable(default=None, constraint="positive")
    mean: Array | None = buffer(default=None)
    components: Array | None = buffer(default=None)
    columns: Array | None = buffer(default=None)
    n_comps: int = static(default=50)
    zero_center: bool = static(default=True)
    anchored: bool = static(default=True)

    @property
    def by_cell(self) -> bool:
        """Whether a cell's scores are the same whichever cells come with it."""
        return self.anchored and self.components is not None

    def init(self, x: C.Rows, weight: Array | None = None, mask: Array | None = None, key: Array | None = None) -> PCA:
        op = self if mask is None else replace(self, columns=jnp.asarray(np.flatnonzero(np.asarray(mask)), jnp.int32))
        if not self.anchored:
            return op
        x = op._selected(x, weight, None)
        fitted, mean, _ = _fitted(op, x)
        return replace(
            op,
            mean=mean,
            components=fitted.vectors,
            shift=jnp.zeros_like(fitted.vectors),
            scale=jnp.ones(self.n_comps, fitted.vectors.dtype),
        )

    def _selected(self, x: C.Rows, weight: Array | None, mask: Array | None) -> C.Rows:
        if self.columns is not None:
            x = C.take_columns(x, self.columns)
            weight = None if weight is None else weight[self.columns]
        elif mask is not None:
            weight = jnp.asarray(mask, x.dtype) * (1 if weight is None else weight)
        return x if weight is None else C.scale_columns(x, weight)

    def _fit(self, x: C.Rows) -> tuple[Any, Array, Array]:
        n, genes = x.shape
        if not 1 <= self.n_comps <= min(n, genes):
            raise ValueError(f"n_comps={self.n_comps} must lie between 1 and min(cells, genes) = {min(n, genes)}")
        if isinstance(x, C.Streamed) and genes > MAX_GRAM_GENES:
            raise ValueError(
                f"PCA of {genes} genes would read a matrix that is not in memory again and again; "
                f"select at most {MAX_GRAM_GENES} genes, for instance by `pp.highly_variable_genes`"
            )
        mean = C.column_sums(x) / n if self.zero_center else jnp.zeros(genes, x.dtype)
        if isinstance(x, C.Streamed) or genes <= MAX_GRAM_GENES:
            covariance: Any = C.gram(x, mean) / max(n - 1, 1)
        else:
            covariance = Covariance(x, mean)
        # The trace of the centred covariance is the total variance; where it is not at hand, count it.
        known = self.zero_center and genes <= MAX_GRAM_GENES
        total = jnp.trace(covariance) if known else C.column_moments(x)[1].sum()
        eigen = eigenpairs(covariance, self.n_comps, tol=1e-5 if x.dtype == jnp.float32 else None)
        return eigen._replace(vectors=fix_signs(eigen.vectors)), mean, total

    def __call__(self, x: C.Rows, weight: Array | None = None, mask: Array | None = None) -> PCAResult:
        n_genes = x.shape[1]
        x = self._selected(x, weight, mask)
        if self.components is None or not self.anchored:
            eigen, mean, total = self._fit(x)
            components = eigen.vectors
            scores = _scores(x, mean, components)
            variance = jnp.maximum(eigen.values, 0) if self.zero_center else scores.var(0)
            ratio = variance / jnp.where(total > 0, total, 1)
        else:
            components = jnp.asarray(self.components, x.dtype) + (0 if self.shift is None else self.shift)
            components = components * (1 if self.scale is None else jnp.asarray(self.scale, x.dtype))
            scores = _scores(x, jnp.asarray(self.mean, x.dtype), components)
            variance = scores.var(0, ddof=1)
            ratio = variance / C.column_moments(x)[1].sum()
        if self.columns is not None:
            components = jnp.zeros((n_genes, components.shape[1]), x.dtype).at[self.columns].set(components)
        return PCAResult(scores, components, variance, ratio)


@jax.jit
def _fitted(op: PCA, x: C.Matrix) -> tuple[Any, Array, Array]:
    return op._fit(x)


def _scores(x: C.Rows, mean: Array, components: Array) -> Array:
    return C.matmul(x, components) - mean @ components


@jax.jit
def fix_signs(vectors: Array) -> Array:
    """The largest loading of each component is positive, as scikit-learn's rule has it."""
    frozen = jax.lax.stop_gradient(vectors)
    largest = jnp.take_along_axis(frozen, jnp.abs(frozen).argmax(0)[None], axis=0)
    return vectors * jnp.where(largest < 0, -1, 1).astype(vectors.dtype)
