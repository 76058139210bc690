"""Operators of one's own by `sd.step`: on an AnnData, in plans, fits and grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scdiffx as sd
from helpers import changed, contents, pbmc_counts
from scdiffx._slots import Obsm
from scdiffx._steps import Step, Write


class Powers(NamedTuple):
    scores: jax.Array
    total: jax.Array


@sd.ops.operator
class Power:
    """Coordinates to a power that keeps their signs, and the sums of these."""

    exponent: float | jax.Array = sd.ops.learnable(default=0.5, constraint="positive")

    def __call__(self, z: jax.Array) -> Powers:
        there = jnp.abs(z) > 0
        size = jnp.where(there, jnp.abs(z), 1) ** self.exponent
        scores = jnp.where(there, jnp.sign(z) * size, 0)
        return Powers(scores, scores.sum(1))


@sd.ops.operator
class Doubled:
    def __call__(self, x: Any) -> Any:
        return x.with_data(2 * x.data)


BOTH = {"obsm/X_power": "scores", "obs/power": "total"}


@pytest.fixture
def adata() -> ad.AnnData:
    adata = pbmc_counts(120, 40)
    adata.obsm["X_z"] = np.log1p(adata.X.toarray()[:, :6]) - 0.5
    return adata


def test_what_is_written_is_what_the_operator_returns(adata: ad.AnnData) -> None:
    before = contents(adata)
    copied = sd.step(adata, Power(), reads="obsm/X_z", writes=BOTH, copy=True)
    assert not changed(before, contents(adata))
    assert sd.step(adata, Power(), reads=["obsm/X_z"], writes=BOTH) is None
    expected = Power()(jnp.asarray(adata.obsm["X_z"]))
    for found in (adata, copied):
        np.testing.assert_allclose(found.obsm["X_power"], expected.scores, rtol=1e-6)
        np.testing.assert_allclose(found.obs["power"], expected.total, rtol=1e-5)
    new = changed(before, contents(adata))
    assert {path for path in new if not path.startswith("uns/scdiffx")} == set(BOTH)
    sd.step(adata, Doubled(), reads="X", writes="layers/twice")
    np.testing.assert_array_equal(adata.layers["twice"].toarray(), 2 * adata.X.toarray())


def test_in_a_plan_it_is_fitted_applied_to_new_cells_and_tried_in_a_grid(adata: ad.AnnData) -> None:
    plan = sd.plan(adata)
    sd.step(plan, Power(), reads="obsm/X_z", writes=BOTH)
    assert [step.name for step in plan.steps] == ["power"]
    # The sum of other powers, so that it is known where the fit has to go.
    adata.obs["truth"] = np.asarray(Power(exponent=2.0)(jnp.asarray(adata.obsm["X_z"])).total)
    loss = sd.losses.correlation("power", "truth")
    fitted = sd.fit(plan, loss, n_steps=60, optimizer=optax.adam(0.1), refresh_every=0, progress=False)
    assert set(fitted.params) == {"power.exponent"}
    assert fitted.params["power.exponent"] == pytest.approx(2, abs=0.2)
    new = adata[::-1].copy()
    fitted.apply(new)
    expected = Power(exponent=fitted.params["power.exponent"])(jnp.asarray(new.obsm["X_z"])).scores
    np.testing.assert_allclose(new.obsm["X_power"], expected, rtol=1e-5)
    found = sd.grid(plan, loss, {"power.op": [Power(exponent=1.0)]}, progress=False)
    alone = sd.plan(adata)
    sd.step(alone, Power(exponent=1.0), reads="obsm/X_z", writes=BOTH)
    directly = sd.grid(alone, loss, {}, progress=False)
    assert found.table["train"].iloc[1] == pytest.approx(directly.table["train"].iloc[0])
    assert found.table["train"].iloc[1] != pytest.approx(found.table["train"].iloc[0])


def test_files_hold_no_code(adata: ad.AnnData, tmp_path: Any) -> None:
    plan = sd.plan(adata)
    sd.step(plan, Power(), reads="obsm/X_z", writes=BOTH)
    loss = sd.losses.cross_entropy("X_power", "cell_type")
    fitted = sd.fit(plan, loss, n_steps=1, progress=False)
    with pytest.raises(ValueError, match="an argument that cannot be saved: Power"):
        fitted.save(tmp_path / "fit")
    sd.step(adata, Power(), reads="obsm/X_z", writes=BOTH)
    with pytest.raises(ValueError, match=r"'step', had arguments.*op \(Power\).*Make this call on a plan yourself"):
        sd.plan.from_history(adata)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"op": jnp.tanh}, TypeError, r"made by `sd.ops.operator`"),
    ({"op": Power}, TypeError, r"an instance of a class"),
    ({"reads": "X_z"}, ValueError, r"reads: 'X_z' is no place.*'obsm'"),
    ({"reads": "obsm/absent"}, KeyError, r"'absent' is not in `adata.obsm`.*'X_z'"),
    ({"writes": "obsm/"}, ValueError, r"writes: 'obsm/' is no place"),
    ({"writes": {"obs/power": "absent"}}, ValueError, r"no field 'absent'.*'scores', 'total'"),
    ({"writes": BOTH | {"obs/wrong": "scores"}}, ValueError, r"wrong.*\(120, 6\), and \(120,\) is needed"),
    ({"writes": {"varm/wrong": "scores"}}, ValueError, r"\(120, 6\), and \(40, any\) is needed"),
    ({"writes": {"layers/wrong": "scores"}}, ValueError, r"\(120, 6\), and \(120, 40\) is needed"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG, ids=[match for *_, match in WRONG])
def test_what_cannot_be_a_step_changes_nothing(
    adata: ad.AnnData, wrong: dict[str, Any], error: type[Exception], match: str
) -> None:
    before = contents(adata)
    with pytest.raises(error, match=match):
        sd.step(adata, **{"op": Power(), "reads": "obsm/X_z", "writes": BOTH} | wrong)
    assert not changed(before, contents(adata))


class Shifted:
    """Not an operator of JAX: counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, z: Any) -> Any:
        self.calls += 1
        return z + 1


def _chain(adata: ad.AnnData, target: str) -> tuple[Any, Shifted]:
    """A plan whose last step prepares nothing, after one that does."""
    plan, shifted = sd.plan(adata), Shifted()
    sd.pp.pca(plan, n_comps=4)
    last = Step("shifted", shifted, (Obsm("X_pca"),), (Write(Obsm(target), lambda op, z: z),), compiled=False)
    plan.add(last)
    return plan, shifted


def test_a_fit_leaves_steps_that_prepare_nothing_for_when_they_are_asked_for(adata: ad.AnnData) -> None:
    plan, shifted = _chain(adata, "X_shifted")
    eager = plan.run()[2]
    assert shifted.calls == 1
    values = plan.run(lazily=True)[2]
    assert shifted.calls == 1
    np.testing.assert_array_equal(values[Obsm("X_shifted")], eager[Obsm("X_shifted")])
    np.testing.assert_array_equal(values[Obsm("X_shifted")], values[Obsm("X_pca")] + 1)
    assert shifted.calls == 2
    with pytest.raises(KeyError):
        values[Obsm("X_absent")]


def test_a_step_that_changes_what_others_wrote_is_not_left_for_later(adata: ad.AnnData) -> None:
    plan, shifted = _chain(adata, "X_pca")
    assert (plan.run(lazily=True)[2][Obsm("X_pca")] == plan.run()[2][Obsm("X_pca")]).all()
    assert shifted.calls == 2
