"""Graphs as text and JSON, the verifier's laws, and plans as files."""

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import models
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.attrs import from_json, number, read_all, real, spelled_all
from meshwright.ir.codec import CHECKSUM, _digest, dump_graph, load_graph, load_plan, save_plan
from meshwright.ir.errors import GraphError, MismatchError, PlanError
from meshwright.ir.graph import Graph, Op, TensorType
from meshwright.ir.rules import rule_of
from meshwright.ir.text import parse, show
from meshwright.ir.verify import verify, verify_rule

from .pipelines import captured_of

TEXT = """\
in %0: f32[16, 4] 'w' donated
in %1: f32[8, 16] 'x'
const %2: f32[] = -inf
%3: f32[8, 4] = dot_general %1 %0 (lhs_contracting=(1,), rhs_contracting=(0,)) @ 'model.py:3'
%6: f32[8, 4] = scan %3 (length=3, num_carry=1, num_consts=0, reverse=False, unroll=1) {
  in %4: f32[8, 4]
  %5: f32[8, 4] = tanh %4
  out %5
}
%7: f32[16, 4] = add %0 %0
out %6 'y'
out %7 'w' updates %0
"""


def broken(old: str, new: str):
    assert old in TEXT
    return parse(TEXT.replace(old, new))


def test_text_prints_as_it_was_parsed():
    graph = parse(TEXT)
    verify(graph)
    assert show(graph) == TEXT
    assert graph.state == ((0, 1),) and graph.donated == {0}


@pytest.mark.parametrize(
    "name", ["gpt-tiny", "gpt-tiny-scan", "mixtral-tiny", "wrn-tiny", "dlrm-tiny"]
)
def test_captured_graphs_survive_text_and_json(name):
    example = models.build(name)
    graph = capture(example.step, example.state, example.batch, donate_argnums=0).graph
    for kept in (graph, fold(graph).small):
        verify(kept)
        assert parse(show(kept)) == kept
        assert load_graph(dump_graph(kept)) == kept


attributes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats().map(real) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(attributes)
def test_attributes_survive_text_and_json(value):
    """Numbers of both sorts keep apart, and what is not a number is itself."""
    told = (("told", value),)
    assert repr(read_all(spelled_all(told))) == repr(told)
    graph = Graph(
        {v: TensorType("f32", ()) for v in (0, 1)},
        (0,),
        (Op("a kind of theirs", (0,), (1,), told),),
        (1,),
    )
    assert load_graph(dump_graph(graph)).ops[0].attrs == told


def test_attributes_are_equal_where_they_are_of_one_type_and_the_same_bits():
    kept = [2, real(2.0), real(0.0), real(-0.0), 0, real(float("nan")), real(float("inf")), "2.0"]
    assert len({*kept}) == len(kept)
    assert all((a == b) == (k == n) for k, a in enumerate(kept) for n, b in enumerate(kept))
    again = [real(float(repr(value))) for value in kept if isinstance(value, float)]
    assert again == [value for value in kept if isinstance(value, float)]
    assert (
        (real(float("nan")),) == (real(-float("nan")),) and real(2.0) == 2.0 and real(2.0) + 1 == 3
    )


@pytest.mark.parametrize("text", ['{"float": "2"}', '{"nan": 1}', "{}"])
def test_json_that_is_no_attribute_is_refused(text):
    with pytest.raises(ValueError, match="no attribute"):
        from_json(json.loads(text))


def test_numbers_are_written_as_numbers():
    attrs = (("fill", real(float("nan"))), ("low", real(-2.0)), ("many", 2), ("part", real(0.5)))
    assert spelled_all(attrs) == "fill=nan, low=-2.0, many=2, part=0.5"
    assert [number(value) for _, value in attrs[1:]] == [-2.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("%3: f32[8, 4] <- dot %1", "no line of a graph"),
        ("%3: f33[8, 4] = dot %1", "`f33` is not an element type"),
        ("%0: f32[8, 4] = dot %1", "%0 is defined twice"),
        ("%3: f32[8] = scan %1 (length=3) {", "never closed"),
        ("%3: f32[8] = add %1 (axis=f(1))", "no line of a graph"),
        ("out %0 'w' updates %9", "%9, which is no input"),
    ],
)
def test_text_that_is_wrong_is_named_with_its_line(line, complaint):
    with pytest.raises(GraphError, match=complaint):
        parse("in %0: f32[8, 4] 'w'\nin %1: f32[8] 'x'\n" + line + "\n")


@pytest.mark.parametrize(
    ("law", "old", "new"),
    [
        ("defined-before-use", "add %0 %0", "add %0 %8"),
        ("defined-before-use", "tanh %4", "tanh %0"),
        ("region-arity", "length=3, num_carry=1", "length=3, num_carry=0"),
        ("region-arity", "%5: f32[8, 4] = tanh", "%5: f32[8, 5] = tanh"),
        ("state-pairs", "%7: f32[16, 4]", "%7: bf16[16, 4]"),
        ("attributes", "num_carry=1, num_consts=0", "num_consts=0, num_carry=1"),
        ("attributes", "tanh %4", "tanh %4 (axis=1)"),
        ("attributes", "lhs_contracting=(1,)", "lhs_contracting=1"),
        ("attributes", "reverse=False", "reverse=0"),
    ],
)
def test_a_broken_law_is_named(law, old, new):
    with pytest.raises(GraphError, match=law):
        verify(broken(old, new))


def test_values_without_a_type_and_positions_beyond_the_end_are_named():
    graph = parse(TEXT)
    with pytest.raises(GraphError, match="typed"):
        verify(dataclasses.replace(graph, types={v: t for v, t in graph.types.items() if v != 5}))
    with pytest.raises(GraphError, match="positions"):
        verify(dataclasses.replace(graph, donated=frozenset({7})))
    with pytest.raises(GraphError, match="defined-once"):
        verify(dataclasses.replace(graph, inputs=(0, 0), input_names=("a", "b")))


def test_a_rule_that_does_not_fit_its_op_is_named():
    graph = parse(TEXT)
    op = graph.ops[0]
    rule = rule_of(op, graph.types)
    verify_rule(op, rule, graph.types)
    with pytest.raises(GraphError, match="rule-shapes"):
        verify_rule(op, dataclasses.replace(rule, operands=rule.operands[::-1]), graph.types)


def test_every_rule_of_the_zoo_fits():
    for name in ("gpt-tiny", "mixtral-tiny", "wrn-tiny", "dlrm-tiny", "vit-tiny"):
        graph = captured_of(name).graph
        for visit in graph.visits:
            if not visit.op.regions:
                verify_rule(visit.op, rule_of(visit.op, graph.types), graph.types)


def test_a_changed_graph_file_is_refused():
    text = dump_graph(parse(TEXT))
    with pytest.raises(GraphError, match="fingerprint"):
        load_graph(text.replace('"tanh"', '"sin"'))
    with pytest.raises(GraphError, match="format 7"):
        load_graph(json.dumps({**json.loads(text), "version": 7}))
    with pytest.raises(GraphError, match="no graph"):
        load_graph("[]")


def test_a_plan_survives_its_file(small_plan, tmp_path):
    save_plan(small_plan, tmp_path / "plan.json")
    timeless = small_plan.proof.model_copy(update={"seconds": None})  # equal plans are equal files
    assert load_plan(tmp_path / "plan.json") == small_plan.model_copy(update={"proof": timeless})
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_file_that_calls_any_proven_gap_optimal_is_read_as_it_is(small_plan, tmp_path):
    """Files did so before they said what gap is good enough."""
    place, old = tmp_path / "plan.json", small_plan.proof.model_copy(update={"status": "optimal"})
    fields = json.loads(small_plan.model_copy(update={"proof": old}).model_dump_json())
    del fields["proof"]["good_enough"]
    place.write_text(json.dumps({**fields, CHECKSUM: _digest(fields)}))
    true = old.model_copy(update={"status": "within_gap", "good_enough": None, "seconds": None})
    assert old.gap > 0 and load_plan(place).proof == true


def test_damaged_plans_are_refused_by_name(small_plan, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(small_plan, path)
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "version": 99}))
    with pytest.raises(MismatchError, match="format 99"):
        load_plan(path)
    path.write_text(json.dumps({**good, "microbatches": "two"}))
    with pytest.raises(PlanError, match="microbatches"):
        load_plan(path)
    path.write_text("{}")
    with pytest.raises(PlanError, match=r"no plan: it has no `meshwright`, `name`, .* more fields"):
        load_plan(path)
    path.write_text(json.dumps(good)[:100])
    with pytest.raises(PlanError, match="no JSON"):
        load_plan(path)
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "nothing.json")
    with pytest.raises(PlanError, match="cannot be written"):
        save_plan(small_plan, tmp_path / "no" / "such.json")


def test_attributes_are_read_by_name_and_type():
    attrs = (
        ("axes", (0, 1)),
        ("by", real(2.0)),
        ("mode", "clip"),
        ("padding", ((0, 1), ())),
        ("ragged", ((0, "x"), ())),
        ("reverse", True),
        ("sizes", (1, "x")),
    )
    op = Op("sort", (), (), attrs, where="model.py:3")
    assert op.integers("axes") == (0, 1) and op.text("mode") == "clip" and op.real("by") == 2.0
    assert op.flag("reverse") and not op.flag("stable") and not op.has("stable")
    with pytest.raises(GraphError, match="attribute `mode` of `sort` is 'clip', no whole number"):
        op.integer("mode")
    with pytest.raises(GraphError, match=r"`sizes` of `sort` is \(1, 'x'\), no tuple of whole"):
        op.integers("sizes")
    assert op.integer_rows("padding") == ((0, 1), ())
    for name in ("ragged", "axes", "mode"):
        with pytest.raises(GraphError, match="no tuple of tuples of whole numbers"):
            op.integer_rows(name)
    with pytest.raises(GraphError, match=r"`sort` has no attribute `axis`(.|\n)*model.py:3"):
        op.integer("axis")
