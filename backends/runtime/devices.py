"""What the runtime asks of a framework: its processes, its devices, and waiting for them.

Arrays, devices and programs are the framework's own objects, which the runtime only hands on.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Member(Protocol):
    """One process of a run."""

    @property
    def process(self) -> int:
        """Its number, from 0."""
        ...

    @property
    def process_count(self) -> int: ...


class KeyValueStore(Member, Protocol):
    """Texts that the processes of a run leave for each other; asking it looks for no devices.

    A wait without success raises TimeoutError; where the store cannot be reached, ConnectionError.
    """

    def put(self, key: str, text: str) -> None: ...

    def get(self, key: str, seconds: float) -> str:
        """The text, as soon as a process has put it."""
        ...


class Processes(Member, Protocol):
    """The processes of a run, seen from one of them."""

    @property
    def failure(self) -> type[Exception]:
        """What a program or a wait raises when it fails, as where another process has ended."""
        ...

    def wait(self, results: Any) -> None:
        """Block until arrays, in containers or not, are computed."""
        ...

    def gather(self, array: np.ndarray) -> np.ndarray:
        """What each process gives, in their order; all call it."""
        ...
