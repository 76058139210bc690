"""Local quadratic regression of one variable on another, blended between the vertices of a k-d tree.

Cleveland & Grosse, "Computational methods for local regression" (Statistics and Computing 1, 1991): the regression is
solved at a few vertices only, which also yields the slope there, and a cubic Hermite curve joins them. The conventions
(cutting rule, bounding box, neighbourhoods) are those of the authors' routines, so that values agree to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Curve", "evaluate", "loess"]


class Curve(NamedTuple):
    """A cubic Hermite curve: ascending knots, and the value and slope at each. Linear past its ends."""

    knots: Any
    values: Any
    slopes: Any

    def padded(self, size: int) -> Curve:
        """The same curve with `size` knots; the added ones continue its last slope."""
        step = np.arange(1, size - len(self.knots) + 1)
        return Curve(
            np.append(self.knots, self.knots[-1] + step),
            np.append(self.values, self.values[-1] + step * self.slopes[-1]),
            np.append(self.slopes, np.full(len(step), self.slopes[-1])),
        )


def loess(x: np.ndarray, y: np.ndarray, *, span: float = 0.3, cell: float = 0.2) -> Curve:
    """Regress `y` on `x` locally: a quadratic with tricube weights over the nearest ``span`` of the points.

    Parameters
    ----------
    x, y
        The points (n,), n >= 3, finite.
    span
        Fraction of the points in a neighbourhood, in (0, 1].
    cell
        The k-d tree is cut until a cell holds at most ``n * span * cell`` points: the smaller, the more knots.

    Returns
    -------
    The curve, in float64; :func:`evaluate` gives its values.

    Raises
    ------
    ValueError
        With fewer than 3 points in a neighbourhood, when all points of a neighbourhood lie at one place, or for
        points that are not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x and y must be finite")
    if not 0 < span <= 1:
        raise ValueError(f"span={span} must be in (0, 1]")
    near = min(len(x), int(np.floor(len(x) * span + 1e-5)))
    if near < 3:
        raise ValueError(f"span={span} leaves {near} of {len(x)} points in a neighbourhood; a quadratic needs 3")
    knots = _vertices(np.sort(x), int(np.floor(len(x) * span * cell)))
    fits = np.array([_local_quadratic(x, y, knot, near) for knot in knots])
    return Curve(knots, fits[:, 0], fits[:, 1])


def evaluate(curve: Curve, x: Any) -> Any:
    """The curve at `x`: numpy in, numpy out; JAX in, JAX out, differentiable in `x` and in the curve."""
    xp = np if isinstance(x, np.ndarray) else jnp
    knots, values, slopes = (xp.asarray(v) for v in curve)
    inside = xp.clip(x, knots[0], knots[-1])
    left = xp.searchsorted(knots[1:-1], inside, side="left")
    width = knots[left + 1] - knots[left]
    h = (inside - knots[left]) / width
    blend = (1 - h) ** 2 * (1 + 2 * h) * values[left] + h**2 * (3 - 2 * h) * values[left + 1]
    bend = h * (1 - h) ** 2 * slopes[left] + h**2 * (h - 1) * slopes[left + 1]
    beyond = xp.where(x > knots[-1], slopes[-1], slopes[0]) * (x - inside)
    return blend + bend * width + beyond


def _vertices(x: np.ndarray, most: int) -> np.ndarray:
    """Where the tree over sorted points cuts, and the ends of a box 0.5 % wider than the points on either side."""
    low, high = x[0], x[-1]
    margin = 0.005 * max(high - low, 1e-10 * max(abs(low), abs(high)) + 1e-30)
    box = (low - margin, high + margin)
    cuts = set(box)
    cells = [(0, len(x) - 1, *box)]
    # Breadth first: the tree may stop growing at its largest size, and then the order of cutting decides.
    largest, size = max(200, len(x)), 1
    while cells:
        first, last, lower, upper = cells.pop(0)
        if last - first + 1 <= most or size + 2 > largest or len(cuts) + 1 > largest:
            continue
        middle = _untied(x, first, last)
        cut = x[middle]
        if cut in (lower, upper):
            continue
        cuts.add(cut)
        size += 2
        cells += [(first, middle, lower, cut), (middle + 1, last, cut, upper)]
    return np.array(sorted(cuts))


def _untied(x: np.ndarray, first: int, last: int) -> int:
    """The place nearest the middle where the next point differs; the middle itself if a side runs out of points."""
    # Places count from 1 in the rule (first + last) / 2, hence the shift.
    middle = (first + last + 2) // 2 - 1
    offset = 0
    while first <= middle + offset < last:
        if x[middle + offset] != x[middle + offset + 1]:
            return middle + offset
        offset = -offset if offset > 0 else 1 - offset
    return middle


def _local_quadratic(x: np.ndarray, y: np.ndarray, at: float, near: int) -> np.ndarray:
    """Value and slope at `at` of the weighted quadratic through the `near` nearest points."""
    squared = (x - at) ** 2
    reach = np.partition(squared, near - 1)[near - 1]
    if reach <= 0:
        raise ValueError(f"{near} points share the place {at:.4g}: use a larger span")
    inside = squared < reach
    root_weight = np.sqrt((1 - np.sqrt(squared[inside] / reach) ** 3) ** 3)
    offset = x[inside] - at
    design = root_weight[:, None] * np.stack([np.ones_like(offset), offset, offset**2], 1)
    size = np.linalg.norm(design, axis=0)
    size[size == 0] = 1
    tolerance = 100 * np.finfo(np.float64).eps
    solution = np.linalg.lstsq(design / size, root_weight * y[inside], rcond=tolerance)[0]
    return (solution / size)[:2]
