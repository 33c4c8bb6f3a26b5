"""What the runtime asks of a framework: its processes, its devices, and waiting for them.

Arrays, devices and programs are the framework's own objects, which the runtime only hands on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...ir.sharding import Sharding
from .programs import Route, Transfer


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


class Devices(Processes, Protocol):
    """The devices of a run, seen from one process. A mesh is some of them as a grid, of the framework's own kind."""

    def processes_of(self, mesh: Any) -> set[int]:
        """Whose the devices of a mesh are."""
        ...

    def place(self, leaves: Sequence[Any], mesh: Any, layouts: Sequence[Sharding]) -> Sequence[Any]:
        """Arrays of the host, which each process has, or of devices, laid out on a mesh of this process."""
        ...

    def lies_on(self, leaf: Any, mesh: Any) -> bool:
        """Whether a leaf is an array on just this mesh."""
        ...

    def transfer(self, routes: Sequence[Route], sender: Any, receiver: Any) -> Transfer:
        """How arrays get from the devices of one mesh to those of another."""
        ...

    def scalars(self, vector: Any) -> Sequence[Any]:
        """The elements of a vector, on the same devices."""
        ...

    def is_ready(self, array: Any) -> bool:
        """Whether an array is computed by now."""
        ...
