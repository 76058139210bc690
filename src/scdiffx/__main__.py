"""`python -m scdiffx`: the main job and the doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scdiffx import __version__

RUN = """\
Analyse single-cell counts: normalise, variable genes, PCA, neighbours, Leiden clusters, diffusion map and
pseudotime. Leaves result.h5ad, figures and summary.txt in a folder, and prints the summary.

X may hold raw counts (integers from 0 up), normalised values, their logarithms, or scaled values (some are
negative) if there is a .raw. What it holds is decided in this order: negative values mean scaled; integers mean
counts; uns["log1p"] means logarithms; equal totals of the cells mean normalised values; equal totals of
exp(value) - 1, or no value above 20, mean logarithms; anything else is taken for estimated counts. The summary
says what was found."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 problems found by the doctor, 2 input not usable."""
    options = vars(_parser().parse_args(argv))
    if options.pop("command") == "doctor":
        from scdiffx._doctor import doctor

        report = doctor()
        print(report)
        return 0 if report.ok else 1
    from scdiffx._run import InputError, Options, run

    try:
        summary = run(Options(**options))
    except InputError as error:
        print(f"scdiffx: error: {error}", file=sys.stderr)
        return 2
    if not options["quiet"]:
        print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scdiffx", description="Single-cell analysis in JAX.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, which devices JAX sees, and what is wrong")
    add = commands.add_parser(
        "run",
        help="analyse a file, or data that are installed along",
        description=RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_argument
    add("file", nargs="?", type=Path, metavar="FILE.h5ad", help="default: 700 blood cells that ship with scanpy")
    add("--out", type=Path, default=Path("scdiffx-out"), metavar="DIR", help="folder for results (%(default)s)")
    add("--layer", metavar="NAME", help="layer to analyse instead of X")
    add("--n-top-genes", type=_at_least(1), default=2000, metavar="N", help="number of variable genes (%(default)s)")
    add("--n-comps", type=_at_least(1), metavar="N", help="number of principal components (50, or what the data allow)")
    add(
        "--n-neighbors",
        type=_at_least(2),
        default=15,
        metavar="N",
        help="neighbours a cell, with itself (%(default)s)",
    )
    add("--resolution", type=float, default=1.0, metavar="R", help="higher: more clusters (%(default)s)")
    roots = commands.choices["run"].add_mutually_exclusive_group()
    roots.add_argument("--root", metavar="CELL", help="cell where pseudotime starts: a name, or an index from 0")
    roots.add_argument(
        "--root-group",
        metavar="KEY=VALUE",
        help="start at the cell of this group (a column of obs) that is nearest to the group's mean in the principal "
        'components. Without either: uns["iroot"], else an arbitrary extreme cell of the diffusion map',
    )
    add("--seed", type=int, default=0, metavar="N", help="of the neighbour search and of Leiden (%(default)s)")
    add("--no-figures", dest="figures", action="store_false", help="write no figures")
    add("--quiet", action="store_true", help="print nothing but errors; the summary is in summary.txt")
    return parser


def _at_least(smallest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is below {smallest}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
