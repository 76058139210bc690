"""Couplings of slices beside POT's on real spots, motions that are known, and what is put together from them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import scdiffx as sd
from helpers import QUICK, directional_fd, random_direction, tree_vdot
from scdiffx import ops
from scdiffx._core.fields import replace
from scdiffx.ops import _partial_gromov as gromov
from scdiffx.ops._align_slices import _pooled, rotation_of

RECORD = Path(__file__).parent / "align_slices_pot.npz"
SIZES = (64, 56)
in_double = pytest.mark.usefixtures("x64")


@functools.cache
def record() -> dict[str, np.ndarray]:
    with np.load(RECORD) as file:
        return dict(file)


def turn(degrees: float) -> np.ndarray:
    t = np.radians(degrees)
    return np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])


def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, coordinates and slice of the spots that POT coupled."""
    return record()["counts"].astype(np.float64), record()["spatial"], np.repeat([0, 1], SIZES)


def moved(thin: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first slice and some of its spots thinned, turned and shifted; these as they were, and distances of spots."""
    counts, spatial, batch = pair()
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(SIZES[0], SIZES[1], replace=False))
    spots = spatial[: SIZES[0]]
    copy = rng.binomial(counts[kept].astype(int), thin)
    where = spots[kept] @ turn(140).T + [40, -7]
    return (
        np.concatenate([counts[: SIZES[0]], copy]),
        np.concatenate([spots, where]),
        batch,
        spots[kept],
        np.linalg.norm(cdist(spots, spots) + 99 * np.eye(len(spots)), -np.inf, axis=1),
    )


@functools.cache
def compiled() -> Any:
    return jax.jit(lambda op, x, spots, batch: op(x, spots, batch), compiler_options=QUICK)


def run(counts: np.ndarray, spots: np.ndarray, batch: np.ndarray, **settings: Any) -> tuple[Any, Any]:
    args = (jnp.asarray(counts), jnp.asarray(spots), jnp.asarray(batch))
    op = ops.AlignSlices(**settings).init(*args)
    return op, compiled()(op, *args)


def dense_objective(counts: np.ndarray, spots: np.ndarray, plan: np.ndarray, scale: float, alpha: float) -> float:
    """The objective as it is written down: all pairs of pairs, for marginals of any kind."""
    a, b = (x + 0.01 for x in np.split(counts, [SIZES[0]]))
    a, b = a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)
    cost = (a[:, None] * np.log(a[:, None] / b)).sum(2)
    c, d = (cdist(x, x, "sqeuclidean") / scale for x in np.split(spots, [SIZES[0]]))
    p, q = plan.sum(1), plan.sum(0)
    geometry = p @ c**2 @ p + q @ d**2 @ q - 2 * (c @ plan @ d * plan).sum()
    return float((1 - alpha) * (cost * plan).sum() + alpha * geometry)


@in_double
def test_objective_is_as_good_as_pots() -> None:
    counts, spots, batch = pair()
    op, result = run(counts, spots, batch)
    plan = np.asarray(result.plan[0])[:, : SIZES[1]]
    assert float(result.error[0]) < 1e-9
    np.testing.assert_allclose(plan.sum(1), 1 / SIZES[0], rtol=1e-6)
    np.testing.assert_allclose(plan.sum(0), 1 / SIZES[1], rtol=1e-6)
    scale = float(record()["scale"])
    np.testing.assert_allclose(op.groups.scale[0] ** 2, scale, rtol=1e-12)
    found = dense_objective(counts, spots, plan, scale, 0.1)
    np.testing.assert_allclose(result.objective[0], found, rtol=1e-9)
    theirs = record()["plan"].astype(np.float64)
    np.testing.assert_allclose(dense_objective(counts, spots, theirs, scale, 0.1), record()["objective"], rtol=1e-5)
    assert found < record()["objective"] * (1 + 1e-4)


@in_double
@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_not_linear_in_a_part_is_made_of_its_moments(dims: int) -> None:
    rng = np.random.default_rng(dims)
    x, y = rng.normal(size=(7, dims)), rng.normal(size=(5, dims)) + 1
    p = rng.uniform(size=(7, 5)) ** 4
    p *= 0.7 / p.sum()
    c, d = cdist(x, x, "sqeuclidean"), cdist(y, y, "sqeuclidean")
    a, b = p.sum(1), p.sum(0)
    lift = gromov.lifted(jnp.zeros(p.shape), jnp.asarray(x), jnp.asarray(y), jnp.ones(()), jnp.asarray(0.7))
    w = gromov.moments(lift, lift.a[:-1].T @ p @ lift.b[:-1])
    found = (lift.base[:-1, :-1] * p).sum() + gromov.energy(lift, w)
    slope = np.asarray(lift.base + gromov.surface(lift, w))[:-1, :-1]
    np.testing.assert_allclose(found, a @ c**2 @ a + b @ d**2 @ b - 2 * ((c @ p @ d) * p).sum(), rtol=1e-10)
    both = (c**2 @ a)[:, None] + d**2 @ b - 2 * c @ p @ d
    # But for a constant, which the mass that is given takes.
    np.testing.assert_allclose(slope - slope.mean(), 2 * (both - both.mean()), rtol=1e-8)


@pytest.mark.slow
@in_double
def test_a_part_is_coupled_as_well_as_pots() -> None:
    counts, spots, batch = pair()
    _, result = run(counts, spots, batch, overlap=0.7)
    plan = np.asarray(result.plan[0])[:, : SIZES[1]]
    assert float(result.error[0]) < 1e-9
    np.testing.assert_allclose(plan.sum(), 0.7, rtol=1e-8)
    assert plan.sum(1).max() < (1 + 1e-6) / SIZES[0]
    assert plan.sum(0).max() < (1 + 1e-6) / SIZES[1]
    scale = float(record()["scale"])
    found = dense_objective(counts, spots, plan, scale, 0.1)
    np.testing.assert_allclose(result.objective[0], found, rtol=1e-8)
    theirs = dense_objective(counts, spots, record()["part"].astype(np.float64), scale, 0.1)
    assert found < theirs * (1 + 1e-3)


@pytest.mark.slow
@in_double
def test_a_cut_slice_comes_to_where_it_is_from() -> None:
    counts, spots, _ = pair()
    counts, spots = counts[: SIZES[0]], spots[: SIZES[0]]
    near = np.linalg.norm(cdist(spots, spots) + 99 * np.eye(len(spots)), -np.inf, axis=1)
    kept = np.sort(np.argsort(spots @ [0.6, 0.8])[: SIZES[1] - 11])
    copy, where = counts[kept], spots[kept] @ turn(140).T + [40, -7]
    batch = np.repeat([0, 1], [len(spots), len(kept)])
    off = []
    for overlap in (None, len(kept) / len(spots)):
        _, result = run(np.concatenate([counts, copy]), np.concatenate([spots, where]), batch, overlap=overlap)
        aligned = np.asarray(result.aligned)[len(spots) :]
        off.append(np.median(np.linalg.norm(aligned - spots[kept], axis=1)) / np.median(near))
    assert off[0] > 0.5
    assert off[1] < 0.1


@pytest.mark.slow
@in_double
def test_a_centre_of_parts_has_derivatives_and_a_mean_expression() -> None:
    counts, spots, _ = pair()
    rows = np.r_[:18, SIZES[0] : SIZES[0] + 16]
    counts, spots, batch = counts[rows][:, :40], spots[rows], np.repeat([0, 1], [18, 16])
    limits = ops.SliceLimits(tol=1e-12)
    values = {name: jnp.asarray(np.float64(v)) for name, v in {"alpha": 0.2, "epsilon": 0.1, "overlap": 0.8}.items()}
    at = jnp.asarray(counts), jnp.asarray(spots)
    op = ops.AlignSlices(reference="center", limits=limits, **values).init(*at, jnp.asarray(batch))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=spots.shape))

    def loss(free: dict[str, Any]) -> tuple[Any, Any]:
        moved = replace(op, **{name: free[name] for name in values})
        result = moved(free["counts"], free["spots"], jnp.asarray(batch))
        return (weight * result.aligned).sum() + result.objective.sum() + jnp.square(result.center).sum(), result

    # One program for the result, its derivative and the differences: there are few calls, and compiling takes longest.
    both = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    free = values | dict(zip(("counts", "spots"), at, strict=True))
    (_, result), slope = both(free)
    plan, profiles = np.asarray(result.plan), np.zeros((2, 18, 40))
    for k in range(2):
        profiles[k, : (batch == k).sum()] = counts[batch == k]
    shares = (profiles + 0.01) / (profiles + 0.01).sum(2, keepdims=True)
    mean = np.einsum("kij,kjg->ig", plan, shares) / plan.sum((0, 2))[:, None]
    np.testing.assert_allclose(result.center, mean, rtol=1e-6)
    for name in free:
        step = {key: random_direction(v) * (key == name) for key, v in free.items()}
        exact = tree_vdot(slope, step)
        np.testing.assert_allclose(exact, directional_fd(lambda v: both(v)[0][0], free, step, (1e-5,)), rtol=1e-4)
        assert abs(exact) > 1e-6


@in_double
@pytest.mark.parametrize("thin", [1.0, 0.3])
def test_a_known_motion_is_found(thin: float) -> None:
    counts, spots, batch, truth, near = moved(thin)
    _, result = run(counts, spots, batch)
    aligned = np.asarray(result.aligned)
    np.testing.assert_array_equal(aligned[: SIZES[0]], spots[: SIZES[0]])
    off = np.linalg.norm(aligned[SIZES[0] :] - truth, axis=1)
    assert np.median(off) < 0.5 * np.median(near)
    rotation = np.asarray(result.rotation)
    np.testing.assert_allclose(rotation[1] @ rotation[1].T, np.eye(2), atol=1e-12)
    angle = rotation[1] @ turn(140)
    assert abs(np.degrees(np.arctan2(angle[1, 0], angle[0, 0]))) < 3
    np.testing.assert_allclose(
        aligned, np.einsum("sij,sj->si", rotation[batch], spots) + np.asarray(result.shift)[batch]
    )


def mirrored() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    counts, spots, batch, truth, near = moved()
    return counts, spots * np.where(batch[:, None] == 1, [-1, 1], 1), batch, truth, near


@in_double
def test_a_mirrored_slice_is_not_turned_over_unasked() -> None:
    counts, spots, batch, truth, near = mirrored()
    _, result = run(counts, spots, batch)
    assert np.median(np.linalg.norm(np.asarray(result.aligned)[SIZES[0] :] - truth, axis=1)) > np.median(near)
    np.testing.assert_allclose(np.linalg.det(result.rotation), 1)


@pytest.mark.slow
@in_double
def test_a_mirrored_slice_is_turned_over_if_asked() -> None:
    counts, spots, batch, truth, near = mirrored()
    _, result = run(counts, spots, batch, reflection=True)
    assert np.median(np.linalg.norm(np.asarray(result.aligned)[SIZES[0] :] - truth, axis=1)) < 0.5 * np.median(near)
    np.testing.assert_allclose(np.linalg.det(result.rotation), [1, -1])


@in_double
def test_rotations_have_a_derivative_where_spreads_are_equal() -> None:
    step = np.arange(9).reshape(3, 3) % 5 / 5
    exact = jax.jvp(lambda v: rotation_of(v, False), (jnp.eye(3),), (jnp.asarray(step),))[1]
    ends = [rotation_of(jnp.eye(3) + t * step, False) for t in (1e-5, -1e-5)]
    np.testing.assert_allclose(exact, (ends[0] - ends[1]) / 2e-5, atol=1e-8)
    assert float(jnp.abs(exact).max()) > 0.01


@in_double
def test_motions_follow_each_other_or_lead_to_the_reference() -> None:
    turns = jnp.asarray(np.stack([turn(30), turn(50)]))
    shifts = jnp.asarray([[1.0, 2.0], [-3.0, 0.5]])
    rotation, shift = ops.AlignSlices()._composed(turns, shifts)
    spot = np.array([2.0, -1.0])
    twice = turn(30) @ (turn(50) @ spot + shifts[1]) + shifts[0]
    np.testing.assert_allclose(rotation[2] @ spot + shift[2], twice)
    rotation, shift = ops.AlignSlices(reference=1)._composed(turns, shifts)
    np.testing.assert_array_equal(rotation, [turn(30), np.eye(2), turn(50)])
    np.testing.assert_array_equal(shift, [[1, 2], [0, 0], [-3, 0.5]])


def test_large_slices_are_pooled_into_compact_groups_of_equal_size() -> None:
    spots = np.random.default_rng(0).uniform(size=(1000, 2))
    label = _pooled(spots, 37)
    sizes = np.bincount(label, minlength=37)
    assert len(sizes) == 37
    assert sizes.max() - sizes.min() <= 2
    within = np.mean([spots[label == k].var(0).sum() for k in range(37)])
    assert within < 1.5 * spots.var(0).sum() / 37
    np.testing.assert_array_equal(_pooled(spots[:30], 37), np.arange(30))


def test_bad_input_is_refused() -> None:
    counts, spots, batch = pair()
    with pytest.raises(ValueError, match="2 or 3 dimensions, got 1"):
        ops.AlignSlices().init(jnp.asarray(counts), jnp.asarray(spots[:, :1]), batch)
    with pytest.raises(ValueError, match=r"at least two slices.*\[120\]"):
        ops.AlignSlices().init(jnp.asarray(counts), jnp.asarray(spots), 0 * batch)
    with pytest.raises(ValueError, match="reference=2"):
        ops.AlignSlices(reference=2).init(jnp.asarray(counts), jnp.asarray(spots), batch)
    with pytest.raises(ValueError, match="share their place"):
        ops.AlignSlices().init(jnp.asarray(counts), jnp.asarray(0 * spots), batch)
    with pytest.raises(ValueError, match="its groups"):
        ops.AlignSlices()(jnp.asarray(counts), jnp.asarray(spots), batch)


def test_what_is_written_says_where_spots_have_come_to() -> None:
    counts, spots, batch, _, near = moved()
    adata = ad.AnnData(counts.astype(np.float32))
    # The numbers of spots as they were; unused categories are no slices.
    adata.obs["slice"] = np.array(["left", "right"])[batch]
    adata.obs["slice"] = adata.obs["slice"].astype("category").cat.add_categories("absent")
    adata.obsm["spatial"] = spots
    order = np.random.default_rng(1).permutation(adata.n_obs)
    adata = adata[order].copy()
    sd.tl.align_slices(adata, "slice", reference="right")
    entry = adata.uns["align_slices"]
    aligned = adata.obsm["spatial_aligned"]
    assert aligned.dtype == np.float64
    right = adata.obs["slice"].to_numpy() == "right"
    np.testing.assert_array_equal(aligned[right], adata.obsm["spatial"][right])
    np.testing.assert_array_equal(entry["pairs"], [[1, 0]])
    np.testing.assert_array_equal(entry["group"], np.arange(adata.n_obs))
    plan = entry["plan"]
    assert abs(plan.sum() - 1) < 1e-2
    # Each spot of the right has most of its mass from where it lies.
    partner = np.asarray(plan[right].argmax(1)).ravel()
    off = np.linalg.norm(aligned[partner] - aligned[right], axis=1)
    assert np.median(off) < 0.5 * np.median(near)


@pytest.mark.slow
def test_a_search_that_is_cut_short_warns() -> None:
    counts, spots, batch, *_ = moved()
    adata = ad.AnnData(counts.astype(np.float32))
    adata.obs["slice"] = np.array(["left", "right"])[batch]
    adata.obsm["spatial"] = spots
    with pytest.warns(UserWarning, match="1 of 1 couplings are not solved after 1 steps"):
        sd.tl.align_slices(adata, "slice", reference="right", max_iter=1)
    assert np.isfinite(adata.obsm["spatial_aligned"]).all()


@pytest.mark.slow
def test_a_centre_is_written_with_its_places() -> None:
    counts, spots, batch, truth, near = moved(0.3)
    adata = ad.AnnData(counts.astype(np.float32))
    adata.obs["slice"] = np.array(["left", "right"])[batch]
    adata.obsm["spatial"] = spots
    sd.tl.align_slices(adata, "slice", reference="center")
    entry = adata.uns["align_slices"]
    np.testing.assert_array_equal(entry["pairs"], [[0, 0], [0, 1]])
    np.testing.assert_array_equal(entry["center"]["group"], np.arange(SIZES[0]))
    np.testing.assert_allclose(entry["center"]["spatial"], spots[: SIZES[0]])
    np.testing.assert_allclose(entry["center"]["expression"].sum(1), 1, rtol=1e-5)
    off = np.linalg.norm(adata.obsm["spatial_aligned"][SIZES[0] :] - truth, axis=1)
    assert np.median(off) < 0.5 * np.median(near)
