"""Train on some ranks, save, go on with others; in a process of its own, as `python -m tests.torch_resume`:

    MODEL FOLDER 4:{"mesh":(2,2)} 2:{"pp":2}        phases of two steps each: how many ranks, what to request

Ranks are forked from a process that has imported and captured all, so that they start at once. All losses, and at the
end parameters and optimizer state as plain torch loads them, are those of one process that was never interrupted.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

import meshwright as mw
from meshwright.backends.torch.capture import capture

from .torch_models import OPTIMIZERS, SUBJECTS

STEPS = 2


def forked(count: int, store: Path, work: Callable[[int], None]) -> None:
    """Run work on some ranks of a process group; all must succeed."""

    def one(rank: int) -> int:
        try:
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=count)
            work(rank)
            dist.barrier()
            return 0
        except BaseException:
            traceback.print_exc()
            return 1

    children = []
    for rank in range(count):
        if not (child := os.fork()):
            code = one(rank)
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes


def close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    assert torch.allclose(a.float(), b.float(), rtol=2e-3, atol=2e-4), (what, (a - b).abs().max())


def main(name: str, folder: Path, phases: list[tuple[int, dict[str, Any]]]) -> None:
    subject, make = SUBJECTS[name], OPTIMIZERS["adamw"]
    torch.manual_seed(0)
    model = subject.make()
    batches = [subject.batch(8) for _ in range(STEPS * len(phases))]
    alone = copy.deepcopy(model)
    twin = make(alone.parameters())
    wanted = []
    for batch in batches:
        twin.zero_grad()
        loss = subject.loss(alone, batch)
        loss.backward()
        twin.step()
        wanted.append(loss.item())

    captured = capture(model, subject.loss, make(model.parameters()), batches[0])
    for number, (count, words) in enumerate(phases):
        resumed = folder / str(number) if number else None

        def work(
            rank: int, words: Any = words, number: int = number, resumed: Any = resumed
        ) -> None:
            if resumed:
                torch.manual_seed(number)
                model.load_state_dict(subject.make().state_dict())  # what is loaded is not here yet
            given = batches[STEPS * number : STEPS * (number + 1)]
            optimizer, request = make(model.parameters()), mw.Request(**words)
            with patch("meshwright.torch.capture", lambda *_: captured):
                step = mw.torch.parallelize(
                    model, subject.loss, optimizer, given[0], request=request
                )
            if resumed:
                step.load(resumed)
            for batch, loss in zip(given, wanted[STEPS * number :], strict=False):
                found = step(batch)
                assert abs(found - loss) <= 2e-4 * abs(loss), (number, found, loss)
            step.save(folder / str(number + 1))
            if rank == 0:
                print(step.plan.device_count, step.plan.mesh, step.plan.pipeline is not None)

        forked(count, folder / f"store{number}", work)

    dcp_to_torch_save(str(folder / str(len(phases))), str(folder / "plain.pt"))
    plain = torch.load(folder / "plain.pt")
    fresh = subject.make()
    optimizer = make(fresh.parameters())
    fresh.load_state_dict(plain["model"])
    groups = [
        {**optimizer.param_groups[0], "params": [path for path, _ in fresh.named_parameters()]}
    ]
    set_optimizer_state_dict(fresh, optimizer, {**plain["optimizer"], "param_groups": groups})
    for (path, a), b in zip(fresh.named_parameters(), alone.parameters(), strict=True):
        close(a, b, path)
        held, kept = optimizer.state[a], twin.state[b]
        assert held.keys() == kept.keys()
        for key in held:
            close(held[key], kept[key], f"{path}.{key}")
    for (path, a), b in zip(fresh.named_buffers(), alone.buffers(), strict=True):
        close(a, b, path)


if __name__ == "__main__":
    split = [phase.partition(":") for phase in sys.argv[3:]]
    main(sys.argv[1], Path(sys.argv[2]), [(int(n), eval(words or "{}")) for n, _, words in split])
