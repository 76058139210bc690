"""All public functions beside what a user would call instead: time, memory and quality, and two commits compared.

    python benchmarks/run.py --cells 3000 20000 --json out.json [--only pca neighbors] [--core] [--markdown out.md]
    python benchmarks/run.py --compare before.json after.json
    python benchmarks/run.py --show out.json more.json [--sections]

The functions, their input and their peers stand in `cases.py`. Every measurement has a process of its own: it reads the
input, imports what it measures, and calls it twice, each time with a fresh copy, "first" and "warm". A first call finds
no compiled program (neither JAX's nor numba's), a warm one those of the first. Seconds are processor seconds of all
threads, and of the clock; memory is the peak above what the process held before the first call. By default a process
has one core (--cores), without which threads that wait for each other are counted as work. Peers that are not installed
are called so; `--python cellrank=/path/to/python` measures a peer in another environment.

--compare exits with 1 where something became slower, larger or worse by more than --tolerance. --show puts results
together, the latest of each function, number of cells and peer, and names below what is slower than its peer; with
--sections it writes the tables of `docs/benchmarks.md`, one for each number of cells.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pickle
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from cases import CORE, Case, Side, chosen

HERE = Path(__file__).resolve().parent
TIMES = ("cpu_first", "cpu_warm", "wall_first", "wall_warm")
# What differences in --compare have to exceed besides the tolerance to be named.
SMALLEST = {**dict.fromkeys(TIMES, 0.1), "peak_mib": 20.0}
HEADER = {
    "function": "function", "cells": "cells", "peer": "peer", "cpu_first": "first call, CPU s",
    "cpu_warm": "warm call, CPU s", "ratio": "peer / ours", "wall_warm": "warm call, s", "peak_mib": "peak MiB",
    "quality": "quality",
}  # fmt: skip
# A warm call is called slower above this ratio and this many seconds more: less cannot be told from noise.
SLOWER, MORE = 1.2, 0.03
# Scores of which less is better; differences and correlations with a peer are reported, not judged.
LESS = {"inertia", "error left", "error of shares", "error in spots"}


def sides(case: Case) -> list[Side]:
    return [Side("scdiffx", ("scdiffx.pp", "scdiffx.tl"), case.ours, case.most), *case.peers]


# The measured process.


def seconds() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def child(name: str, place: int, source: str, target: str, cores: int, limit: int = 900) -> None:
    """Measure one side on so many cores, and leave figures and what it found in a file."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    if hasattr(os, "sched_setaffinity"):
        have = sorted(os.sched_getaffinity(0))
        # Not always the same ones, so that several runs at once, or of several users, do not wait for each other.
        start = os.getpid() % len(have)
        os.sched_setaffinity(0, (have + have)[start : start + min(cores, len(have))])
    warnings.simplefilter("ignore")
    side = sides(next(case for case in chosen(None) if case.name == name))[place]
    Path(target).write_bytes(pickle.dumps(measure(side, source)))


def measure(side: Side, source: str) -> dict[str, Any]:
    """Call one side twice, in this process."""
    try:
        for module in side.modules:
            importlib.import_module(module)
    except ImportError as error:
        return {"status": "not installed", "why": str(error)}
    if side.package in ("scdiffx", "ott-jax"):
        import jax

        jax.devices()
    import anndata
    from neighbors import peak_mib, reset_peak

    adata = anndata.read_h5ad(source)
    copies = {"first": adata.copy(), "warm": adata.copy()}
    reset_peak()
    before = peak_mib()
    row: dict[str, Any] = {"status": "ok", "version": version(side.package)}
    row |= {"n_obs": adata.n_obs, "n_vars": adata.n_vars}
    for call, data in copies.items():
        cpu, wall = seconds(), time.perf_counter()
        row["found"] = side.call(data)
        row[f"cpu_{call}"], row[f"wall_{call}"] = seconds() - cpu, time.perf_counter() - wall
    return {**row, "peak_mib": peak_mib() - before}


def measured(case: Case, place: int, cells: int, source: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own."""
    side = sides(case)[place]
    if cells > side.most:
        return {"status": f"not run above {side.most} cells"}
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/found.pickle"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(args.cores))
        # A folder that JAX were told of would hold programs of earlier runs.
        programs = args.programs or folder
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{programs}/jax", "NUMBA_CACHE_DIR": f"{programs}/numba"}
        python = args.python.get(side.package, sys.executable)
        call = f"import run; run.child({case.name!r}, {place}, {str(source)!r}, {target!r}, {args.cores}, {args.limit})"
        done = subprocess.run(
            [python, "-c", call], env={**os.environ, **threads, **caches, "PYTHONPATH": str(HERE)},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == -signal.SIGXCPU:
            return {"status": f"more than {args.limit} CPU s"}
        if done.returncode or not Path(target).exists():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            return {"status": "failed", "why": last[0][:300] if last else f"exit status {done.returncode}"}
        return pickle.loads(Path(target).read_bytes())


# The process that asks for it.


def one_case(case: Case, cells: int, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each side."""
    import anndata
    from inputs import prepared

    source = prepared(case.input, cells, folder, args.data)
    rows, own = [], None
    for place, side in enumerate(sides(case)):
        row = measured(case, place, cells, source, args)
        found = row.pop("found", None)
        row = {"function": case.name, "cells": cells, "tool": side.package, "version": None, **row}
        if found is not None:
            adata = anndata.read_h5ad(source)
            row["quality"] = case.score(adata, found)
            if place and own is not None:
                row["agreement"] = case.agree(own, found)
            own = found if place == 0 else own
        rows.append(row)
        print(f"# {described(row)}", file=sys.stderr, flush=True)
    return rows


def described(row: dict[str, Any]) -> str:
    start = f"{row['function']} {row['cells']} {row['tool']}: {row['status']}"
    if row["status"] != "ok":
        return f"{start} {row.get('why', '')}"
    return f"{start}, {row['cpu_first']:.2f} s, {row['cpu_warm']:.2f} s, {row['peak_mib']:.0f} MiB"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for. The file grows with each function: a run that is stopped leaves what it has."""
    from inputs import described as data_of

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    result: dict[str, Any] = {
        "commit": commit.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("jax", "numpy", "scipy", "numba", "anndata")},
        "settings": {"cells": args.cells, "cores": args.cores, "data": data_of(args.data), "kept": bool(args.programs)},
        "results": [],
    }
    cases = chosen(list(CORE) if args.core else args.only)
    with tempfile.TemporaryDirectory() as made:
        folder = args.inputs or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for cells in args.cells:
            for case in cases:
                if cells <= case.most:
                    result["results"] += one_case(case, cells, args, folder)
                    if args.json:
                        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


# Tables.


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def pair(mine: dict[str, Any], other: dict[str, Any] | None, key: str) -> str:
    """A figure of both sides; a side that has none shows a dash."""
    return " / ".join(number(row[key]) if key in row else "-" for row in (mine, other) if row is not None)


def judged(mine: dict[str, Any], other: dict[str, Any] | None) -> str:
    names = [*mine.get("quality", {})]
    parts = [f"{name} {pair(mine['quality'], (other or {}).get('quality'), name)}" for name in names]
    return "; ".join(parts + [f"{name} {number(value)}" for name, value in (other or {}).get("agreement", {}).items()])


def pairs(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Our row beside each peer's, or beside None."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["results"]:
        groups.setdefault((row["function"], row["cells"]), []).append(row)
    return [(mine, other) for mine, *others in groups.values() for other in others or [None]]


def ratio(mine: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """How many times the peer's warm call takes of ours, where both have one."""
    if other is None or "cpu_warm" not in mine or "cpu_warm" not in other:
        return None
    return other["cpu_warm"] / max(mine["cpu_warm"], 1e-9)


def table(result: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """Rows of a function and a peer, "ours / theirs"."""
    names = [name for name in HEADER if name not in without]
    lines = [f"| {' | '.join(HEADER[name] for name in names)} |", "|" + "---|" * len(names)]
    for mine, other in pairs(result):
        cell = {"cells": str(mine["cells"]), "peer": "none", "ratio": "-", "quality": judged(mine, other)}
        cell["function"] = f"`{mine['function']}`" + ("" if mine["status"] == "ok" else f": {mine['status']}")
        if other is not None:
            cell["peer"] = f"{other['tool']} {other['version'] or ''}".strip()
            if other["status"] != "ok":
                cell["peer"] += f": {other['status']}"
        if (found := ratio(mine, other)) is not None:
            cell["ratio"] = number(found)
        cell |= {key: pair(mine, other, key) for key in ("cpu_first", "cpu_warm", "wall_warm", "peak_mib")}
        lines.append(f"| {' | '.join(cell[name] for name in names)} |")
    return "\n".join(lines)


def slower(result: dict[str, Any]) -> str:
    """What is slower than its peer in warm calls, worst first."""
    found = []
    for mine, other in pairs(result):
        if other is not None and ratio(mine, other) is not None:
            ours, theirs = mine["cpu_warm"], other["cpu_warm"]
            if ours > SLOWER * theirs and ours - theirs > MORE:
                found.append(
                    (
                        theirs / ours,
                        f"{mine['function']} {mine['cells']}: {number(ours / theirs)} times {other['tool']}",
                    )
                )
    return "\n".join(["slower than the peer, warm:", *(line for _, line in sorted(found))]) if found else ""


def means(result: dict[str, Any]) -> str:
    """The geometric mean of peer / ours in warm calls, for each number of cells."""
    ratios: dict[int, list[float]] = {}
    for mine, other in pairs(result):
        if (found := ratio(mine, other)) is not None:
            ratios.setdefault(mine["cells"], []).append(found)
    lines = [
        f"{cells:,} cells: peer / ours {number(statistics.geometric_mean(all_))} in the geometric mean of {len(all_)}"
        for cells, all_ in sorted(ratios.items())
    ]
    return "\n".join(lines)


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several runs, the later ones in place of the same of earlier ones."""
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        for key in {(row["function"], row["cells"]) for row in result["results"]}:
            rows = [row for row in result["results"] if (row["function"], row["cells"]) == key]
            groups[key] = {"rows": rows, **{k: result.get(k) for k in ("commit", "date", "machine", "versions")}}
    order = {case.name: place for place, case in enumerate(chosen(None))}
    ordered = sorted(groups, key=lambda key: (key[1], order.get(key[0], len(order))))
    made = {k: sorted({str(group[k]) for group in groups.values()}) for k in ("commit", "date", "machine", "versions")}
    return {**made, "results": [row for key in ordered for row in groups[key]["rows"]]}


def sections(result: dict[str, Any]) -> str:
    """A table for each number of cells, without seconds of the clock."""
    parts = []
    for cells in sorted({row["cells"] for row in result["results"]}):
        rows = [row for row in result["results"] if row["cells"] == cells]
        parts.append(f"## {cells:,} cells\n\n" + table({"results": rows}, ("cells", "wall_warm")))
    return "\n\n".join(parts)


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> tuple[str, bool]:
    """What differs between two results of scdiffx by more than the tolerance, and whether something is worse."""

    def own(result: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
        return {(row["function"], row["cells"]): row for row in result["results"] if row["tool"] == "scdiffx"}

    old, new = own(before), own(after)
    lines = [f"| function | cells | figure | {before['commit']} | {after['commit']} | |", "|---|---|---|---|---|---|"]
    worse = False
    for key in sorted({*old, *new}):
        start = f"| `{key[0]}` | {key[1]} |"
        a, b = old.get(key), new.get(key)
        if a is None or b is None:
            lines.append(f"{start} measured | {'yes' if a else 'no'} | {'yes' if b else 'no'} | |")
            continue
        if a["status"] != b["status"]:
            worse |= a["status"] == "ok"
            lines.append(f"{start} status | {a['status']} | {b['status']} | {'worse' if a['status'] == 'ok' else ''} |")
        for name, x, y, verdict in differences(a, b, tolerance):
            worse |= verdict == "worse"
            lines.append(f"{start} {name} | {number(x)} | {number(y)} | {verdict} |")
    return ("\n".join(lines) if len(lines) > 2 else "no difference"), worse


def differences(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> list[tuple[str, float, float, str]]:
    found = []
    for name, smallest in SMALLEST.items():
        x, y = a.get(name), b.get(name)
        if x is not None and y is not None and abs(y - x) > max(tolerance * x, smallest):
            # Seconds of the clock depend on who else uses the machine.
            found.append((name, x, y, "" if name.startswith("wall") else "worse" if y > x else "better"))
    for name in a.get("quality", {}).keys() & b.get("quality", {}).keys():
        x, y = a["quality"][name], b["quality"][name]
        if abs(y - x) > 0.05 * abs(x):
            found.append((name, x, y, "worse" if (y > x) == (name in LESS) else "better"))
    return sorted(found)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[3000])
    parser.add_argument("--only", nargs="+", help="functions, as pca or pp.pca")
    parser.add_argument("--core", action="store_true", help="the main workflow: " + ", ".join(CORE))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--show", type=Path, nargs="+", help="print the table of results that were written before")
    parser.add_argument("--sections", action="store_true", help="a table for each number of cells, for the pages")
    parser.add_argument("--tolerance", type=float, default=0.25, help="relative difference that --compare lets pass")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--limit", type=int, default=900, help="processor seconds that one measurement may take")
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=PYTHON")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument(
        "--programs", type=Path, help="folder that keeps compiled programs: no call is a first one then"
    )
    parser.add_argument("--inputs", type=Path, help="folder that keeps the prepared cells for the next run")
    args = parser.parse_args(given)
    args.python = dict(entry.split("=", 1) for entry in args.python)
    if args.compare:
        text, worse = compare(*(json.loads(path.read_text()) for path in args.compare), args.tolerance)
        print(text)
        return int(worse)
    if args.show:
        result = together([json.loads(path.read_text()) for path in args.show])
        print(*(f"# {key}: {', '.join(result[key])}" for key in ("commit", "date", "machine", "versions")), sep="\n")
    else:
        warnings.simplefilter("ignore")
        result = run(args)
    text = sections(result) if args.sections else table(result)
    print(text, slower(result), means(result), sep="\n\n")
    if args.markdown:
        args.markdown.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
