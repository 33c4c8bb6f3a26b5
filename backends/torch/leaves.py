"""Names of a step's leaves in a checkpoint: those of torch's own state dicts.

parameters.h.0.weight              ("model", "h.0.weight"), and again under every path of a tied one
buffers.bn.running_mean            ("model", "bn.running_mean")
optimizer.h.0.weight.exp_avg       ("optimizer", "state", "h.0.weight", "exp_avg")
optimizer.step                     ("optimizer", "state", ..., "step") of every trained parameter
random.seed                        ("random", "seed")
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .capture import Captured
from .held import Name


def leaves_of(captured: Captured, model: nn.Module) -> dict[Name, int]:
    """Each leaf of a checkpoint, and the position of the input that it is.

    What `model.state_dict()` leaves out, as buffers that are not persistent, is there only if the step changes it.
    """
    graph = captured.graph
    kept, changed = set(model.state_dict()), {into for into, _ in graph.state}
    tied: dict[str, list[str]] = {}
    for path, first in captured.binding.tied.items():
        tied.setdefault(first, [first]).append(path)
    trained = [
        graph.input_names[into].removeprefix("parameters.")
        for into, _ in graph.state
        if graph.input_names[into].startswith("parameters.")
    ]
    found: dict[Name, int] = {}
    for position, name in enumerate(graph.input_names):
        kind, _, path = name.partition(".")
        if name in captured.binding.rates:
            continue  # a schedule's, not the step's
        if kind == "optimizer":
            found |= dict.fromkeys(_of_optimizer(path, trained), position)
        elif kind in ("parameters", "buffers"):
            paths = [each for each in tied.get(path, [path]) if each in kept]
            found |= {("model", each): position for each in paths}
            if not paths and position in changed:
                found[kind, path] = position
        elif kind == "random":
            found[kind, path] = position
    return found


def _of_optimizer(path: str, trained: list[str]) -> Iterator[Name]:
    parameter, _, key = path.rpartition(".")
    for each in [parameter] if parameter else trained:
        yield "optimizer", "state", each, key
