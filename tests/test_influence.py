"""Influence of settings: against closed forms, refits with the structure held, and reverse derivatives."""

from __future__ import annotations

import functools
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scdiffx as sd
from documented import assert_documented
from helpers import QUICK, contents, pbmc_counts
from scdiffx._core.fields import CONSTRAINTS, replace
from scdiffx._program import Program
from scdiffx._slots import Obsm
from scdiffx._steps import Plan
from scdiffx.tl._influence import _around


def reduced(adata: ad.AnnData) -> Plan:
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan)
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=4)
    return plan


def fated(adata: ad.AnnData, ordered: bool) -> Plan:
    plan = reduced(adata)
    sd.pp.neighbors(plan, n_neighbors=8)
    if ordered:
        sd.tl.pseudotime(plan, n_dcs=4, root=0)
    else:
        adata.obs["dpt_pseudotime"] = np.linspace(0, 1, adata.n_obs)
    sd.tl.fate_probabilities(plan, {"a": adata.obs_names[20:25], "b": adata.obs_names[40:45]})
    return plan


def test_of_the_target_sum_on_a_component_is_its_closed_form() -> None:
    adata = pbmc_counts(80, 60)
    before = set(contents(adata))
    sd.tl.influence(reduced(adata), "X_pca", column=1)
    key = "influence_X_pca_1"
    assert {path.rsplit("/", 1)[0] for path in set(contents(adata)) - before} == {
        "obsm",
        "uns",
        f"uns/{key}",
        f"uns/{key}/params",
        f"uns/{key}/values",
    }
    written = {f"obsm/{key}": "DataFrame", f"uns/{key}": "mapping", f"uns/{key}/values": "mapping"}
    assert_documented(sd.tl.influence, written)
    table, counts = adata.obsm[key], adata.X.toarray().astype(np.float64)
    assert list(table) == ["normalize_total.target_sum"]
    assert list(table.index) == list(adata.obs_names)
    run = reduced(adata)
    copied = run.apply(copy=True)
    size = counts.sum(1, keepdims=True)
    middle = np.median(size)
    assert adata.uns[key]["values"] == {"normalize_total.target_sum": pytest.approx(middle)}
    slope = counts / size / (1 + counts * middle / size)
    np.testing.assert_allclose(table.iloc[:, 0], slope @ copied.varm["PCs"][:, 1].astype(np.float64), rtol=1e-4)
    again = sd.tl.influence(reduced(adata), "X_pca", column=1, knobs="normalize_total", key_added="mine", copy=True)
    assert again.obsm["mine"].equals(table)
    assert "mine" not in adata.obsm


@pytest.mark.slow
def test_it_predicts_refits_with_the_structure_held() -> None:
    adata = pbmc_counts(60, 40)
    adata.X = adata.X.astype(np.float64)
    plan = fated(adata, ordered=False)
    sd.tl.influence(plan, "lineages_fwd", column=1)
    table, values = adata.obsm["influence_lineages_fwd_1"], adata.uns["influence_lineages_fwd_1"]["values"]
    names = ["normalize_total.target_sum", "neighbors.bandwidth", "fate_probabilities.b", "fate_probabilities.nu"]
    assert list(table) == list(values) == names
    assert adata.uns["influence_lineages_fwd_1"]["params"] == {"target": "lineages_fwd", "step": 1e-6, "column": 1}
    ops = plan.run()[0]
    for name, value in values.items():
        i = next(i for i, step in enumerate(plan.steps) if step.name == name.split(".")[0])
        ends = []
        for moved in (0.998 * value, 1.002 * value):
            with jax.enable_x64(True):
                changed = [*ops[:i], replace(ops[i], **{name.split(".")[1]: jnp.asarray(moved)}), *ops[i + 1 :]]
            ends.append(
                np.asarray(plan.run(ops=changed, prepare=lambda op, args, key: op)[2][Obsm("lineages_fwd")])[:, 1]
            )
        expected = (ends[1] - ends[0]) / (0.004 * value)
        assert np.abs(expected).max() * value > 1e-3
        # The error of differences over 0.2 % to both sides is of second order.
        np.testing.assert_allclose(table[name], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("target", "column"), [("dpt_pseudotime", None), ("lineages_fwd", 0)])
def test_its_sum_over_cells_is_the_reverse_derivative(target: str, column: int | None) -> None:
    adata = pbmc_counts(100, 60)
    plan = fated(adata, ordered=True)
    sd.tl.influence(plan, target, column=column, key_added="found")
    program = Program.towards(plan, plan.slot(target))

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def slopes(values: dict[str, Any]) -> Any:
        ops = list(program.ops)
        for name, value in values.items():
            i, field = program.find(name)
            ops[i] = replace(ops[i], **{field: value})
        y = program.evaluate(ops, program.frozen)[plan.slot(target)]
        return (y if column is None else y[:, column]).sum()

    with jax.enable_x64(True):
        expected = slopes({name: jnp.asarray(v) for name, v in adata.uns["found"]["values"].items()})
    assert set(expected) == set(adata.obsm["found"])
    for name, value in expected.items():
        assert adata.obsm["found"][name].sum() == pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize(
    ("constraint", "value", "expected"),
    [
        ("real", 0.0, (-1e-6, 1e-6)),
        ("real", -2.0, (-2.000002, -1.999998)),
        ("positive", 1e4, (9999.99, 10000.01)),
        ("unit", 1.0, (0.999999, 1.0)),
        ("unit", 0.0, (0.0, 1e-6)),
    ],
)
def test_steps_stay_where_the_parameter_may_be(constraint: str, value: float, expected: tuple[float, float]) -> None:
    with jax.enable_x64(True):
        found = _around(jnp.asarray(value, jnp.float64), CONSTRAINTS[constraint])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": "absent"}, KeyError, "'absent'"),
        ({"target": "day"}, KeyError, "not written by the plan"),
        ({"column": None}, KeyError, "column=None of target='X_pca': it has 4"),
        ({"column": 4}, KeyError, "column=4"),
        ({"knobs": "bandwidth"}, ValueError, r"knobs='bandwidth' names no.*'normalize_total.target_sum'"),
        (
            {"knobs": ["pca.scale"]},
            ValueError,
            r"knobs='pca.scale' is not a single number.*'normalize_total.target_sum'",
        ),
        ({"knobs": "pca"}, ValueError, "no parameter that is a single number leads to"),
        ({"target": "first", "knobs": "normalize_total_2.target_sum", "column": None}, ValueError, "does not lead"),
    ],
)
def test_bad_settings_name_themselves(settings: dict, error: type[Exception], message: str) -> None:
    adata = pbmc_counts(60, 40)
    adata.obs["day"] = 1.0
    plan = sd.plan(adata)
    sd.pp.normalize_total(plan, key_added="first")
    sd.pp.log1p(plan)
    sd.pp.pca(plan, n_comps=4)
    sd.pp.normalize_total(plan, key_added="second")
    before = set(contents(adata))
    with pytest.raises(error, match=message):
        sd.tl.influence(plan, **({"target": "X_pca", "column": 0} | settings))
    assert set(contents(adata)) == before


@pytest.mark.parametrize("wrong", [ad.AnnData(np.ones((3, 3))), "plan"])
def test_only_a_plan_has_settings_to_move(wrong: object) -> None:
    with pytest.raises(TypeError, match="plan"):
        sd.tl.influence(wrong, "day")
