"""One meaning for all that users call a seed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from scdiffx._core.random import as_key, as_seed, one_rng


def test_one_of_two_names() -> None:
    assert one_rng(None, None) == 0
    assert one_rng(5, None) == 5
    assert one_rng(None, 6) == 6
    with pytest.raises(TypeError, match="not both"):
        one_rng(0, 0)


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), 2**32 + 7], ids=str)
def test_integers(seed: int) -> None:
    assert as_seed(seed) == int(seed) % 2**32


@pytest.mark.parametrize(
    "make",
    [np.random.default_rng, np.random.RandomState, jax.random.key, jax.random.PRNGKey],
    ids=["Generator", "RandomState", "key", "old key"],
)
def test_generators_and_keys(make: Any) -> None:
    first = as_seed(make(3))
    assert 0 <= first < 2**32
    assert as_seed(make(3)) == first
    assert as_seed(make(4)) != first


def test_a_generator_moves_on_and_none_is_fresh() -> None:
    generator = np.random.default_rng(0)
    assert as_seed(generator) != as_seed(generator)
    assert as_seed(None) != as_seed(None)


def test_keys_of_equal_seeds_are_equal() -> None:
    a, b = (jax.random.normal(as_key(seed), (3,)) for seed in (5, np.int32(5)))
    np.testing.assert_array_equal(a, b)
    key = jax.random.key(1)
    assert as_key(key) is key


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    as_seed(None)
    as_key(3)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("rng", "error", "match"),
    [
        ("seed", TypeError, "rng='seed'"),
        (1.5, TypeError, "rng=1.5"),
        (True, TypeError, "bool"),
        (-1, ValueError, "negative"),
    ],
)
def test_what_is_no_seed(rng: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        as_seed(rng)
