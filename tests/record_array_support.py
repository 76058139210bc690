"""Write docs/array-support.md from the code and from the tables of the binding and the contract tests.

    python tests/record_array_support.py

`test_bindings.py` checks that the page is up to date.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import scdiffx as sd

PAGE = Path(__file__).resolve().parents[1] / "docs" / "array-support.md"
# They read layers by their names.
LAYERS = {"tl.velocity"}
HEADER = """# Array support

`python tests/record_array_support.py` made this page from the code and from the tables of the tests, and a test
compares the two. A row is a function with the operator that it runs; some run others by `mode` or `method`.

- **csr, csc, dense**: which matrices it reads from `X` or a layer, with the same results: SciPy's matrices and arrays,
  NumPy's in either order; integers, float32 and float64. A dash: it reads no matrix of genes but an embedding, a
  graph, or what functions before it wrote. (`tl.ot_trajectory` reads one where `growth` names genes.)
- **dask**: *lazy*: the result is a dask array again; *streamed*: read in passes over blocks of cells, as AnnData in
  files are; *in part*: so for some arguments, such as `genes` of `pp.magic`; *refused* with a `TypeError` that says to
  load the data (`adata.to_memory()`). Nothing is loaded or made dense behind your back. Of dense results, `scale` warns
  when it centres a sparse matrix, as scanpy does.
- **in a plan**: whether it can be a step of `sd.plan`, and so of a fit.
- **input**: whether its results are differentiable in its floating inputs (matrix, embedding or graph), the discrete
  structure held. Compared with finite differences in `tests/test_contract.py`.
- **parameters**: its learnable parameters, compared in the same way.
- **minibatches**: whether a fit may take it by `batch_size=` while it moves. *yes*: it looks at one cell at a time;
  *with neighbours*: batches bring the cells around them. Steps before the first one that moves need neither.

| function | operator | csr | csc | dense | dask | in a plan | input | parameters | minibatches |
|---|---|---|---|---|---|---|---|---|---|
"""
FOOTER = """
What is not in the table takes no plan and writes no step: `pp.replicates`, `tl.simulate` and `tl.ot_interpolate` make
new cells; `tl.uncertainty` and `tl.influence` run or differentiate a plan; `tl.annotation_model` makes a model.
"""


def operators(case: Any, bindings: Any) -> list[Any]:
    """The operators that a call adds to a plan: none where it takes no plan or is no step."""
    function = bindings.function_named(case.function)
    if "Plan" not in str(inspect.signature(function).parameters["adata"].annotation):
        return []
    plan = sd.plan(bindings.source(case.source))
    try:
        bindings.call(case, plan)
    except ValueError as error:
        if "cannot be part of a plan" not in str(error):
            raise
    return [step.op for step in plan.steps]


def out_of_memory(function: str, bindings: Any) -> str:
    """What becomes of a matrix that is not in memory."""
    names = [case.name for case in bindings.OF_MATRIX if case.function == function]
    if any(name in bindings.REWRITTEN for name in names):
        return "lazy"
    streamed = [name in bindings.STREAMED for name in names]
    return "refused" if not any(streamed) else "streamed" if all(streamed) else "in part"


def row(function: str, op: Any, dask: str | None, contract: Any) -> str:
    """One line of the table; `op` is None for a function that is no step, `dask` for one that reads no matrix."""
    formats = ["yes", "yes", "yes", dask] if dask else ["-"] * 4
    if op is None:
        return " | ".join([f"`{function}`", "-", *formats, "no", "-", "-", "-"])
    cases = [case for case in contract.CASES if type(case.op()) is type(op)]
    assert cases, f"{type(op).__name__} has no case in test_contract.py"
    differentiable = "yes" if any(case.differentiable for case in cases) else "no"
    # Once initialised: networks and changes that start at zero are None before.
    names = ", ".join(dict.fromkeys(f"`{name}`" for case in cases for name in case.learns)) or "none"
    rests = "while its input rests" if hasattr(type(op), "settled") else "no"
    by_cell = "yes" if hasattr(type(op), "by_cell") else "with neighbours" if hasattr(type(op), "reach") else rests
    return " | ".join([f"`{function}`", f"`{type(op).__name__}`", *formats, "yes", differentiable, names, by_cell])


def rows(cases: Iterable[Any], bindings: Any, contract: Any) -> list[str]:
    """The lines of the table for these cases of the binding tests."""
    found: dict[tuple[str, str], str] = {}
    for case in cases:
        parameters = inspect.signature(bindings.function_named(case.function)).parameters
        matrix = case.function in LAYERS or "layer" in parameters
        dask = out_of_memory(case.function, bindings) if matrix else None
        for op in operators(case, bindings) or [None]:
            found.setdefault((case.function, type(op).__name__), f"| {row(case.function, op, dask, contract)} |")
    return list(found.values())


def page(bindings: Any, contract: Any) -> str:
    """The text of the page, from the modules of the binding and the contract tests."""
    return HEADER + "\n".join(rows(bindings.CASES, bindings, contract)) + "\n" + FOOTER


if __name__ == "__main__":
    import bindings
    import test_contract

    PAGE.write_text(page(bindings, test_contract))
