"""Harmony against harmonypy and against its definition; derivatives and cost are in test_contract too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import scdiffx as sd
from helpers import QUICK, called, directional_fd, random_direction
from scdiffx import ops
from scdiffx._core.fields import replace

# Written by `benchmarks/harmony.py record`: harmonypy 2.1.0, every sixth cell of harmony_cell_lines.
RECORDED = Path(__file__).parent / "harmony_harmonypy.npz"
EXACT = {"nclust": 2, "block_size": 1.0, "sigma": 0.3, "max_iter_harmony": 4, "epsilon_harmony": -9.0}
RUNS: dict[str, dict[str, Any]] = {
    "default": {"key": "dataset"},
    "again": {"key": "dataset", "random_state": 1},
    "fixed": {"key": "dataset", "lamb": 1.0, "theta": 1.0},
    "pruned": {"key": "dataset", "batch_prop_cutoff": 0.01},
    "columns": {"key": ["dataset", "half"], "theta": [4.0, 2.0]},
    "exact": {"key": "dataset", **EXACT},
    "exact_columns": {"key": ["dataset", "half"], **EXACT},
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return dict(file)


@pytest.fixture(scope="module")
def _cell_lines(data_dir: Path) -> ad.AnnData:
    path = data_dir / "harmony_cell_lines" / "harmony_cell_lines.h5ad"
    if not path.exists():
        pytest.skip("the data set harmony_cell_lines is not in ../shared/data beside the repository")
    adata = ad.read_h5ad(path)
    z = adata.obsm["X_pca"][:, 1]
    noise = np.random.default_rng(0).normal(size=len(z)) * z.std() / 2
    adata.obs["half"] = np.where(z + noise > np.median(z), "x", "y")
    return adata


def corrected(adata: ad.AnnData, settings: dict[str, Any]) -> np.ndarray:
    found = adata.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sd.pp.harmony_integrate(found, **settings)
    return found.obsm["X_pca_harmony"]


def closeness(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest correlation of a component."""
    return min(np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(a.shape[1]))


def lisi(z: np.ndarray, labels: np.ndarray, perplexity: float = 30) -> float:
    """Mean inverse Simpson index of labels among near cells, weighted as in t-SNE (Korsunsky et al. 2019)."""
    squared = cdist(z, z, "sqeuclidean") / z.var()
    index = np.argsort(squared, axis=1)[:, 1 : int(3 * perplexity) + 1]
    # harmonypy's kernel is of distances, not of their squares.
    distance = np.sqrt(np.take_along_axis(squared, index, 1))
    beta, low, high = np.ones(len(z)), np.zeros(len(z)), np.full(len(z), np.inf)
    for _ in range(60):
        p = np.exp(-(distance - distance[:, :1]) * beta[:, None])
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + high) / 2)
    shares = np.stack([(p * (labels[index] == name)).sum(1) for name in np.unique(labels)])
    return float((1 / (shares**2).sum(0)).mean())


@pytest.mark.parametrize("run", ["default", "fixed", "pruned", "columns"])
def test_agrees_with_harmonypy_as_well_as_harmonypy_with_itself(
    _cell_lines: ad.AnnData, recorded: dict[str, np.ndarray], run: str
) -> None:
    every = int(recorded["every"])
    found = corrected(_cell_lines, RUNS[run])[::every]
    before = _cell_lines.obsm["X_pca"][::every]
    # Two columns are the hardest: harmonypy agrees with itself to .9954 there, and to .9972 with one.
    assert closeness(found, recorded[run]) > (0.993 if run == "columns" else 0.995)
    assert closeness(before, recorded[run]) < closeness(found, recorded[run]) - 0.03
    spread = found.var(0).sum() / recorded[run].var(0).sum()
    assert abs(spread - 1) < 0.01
    assert 0.8 < found.var(0).sum() / before.var(0).sum() < 1


@pytest.mark.parametrize("run", ["exact", "exact_columns"])
def test_equals_harmonypy_where_nothing_is_random(
    _cell_lines: ad.AnnData, recorded: dict[str, np.ndarray], run: str
) -> None:
    """Two clear clusters, all cells assigned at once, four rounds; harmonypy computes in single precision."""
    found = corrected(_cell_lines, RUNS[run])[:: int(recorded["every"])]
    np.testing.assert_allclose(found, recorded[run], atol=2e-3 * recorded[run].std())


def test_lisi_is_that_of_harmonypy(_cell_lines: ad.AnnData, recorded: dict[str, np.ndarray]) -> None:
    batch, kind = (_cell_lines.obs[name].to_numpy().astype(str) for name in ("dataset", "cell_type"))
    z = _cell_lines.obsm["X_pca"]
    before = np.array([lisi(z, batch), lisi(z, kind)])
    np.testing.assert_allclose(before, recorded["lisi_before"], atol=1e-4)
    found = corrected(_cell_lines, RUNS["default"])
    after = np.array([lisi(found, batch), lisi(found, kind)])
    np.testing.assert_allclose(after, recorded["lisi_default"], atol=0.05)
    assert after[0] > before[0] + 0.4


def planted(cells: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Cells in four directions; the same moved by batch and by a second column; and both columns.

    The third batch has no cells in the first direction.
    """
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, cells)
    clean = 4 * np.eye(4, 5)[kind] + rng.normal(size=(cells, 5)) * 0.3
    batch, second = rng.integers(0, 3, cells), rng.integers(0, 2, cells)
    batch[(kind == 0) & (batch == 2)] = 1
    moved = clean + (rng.normal(size=(3, 5)) * 0.7)[batch] + (rng.normal(size=(2, 5)) * 0.4)[second]
    return clean, moved, [batch, second]


def prepared(columns: int = 2, **settings: Any) -> tuple[ops.Harmony, tuple[jax.Array, ...], np.ndarray]:
    clean, moved, batches = planted()
    args = (jnp.asarray(moved), *(jnp.asarray(b, jnp.int32) for b in batches[:columns]))
    return ops.Harmony(**{"nclust": 5, **settings}).init(*args, key=jax.random.key(1)), args, clean


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_definition(
    op: ops.Harmony, z: np.ndarray, columns: list[np.ndarray], theta: np.ndarray, lamb: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The method with whole matrices, cell by cell and cluster by cluster."""
    groups = jax.tree.map(np.asarray, op.groups)
    n, sigma, most = len(z), float(op.sigma), op.settings
    sizes = [b.max() + 1 for b in columns]
    phi = np.concatenate([np.eye(size)[b] for size, b in zip(sizes, columns, strict=True)], 1)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    share = phi.mean(0)
    y = unit(np.stack([unit(z)[groups.start == k].mean(0) for k in range(op.nclust)]))
    blocks = np.split(groups.order, np.arange(-(-n // 20), n, -(-n // 20)))
    objective, found = [], z

    def value(r: np.ndarray, distance: np.ndarray) -> float:
        o, e = r.T @ phi, np.outer(r.sum(0), share)
        crossed = (r * ((np.log((o + e + 1) / (2 * e + 1)) * theta) @ phi.T).T).sum()
        return 2000 / n * ((r * distance).sum() + sigma * (r * np.log(r)).sum() + sigma * crossed)

    for _ in range(op.rounds):
        distance = 2 * (1 - unit(found) @ y.T)
        r = np.exp(-distance / sigma)
        r /= r.sum(1, keepdims=True)
        objective += [] if objective else [value(r, distance)]
        for _ in range(most.max_iter_kmeans):
            for block in blocks:
                others = np.setdiff1d(np.arange(n), block)
                o, e = r[others].T @ phi[others], np.outer(r[others].sum(0), share)
                ratio = ((2 * e + 1) / (o + e + 1)) ** theta
                for i in block:
                    r[i] = np.exp(-distance[i] / sigma) * ratio[:, phi[i] > 0].prod(1)
                    r[i] /= r[i].sum()
        objective.append(value(r, distance))
        found, y = z.copy(), y.copy()
        for k in range(op.nclust):
            o, e = r[:, k] @ phi, r[:, k].sum() * share
            keep = o / phi.sum(0) > most.batch_prop_cutoff
            keep &= np.array([keep[owner == c].sum() > 1 for c in owner])
            if not keep.any():
                continue
            there = phi[:, keep].any(1)
            design = np.column_stack([np.ones(n), phi[:, keep]])[there]
            penalty = np.concatenate([[0], (float(op.alpha) * e if lamb is None else lamb)[keep]])
            gram = design.T @ (design * r[there, k, None]) + np.diag(penalty)
            weight = np.linalg.solve(gram, design.T @ (r[there, k, None] * z[there]))
            y[k] = weight[0] / np.linalg.norm(weight[0])
            found[there] -= r[there, k, None] * (design[:, 1:] @ weight[1:])
    return found, y, objective


# A number for each batch, and one for each column.
TWO_FIXED = {"theta": jnp.asarray([3.0, 1.0, 2.0, 0.5, 1.0]), "lamb": jnp.asarray([1.0, 3.0])}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        pytest.param(1, {}, id="one", marks=pytest.mark.slow),
        pytest.param(1, {"lamb": jnp.asarray([0.5, 2.0, 5.0]), "theta": 1.5}, id="one_fixed", marks=pytest.mark.slow),
        pytest.param(2, {"theta": jnp.asarray([3.0, 1.0])}, id="two"),
        pytest.param(2, TWO_FIXED, id="two_fixed", marks=pytest.mark.slow),
    ],
)
def test_every_round_by_its_definition(columns: int, settings: dict[str, Any]) -> None:
    pruning = ops.HarmonySettings(max_iter_kmeans=3, batch_prop_cutoff=0.15)
    op, (z, *batches), _ = prepared(columns, rounds=3, settings=pruning, **settings)
    result = called(op, z, *batches)
    sizes = [3, 2][:columns]
    per_batch = {}
    for name in ("theta", "lamb"):
        given = None if getattr(op, name) is None else np.atleast_1d(np.asarray(getattr(op, name)))
        if given is not None and len(given) == columns:
            given = np.repeat(given, sizes)
        per_batch[name] = given if given is None else np.broadcast_to(given, sum(sizes))
    found, centroids, objective = by_definition(op, np.asarray(z), [np.asarray(b) for b in batches], **per_batch)
    np.testing.assert_allclose(result.corrected, found, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.centroids, centroids, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.objective, objective, rtol=1e-10)
    # The case is one in which batches are left out: with them the result is another.
    whole = replace(op, settings=pruning._replace(batch_prop_cutoff=0.0))
    assert np.abs(called(whole, z, *batches).corrected - found).max() > 1e-3


@pytest.mark.slow
def test_planted_batches_are_removed_and_centroids_move() -> None:
    op, args, clean = prepared()
    found = called(op, *args)
    assert closeness(np.asarray(args[0]), clean) < 0.95
    assert closeness(np.asarray(found.corrected), clean) > closeness(np.asarray(args[0]), clean) + 0.02
    moved = called(replace(op, rounds=1), *args).centroids
    assert float(jnp.abs(found.centroids - moved).max()) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(found.centroids, axis=1), 1, rtol=1e-5)


def test_a_fixed_number_of_rounds_is_what_the_convergence_test_finds() -> None:
    op, args, _ = prepared()
    free, fixed = called(replace(op, rounds=0), *args), called(op, *args)
    assert int(free.rounds) == op.rounds == int(fixed.rounds)
    np.testing.assert_allclose(free.corrected, fixed.corrected, atol=1e-5)
    objective = np.asarray(free.objective)[: op.rounds + 1]
    np.testing.assert_allclose(objective, fixed.objective, rtol=1e-5)
    assert np.isnan(np.asarray(free.objective)[op.rounds + 1 :]).all()
    fall = -np.diff(objective) / np.abs(objective[:-1])
    # The rule: the first round that lowers the objective by less than a hundredth is the last.
    assert (fall[:-1] >= 0.01).all()
    assert fall[-1] < 0.01
    assert 1 < op.rounds < op.settings.max_iter_harmony


def test_another_seed_is_another_start() -> None:
    _, args, _ = prepared()
    one, same, other = (ops.Harmony(nclust=5).init(*args, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.groups.start, same.groups.start)
    np.testing.assert_array_equal(called(one, *args).corrected, called(same, *args).corrected)
    assert (np.asarray(one.groups.order) != np.asarray(other.groups.order)).any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"theta": jnp.asarray([3.0, 1.0])}, id="expected"),
        pytest.param({"lamb": jnp.asarray([1.0, 2.0]), "sigma": jnp.linspace(0.1, 0.2, 5)}, id="fixed"),
    ],
)
def test_derivatives_by_finite_differences(settings: dict[str, Any]) -> None:
    op, (z, *batches), _ = prepared(rounds=3, **settings)
    params = {name: getattr(op, name) for name in ("theta", "sigma", "alpha", "lamb")} | {"z": z}
    params = {name: jnp.asarray(value, jnp.float64) for name, value in params.items() if value is not None}
    weight = jnp.asarray(random_direction(z, 3))

    @jax.jit
    def f(params: dict[str, jax.Array]) -> jax.Array:
        rest = {name: value for name, value in params.items() if name != "z"}
        return (replace(op, **rest)(params["z"], *batches).corrected * weight).sum()

    gradient = jax.jit(jax.grad(f), compiler_options=QUICK)(params)
    for name, value in params.items():
        step = jnp.asarray(random_direction(value, 4))
        exact = float(jnp.vdot(gradient[name], step))
        numeric = directional_fd(lambda v, name=name: f(params | {name: v}), value, step, steps=(1e-4, 1e-5, 1e-6))
        assert abs(exact) > 1e-4, name
        # Differences of values of this size are rounded at about this place, on some processors above 1e-6.
        assert np.abs(numeric / exact - 1).min() < 1e-5, (name, numeric, exact)


@pytest.mark.slow
def test_cells_at_the_origin_copies_and_empty_clusters_have_finite_values_and_derivatives() -> None:
    _, moved, (batch, _) = planted(90)
    z = jnp.asarray(np.concatenate([np.zeros((5, 5)), np.repeat(moved[:4], 10, axis=0), moved]), jnp.float32)
    codes = jnp.asarray(np.concatenate([np.arange(45) % 3, batch]), jnp.int32)
    op = ops.Harmony(rounds=2, nclust=5).init(z, codes)
    # No cell is in the last cluster, which starts at the origin; with so small a sigma, none comes near.
    empty = op.groups._replace(start=jnp.where(op.groups.start == 4, 0, op.groups.start))
    both = jax.jit(jax.value_and_grad(lambda op, z: (op(z, codes).corrected ** 2).sum(), 1), compiler_options=QUICK)
    for case in (op, replace(op, groups=empty, sigma=jnp.asarray(1e-3, jnp.float32))):
        value, slope = both(case, z)
        assert np.isfinite(float(value))
        assert bool(jnp.isfinite(slope).all())


@pytest.mark.slow
def test_a_batch_alone_in_a_column_changes_nothing() -> None:
    op, (z, batch), _ = prepared(1, rounds=2)
    alone = ops.Harmony(nclust=5, rounds=2).init(z, batch, jnp.zeros_like(batch), key=jax.random.key(1))
    np.testing.assert_allclose(called(alone, z, batch, batch).corrected, called(op, z, batch).corrected, atol=1e-4)


def test_wrong_settings_name_themselves() -> None:
    _, (z, batch, second), _ = prepared()
    for settings, message in (
        ({"nclust": 0}, "nclust=0"),
        ({"theta": jnp.ones(4)}, r"theta has shape \(4,\): it must be a number or 2 or 5"),
        ({"lamb": jnp.ones(3)}, "lamb has shape"),
        ({"sigma": jnp.ones(3), "nclust": 5}, "sigma has shape.*5 of them"),
        ({"alpha": None}, "`alpha` and `lamb`"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.Harmony(**settings).init(z, batch, second)
    with pytest.raises(ValueError, match="batch of each cell"):
        ops.Harmony().init(z)
    with pytest.raises(ValueError, match="init"):
        ops.Harmony()(z, batch)


def test_too_few_rounds_are_reported() -> None:
    _, moved, (batch, _) = planted()
    adata = ad.AnnData(np.zeros((len(moved), 1), np.float32), obsm={"X_pca": moved})
    adata.obs["batch"] = [f"batch {b}" for b in batch]
    with pytest.warns(UserWarning, match="raise `max_iter_harmony`") as caught:
        sd.pp.harmony_integrate(adata, "batch", max_iter_harmony=1)
    assert caught[0].filename == __file__
    assert adata.uns["harmony"]["converged"] is False
    assert adata.uns["harmony"]["n_rounds"] == 1
    assert adata.obsm["X_pca_harmony"].dtype == np.float64


@pytest.mark.slow
def test_a_plan_learns_how_much_to_mix() -> None:
    clean, moved, (batch, second) = planted()
    adata = ad.AnnData(np.zeros((len(moved), 1), np.float32), obsm={"X_pca": moved.astype(np.float32)})
    adata.obs["batch"], adata.obs["second"] = batch.astype(str), second.astype(str)
    adata.obs["kind"] = clean[:, :4].argmax(1).astype(str)
    plan = sd.plan(adata)
    sd.pp.harmony_integrate(plan, ["batch", "second"], nclust=5)
    loss = sd.losses.cross_entropy("X_pca_harmony", "kind")
    fitted = sd.fit(plan, loss, learn="harmony", n_steps=5, progress=False)
    assert fitted.losses["train_after"] < fitted.losses["train_before"]
    defaults = {"harmony.theta": 2.0, "harmony.sigma": 0.1, "harmony.alpha": 0.2}
    assert set(fitted.params) == set(defaults)
    assert all(abs(float(fitted.params[name]) / value - 1) > 0.01 for name, value in defaults.items())
    default = adata.copy()
    fitted.apply(adata)
    sd.pp.harmony_integrate(default, ["batch", "second"], nclust=5)
    assert np.abs(adata.obsm["X_pca_harmony"] - default.obsm["X_pca_harmony"]).max() > 1e-4
