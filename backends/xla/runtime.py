"""jax as the runtime (`backends/runtime`) asks for it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class JaxProcesses:
    """The processes of a run; asking for them looks for the devices of all."""

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
