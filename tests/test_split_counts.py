"""Dealing molecules into layers, and the losses that compare matrices."""

from __future__ import annotations

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import scdiffx as sd
from helpers import directional_fd, pbmc_counts, tree_vdot
from scdiffx import ops
from scdiffx.losses._terms import MolecularCrossValidation, Reconstruction


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()])
def test_every_molecule_goes_to_one_layer(form) -> None:
    adata = pbmc_counts()
    adata.X = form(adata.X)
    before = adata.X.copy()
    sd.pp.split_counts(adata, {"a": 0.6, "b": 0.3, "c": 0.1}, rng=1)
    assert abs(adata.layers["a"] + adata.layers["b"] + adata.layers["c"] - before).max() == 0
    assert abs(adata.X - before).max() == 0
    assert type(adata.layers["a"]) is type(before)
    sizes = np.array([adata.layers[k].sum() for k in "abc"])
    np.testing.assert_allclose(sizes / sizes.sum(), [0.6, 0.3, 0.1], atol=0.005)
    again = sd.pp.split_counts(pbmc_counts(), {"a": 0.6, "b": 0.3, "c": 0.1}, rng=1, copy=True)
    assert abs(again.layers["a"] - adata.layers["a"]).max() == 0
    other = sd.pp.split_counts(pbmc_counts(), rng=2, copy=True)
    assert abs(other.layers["fit"] - again.layers["a"]).max() > 0


def test_parts_of_a_poisson_count_are_independent() -> None:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(3.0, size=(4000, 5)).astype(np.float32))
    sd.pp.split_counts(adata, {"a": 0.5, "b": 0.5})
    for gene in range(5):
        assert abs(np.corrcoef(adata.layers["a"][:, gene], adata.layers["b"][:, gene])[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("fractions", "change", "message"),
    [
        ({"a": 0.5, "b": 0.4}, None, "sum to 1"),
        ({"a": 1.0}, None, "at least two"),
        ({"a": 1.5, "b": -0.5}, None, "greater than 0"),
        (None, 0.5, "whole molecules"),
        (None, -1.0, "is negative"),
        (None, np.nan, "is not finite"),
    ],
)
def test_what_cannot_be_split_is_refused(fractions, change, message) -> None:
    adata = pbmc_counts(20, 30)
    if change is not None:
        adata.X[0, 0] = change
    with pytest.raises(ValueError, match=message):
        sd.pp.split_counts(adata, fractions)
    assert not adata.layers


def test_a_plan_cannot_draw() -> None:
    with pytest.raises(TypeError, match="before"):
        sd.pp.split_counts(sd.plan(pbmc_counts(20, 30)))


@pytest.fixture
def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    value, counts = rng.gamma(1.0, size=(50, 20)), rng.poisson(0.8, size=(50, 20)).astype(float)
    value[3], counts[4], value[:, 5] = 0, 0, 0
    return value, counts, np.arange(50) % 5 != 0


def by_definition(value: np.ndarray, counts: np.ndarray, keep: np.ndarray, background: float) -> float:
    total = value.sum(1, keepdims=True)
    share = np.divide(value, total, out=np.zeros_like(value), where=total > 0)
    mean = share[keep].sum(0) + 1 / value.shape[1]
    mean /= mean.sum()
    share = np.where(total > 0, (1 - background) * share + background * mean, mean)
    expected = share * counts.sum(1, keepdims=True)
    x, mu = counts[keep], expected[keep]
    safe = np.where(mu > 0, mu, 1)
    return 2 * (np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / safe), 0) - (x - mu)).sum() / x.sum()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", ["linear", "sqrt", "log1p"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_cross_validation_is_the_poisson_deviance(matrices, form: str, scale: str) -> None:
    value, counts, keep = matrices
    target = ops.Counts.from_scipy(sp.csr_matrix(counts)) if form == "sparse" else jnp.asarray(counts)
    term = MolecularCrossValidation(output="v", target="t", scale=scale, background=0.02)
    given = jnp.asarray({"linear": value, "sqrt": np.sqrt(value), "log1p": np.log1p(value)}[scale])
    np.testing.assert_allclose(
        jax.jit(term)(given, target, jnp.asarray(keep)), by_definition(value, counts, keep, 0.02), rtol=1e-10
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_reconstruction_is_the_mean_squared_difference(matrices, form: str) -> None:
    value, counts, keep = matrices
    target = ops.Counts.from_scipy(sp.csr_matrix(counts)) if form == "sparse" else jnp.asarray(counts)
    found = jax.jit(Reconstruction(output="v"))(jnp.asarray(value), target, jnp.asarray(keep))
    np.testing.assert_allclose(found, ((value - counts)[keep] ** 2).mean(), rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("term", [MolecularCrossValidation(output="v", target="t"), Reconstruction(output="v")])
def test_derivatives_of_both(matrices, term) -> None:
    value, counts, keep = matrices
    target, at = ops.Counts.from_scipy(sp.csr_matrix(counts)), jnp.asarray(value + 0.1)
    loss = jax.jit(lambda v: term(v, target, jnp.asarray(keep)))
    step = jnp.asarray(np.random.default_rng(1).normal(size=value.shape))
    exact = tree_vdot(jax.grad(loss)(at), step)
    assert exact != 0
    np.testing.assert_allclose(directional_fd(loss, at, step, [1e-5, 1e-6]), exact, rtol=1e-6)


def test_shapes_and_settings_are_checked(matrices) -> None:
    value, counts, keep = matrices
    for term in (Reconstruction(output="v"), MolecularCrossValidation(output="v", target="t")):
        with pytest.raises(ValueError, match=r"'v' has shape \(50, 19\)"):
            term(jnp.asarray(value[:, 1:]), jnp.asarray(counts), jnp.asarray(keep))
    with pytest.raises(ValueError, match="background=1"):
        sd.losses.molecular_cross_validation("magic", "test", background=1)
    with pytest.raises(ValueError, match="scale='log2'"):
        sd.losses.molecular_cross_validation("magic", "test", scale="log2")
