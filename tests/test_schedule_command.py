"""`meshwright schedule` as a user types it, and the closed forms that it shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meshwright.cli import main
from meshwright.ir.errors import PlanError
from meshwright.ir.pipeline.schedule import check, read_schedule
from meshwright.planner.pipeline.schedules import SCHEDULES
from meshwright.planner.pipeline.schedules.closed_forms import FORMS, Case
from meshwright.planner.pipeline.timeline import check_nested
from meshwright.schedule_view import closed_form
from meshwright.scheduling import Memory, Seconds, Size, study

SIZE = ("--stages", "4", "--microbatches", "8")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("zbv", ...) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", "schedule", *words])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


def read(run, *words: str) -> dict:
    code, out, err = run(*words, "--format", "json")
    assert code == 0, err
    return json.loads(out)


# ---------------------------------------------------------------- what it shows


def test_a_schedule_as_text(run, golden):
    code, out, err = run("zb-h1", *SIZE, "--forward", "5ms", "--backward", "6ms", "--weight", "4ms")
    assert code == 0, err
    assert out == golden


def test_seconds_are_of_a_rank_and_may_be_given_per_stage(run):
    whole = read(run, "zbv", *SIZE, "--forward", "2", "--backward", "2", "--weight", "2")
    each = read(
        run, "zbv", *SIZE, "--forward", "1,1,1,1,1,1,1,1", "--backward", "2", "--weight", "2"
    )
    assert whole["makespan"] == each["makespan"] == 51
    free = ("--forward", "1,0", "--backward", "1,0", "--weight", "1,0")
    assert [
        row["span"]
        for row in read(run, "1f1b", "--pp", "2", "--microbatches", "1", *free)["per_rank"]
    ] == [3, 0]
    slow = read(run, "1f1b", *SIZE, "--forward", "1,2,1,1")
    assert slow["makespan"] > read(run, "1f1b", *SIZE)["makespan"]


def test_memory_is_counted_in_microbatches_or_in_bytes(run):
    assert [row["peak"] for row in read(run, "zb-h1", *SIZE)["per_rank"]] == [4, 4, 4, 4]
    late = read(run, "zb-h1", *SIZE, "--kept", "0.5")
    assert [row["peak"] for row in late["per_rank"]] == [4, 3.5, 3, 2.5]
    sized = read(run, "1f1b", *SIZE, "--held", "1GiB", "--static", "2GiB")
    assert [row["peak"] / 2**30 for row in sized["per_rank"]] == [6, 5, 4, 3]


def test_without_a_name_the_catalogue_is_listed(run):
    code, out, _ = run()
    assert code == 0
    assert all(entry.name in out and entry.source in out for entry in SCHEDULES)


# ---------------------------------------------------------------- the search


def test_the_search_is_as_fast_as_the_best_that_fits(run):
    uneven = ("--forward", "5ms", "--backward", "6ms", "--weight", "4ms", "--send", "0.1ms")
    found = read(run, "search", *SIZE, *uneven, "--memory-limit", "4")
    assert max(row["peak"] for row in found["per_rank"]) <= 4
    assert (
        found["lower_bound"] <= found["makespan"] <= read(run, "zb-h1", *SIZE, *uneven)["makespan"]
    )
    check(read_schedule(found["schedule"], found["stages"], found["microbatches"], found["orders"]))
    more = read(run, "search", *SIZE, *uneven)
    assert more["makespan"] == pytest.approx(more["lower_bound"])
    assert more["makespan"] < found["makespan"]


def test_a_search_in_bytes_is_that_in_microbatches(run):
    counted = read(run, "search", *SIZE, "--chunks", "2", "--memory-limit", "3")
    sized = ("--held", "2GiB", "--static", "1GiB", "--memory-limit", "7GiB")
    assert (
        read(run, "search", *SIZE, "--chunks", "2", *sized)["makespan"]
        == counted["makespan"]
        == 26.5
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["1f1b", "zb-h2", "v-half", "dualpipe-v"])
def test_what_is_written_for_torch_is_read_back(run, name):
    written = read(run, name, *SIZE, "-o", "x.csv")
    assert read(run, "x.csv") == written | {"schedule": "x", "closed_form": None}


def test_the_trace_opens_in_perfetto(run, tmp_path):
    assert run("zbv", *SIZE, "--send", "0.1", "--trace", "x.json")[0] == 0
    trace = json.loads((tmp_path / "x.json").read_text())
    check_nested(trace)
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"0F0", "7W7", "send 0F0"} <= names


# ---------------------------------------------------------------- refusals

REFUSED = [
    (("zvb", *SIZE), 2, "no schedule `zvb`"),
    (("hydra", *SIZE), 2, "one of gpipe, GPipe, 1f1b"),
    (("zbv",), 2, "a schedule needs its size"),
    (
        ("interleaved", "--stages", "4", "--microbatches", "9"),
        2,
        "9 microbatches make no 2 equal groups of 4",
    ),
    (("chimera", "--stages", "3", "--microbatches", "8"), 2, "even number of ranks, got 3"),
    (("zbv", *SIZE, "--chunks", "3"), 2, "zbv has 2 chunks per rank, not 3"),
    (("1f1b", "--stages", "0", "--microbatches", "8"), 2, "0 is no number of them"),
    (("1f1b", "--stages", "4", "--microbatches", "1000000"), 2, "too many to simulate"),
    (("1f1b", *SIZE, "--forward", "1,2"), 2, "2 values for 4"),
    (("1f1b", *SIZE, "--forward", "5 parsecs"), 2, "unknown unit `parsecs`"),
    (("1f1b", *SIZE, "--weight", "-1"), 2, "less than nothing"),
    (("1f1b", *SIZE, "--kept", "2"), 2, "2.0 is no share"),
    (
        ("search", *SIZE, "--memory-limit", "5GiB"),
        2,
        "says nothing without what a microbatch holds",
    ),
    (("search", *SIZE, "--memory-limit", "0.5"), 3, "no room for one microbatch"),
    (
        ("zbv", *SIZE, "--memory-limit", "2"),
        3,
        "zbv holds 4 microbatches on rank 0, the limit is 2",
    ),
    (("none.csv",), 2, "the schedule none.csv cannot be read"),
    (("chimera", *SIZE, "-o", "x.csv"), 2, "stage 0 of schedule chimera lies on 2 ranks"),
    (("1f1b", *SIZE, "--trace", "no/x.json"), 2, "folder is missing"),
]


@pytest.mark.parametrize(("words", "code", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_by_name(run, words, code, message):
    found, _, err = run(*words)
    assert (found, message in err) == (code, True), err


def test_a_file_that_says_otherwise_is_refused(run, tmp_path):
    run("1f1b", *SIZE, "-o", "x.csv")
    code, _, err = run("x.csv", "--microbatches", "9")
    assert code == 2 and "x.csv has 8, not 9" in err
    (tmp_path / "x.csv").write_text("0F0,0F0\n")
    code, _, err = run("x.csv")
    assert code == 2 and "has 0F0 2 times" in err


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("name", [entry.name for entry in SCHEDULES])
def test_closed_forms_hold_where_they_say(name):
    """Idle seconds equal, memory at most and for some sizes equal; F, B, W in seconds that doubles hold exactly."""
    equal = shown = 0
    for p, m in ((1, 1), (2, 4), (3, 7), (4, 12), (6, 12), (6, 24)):
        for seconds in (
            ("4", "4", "4"),
            ("5", "6", "4"),
            ("4", "4", "1"),
            ("3", "2", "1"),
            ("2", "3", "7"),
        ):
            try:
                found = study(name, Size(p, m, None), Seconds(*seconds), Memory(kept=0.0))
            except PlanError:
                continue
            case, form = found.case, FORMS[name]
            assert case == Case(p, m, found.chunks, *map(float, seconds))
            if not form.grouped or m % p == 0:
                assert max(found.peaks) <= form.peak_of(case) + 1e-9
                equal += max(found.peaks) == pytest.approx(form.peak_of(case))
            if (idle := closed_form(found)) is not None:
                assert idle["simulated"] == pytest.approx(idle["seconds"], abs=1e-9)
                shown += 1
    assert equal
    assert shown or FORMS[name].idle is None


def test_closed_forms_are_of_equal_stages_without_transfers():
    slow = study("1f1b", Size(4, 8, None), Seconds("1,2,1,1"), Memory())
    sent = study("1f1b", Size(4, 8, None), Seconds(send="0.1"), Memory())
    assert closed_form(slow) is None
    assert closed_form(sent) is None


def test_the_page_says_what_the_closed_forms_say():
    page = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text()
    table = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(table) == [entry.name for entry in SCHEDULES]
    for entry in SCHEDULES:
        row, form = table[entry.name], FORMS[entry.name]
        assert row.endswith(f"| {form.peak} | {entry.source} |")
        if idle := form.idle:
            formula = idle.formula + (" of the span" if idle.of == "span" else "")
            assert f"| {formula} | {idle.where} |".replace("|  |", "| |") in row
