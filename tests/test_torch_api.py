"""`mw.torch.parallelize`: a model, its loss and its optimizer over the ranks of a run, as on one device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import meshwright as mw  # noqa: E402
from meshwright.ir.errors import LoweringError, MismatchError  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "pytorch.py"

SCRIPT = """
import copy, sys, warnings

import torch

import meshwright as mw
from tests.torch_models import SUBJECTS

case = SUBJECTS[sys.argv[1]]
torch.manual_seed(0)
model, batch = case.make(), case.batch(8)
alone = copy.deepcopy(model)
make = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-5)
optimizer, twin = make(model), make(alone)
clip = lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2)
scheduler, other = schedule(optimizer), schedule(twin)
step = mw.torch.parallelize(
    model, case.loss, optimizer, batch, request=mw.Request(**eval(sys.argv[2])), before_update=clip
)
warnings.simplefilter("error")
for _ in range(3):
    twin.zero_grad()
    wanted = case.loss(alone, batch)
    wanted.backward()
    clip(alone)
    twin.step()
    found = step(batch)
    scheduler.step()
    other.step()
    assert abs(found - wanted.item()) <= 2e-4 * abs(wanted.item()), (found, wanted.item())
step.write_back()
for (name, a), b in zip(model.named_parameters(), alone.parameters()):
    assert torch.allclose(a, b, rtol=2e-3, atol=2e-4), (name, (a - b).abs().max())
held, kept = optimizer.state_dict()["state"], twin.state_dict()["state"]
assert held.keys() == kept.keys()
for key in held:
    assert held[key].keys() == kept[key].keys()
    assert float(held[key]["step"]) == 3
    assert torch.allclose(held[key]["exp_avg"], kept[key]["exp_avg"], rtol=2e-3, atol=2e-4)
assert "jax" not in sys.modules
print("same", step.plan.mesh)
"""


def ranks(count: int, *command: str) -> list[str]:
    """What processes print that are ranks as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **shared, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=EXAMPLE.parents[1],
        )
        for rank in range(count)
    ]  # fmt: skip
    told = [process.communicate(timeout=400) for process in running]
    assert not any(process.returncode for process in running), [err[-2000:] for _, err in told]
    return [out for out, _ in told]


@pytest.mark.parametrize(
    ("count", "name", "words"),
    [
        pytest.param(2, "gpt", {"pp": 2, "microbatches": 4}, id="two stages"),
        *(
            pytest.param(4, name, words, id=words_, marks=pytest.mark.slow)
            for words_, name, words in (
                ("data parallel", "gpt", {"mesh": (4,), "microbatches": 2}),
                ("two axes", "llama", {"mesh": (2, 2), "attention": "fused"}),
                ("stages of two", "gpt", {"pp": 2, "microbatches": 4}),
            )
        ),
    ],
)
def test_ranks_train_as_one_process_and_give_the_model_back(
    count: int, name: str, words: dict[str, Any]
):
    told = ranks(count, "-c", SCRIPT, name, repr(words))
    assert all(out.startswith("same") for out in told)


def test_the_example_runs_under_torchruns_variables_and_alone():
    first, *others = ranks(2, str(EXAMPLE))
    assert "2 devices" in first and "proof" in first and not any(others)
    [alone] = ranks(1, str(EXAMPLE))
    assert first.splitlines()[-2:] == alone.splitlines()[-2:]


DRAWS = """
import os, torch
import meshwright as mw

torch.manual_seed(0)
model, batch = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)), torch.ones(8, 8)
torch.manual_seed(int(os.environ["RANK"]))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step = mw.torch.parallelize(model, lambda model, batch: model(batch).square().mean(), optimizer, batch)
print([f"{step(batch):.5f}" for _ in range(3)])
"""


def test_ranks_draw_by_the_seed_of_the_first():
    one, other = ranks(2, "-c", DRAWS)
    [alone] = ranks(1, "-c", DRAWS)
    assert one == other == alone
    assert len(set(eval(one))) == 3


def test_too_few_processes_and_other_batches_are_refused():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    with pytest.raises(LoweringError, match="the plan is for 4 devices, this run has 1 process"):
        mw.torch.parallelize(model, loss, optimizer, torch.ones(8, 4), cluster="4xcpu")
    step = mw.torch.parallelize(model, loss, optimizer, torch.ones(8, 4))
    before = step.state()
    assert torch.equal(before["parameters.weight"], model.weight)
    step.write_back()
    assert step(torch.ones(8, 4)) > 0
    assert not torch.equal(step.state()["parameters.weight"], before["parameters.weight"])
    before = step.state()
    for batch, told in (
        ([torch.ones(8, 4)], "the batch is"),
        (torch.ones(1, 4), r"`batch` is f32\[1, 4\], it was f32\[8, 4\]"),
        (torch.ones(8, 4, dtype=torch.float64), r"`batch` is f64"),
    ):
        with pytest.raises(MismatchError, match=told):
            step(batch)
    assert all(torch.equal(step.state()[name], tensor) for name, tensor in before.items())
