"""Messages in scanpy's style, through scanpy's logger where scanpy is loaded, and the package's settings."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

__all__ = ["Timer", "progress_bar", "say", "settings", "warn"]

INFO = 2
HINT = 3


def _scanpy_settings() -> Any:
    scanpy = sys.modules.get("scanpy")
    return getattr(scanpy, "settings", None)


@dataclass
class Settings:
    """What holds for all functions, as ``sd.settings``.

    `verbosity`: 0 errors, 1 warnings, 2 what is computed, 3 and which keys were added. Follows
    ``scanpy.settings.verbosity`` while scanpy is loaded, unless set here.

    `deterministic`: whether Leiden reads the weights of the graph rounded to 2^-12 of the largest, so that what other
    processors and accelerators make of their last digits seldom changes a partition. Off by default: the partition
    is then igraph's on the weights as they are.
    """

    own_verbosity: int | None = None
    own_deterministic: bool = False

    @property
    def verbosity(self) -> int:
        if self.own_verbosity is not None:
            return self.own_verbosity
        theirs = getattr(_scanpy_settings(), "verbosity", 1)
        return int(getattr(theirs, "value", theirs))

    @verbosity.setter
    def verbosity(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or not 0 <= value <= 4):
            raise ValueError(f"verbosity={value!r} must be an integer from 0 to 4, or None to follow scanpy")
        self.own_verbosity = value

    @property
    def deterministic(self) -> bool:
        return self.own_deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"deterministic={value!r} must be True or False")
        self.own_deterministic = value


settings = Settings()


class Timer:
    """Says what starts, and how long it took when it is done."""

    def __init__(self, message: str) -> None:
        self.start = time.perf_counter()
        if settings.verbosity >= INFO:
            print(message, file=sys.stderr)

    def done(self, added: str = "") -> None:
        if settings.verbosity < INFO:
            return
        seconds = int(time.perf_counter() - self.start)
        clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        detail = f": added {added}" if added and settings.verbosity >= HINT else ""
        print(f"    finished{detail} ({clock})", file=sys.stderr)


def say(message: str) -> None:
    """Print beside progress bars."""
    print(message, file=sys.stderr)


def warn(message: str) -> None:
    """A UserWarning that points at the line that called the package, however deep inside it arises."""
    level = 1
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "scdiffx":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def progress_bar(total: int, description: str, shown: bool) -> Any:
    """A tqdm bar, silent when not `shown`."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, disable=not shown)
