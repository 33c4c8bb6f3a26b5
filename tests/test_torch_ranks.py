"""Ranks as processes that meet over gloo: equal to one device over several steps, and told when one of them ends."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from meshwright.api import plan_captured  # noqa: E402
from meshwright.backends.torch.lower import arrays_in, local_program  # noqa: E402
from meshwright.backends.torch.ranks import Ranks  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.cluster.cluster import Cluster  # noqa: E402
from meshwright.ir.errors import ProcessError  # noqa: E402
from meshwright.planner.request import Request  # noqa: E402

from .test_cli import QUICK, run  # noqa: E402, F401
from .test_torch_local import close, drawn, in_f32, tensors_of  # noqa: E402
from .torch_ranks import meetings  # noqa: E402


@contextmanager
def ranks_of(name: str, **words: Any) -> Iterator[tuple[Any, Any, Ranks]]:
    captured = in_f32(name)
    plan = plan_captured(captured, Cluster.parse("4xcpu"), Request(loss="plain", **words), name)
    program = local_program(plan, captured.graph)
    arrays = {v: np.asarray(x) for v, x in captured.binding.arrays.items()}
    with Ranks(program, arrays_in(program, captured.graph, arrays), captured.graph.state) as ranks:
        yield captured, plan, ranks


@pytest.mark.parametrize(
    "words",
    [{"mesh": (4,), "microbatches": 2}, {"mesh": (2, 2), "attention": "fused", "memory": 3e6}],
)
def test_three_steps_give_what_one_device_gives(words: dict[str, Any]):
    with ranks_of("gpt-tiny", **words) as (captured, plan, ranks):
        graph, given = captured.graph, drawn(captured.graph, 2)
        ranks.give(dict(enumerate(given)))
        inputs = tensors_of(graph, given)
        constants = {v: torch.tensor(np.asarray(x)) for v, x in captured.binding.arrays.items()}
        for _ in range(3):
            assert ranks.step() > 0
            wanted = replay(graph, constants, inputs)
            for into, out in graph.state:
                inputs[into] = wanted[out]
        found = ranks.results(range(len(graph.outputs)))
        for output, x, y in zip(graph.output_names, found, wanted, strict=True):
            close(x, y.numpy(), output)
        executed, planned = Counter[Any](), Counter[Any]()
        every = ranks.met()
        for kind, axes, nbytes in every[0]:
            executed[kind, frozenset(axes)] += nbytes
        for each in plan.collectives:
            planned[each.kind, frozenset(each.axes)] += round(each.nbytes * each.count)
        assert executed and executed == planned
        program = local_program(plan, graph)
        assert not any(op.joint for op in program.walk())
        for met in every:
            assert Counter(met) == meetings(program)


def test_a_users_file_may_be_called_as_one_of_pythons(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "json.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with ranks_of("dlrm-tiny", mesh=(4,)) as (captured, _, ranks):
        ranks.give(dict(enumerate(drawn(captured.graph, 2))))
        assert ranks.step() > 0


def test_a_rank_that_dies_as_it_starts_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshwright.backends.torch.ranks._serve", os._exit)
    with pytest.raises(ProcessError, match="rank 0 ended"), ranks_of("gpt-tiny", mesh=(4,)):
        pass


def test_a_rank_that_is_killed_ends_all_with_the_reason():
    with ranks_of("gpt-tiny", mesh=(4,)) as (captured, _, ranks):
        ranks.give(dict(enumerate(drawn(captured.graph, 2))))
        os.kill(ranks._processes[2].pid, signal.SIGKILL)
        with pytest.raises(ProcessError, match=r"rank 2 ended by signal 9|rank . failed"):
            ranks.step()
        ranks._processes[0].join(10)
        assert not any(process.is_alive() for process in ranks._processes)


def test_a_rank_that_is_stopped_is_named_at_the_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MESHWRIGHT_DEADLINE", "20")
    with ranks_of("dlrm-tiny", mesh=(4,)) as (captured, _, ranks):
        ranks.give(dict(enumerate(drawn(captured.graph, 2))))
        ranks.deadline = 2.0
        os.kill(ranks._processes[1].pid, signal.SIGSTOP)
        with pytest.raises(ProcessError, match=r"rank .*1.* did not answer within 2 s"):
            ranks.step()


def test_the_command_line_trains_on_torch_as_on_one_device(run: Any):  # noqa: F811
    code, _, err = run(
        "plan",
        "--model",
        "gpt-tiny",
        "--layers",
        "1",
        "--cluster",
        "4xcpu",
        "--time-limit",
        "20",
        "-o",
        "p.json",
    )
    assert code == 0, err
    code, out, err = run(
        "run", "p.json", "--backend", "torch", "--verify", "--steps", "2", "--deadline", "300"
    )
    assert code == 0, err
    first, second = out.splitlines()
    assert first.endswith("equals the unsharded step") and second.startswith("step    2  loss ")


def test_what_torch_cannot_run_is_refused_by_name(run: Any):  # noqa: F811
    step = ("plan", "--model", "gpt-tiny", "--layers", "4")
    assert (
        run(*step, "--cluster", "8xcpu", "--pp", "2", "--time-limit", "20", "-o", "stages.json")[0]
        == 0
    )
    assert run(*step, "--cluster", "h100x8", *QUICK, "-o", "gpus.json")[0] == 0
    for words, code, told in (
        (("stages.json",), 5, "a pipeline as a single program cannot run on torch yet"),
        (("gpus.json",), 5, "--emulate"),
        (("gpus.json", "--coordinator", "127.0.0.1:9"), 2, "--coordinator goes with --backend xla"),
    ):
        found, _, err = run("run", *words, "--backend", "torch", "--steps", "1")
        assert found == code and told in err, err
