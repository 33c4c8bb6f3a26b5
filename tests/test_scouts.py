"""Bounds that other processes work out: the same search, and none that hangs or is left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from meshwright import api
from meshwright.api import plan_captured
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.planner.cost.model import Roofline
from meshwright.planner.problem import Problem
from meshwright.planner.request import Request
from meshwright.planner.search import scout, scouts
from meshwright.recipe import make

from .pipelines import pipelines_on

EIGHT = Cluster.parse("8xh100x1@ib100")


@pytest.fixture(scope="module")
def step():
    made = make({"model": "gpt-tiny", "batch": 16, "layers": 8})
    return made.capture(True)


def problem_of(step) -> Problem:
    return Problem(fold(step.graph), EIGHT, Request(pp="auto"), Roofline(EIGHT), "", "")


def gone(found: scouts.Scouts) -> bool:
    return any(process.poll() is not None for process in found.processes)


def planned(step, monkeypatch: pytest.MonkeyPatch, count: int, errors: Path):
    kept: list[scouts.Scouts] = []

    @contextmanager
    def hired(cluster: Cluster, request: Request) -> Iterator[scouts.Scouts | None]:
        with errors.open("wb") as file:
            kept.extend([scouts.Scouts(count, file)] * bool(count))
        yield kept[0] if kept else None
        for each in kept:
            each.close()

    monkeypatch.setattr(api, "hired", hired)
    told: list[str] = []
    plan = plan_captured(
        step, EIGHT, Request(pp="auto", gap=0.001, time_limit=1e4), "gpt-tiny", told.append
    )
    return plan, told, kept


def test_a_search_with_scouts_makes_the_same_choices(step, monkeypatch, tmp_path):
    taken, errors = [], tmp_path / "errors"
    take, wish = scouts.Scouts.take, scouts.Scouts.wish
    monkeypatch.setattr(
        scouts.Scouts, "take", lambda self, key: taken.append(take(self, key)) or taken[-1]
    )

    def waiting(self: scouts.Scouts, keys) -> None:
        """What is wished for first is waited for, however slow the scout's start."""
        wish(self, keys)
        with self.change:
            if not any(found is not None for found in taken):
                self.change.wait_for(
                    lambda: not (self.wishes or self.doing) or gone(self), timeout=60
                )

    monkeypatch.setattr(scouts.Scouts, "wish", waiting)
    alone, told_alone, _ = planned(step, monkeypatch, 0, errors)
    assert not taken
    helped, told, kept = planned(step, monkeypatch, 1, errors)
    assert told == told_alone and helped.pipeline == alone.pipeline
    assert helped.proof.lower_bound == alone.proof.lower_bound
    assert any(found is not None for found in taken), errors.read_text()
    assert all(process.poll() is not None for process in kept[0].processes), "left behind"


def test_a_scout_starts_whatever_lies_beside_the_users_file(monkeypatch, tmp_path):
    """A file called as one of Python's modules is, where the user's own files are looked for."""
    (tmp_path / "json.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    process = scouts._start(subprocess.PIPE)
    _, told = process.communicate(timeout=120)  # nothing to do: it ends
    assert process.returncode == 0, told.decode()


def test_bounds_of_a_scout_are_those_of_the_search(step):
    problem = problem_of(step)
    pipelines, folded = pipelines_on(problem), replace(problem.folded, whole=problem.folded.small)
    work_out = scout._worker(folded, EIGHT, problem.request, problem.cost, pipelines.choices.units)
    shapes = [shape for shape in pipelines.choices.families() if shape.stages in (2, 4)][::2]
    assert len(shapes) > 3
    for family in shapes:
        shape = replace(family, microbatches=4)
        for beat in (inf, 1.05 * pipelines.choices.floor(shape)):
            assert work_out((shape, beat)) == pipelines.bounds.relaxed(shape, beat)


def test_a_scout_that_dies_leaves_the_work_to_the_search(step):
    problem = problem_of(step)
    pipelines = pipelines_on(problem)
    found = scouts.Scouts(1)
    try:
        key = (next(pipelines.choices.families()), inf)
        found.processes[0].kill()
        found.brief(problem, pipelines.choices.units)
        found.wish([key])
        assert found.take(key) is None
    finally:
        found.close()


def test_scouts_are_gone_whatever_happens(monkeypatch):
    monkeypatch.setattr(scouts, "_cores", lambda: 2)
    kept = []
    with (
        pytest.raises(RuntimeError),
        scouts.hired(Cluster.parse("8xh100x8@ib400"), Request(pp="auto")) as hired,
    ):
        kept.append(hired)
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
    monkeypatch.setattr(scouts, "_cores", lambda: 2)
    with scouts.hired(Cluster.parse(cluster), request_) as hired:
        assert hired is None
