"""The vocabulary of operators: kinds of fields, constraints, and what a pytree carries."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scdiffx._core.fields import CONSTRAINTS, buffer, fields_of_kind, learnable, learnables, operator, replace, static


@operator
class Mix:
    weight: jax.Array | float = learnable(default=0.5, constraint="unit")
    shift: jax.Array | None = learnable(default=None)
    centre: jax.Array | None = buffer()
    where: jax.Array | None = buffer(structure=True)
    size: int = static(default=3)

    def __call__(self, x):
        return self.weight * x + self.size


INSIDE = {
    "real": [-3.0, 0.0, 7.5],
    "positive": [1e-4, 1.0, 30.0],
    "unit": [0.01, 0.5, 0.99],
    "simplex": [[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]],
}
OUTSIDE = {
    "real": [np.nan, np.inf],
    "positive": [0.0, -1.0, np.inf, np.nan],
    "unit": [-0.1, 1.1, np.nan],
    "simplex": [[0.5, 0.6], [1.2, -0.2]],
}


def test_every_constraint_is_tried_here() -> None:
    assert set(INSIDE) == set(OUTSIDE) == set(CONSTRAINTS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_are_bijections(name: str) -> None:
    constraint, inside = CONSTRAINTS[name], jnp.asarray(INSIDE[name])
    assert bool(constraint.accepts(inside).all())
    assert not bool(constraint.accepts(jnp.asarray(OUTSIDE[name])).all(-1).any())
    np.testing.assert_allclose(constraint.from_real(constraint.to_real(inside)), inside, rtol=1e-12)
    far = constraint.from_real(jnp.asarray([-300.0, 0.0, 300.0]))
    assert bool(constraint.accepts(far).all())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_unit_interval_have_finite_logits(value: float) -> None:
    unit = CONSTRAINTS["unit"]
    real = unit.to_real(jnp.float32(value))
    assert np.isfinite(float(real))
    assert abs(float(unit.from_real(real)) - value) < 1e-6


def test_kinds_and_learnables() -> None:
    op = Mix()
    assert [f.name for f in fields_of_kind(op, "learnable")] == ["weight", "shift"]
    assert [f.name for f in fields_of_kind(Mix, "buffer")] == ["centre", "where"]
    assert {name: c.name for name, c in learnables(op).items()} == {"weight": "unit"}
    assert set(learnables(replace(op, shift=jnp.zeros(2)))) == {"weight", "shift"}


def test_statics_are_part_of_the_compilation_key_and_the_rest_is_not() -> None:
    traces = []

    @jax.jit
    def run(op: Mix, x: jax.Array) -> jax.Array:
        traces.append(op.size)
        return op(x)

    x = jnp.ones(2)
    assert float(run(Mix(weight=jnp.float32(0.5)), x)[0]) == 3.5
    assert float(run(Mix(weight=jnp.float32(0.25)), x)[0]) == 3.25
    assert float(run(Mix(weight=jnp.float32(0.5), size=4), x)[0]) == 4.5
    assert traces == [3, 4]


def test_operators_differentiate_with_respect_to_themselves() -> None:
    gradient = jax.grad(lambda op: op(jnp.float32(3.0)))(Mix(weight=jnp.float32(0.5)))
    assert isinstance(gradient, Mix)
    assert float(gradient.weight) == 3.0


def test_replace_leaves_the_original() -> None:
    op = Mix()
    other = replace(op, size=5)
    assert (op.size, other.size) == (3, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.size = 4


def test_mistakes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"\['plain'\] must be learnable"):

        @operator
        class Unmarked:
            plain: int = 3

    with pytest.raises(ValueError, match=r"constraint='round' is unknown.*'unit'"):
        learnable(default=1.0, constraint="round")
    with pytest.raises(TypeError, match="positional"):
        Mix(0.5)
