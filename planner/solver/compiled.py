"""Functions compiled once per machine and signature, with a cache that several processes may fill at once.

numba numbers what it keeps of a function by signature: it reads an index, takes the next number, writes both.
Two processes that do so together give one number to two signatures, and whoever loads it later runs
code for other types. One lock per function keeps readers and writers apart.

numba also reads what it kept before it asks whether the source has changed since, and fails where a type in it is
gone: what is kept is dropped then, as where a file is damaged.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
from filelock import FileLock

caching: Any = import_module("numba.core.caching")  # which has no types


class SharedCache(caching.FunctionCache):
    """numba's cache of one function; one process at a time reads or writes it."""

    def _lock(self) -> FileLock:
        self._impl.locator.ensure_cache_path()
        return FileLock(Path(self.cache_path) / f"{self._impl.filename_base}.lock")

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with self._lock():
            try:
                return caching.FunctionCache.load_overload(self, sig, target_context)
            except (
                Exception
            ):  # whatever reading a damaged file, or one with types of other names, may raise
                self.flush()
                return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with self._lock():
            caching.FunctionCache.save_overload(self, sig, data)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the types it is called with; the interpreter's lock is not held while it runs."""
    dispatcher: Any = numba.njit(nogil=True)(function)
    dispatcher._cache = SharedCache(function)
    return dispatcher
