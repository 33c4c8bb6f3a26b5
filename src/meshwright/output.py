"""Results go to stdout, alone: what a user's file or a library prints while a command runs goes to stderr.

    with apart():          sys.stdout, and what C code takes for it, are stderr now
        say("a result")    on what stdout was

What the terminal cannot write is written as an escape: stdout may be ASCII alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from .ir.errors import UsageError

_streams: list[TextIO] = []


class ReaderGoneError(Exception):
    """Whoever read what is printed has closed the pipe."""


def say(text: str) -> None:
    """Print a result.

    Raises:
        ReaderGoneError: the pipe is closed.
        UsageError: there is no room for it.
    """
    with _told():
        print(text, file=_streams[-1] if _streams else sys.stdout)


def flush() -> None:
    """Bring to stdout what was printed; raises as `say`."""
    with _told():
        for stream in (*_streams, sys.stdout):
            if stream is not None:
                stream.flush()


@contextmanager
def apart() -> Iterator[None]:
    """While inside, only `say` reaches stdout."""
    before = sys.stdout
    stream, number = _own(before)
    _streams.append(stream)
    sys.stdout = sys.stderr
    try:
        yield
        flush()
    finally:
        _streams.pop()
        sys.stdout = before
        if number is not None:
            _give_back(stream, number)


def tolerant() -> None:
    """Let stdout and stderr escape what their encoding has no character for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or none of the system's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def silence() -> None:
    """Nothing more can be printed: what is left in buffers goes nowhere, at exit too."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGoneError from error
    except OSError as error:
        raise UsageError(
            f"results cannot be printed: {error.strerror or error}.", where="stdout", fix="room where stdout leads"
        ) from error  # fmt: skip


def _own(before: TextIO | None) -> tuple[TextIO, int | None]:
    """A stream of our own to where stdout leads, and its number; stdout itself where it is none of the system's."""
    if before is None:  # it was closed when Python started
        return open(os.devnull, "w"), None
    try:
        if before.fileno() != 1:
            return before, None
        before.flush()
        number = os.dup(1)
        os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):
        return before, None
    line_by_line = 1 if os.isatty(number) else -1
    stream = os.fdopen(
        number, "w", line_by_line, encoding=before.encoding, errors="backslashreplace"
    )
    return stream, number


def _give_back(stream: TextIO, number: int) -> None:
    os.dup2(number, 1)
    try:
        stream.close()
    except OSError:
        silence()
