"""Ctrl-C that Python drops inside a callback of the garbage collector, delivered again.

jax collects garbage through such a callback. An exception there cannot be raised to anyone:
Python reports it as "ignored" and goes on; while a step is traced that meets one Ctrl-C in four.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

AGAIN = 0.02  # seconds, by which the callback is over


@contextmanager
def heard() -> Iterator[None]:
    """While inside, a KeyboardInterrupt that was ignored is raised again a moment later."""
    before = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            Timer(AGAIN, _interrupt).start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
