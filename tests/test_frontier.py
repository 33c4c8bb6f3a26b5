"""Planning anew after devices were lost or gained: from what a search met, as good as a search, at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from typer.testing import CliRunner

from meshwright.api import plan_captured
from meshwright.backends.xla.lower import lower
from meshwright.backends.xla.verify import verify_outputs
from meshwright.cli import app, main
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import sealed
from meshwright.ir.errors import ClusterError, InfeasibleError, MismatchError, PlanError, UsageError
from meshwright.ir.execution import OVERLAPS
from meshwright.planner.request import Request
from meshwright.planner.search.frontier import Frontier, load_frontier
from meshwright.recipe import make

from .pipelines import case


@pytest.fixture(scope="module")
def kept():
    """A step of eight layers, its plan for eight hosts of one device, and what the search kept."""
    captured = make({"model": "gpt-tiny", "batch": 16, "layers": 8}).capture(True)
    frontiers: list[Frontier] = []
    plan = plan_captured(
        captured,
        "8xh100x1@ib100",
        Request(pp="auto", schedule="1f1b"),
        "gpt-tiny",
        keep=frontiers.append,
    )
    return captured, plan, frontiers[0]


@pytest.mark.parametrize(
    "hosts", [4, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8, 12))]
)
def test_as_fast_as_a_search_of_the_same_hosts(kept, hosts):
    captured, _, frontier = kept
    cluster = f"{hosts}xh100x1@ib100"
    anew = frontier.replanned(Cluster.parse(cluster), looks=24)
    searched = plan_captured(captured, cluster, Request(pp="auto", schedule="1f1b"), "gpt-tiny")
    assert anew.pipeline is not None and anew.cluster.size <= hosts
    assert anew.estimate.peak_bytes <= anew.estimate.limit_bytes
    assert anew.estimate.step_seconds <= 1.05 * searched.estimate.step_seconds
    assert 0 < anew.proof.lower_bound <= searched.proof.lower_bound, (
        "more is proven than by a search"
    )
    spare = hosts - anew.cluster.hosts
    assert (f"{spare} spare" in anew.notes[-1]) == bool(spare)


def test_devices_are_not_left_spare_where_all_are_faster():
    """18 units are three on six stages and on eight, but ends weigh less than layers, and eight are faster."""
    captured, frontiers = (
        make({"model": "gpt-tiny", "batch": 16, "layers": 8}).capture(True),
        list[Frontier](),
    )
    cluster = Cluster.parse("8xa100x1@ib100")
    request = Request(pp="auto", schedule="1f1b", recompute="none")
    plan = plan_captured(captured, cluster, request, "gpt-tiny", keep=frontiers.append)
    anew = frontiers[0].replanned(cluster)
    assert anew.estimate.step_seconds <= plan.estimate.step_seconds * (1 + 1e-9)


def test_the_clock_has_no_part_in_a_plan_made_anew(kept, monkeypatch):
    """Neither a slow machine nor a second time gives another plan."""
    _, _, frontier = kept
    file = lambda: sealed(frontier.replanned(Cluster.parse("6xh100x1@ib100")))  # noqa: E731
    first = file()
    ticks = count(0.0, 0.5)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    assert file() == first
    assert json.loads(first)["proof"]["stopped_by"] == "estimate"


def test_a_frontier_is_the_same_after_writing_and_reading(kept, tmp_path):
    _, _, frontier = kept
    place = tmp_path / "kept.json"
    place.write_text(sealed(frontier))
    assert load_frontier(place) == frontier


def test_what_overlaps_is_asked_for_anew(kept, tmp_path):
    found: list[Frontier] = []
    request = Request(pp=2, schedule="1f1b", microbatches=4, overlap="all", recompute="none")
    plan_captured(kept[0], "2xh100x1@ib100", request, "gpt-tiny", keep=found.append)
    place = tmp_path / "kept.json"
    place.write_text(sealed(found[0]))
    assert load_frontier(place).request["overlap"] == request.overlap == OVERLAPS


def test_a_plan_made_anew_equals_the_unsharded_step():
    captured, leaves, _, truth = case("gpt-tiny")
    frontiers: list[Frontier] = []
    request = Request(pp="auto", schedule="1f1b", recompute="none", microbatches=4, time_limit=20)
    plan_captured(captured, "8xcpu", request, "gpt-tiny", keep=frontiers.append)
    anew = frontiers[0].replanned(Cluster.parse("6xcpu"))
    assert anew.pipeline is not None and anew.cluster.size <= 6
    verify_outputs(truth, lower(anew, captured).jitted(*leaves), captured.graph.output_names)


def test_hosts_of_a_cluster_by_themselves():
    four = Cluster.parse("128xa100x8@hdr200").first(4)
    assert (four.hosts, four.size, four.per_host) == (4, 32, 8)
    assert four.tier_joining(0, 32).tier == "hdr200" and four.tier_joining(0, 8).tier == "nvlink3"
    assert len(Cluster.parse("128xa100x8@hdr200").first(1).fabric) == 1
    with pytest.raises(ClusterError, match="shape 4x4x8"):
        Cluster.parse("v5p-256").first(5)
    with pytest.raises(UsageError, match="129 hosts are no part"):
        Cluster.parse("128xa100x8@hdr200").first(129)


def test_pins_hold_and_devices_of_a_host_that_are_spare_are_told():
    """A pinned mesh of two is not made one or four, and two of ten devices have no part."""
    frontiers: list[Frontier] = []
    request = Request(pp=4, mesh=(2,), schedule="1f1b", time_limit=20)
    plan_captured(case("gpt-tiny")[0], "8xcpu", request, "gpt-tiny", keep=frontiers.append)
    anew = frontiers[0].replanned(Cluster.parse("10xcpu"))
    assert anew.mesh.shape == (2,) and "8 of 10 devices are used, 2 spare" in anew.notes[-1]
    assert anew.pipeline is not None and set(anew.pipeline.programs) == {"stages"}
    assert not any("but for the pipeline" in each for each in anew.proof.left_out)
    with pytest.raises(InfeasibleError, match=r"(?s)can be dealt out to 4 devices.*pp=4; mesh=2; "):
        frontiers[0].replanned(Cluster.parse("4xcpu"))


def test_what_cannot_be_planned_anew(kept, tmp_path):
    _, _, frontier = kept
    with pytest.raises(
        InfeasibleError, match=r"can be dealt out to 1 device\.\n.*has two stages at least"
    ) as one:
        frontier.replanned(Cluster.parse("1xh100x1"))
    assert "may be used" not in str(one.value), "memory is not the reason"
    full = frontier.model_copy(update={"request": {**frontier.request, "memory": 1e5}})
    with pytest.raises(InfeasibleError, match=r"fits 4 devices\.\n.*per device may be used"):
        full.replanned(Cluster.parse("4xh100x1@ib100"))
    with pytest.raises(PlanError, match="has 2 groups"):
        frontier.replanned(Cluster.parse("benchmarks/clusters/a100_v100.yaml"))
    with pytest.raises(PlanError, match="cannot be read"):
        load_frontier(tmp_path / "none.json")
    for text in ("no json", "[]", "{}", json.dumps({"points": []})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PlanError, match=r"no (frontier|JSON)"):
            load_frontier(tmp_path / "bad.json")
    (tmp_path / "old.json").write_text(json.dumps({"meshwright": "0.0.1"}))
    with pytest.raises(MismatchError, match=r"of meshwright 0\.0\.1"):
        load_frontier(tmp_path / "old.json")


def damaged(data: Any, deep: int = 4) -> Iterator[tuple[str, Any]]:
    """Copies of JSON with one place missing, of another type or of another value, and the place's name."""
    keys = (
        list(data) if isinstance(data, dict) else sorted({0, len(data) - 1} & set(range(len(data))))
    )
    for key in keys if len(keys) < 20 else keys[:2]:
        rest = (
            {k: v for k, v in data.items() if k != key}
            if isinstance(data, dict)
            else data[:key] + data[key + 1 :]
        )
        was = data[key]
        other = (
            was + was[-1:]
            if isinstance(was, list | str) and was
            else not was
            if isinstance(was, bool)
            else 7
        )
        if other == was:
            other = 8
        inner = list(damaged(was, deep - 1)) if deep and isinstance(was, list | dict) else []
        found = [("", [was]), ("", other), *inner]
        yield f"{key}", rest
        for name, value in found:
            changed = (
                {**data, key: value}
                if isinstance(data, dict)
                else [*data[:key], value, *data[key + 1 :]]
            )
            yield f"{key}.{name}", changed


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frontier_damaged_anywhere_is_refused_by_name(kept, tmp_path, step):
    _, _, frontier = kept
    place, text = tmp_path / "kept.json", sealed(frontier)
    files = [(name, json.dumps(data)) for name, data in damaged(json.loads(text))]
    files += [(f"cut at {at}", text[:at]) for at in range(0, len(text) - 2, len(text) // 7)]
    assert len(files) > 100 and any("points.0.slots" in name for name, _ in files)
    for name, changed in files[::step]:
        place.write_text(changed)
        with pytest.raises((PlanError, MismatchError)) as refused:
            load_frontier(place)
        told = refused.value
        assert told.exit_code == (5 if isinstance(told, MismatchError) else 2), name
        assert told.origin == str(place) and told.what and told.fix, name


@pytest.mark.parametrize(("was", "becomes"), [("broadcast", "broadcost"), ('"passes"', '"paces"')])
def test_the_command_refuses_a_damaged_frontier(kept, tmp_path, monkeypatch, capsys, was, becomes):
    place = tmp_path / "kept.json"
    text = sealed(kept[2])
    place.write_text(text.replace(was, becomes, 1))
    assert place.read_text() != text
    monkeypatch.setattr(
        sys, "argv", ["meshwright", "replan", str(place), "--cluster", "4xh100x1@ib100"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and said.startswith("PlanError")
        and str(place) in said
        and "  try  " in said
    )


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = ["plan", "--model", "gpt-tiny", "--layers", "8", "--batch", "16"]
    made = CliRunner().invoke(
        app, [*step, "--cluster", "8xh100x1@ib100", "--pp", "4", "--frontier", "kept.json"]
    )
    assert made.exit_code == 0, made.output
    anew = CliRunner().invoke(
        app, ["replan", "kept.json", "--cluster", "7xh100x1@ib100", "-o", "anew.json"]
    )
    assert anew.exit_code == 0 and "4 of 7 hosts are used, 3 spare" in anew.output
    shown = CliRunner().invoke(app, ["show", "anew.json"])
    assert shown.exit_code == 0 and "pipeline parallel 4" in shown.output
    flat = CliRunner().invoke(
        app, [*step, "--cluster", "8xh100x1@ib100", "--frontier", "flat.json"]
    )
    assert flat.exit_code != 0 and not (tmp_path / "flat.json").exists()
    assert "searching" not in flat.output, "refused before the search"
