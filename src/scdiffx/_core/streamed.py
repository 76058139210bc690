"""A cells x genes matrix that is never in memory as a whole: rows are read in order, some thousand at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scdiffx._core.packed import BLOCK_ROWS, Matrix, Packer

__all__ = ["PIECE_ROWS", "Streamed"]

# Rows that are worked on at once: enough to keep a processor busy, little beside what memory holds.
PIECE_ROWS = 8192
C = TypeVar("C")


class Streamed:
    """Rows that come from a file or a graph of tasks, and what is done to them as they pass.

    ``read()`` yields them in order as CSR or dense blocks of at most `longest` rows, as they are stored. ``change``
    makes of a piece on the device, and of the ``by_row`` values (cells,) of its rows, what the matrix is there; None
    where it is as stored. Every pass compiles what it does once, as all pieces are padded to one shape.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: Any,
        longest: int,
        read: Callable[[], Iterator[Any]],
        change: Callable[..., Matrix] | None = None,
        by_row: tuple[np.ndarray, ...] = (),
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.longest = longest
        self.read = read
        self.change = change
        self.by_row = by_row
        # The sums of the rows, once they are known: reading everything again costs more than keeping them.
        self.totals: Any = None

    def changed(self, f: Callable[..., Any], *by_row: Any, genes: int | None = None) -> Any:
        """The matrix after ``f(piece, *by_row)``, which takes each row by itself; `genes` is how many f leaves."""
        before, k = self.change, len(self.by_row)

        def change(piece: Matrix, *values: Array) -> Matrix:
            return f(piece if before is None else before(piece, *values[:k]), *values[k:])

        shape = (self.shape[0], self.shape[1] if genes is None else genes)
        values = (*self.by_row, *(np.asarray(v) for v in by_row))
        return Streamed(shape, self.dtype, self.longest, self.read, change, values)

    def astype(self, dtype: Any) -> Streamed:
        """The matrix in another precision."""
        return Streamed(self.shape, dtype, self.longest, self.read, self.change, self.by_row)

    @property
    def rows(self) -> int:
        """How many rows every piece has, once padded."""
        even = -(-self.longest // -(-self.longest // PIECE_ROWS))
        return even if even <= BLOCK_ROWS else -(-even // BLOCK_ROWS) * BLOCK_ROWS

    def stored(self) -> Iterator[tuple[slice, Any]]:
        """The rows as they are stored, at most `rows` at a time, and which they are."""
        start = 0
        for block in self.read():
            for low in range(0, block.shape[0], self.rows):
                piece = block[low : low + self.rows]
                yield slice(start, start + piece.shape[0]), piece
                start += piece.shape[0]

    def _pieces(self) -> Iterator[tuple[slice, Matrix, list[np.ndarray]]]:
        pack = Packer(self.rows, self.dtype)
        for at, piece in self.stored():
            short = self.rows - piece.shape[0]
            yield at, pack(piece), [np.pad(v[at], (0, short)) for v in self.by_row]

    def _made(self, piece: Matrix, values: list[Array]) -> Matrix:
        return piece if self.change is None else self.change(piece, *values)

    def fold(self, f: Callable[[C, Matrix, Any], C], carry: C) -> C:
        """``carry = f(carry, piece, n)`` over the pieces, of whose rows the first `n` are not pads."""
        run = jax.jit(lambda carry, piece, values, n: f(carry, self._made(piece, values), n))
        for at, piece, values in self._pieces():
            # The device works while the host reads on, but the host is never more than a piece ahead.
            carry = run(jax.block_until_ready(carry), piece, values, at.stop - at.start)
        return carry

    def each(self, f: Callable[[Matrix], Array]) -> Iterator[tuple[slice, np.ndarray]]:
        """`f` of every piece, pad rows included, and which rows the piece has; the host reads a piece ahead."""
        run = jax.jit(lambda piece, values: f(self._made(piece, values)))
        before: tuple[slice, Array] | None = None
        for at, piece, values in self._pieces():
            following = (at, run(piece, values))
            if before is not None:
                yield before[0], np.asarray(before[1])
            before = following
        if before is not None:
            yield before[0], np.asarray(before[1])

    def by_rows(self, f: Callable[[Matrix], Array]) -> Array:
        """`f` of every piece, (rows, ...), as one array (cells, ...)."""
        out: Any = None
        for at, part in self.each(f):
            out = np.empty((self.shape[0], *part.shape[1:]), part.dtype) if out is None else out
            out[at] = part[: at.stop - at.start]
        return jnp.asarray(out)
