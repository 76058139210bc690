"""Highly variable genes: the hard table against scanpy, and the weights against the table and finite differences."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from packaging.version import Version

from helpers import directional_fd, pbmc_counts, random_direction, tree_vdot
from scdiffx._core.counts import Counts
from scdiffx._core.fields import learnables, replace
from scdiffx.ops._highly_variable import HighlyVariable

SCANPY_BATCHES_BY_RUNNING_MEANS = Version(version("scanpy")) >= Version("1.12")
pytest.importorskip("skmisc.loess", reason="scanpy's seurat_v3 needs scikit-misc")


def logged(adata):
    adata = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def split(adata, batches=3, seed=0):
    """A batch of every cell, and the same as codes."""
    codes = np.random.default_rng(seed).integers(0, batches, adata.n_obs)
    adata.obs["batch"] = np.array([f"b{i}" for i in range(batches)])[codes]
    return codes


def scanpy_columns(adata, batched=False, **settings):
    adata = adata.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.highly_variable_genes(adata, batch_key="batch" if batched else None, **settings)
    return {k: adata.var[k].to_numpy() for k in adata.var if k.startswith(("highly", "means", "disp", "var"))}


def assert_equal_tables(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        if value.dtype.kind in "bi":
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        else:
            # Scores are in units of the spread of a bin, and scanpy squares float32 values in float32.
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


SETTINGS = [
    {"flavor": "seurat", "n_top_genes": 500},
    {"flavor": "seurat", "n_top_genes": 2000},
    {"flavor": "seurat"},
    {"flavor": "cell_ranger", "n_top_genes": 1000},
    {"flavor": "seurat_v3", "n_top_genes": 500},
    {"flavor": "seurat_v3", "n_top_genes": 2000},
    {"flavor": "seurat_v3_paper", "n_top_genes": 1000},
]


def data_for(flavor, counts):
    return counts if flavor.startswith("seurat_v3") else logged(counts)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_table_equals_scanpy(paul15, worm_embryo, settings):
    for counts in (paul15, worm_embryo):
        adata = data_for(settings["flavor"], counts)
        assert_equal_tables(HighlyVariable(**settings).table(adata.X), scanpy_columns(adata, **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_table_with_batches_equals_scanpy(paul15, settings):
    adata = data_for(settings["flavor"], paul15)
    codes = split(adata)
    ours = HighlyVariable(**settings).table(adata.X, codes, gene_names=adata.var_names)
    theirs = scanpy_columns(adata, batched=True, **settings)
    if settings["flavor"].startswith("seurat_v3") and SCANPY_BATCHES_BY_RUNNING_MEANS:
        # This scanpy computes means within batches by updates whose rounding depends on the order of the cells. Equal
        # means come out unequal, and the loess tree cuts elsewhere: compare what does not hinge on exact ties.
        assert (ours["highly_variable"] != theirs["highly_variable"]).sum() <= 0.01 * settings["n_top_genes"]
        np.testing.assert_allclose(ours["variances_norm"], theirs["variances_norm"], rtol=5e-3)
        for name in ("means", "variances"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    else:
        assert_equal_tables(ours, theirs)


@pytest.mark.parametrize("name", ["moor_villus", "mixology_sc"])
@pytest.mark.parametrize("n_top_genes", [500, 1000, 2000])
def test_seurat_v3_selects_the_same_genes_elsewhere(data_dir, name, n_top_genes):
    path = data_dir / name / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"the data set {name} is not there")
    adata = ad.read_h5ad(path)
    settings = {"flavor": "seurat_v3", "n_top_genes": n_top_genes}
    assert_equal_tables(HighlyVariable(**settings).table(adata.X), scanpy_columns(adata, **settings))


@pytest.mark.parametrize(
    "cutoffs",
    [{"min_disp": 0.2, "min_mean": 0.1, "max_mean": 2.0, "max_disp": 2.0}, {"min_disp": -1.0, "min_mean": -1.0}],
    ids=str,
)
@pytest.mark.parametrize("batched", [False, True])
def test_cutoffs_and_bins(cutoffs, batched):
    adata = logged(pbmc_counts())
    codes = split(adata) if batched else None
    limits = {"min_disp": 0.5, "max_disp": np.inf, "min_mean": 0.0125, "max_mean": 3.0} | cutoffs
    op = HighlyVariable(cutoffs=tuple(limits.values()), n_bins=12)
    ours = op.table(adata.X, codes, gene_names=adata.var_names)
    assert_equal_tables(ours, scanpy_columns(adata, batched, n_bins=12, **cutoffs))
    weight = op.init(adata.X, codes)(Counts.from_scipy(adata.X), codes).weight
    np.testing.assert_array_equal(np.asarray(weight) > 0.5, ours["highly_variable"])


@pytest.mark.parametrize("span", [0.2, 0.6])
def test_span(span):
    adata = pbmc_counts()
    settings = {"flavor": "seurat_v3", "n_top_genes": 100, "span": span}
    assert_equal_tables(HighlyVariable(**settings).table(adata.X), scanpy_columns(adata, **settings))


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_every_form_of_matrix_gives_one_table(flavor):
    adata = data_for(flavor, pbmc_counts())
    codes = split(adata)
    op = HighlyVariable(flavor=flavor, n_top_genes=100)
    first = op.table(adata.X, codes)
    for x in (adata.X.tocsc(), adata.X.toarray(), sp.coo_array(adata.X), Counts.from_scipy(adata.X)):
        again = op.table(x, codes)
        for name in first:
            np.testing.assert_allclose(again[name], first[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_base_of_the_logarithm():
    adata = pbmc_counts()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata, base=2)
    op = HighlyVariable(n_top_genes=100)
    table = op.table(adata.X, log_base=2)
    assert_equal_tables(table, scanpy_columns(adata, n_top_genes=100))
    assert (op.table(adata.X)["highly_variable"] != table["highly_variable"]).any()
    weight = op.init(adata.X, log_base=2)(Counts.from_scipy(adata.X)).weight
    np.testing.assert_array_equal(np.asarray(weight) > 0.5, table["highly_variable"])


def awkward(log):
    """Real counts with genes of zeros and of ones, genes equal to each other, and one gene alone in its bin."""
    adata = pbmc_counts(200, 120)
    x = adata.X.toarray()
    x[:, :3], x[:, 3:5] = 0, 1
    x[:, 6:12] = x[:, [5]]
    x[:, 12] = 300 + 10 * x[:, 13]
    return ad.AnnData(sp.csr_matrix(np.log1p(x) if log else x))


@pytest.mark.parametrize("n_top_genes", [8, 60, 117, 119, 500])
@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_constant_empty_and_equal_genes(flavor, n_top_genes):
    adata = awkward(flavor == "seurat")
    # Ones become 1.0000000x on their way through log1p in float32; in float64 squares stay exact for scanpy too.
    adata.X = adata.X.astype(np.float64)
    adata.X.data = np.log1p(np.round(np.expm1(adata.X.data))) if flavor == "seurat" else adata.X.data
    op = HighlyVariable(flavor=flavor, n_top_genes=n_top_genes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = op.table(adata.X)
        fitted = op.init(adata.X)
    assert_equal_tables(ours, scanpy_columns(adata, flavor=flavor, n_top_genes=n_top_genes))
    x = Counts.from_scipy(adata.X, np.float32)
    result, pull = jax.vjp(lambda d: fitted(x.with_data(d)), x.data)
    assert all(np.isfinite(part).all() for part in result)
    assert np.isfinite(pull(result)[0]).all()
    np.testing.assert_array_equal(np.asarray(result.weight) > 0.5, ours["highly_variable"])


def test_more_genes_than_have_a_score_warns_the_caller():
    adata = awkward(log=True)
    with pytest.warns(UserWarning, match="number of normalized dispersions") as record:
        HighlyVariable(n_top_genes=119).table(adata.X)
    assert record[0].filename == __file__


@pytest.mark.parametrize(
    ("flavor", "batched"),
    [
        ("seurat", True),
        ("seurat_v3", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("seurat", False), ("cell_ranger", False), ("seurat_v3_paper", True))
        ),
    ],
)
def test_weights_agree_with_the_table(paul15, flavor, batched):
    adata = data_for(flavor, paul15)
    codes = split(adata) if batched else None
    op = HighlyVariable(flavor=flavor, n_top_genes=500).init(adata.X, codes, gene_names=adata.var_names)
    table = op.table(adata.X, codes, gene_names=adata.var_names)
    x = Counts.from_scipy(adata.X)
    result = jax.jit(lambda o, x, c: o(x, c))(op, x, codes)
    hard = table["highly_variable"]
    np.testing.assert_array_equal(np.asarray(result.weight) > 0.5, hard)
    np.testing.assert_array_equal(replace(op, temperature=1e-6)(x, codes).weight, hard.astype(np.float32))
    assert abs(result.weight.sum() - hard.sum()) < 0.1 * hard.sum()
    score = table["variances_norm"] if flavor.startswith("seurat_v3") else np.nan_to_num(table["dispersions_norm"])
    # The spread within a bin of two genes is a difference of nearly equal numbers: float32 has few digits of it.
    assert np.quantile(np.abs(np.asarray(result.score) - score), 0.995) < 1e-4
    np.testing.assert_allclose(result.mean, table["means"], rtol=1e-4, atol=1e-5)
    second = table["variances"] if flavor.startswith("seurat_v3") else table["dispersions"]
    np.testing.assert_allclose(result.dispersion, np.nan_to_num(second), rtol=1e-4, atol=1e-4)


def small(flavor, batched):
    adata = data_for(flavor, pbmc_counts(120, 80))
    adata.X = adata.X.astype(np.float64)
    return adata, (split(adata, 2) if batched else None)


@pytest.mark.parametrize(
    ("settings", "batched"),
    [
        ({"flavor": "seurat", "n_top_genes": 30}, True),
        pytest.param({"flavor": "seurat"}, False, marks=pytest.mark.slow),
        pytest.param({"flavor": "cell_ranger", "n_top_genes": 30}, False, marks=pytest.mark.slow),
        pytest.param({"flavor": "seurat_v3", "n_top_genes": 30, "span": 0.5}, False, marks=pytest.mark.slow),
        ({"flavor": "seurat_v3", "n_top_genes": 30, "span": 0.5}, True),
    ],
    ids=str,
)
def test_gradients_meet_finite_differences(x64, settings, batched):
    adata, codes = small(settings["flavor"], batched)
    x = Counts.from_scipy(adata.X)
    op = HighlyVariable(**settings, temperature=0.5).init(x, codes)
    mix = np.random.default_rng(1).normal(size=(4, x.shape[1]))

    def value(inputs):
        data, temperature, shift = inputs
        result = replace(op, temperature=temperature, shift=shift)(x.with_data(data), codes)
        return sum(jnp.vdot(m, part) for m, part in zip(mix, result, strict=True))

    at = (x.data, jnp.asarray(0.5), jnp.asarray(mix[0] / 10))
    value = jax.jit(value)
    grads = jax.jit(jax.grad(value))(at)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-6 for g in grads)
    for i in range(3):
        direction = tuple(random_direction(a, 3) * (j == i) for j, a in enumerate(at))
        # Pads of the blocks are no cells: they have no derivative, and must not be moved.
        real = np.asarray(x.position) < x.block_rows * x.shape[1]
        direction = (direction[0] * real, *direction[1:])
        fd = directional_fd(value, at, direction, steps=(1e-5, 1e-6))
        np.testing.assert_allclose(fd, tree_vdot(grads, direction), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("flavor", "batched"), [("seurat", False), ("seurat_v3", True)])
def test_sparse_dense_jit_eager_and_order_of_cells(x64, flavor, batched):
    adata, codes = small(flavor, batched)
    x, dense = Counts.from_scipy(adata.X), jnp.asarray(adata.X.toarray())
    op = HighlyVariable(flavor=flavor, n_top_genes=30, span=0.5).init(x, codes)
    first = op(x, codes)
    order = np.random.default_rng(2).permutation(adata.n_obs)
    there = None if codes is None else codes[order]
    others = [jax.jit(type(op).__call__)(op, x, codes), op(dense, codes), op(Counts.from_scipy(adata.X[order]), there)]
    others.append(HighlyVariable(flavor=flavor, n_top_genes=30, span=0.5).init(dense[order], there)(dense, codes))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_float32_is_close_to_float64(flavor):
    adata, _ = small(flavor, False)
    op = HighlyVariable(flavor=flavor, n_top_genes=30, span=0.5)
    short = op.init(adata.X.astype(np.float32))(Counts.from_scipy(adata.X, np.float32))
    with jax.enable_x64(True):
        x = Counts.from_scipy(adata.X)
        long = op.init(x)(x)
        assert {part.dtype for part in long} == {np.dtype(np.float64)}
        long = [np.asarray(part) for part in long]
    assert {part.dtype for part in short} == {np.dtype(np.float32)}
    for a, b in zip(short, long, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3)


def test_learnables_and_every_parameter():
    adata, _ = small("seurat", False)
    x = Counts.from_scipy(adata.X, np.float32)
    base = HighlyVariable(n_top_genes=30).init(x)
    assert set(learnables(base)) == {"temperature", "shift"}
    assert base.shift.shape == (80,)
    assert not base.shift.any()
    weight = base(x).weight
    for other in (
        replace(base, temperature=0.3),
        replace(base, shift=base.shift + 1),
        HighlyVariable(n_top_genes=40).init(x),
        HighlyVariable(n_top_genes=30, n_bins=5).init(x),
        HighlyVariable().init(x),
        HighlyVariable(cutoffs=(0.1, 2.0, 0.2, 4.0)).init(x),
        HighlyVariable(n_top_genes=30, flavor="cell_ranger").init(x),
    ):
        assert np.abs(other(x).weight - weight).max() > 1e-3
    both = [HighlyVariable(flavor="seurat_v3", n_top_genes=30, span=s).init(x)(x).weight for s in (0.4, 0.8)]
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_default_number_of_genes_of_seurat_v3(worm_embryo):
    assert HighlyVariable(flavor="seurat_v3").table(worm_embryo.X)["highly_variable"].sum() == 2000


def test_scanpy_raises_on_sparse_batches_and_we_do_not(worm_embryo):
    """Where most genes of a batch share a few means, the regression is singular; its least-norm solution serves."""
    codes = split(worm_embryo)
    with pytest.raises(ValueError, match=r"reciprocal condition number|near singularities|pseudoinverse"):
        scanpy_columns(worm_embryo, batched=True, flavor="seurat_v3", n_top_genes=500)
    table = HighlyVariable(flavor="seurat_v3", n_top_genes=500).table(worm_embryo.X, codes)
    assert table["highly_variable"].sum() == 500
    assert np.isfinite(table["variances_norm"]).all()
    alone = HighlyVariable(flavor="seurat_v3", n_top_genes=500).table(worm_embryo.X)["highly_variable"]
    assert (alone & table["highly_variable"]).sum() > 300


def test_errors():
    x = pbmc_counts(60, 40).X
    fitted = HighlyVariable(n_top_genes=10).init(x)
    for op, match in (
        (HighlyVariable(flavor="seurat_v4"), r"flavor='seurat_v4' is unknown\. Available"),
        (HighlyVariable(n_top_genes=0), "n_top_genes=0"),
        (HighlyVariable(n_bins=0), "n_bins=0"),
        (HighlyVariable(cutoffs=(1.0, 2.0)), "cutoffs="),
    ):
        with pytest.raises(ValueError, match=match):
            op.table(x)
    for codes, match in (
        (np.zeros(3, int), r"shape \(60,\)"),
        (np.zeros(60), "integer codes"),
        (np.repeat([0, 2], 30), "without gaps"),
    ):
        with pytest.raises(ValueError, match=match):
            HighlyVariable().table(x, codes)
    with pytest.raises(ValueError, match="two cells in every batch"):
        HighlyVariable(flavor="seurat_v3").table(x, np.append(np.zeros(59, int), 1))
    with pytest.raises(ValueError, match=r"call op = op\.init"):
        HighlyVariable()(Counts.from_scipy(x))
    with pytest.raises(ValueError, match="x has 39 genes, and init saw 40"):
        fitted(Counts.from_scipy(x[:, :39]))
    with pytest.raises(ValueError, match="init saw 2 batches"):
        HighlyVariable(n_top_genes=10).init(x, np.repeat([0, 1], 30))(Counts.from_scipy(x))
