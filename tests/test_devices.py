"""Several devices, virtual ones in processes of their own: results equal those of one, and the work is split."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.sharding import AxisType

from scdiffx import ops
from scdiffx._core import counts as C
from scdiffx._core import devices
from scdiffx._core.minibatch import densify, draw, widest
from scdiffx.ops import _vae, _vae_fit

DEVICES = 4
# Neither is a multiple of the devices, and a thousand cells fill no whole number of blocks.
CELLS, GENES = 1030, 102


def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(0.5, (CELLS, GENES)).astype(np.float32))


def neighbours() -> sp.csr_matrix:
    rng = np.random.default_rng(1)
    row, column = np.repeat(np.arange(CELLS), 6), rng.integers(0, CELLS, 6 * CELLS)
    one = sp.coo_matrix((rng.random(6 * CELLS), (row, column)), (CELLS, CELLS)).astype(np.float32)
    return (one + one.T).tocsr()


def mesh() -> Any:
    return jax.make_mesh((len(jax.devices()),), ("cells",), axis_types=(AxisType.Auto,))


def error(one: Any, several: Any) -> float:
    """The largest difference, relative to the largest value."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True)
    both = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in both)


def collectives(program: str) -> list[str]:
    """The shapes of what the devices send to each other, such as "all-gather f32[8,3]"; all parts of each."""
    found = []
    for line in program.splitlines():
        sent = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", line)
        if sent:
            found += [f"{sent[2]} {shape}" for shape in re.findall(r"\w+\[[\d,]*\]", sent[1])]
    return found


# ------------------------------------------------------------------------------------------------ in the other process


def on_both(f: Callable[..., Any], *make: Callable[[], Any]) -> dict[str, Any]:
    """What becomes of a function on one device and on all."""
    one = jax.jit(f)(*(m() for m in make))
    with jax.set_mesh(mesh()):
        args = [m() for m in make]
        compiled = jax.jit(f).lower(*args).compile()
        several, program = compiled(*args), compiled.as_text()
    inputs = [a.addressable_shards[0].data.shape for a in jax.tree.leaves(args) if isinstance(a, jax.Array)]
    return {"error": error(one, several), "sent": collectives(program), "inputs": inputs, "program": program}


def training() -> dict[str, Any]:
    """The autoencoder and one of its steps."""
    op = ops.VAE(n_latent=3, n_hidden=16, training=ops.Training(max_epochs=2))
    one = op.init(ops.Counts.from_scipy(counts()[:210]))
    with jax.set_mesh(mesh()):
        several = op.init(ops.Counts.from_scipy(counts()[:210]))
        rows = draw(counts(), np.arange(128)[None], widest(counts(), 128))[0]
        state = (one.net, _vae_fit.optimizer().init(one.net))
        numbers = (np.float32(1), np.float32(1e-3), np.uint32(0))
        program = {"terms": _vae.batch_bound, "likelihood": "nb"}
        step = _vae_fit._train_step.lower(state, rows, np.zeros(128, np.int32), *numbers, **program).compile()
        dense = densify(rows, 128, GENES)
    weights = ("encoder_in", "encoder_out", "decoder_in", "decoder_out")
    return {
        "history": error(one.history, several.history),
        "weights": error(*({name: op.net[name] for name in weights} for op in (one, several))),
        "dense": bool((np.asarray(dense) == counts()[:128].toarray()).all()),
        "program": step.as_text(),
        "sent": collectives(step.as_text()),
    }


def report() -> dict[str, Any]:
    """All that the tests look at."""

    def packed() -> Any:
        return ops.Counts.from_scipy(counts())

    before = packed()  # as it is without a mesh: two blocks
    graph, vectors = (lambda: ops.Graph.from_scipy(neighbours())), jnp.ones((CELLS, 5)).cumsum(0)
    magic = ops.Magic(t=2.0).init(before, graph())
    centre = jnp.full(GENES, 0.5)

    def products(x: ops.Counts) -> Any:
        return C.gram(x, centre), C.column_moments(x), C.row_sums(x), C.matmul(x, jnp.eye(GENES)[:, :7])

    def slope(values: Any, x: ops.Counts) -> Any:
        return jax.grad(lambda v: (C.gram(x.with_data(v), centre) ** 2).sum())(values).sum(1).sum()

    def slope_of_graph(g: ops.Graph) -> Any:
        values = jax.grad(lambda v: ((g.with_values(v) @ vectors) ** 2).mean())(g.values)
        return g.with_values(values) @ vectors

    found = {
        "products": on_both(products, packed),
        "products of blocks from before": on_both(products, lambda: before),
        "products of a dense matrix": on_both(products, lambda: jnp.asarray(counts().toarray())),
        "slope": on_both(slope, lambda: packed().data, packed),
        "graph": on_both(lambda g: g @ vectors, graph),
        "slope of graph": on_both(slope_of_graph, graph),
        "magic": on_both(lambda x, g: magic(x, g).imputed, packed, graph),
        "training": training(),
    }
    return json.loads(json.dumps(found))


def in_child(call: str, n_devices: int = DEVICES) -> subprocess.Popen[str]:
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={n_devices}"
    env = dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=str(Path(__file__).parent))
    code = f"import json, test_devices; print(json.dumps(test_devices.{call}))"
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=env, stdout=-1, stderr=-1)


def answer(child: subprocess.Popen[str]) -> Any:
    out, problems = child.communicate(timeout=600)
    assert child.returncode == 0, problems
    return json.loads(out.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return answer(in_child("report()"))


@pytest.mark.slow
def test_results_are_those_of_one_device(found: dict[str, Any]) -> None:
    errors = {name: entry["error"] for name, entry in found.items() if "error" in entry}
    assert len(errors) == 7
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_blocks_of_cells_are_shared_out(found: dict[str, Any]) -> None:
    entry = found["products"]
    assert {blocks for blocks, _ in entry["inputs"]} == {1}  # of four
    # Each device multiplies the 258 cells of its block; what is sent are sums, and scores of 7 columns.
    assert re.search(rf"f32\[1,258,{GENES}\]|f32\[258,{GENES}\]", entry["program"])
    assert not re.search(rf"f32\[(103\d|4,258),{GENES}\]", entry["program"])
    assert any(sent.startswith("all-reduce") for sent in entry["sent"])
    assert not [s for s in entry["sent"] if s.startswith("all-gather") and re.search(rf",{GENES}\]|\[4,", s)]


@pytest.mark.slow
def test_a_graph_is_shared_out_by_rows(found: dict[str, Any]) -> None:
    entry = found["graph"]
    rows, width = entry["inputs"][0]
    # One gathering of the product, and none of the edges.
    assert entry["sent"] == [f"all-gather f32[{DEVICES * rows},5]"]
    assert f"[{DEVICES * rows},{width}]" not in entry["program"]


@pytest.mark.slow
def test_imputation_is_shared_out_by_genes(found: dict[str, Any]) -> None:
    entry = found["magic"]
    each = -(-GENES // DEVICES)
    assert f"f32[{CELLS},{each}]" in entry["program"]
    assert any(s.startswith("all-to-all") for s in entry["sent"])
    # All of the genes are only in the result, whose 102 columns four devices cannot share evenly.
    whole = [s for s in entry["sent"] if s.startswith("all-gather") and re.search(r"\[10\d\d,10\d\]", s)]
    assert len(whole) <= 1


@pytest.mark.slow
def test_minibatches_are_shared_out(found: dict[str, Any]) -> None:
    entry = found["training"]
    assert entry["dense"]
    assert entry["history"] < 1e-5
    assert entry["weights"] < 1e-5
    # Each device has 32 of the 128 cells, and all that is sent are sums over cells.
    assert f"f32[32,{GENES}]" in entry["program"]
    assert not re.search(r"f32\[128,\d+\]", entry["program"])
    assert {s.split()[0] for s in entry["sent"]} == {"all-reduce"}


def test_an_explicit_axis_is_refused() -> None:
    explicit = jax.make_mesh((1,), ("cells",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="axis 'cells' of the mesh is Explicit"):
        devices.n_parts()
    with jax.set_mesh(jax.make_mesh((1,), ("other",), axis_types=(AxisType.Auto,))):
        assert devices.n_parts() == 1


def one_of_two(process: int, port: int) -> list[float]:
    """An analysis by two processes of two devices each: both call the same, with the same data."""
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    with jax.set_mesh(mesh()):
        assert devices.n_parts() == 4
        return analysed()


def analysed() -> list[float]:
    import anndata as ad

    import scdiffx as sd

    adata = ad.AnnData(counts()[:210])
    sd.pp.vae(adata, n_latent=3, max_epochs=1, progress=False)
    sd.pp.normalize_total(adata)
    total = jax.jit(lambda x: C.gram(x, jnp.zeros(GENES)))(ops.Counts.from_scipy(adata.X))
    return [float(v) for v in (adata.uns["vae"]["validation"], adata.X[7].max(), *np.asarray(total)[0, :5])]


@pytest.mark.slow
def test_two_hosts() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [in_child(f"one_of_two({process}, {port})", 2) for process in range(2)]
    first, second = (answer(child) for child in children)
    assert first == second
    np.testing.assert_allclose(first, analysed(), rtol=1e-5)
