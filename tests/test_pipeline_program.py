"""What each rank of a pipeline runs, as text: read as it is printed; every law, and what breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.ir.errors import GraphError, LoweringError
from meshwright.ir.local.pipeline import Move, PipelineProgram, RankOp, RankProgram, Run
from meshwright.ir.local.pipeline_checks import verify_pipeline
from meshwright.ir.local.pipeline_text import parse_pipeline
from meshwright.ir.passes.localize_pipeline import localize_pipeline
from meshwright.ir.pipeline.schedule import Schedule
from meshwright.planner.pipeline.schedules import chimera, interleaved, one_f_one_b, zbv

from .pipelines import case, half_split, lowered, pipelined, stage_plan, zero_bubble

SCHEDULES = {
    "1f1b": one_f_one_b(2, 4),
    "interleaved": interleaved(2, 4, 2),
    "zero-bubble": zero_bubble(2, 4),
    "half-split": half_split(2, 4),
    "one microbatch": one_f_one_b(2, 1),
}


def program_of(schedule: Schedule) -> PipelineProgram:
    """Of gpt-tiny, stages of four devices."""
    plan = stage_plan("gpt-tiny", 4, schedule.microbatches, mesh=(2, 2))
    captured, *_ = case("gpt-tiny")
    return localize_pipeline(pipelined(plan, captured, schedule), captured.graph)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_pipeline_keeps_every_law_and_is_read_as_it_is_printed(schedule):
    program = program_of(schedule)
    verify_pipeline(program)
    assert parse_pipeline(str(program)) == program


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ranks_run_the_passes_of_their_schedule(schedule):
    for rank, order in zip(program_of(schedule).ranks, schedule.orders, strict=True):
        runs = [op for op in rank.ops if isinstance(op, Run) and op.microbatch is not None]
        wanted = []
        for step in order:
            wanted.append(Run(f"{step.kind} {step.stage}", step.microbatch))
            if schedule.splits and schedule.whole(step):
                wanted.append(Run(f"weight {step.stage}", step.microbatch))
        assert runs == wanted


def test_what_the_backend_runs_keeps_them_too():
    """With the barriers that XLA needs, and collectives coalesced."""
    running = lowered("gpt-tiny", zero_bubble(2, 4), 4, mesh=(2, 2))
    verify_pipeline(running.program)
    assert parse_pipeline(str(running.program)) == running.program
    assert running.driver.ranks == running.program.ranks
    assert running.program.by_name.keys() <= running.passes.keys()


def test_a_value_that_two_stages_read_goes_from_where_it_lies_and_its_gradient_back():
    """Token embeddings that are also the head."""
    first, last = program_of(one_f_one_b(2, 4)).ranks
    tokens = next(each for each in first.inputs if each.name.endswith("['token_VD']"))
    assert tokens.value not in {each.value for each in last.inputs}
    sent = [op for op in first.ops if isinstance(op, Move) and op.phase == "start"]
    assert [(op.kind, op.values) for op in sent] == [("send", (tokens.value,))]
    shapes = {
        op.leaves.whole.shape
        for op in last.ops
        if isinstance(op, Move) and (op.kind, op.phase) == ("send", "update")
    }
    assert tokens.shard.whole.shape in shapes


def test_stages_of_one_rank_hand_over_by_copies():
    """In a V rank 1 holds stages 1 and 2."""
    program = program_of(zbv(2, 4))
    verify_pipeline(program)
    found = {(op.sender, op.receiver) for op in moves(program, 1) if op.kind == "copy"}
    assert found >= {(1, 2), (2, 1)}
    assert not [op for op in moves(program, 0) if op.kind == "copy" and op.phase == "forward"]


def test_stages_on_other_meshes_take_values_as_they_want_them():
    captured, *_ = case("gpt-tiny")
    schedule = one_f_one_b(2, 4)
    plans = [stage_plan("gpt-tiny", 4, 4, mesh=mesh) for mesh in ((2, 2), (4,))]
    a, b = (pipelined(plan, captured, schedule).pipeline for plan in plans)
    both = a.model_copy(update={"stages": (a.stages[0], b.stages[1])})
    plan = pipelined(plans[0], captured, schedule).model_copy(update={"pipeline": both})
    program = localize_pipeline(plan, captured.graph)
    verify_pipeline(program)
    assert parse_pipeline(str(program)) == program
    assert [len(mesh.axes) for mesh in program.meshes] == [2, 1]


# ---------------------------------------------------------------- laws


def moves(program: PipelineProgram, rank: int) -> list[Move]:
    return [op for op in program.ranks[rank].ops if isinstance(op, Move)]


def with_ops(program: PipelineProgram, rank: int, ops: list[RankOp]) -> PipelineProgram:
    ranks = list(program.ranks)
    ranks[rank] = RankProgram(ranks[rank].inputs, tuple(ops))
    return replace(program, ranks=tuple(ranks))


def refused(program: PipelineProgram, law: str) -> str:
    with pytest.raises(GraphError, match=f"breaks `{law}`") as error:
        verify_pipeline(program)
    return str(error.value)


@pytest.fixture(scope="module")
def program() -> PipelineProgram:
    return program_of(one_f_one_b(2, 4))


@pytest.fixture
def ops(program) -> list[RankOp]:
    """What rank 0 does."""
    return list(program.ranks[0].ops)


def first(ops: list[RankOp], kind: str, phase: str) -> int:
    """Where the first such move stands."""
    return next(
        k
        for k, op in enumerate(ops)
        if isinstance(op, Move) and (op.kind, op.phase) == (kind, phase)
    )


def test_every_send_has_its_receive(program, ops):
    del ops[first(ops, "send", "forward")]
    said = refused(with_ops(program, 0, ops), "meets")
    assert "rank 0 comes to `send forward" in said and "microbatch 1" in said
    assert "rank 1 comes to `receive forward" in said and "microbatch 0" in said


def test_two_ranks_send_and_receive_in_one_order(program, ops):
    send = first(ops, "send", "forward")
    later = send + 1 + first(ops[send + 1 :], "receive", "backward")
    ops[send], ops[later] = ops[later], ops[send]
    refused(with_ops(program, 0, ops), "meets")


def test_a_send_and_its_receive_are_of_one_type(program, ops):
    at = first(ops, "send", "forward")
    half = replace(ops[at].leaves.whole, dtype="bf16")
    ops[at] = replace(ops[at], leaves=replace(ops[at].leaves, whole=half))
    assert "bf16[" in refused(with_ops(program, 0, ops), "meets")
    theirs = list(program.ranks[1].ops)
    there = first(theirs, "receive", "forward")
    theirs[there] = replace(theirs[there], leaves=ops[at].leaves)
    both = with_ops(with_ops(program, 0, ops), 1, theirs)
    assert "lies as f32[" in refused(both, "there"), "the pass made another type than both say"


def test_ranks_do_not_wait_in_a_circle():
    """0 for 2 with the embeddings, 2 for 1 and 1 for 0 with results of the first microbatch."""
    captured, *_ = case("gpt-tiny")
    schedule = one_f_one_b(3, 4)
    plan = pipelined(stage_plan("gpt-tiny", 2, 4, mesh=(2,)), captured, schedule)
    program = localize_pipeline(plan, captured.graph)
    verify_pipeline(program)
    ops = list(program.ranks[2].ops)
    ops.insert(0, ops.pop(first(ops, "receive", "forward")))
    said = refused(with_ops(program, 2, ops), "ends")
    assert all(f"rank {rank} at `" in said for rank in range(3))


def test_a_pass_waits_for_what_it_takes(program):
    ops = list(program.ranks[1].ops)
    at = first(ops, "receive", "forward")
    ops[at], ops[at + 1] = ops[at + 1], ops[at]
    assert "is not there" in refused(with_ops(program, 1, ops), "there")


def test_every_pass_runs_once(program, ops):
    at = ops.index(Run("backward 0", 2))
    refused(with_ops(program, 0, [*ops[:at], *ops[at + 1 :]]), "once")
    refused(with_ops(program, 0, [*ops, ops[at]]), "once")
    refused(with_ops(program, 0, [*ops, Run("forward 7", 0)]), "once")


def test_a_pass_has_a_value_for_each_input(program):
    passes = (replace(program.passes[0], takes=program.passes[0].takes[1:]), *program.passes[1:])
    refused(replace(program, passes=passes), "passes")


def test_a_stage_on_two_ranks_is_refused():
    with pytest.raises(LoweringError, match="stage 0 lies on 2 ranks"):
        program_of(chimera(2, 4))


@pytest.mark.parametrize(
    "line",
    [
        "stage 7 on x=2",
        "rank 7 {",
        "pass of stage 0: eats v1",
        "send forward v1 from stage 0 to stage 1 microbatch 0: f32[2] @ [-]",
        "copy forward v1 from stage 0 to stage 1 of rank 1: f32[2] @ [-]",
        "send forward v1 from stage 0 to stage 9 of rank 1: f32[2] @ [-]",
        "receive forward v1 from stage 0 of rank 0 to stage 1: f32[2] @ [-] and more",
    ],
)
def test_a_line_that_is_not_understood_is_named(line):
    text = f"pipeline 'p', 2 microbatches\nstage 0 on x=2\nstage 1 on -\nrank 0 {{\n  {line}\n}}\n"
    if not line.startswith(("send", "copy", "receive")):
        text = f"pipeline 'p', 2 microbatches\nstage 0 on x=2\nstage 1 on -\n\n{line}\n}}\n"
    with pytest.raises(GraphError, match="no line of a pipeline") as error:
        parse_pipeline(text)
    assert "line 5" in str(error.value)
