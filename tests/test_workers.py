"""Bounds that other processes work out: the same search, and none that hangs or is left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from meshwright import planning
from meshwright.api import plan_captured
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.cost.model import Roofline
from meshwright.planner.problem import Problem
from meshwright.planner.request import Request
from meshwright.planner.search import worker, workers
from meshwright.recipe import make

from .pipelines import pipelines_on

EIGHT = Cluster.parse("8xh100x1@ib100")


@pytest.fixture(scope="module")
def step():
    made = make({"model": "gpt-tiny", "batch": 16, "layers": 8})
    return made.capture(True)


def problem_of(step) -> Problem:
    return Problem(fold(step.graph), EIGHT, Request(pp="auto"), Roofline(EIGHT), "", "")


def gone(found: workers.Workers) -> bool:
    return any(process.poll() is not None for process in found.processes)


def planned(step, monkeypatch: pytest.MonkeyPatch, count: int, errors: Path):
    kept: list[workers.Workers] = []

    @contextmanager
    def worker_pool(cluster: Cluster, request: Request) -> Iterator[workers.Workers | None]:
        with errors.open("wb") as file:
            kept.extend([workers.Workers(count, file)] * bool(count))
        yield kept[0] if kept else None
        for each in kept:
            each.close()

    monkeypatch.setattr(planning, "worker_pool", worker_pool)
    told: list[str] = []
    request = Request(pp="auto", recompute="none", gap=0.001, time_limit=1e4)
    plan = plan_captured(step, EIGHT, request, "gpt-tiny", told.append)
    return plan, told, kept


def test_a_search_with_workers_makes_the_same_choices(step, monkeypatch, tmp_path):
    taken, errors = [], tmp_path / "errors"
    result, prefetch = workers.Workers.result, workers.Workers.prefetch
    monkeypatch.setattr(
        workers.Workers, "result", lambda self, key: taken.append(result(self, key)) or taken[-1]
    )

    def waiting(self: workers.Workers, keys) -> None:
        """What is asked for first is waited for, however slow the worker's start."""
        prefetch(self, keys)
        with self.change:
            if not any(found is not None for found in taken):
                self.change.wait_for(
                    lambda: not (self.wanted or self.doing) or gone(self), timeout=60
                )

    monkeypatch.setattr(workers.Workers, "prefetch", waiting)
    alone, told_alone, _ = planned(step, monkeypatch, 0, errors)
    assert not taken
    helped, told, kept = planned(step, monkeypatch, 1, errors)
    assert told == told_alone and helped.pipeline == alone.pipeline
    assert helped.proof.lower_bound == alone.proof.lower_bound
    assert any(found is not None for found in taken), errors.read_text()
    assert all(process.poll() is not None for process in kept[0].processes), "left behind"


def test_a_worker_starts_whatever_lies_beside_the_users_file(monkeypatch, tmp_path):
    """A file called as one of Python's modules is, where the user's own files are looked for."""
    (tmp_path / "json.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    process = workers._start(subprocess.PIPE)
    _, told = process.communicate(timeout=120)  # nothing to do: it ends
    assert process.returncode == 0, told.decode()


def test_bounds_of_a_worker_are_those_of_the_search(step):
    problem = problem_of(step)
    pipelines, folded = pipelines_on(problem), replace(problem.folded, whole=problem.folded.small)
    work_out = worker._worker(folded, EIGHT, problem.request, problem.cost, pipelines.choices.units)
    shapes = [shape for shape in pipelines.choices.families() if shape.stages in (2, 4)][::2]
    assert len(shapes) > 3
    for family in shapes:
        shape = replace(family, microbatches=4)
        for beat in (inf, 1.05 * pipelines.choices.floor(shape)):
            assert work_out((shape, beat)) == pipelines.bounds.relaxed(shape, beat)


def test_a_worker_that_dies_leaves_the_work_to_the_search(step):
    problem = problem_of(step)
    pipelines = pipelines_on(problem)
    found = workers.Workers(1)
    try:
        key = (next(pipelines.choices.families()), inf)
        found.processes[0].kill()
        found.start(problem, pipelines.choices.units)
        found.prefetch([key])
        assert found.result(key) is None
    finally:
        found.close()


def test_workers_are_gone_whatever_happens(monkeypatch):
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    kept = []
    with (
        pytest.raises(RuntimeError),
        workers.worker_pool(Cluster.parse("8xh100x8@ib400"), Request(pp="auto")) as worker_pool,
    ):
        kept.append(worker_pool)
        raise RuntimeError
    assert [process.poll() is not None for process in kept[0].processes] == [True]


@pytest.mark.parametrize(
    ("cluster", "request_"),
    [
        ("h100x8", Request(pp="auto")),
        ("8xh100x8@ib400", Request()),
        ("8xh100x8@ib400", Request(pp=64)),
    ],
)
def test_small_searches_have_none(cluster, request_, monkeypatch):
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    with workers.worker_pool(Cluster.parse(cluster), request_) as worker_pool:
        assert worker_pool is None
