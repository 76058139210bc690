"""What is installed, where it runs, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scdiffx._core.runtime import cache_folder

__all__ = ["Report", "doctor"]

_SHOWN = (
    "jax",
    "jaxlib",
    "anndata",
    "scanpy",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "flax",
    "optax",
    "ott-jax",
    "igraph",
    "pynndescent",
)
# Packages through which JAX reaches a device; of no use where it then sees none.
_PLUGIN = re.compile(r"(jax-.*-plugin|libtpu)$")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)(?:;(.*))?$")
_CLAUSE = re.compile(r"(>=|<=|==|!=|~=|<|>)\s*([^,\s]+)")
_ACCELERATORS = {"NVIDIA": ("/proc/driver/nvidia/version", "cuda13"), "AMD": ("/dev/kfd", "rocm")}


@dataclass(repr=False)
class Report:
    """What `doctor` found.

    Attributes
    ----------
    versions
        Version by package; None for one that is not installed.
    system
        Devices, precision, cores and the cache of compiled programs.
    problems
        What is wrong, each with its remedy.
    notes
        What may be worth knowing, and is not wrong.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        rows = {**{name: version or "not installed" for name, version in self.versions.items()}, **self.system}
        lines = [f"{name:<18} {value}" for name, value in rows.items()]
        lines += ["", *(f"Note: {note}" for note in self.notes)] if self.notes else []
        lines.append("")
        for problem, remedy in self.problems:
            lines += [f"PROBLEM: {problem}", f"  remedy: {remedy}"]
        return "\n".join(lines if self.problems else [*lines, "No problems found."])

    __repr__ = __str__


def doctor() -> Report:
    """Report what is installed, which devices JAX sees, where compiled programs are kept, and what is wrong.

    Returns
    -------
    Report
        Printed, it is the report; `ok`, `problems` (pairs of problem and remedy), `notes`, `versions` and `system` are
        its parts.

    Examples
    --------
    >>> import scdiffx as sd
    >>> report = sd.doctor()
    >>> "jax" in report.versions, all(len(problem) == 2 for problem in report.problems)
    (True, True)
    """
    from scdiffx import __version__

    own = {"python": platform.python_version(), "scdiffx": __version__}
    report = Report({**own, **{name: version_of(name) for name in _SHOWN}})
    _check_requirements(report)
    _check_pynndescent(report)
    _check_devices(report)
    report.system["cores"] = _cores()
    _check_cache(report)
    return report


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements_of(name: str) -> list[str]:
    """What a package requires: of its metadata, or of the source tree's for this one when it is not installed."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        if name != "scdiffx" or not project.exists():
            return []
        return list(tomllib.loads(project.read_text())["project"]["dependencies"])


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a release: enough to compare, as the bounds here name no pre-releases."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version meets bounds such as ">=0.10,<0.12" or "==0.0.50.*"."""
    return all(_meets(_release(version), operator, bound) for operator, bound in _CLAUSE.findall(bounds))


def _meets(have: tuple[int, ...], operator: str, bound: str) -> bool:
    want = _release(bound)
    if operator == "~=":
        return _meets(have, ">=", bound) and have[: len(want) - 1] == want[:-1]
    if operator in ("==", "!=") and bound.endswith(".*"):
        return (have[: len(want)] == want) == (operator == "==")
    length = max(len(have), len(want))
    a, b = (v + (0,) * (length - len(v)) for v in (have, want))
    return {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}[operator]


def _unmet(package: str, *, extras: bool) -> Iterator[tuple[str, str, str | None]]:
    """Requirements not met, as name, bounds and version found: its own, or what is installed of its extras."""
    found = set()
    for requirement in requirements_of(package):
        match = _REQUIREMENT.match(requirement)
        if match is None or bool(match[3]) != extras:
            continue
        name, bounds, version = match[1], match[2].strip(), version_of(match[1])
        if (version is None and not extras) or (version is not None and not satisfies(version, bounds)):
            found.add((name, bounds, version))
    yield from sorted(found, key=lambda item: item[:2])


def _check_requirements(report: Report) -> None:
    if version_of("scdiffx") is None:
        report.notes.append("scdiffx runs from its source tree and is not installed")
    for name, bounds, version in _unmet("scdiffx", extras=False):
        what = "is not installed" if version is None else f"{version} does not meet {bounds}"
        report.problems.append((f"{name} {what}, which scdiffx needs", f"pip install '{name}{bounds}'"))
    # JAX's parts are built for each other; its own metadata says which versions fit, for the plug-ins as extras.
    parts = [item for item in _unmet("jax", extras=False) if item[0] == "jaxlib"]
    parts += [item for item in _unmet("jax", extras=True) if _PLUGIN.match(item[0])]
    for name, bounds, version in parts:
        jax = version_of("jax")
        what = "is not installed" if version is None else f"{version} does not fit"
        problem = f"{name} {what}: jax {jax} needs {bounds}"
        report.problems.append((problem, f"pip install 'jax=={jax}' '{name}{bounds}'"))


def _check_pynndescent(report: Report) -> None:
    scanpy, search = version_of("scanpy"), version_of("pynndescent")
    if scanpy and search and satisfies(scanpy, ">=1.12") and satisfies(search, ">=0.7"):
        report.notes.append(
            f"scanpy {scanpy} with pynndescent {search}: scanpy's own `sc.pp.neighbors` fails above about 8,000 cells; "
            "`sd.pp.neighbors` works (to mend scanpy's: pip install 'pynndescent<0.7')"
        )


def plugins() -> list[str]:
    """The installed packages through which JAX reaches a device."""
    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return sorted(name for name in names if _PLUGIN.match(name))


def chosen_platforms() -> str | None:
    """The platforms that the user restricted JAX to, if any."""
    import jax

    return jax.config.jax_platforms or None


def _check_devices(report: Report) -> None:
    import jax

    report.system["64-bit floats"] = "on by default" if jax.config.jax_enable_x64 else "off by default (used in scopes)"
    try:
        devices = jax.devices()
    except RuntimeError as error:
        report.system["devices"] = "none"
        remedy = "unset JAX_PLATFORMS, or install JAX for the platform it names"
        report.problems.append((f"JAX finds no device: {error}", remedy))
        return
    report.system["devices"] = ", ".join(f"{d.platform}:{d.id} ({d.device_kind})" for d in devices)
    if any(d.platform != "cpu" for d in devices):
        return
    names, chosen = ", ".join(plugins()), chosen_platforms()
    if names and chosen:
        report.notes.append(f"{names} is installed, but JAX_PLATFORMS={chosen} keeps JAX off it")
    elif names:
        problem = f"{names} is installed, but JAX sees no device besides the CPU"
        remedy = "check the driver (`nvidia-smi`, `rocminfo`) and that the plug-in fits it, or set JAX_PLATFORMS=cpu"
        report.problems.append((problem, remedy))
    else:
        for maker, (path, extra) in _ACCELERATORS.items():
            if Path(path).exists():
                report.notes.append(f"there is a driver for {maker} GPUs: `pip install 'scdiffx[{extra}]'` to use one")


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "XLA_FLAGS") if os.environ.get(name)]
    return ", ".join([f"{usable} usable of {os.cpu_count()}", *limits])


def cache_in_use() -> str | Path | None:
    """The folder that JAX already writes to, else the one it will be given."""
    import jax

    return jax.config.jax_compilation_cache_dir or cache_folder()


def _check_cache(report: Report) -> None:
    folder = cache_in_use()
    if folder is None:
        report.system["compiled programs"] = "not kept (SCDIFFX_CACHE is empty)"
        return
    if "://" in str(folder):
        report.system["compiled programs"] = f"{folder} (remote, not checked)"
        return
    folder = Path(folder)
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files) / 2**20
    writable = _writable(folder)
    report.system["compiled programs"] = f"{folder} ({size:.1f} MiB, {'' if writable else 'not '}writable)"
    if not writable:
        problem = f"the folder for compiled programs, {folder}, cannot be written: every session compiles anew"
        remedy = "set SCDIFFX_CACHE to a folder you can write to, or to nothing to keep no programs"
        report.problems.append((problem, remedy))


def _writable(folder: Path) -> bool:
    """Whether files can be made in the folder, or in the nearest one above it that exists. Leaves nothing behind."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
