"""jax as the runtime (`backends/runtime`) asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding

from ...ir.sharding import Sharding
from ..runtime.programs import Route, Transfer
from .devices import named_sharding, place, processes_of
from .handover import Handover


class JaxDevices:
    """The devices of all processes; asking for a process looks for them."""

    failure = jax.errors.JaxRuntimeError

    @property
    def process(self) -> int:
        return jax.process_index()

    @property
    def process_count(self) -> int:
        return jax.process_count()

    def wait(self, results: Any) -> None:
        jax.block_until_ready(results)

    def gather(self, array: np.ndarray) -> np.ndarray:
        return multihost_utils.process_allgather(array)  # type: ignore[return-value]

    def processes_of(self, mesh: DeviceMesh) -> set[int]:
        return processes_of(mesh)

    def place(
        self, leaves: Sequence[Any], mesh: DeviceMesh, layouts: Sequence[Sharding]
    ) -> Sequence[Any]:
        goals = [named_sharding(mesh, layout) for layout in layouts]
        if len(processes_of(mesh)) == 1:
            return jax.device_put(list(leaves), goals)
        return [place(leaf, goal) for leaf, goal in zip(leaves, goals, strict=True)]

    def lies_on(self, leaf: Any, mesh: DeviceMesh) -> bool:
        layout = leaf.sharding if isinstance(leaf, jax.Array) else None
        return isinstance(layout, NamedSharding) and layout.mesh == mesh

    def transfer(
        self, routes: Sequence[Route], sender: DeviceMesh, receiver: DeviceMesh
    ) -> Transfer:
        return Handover(routes, sender, receiver)

    def scalars(self, vector: Any) -> Sequence[Any]:
        return _scalars(vector)

    def is_ready(self, array: Any) -> bool:
        return array.is_ready()


_scalars = jax.jit(list)
