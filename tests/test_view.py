"""Plans for human eyes: text, HTML, and the notebook."""

import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient import NotebookClient

import meshwright as mw
from meshwright.ir.plan import Collective, Plan, Tensor
from meshwright.view import plan_html, plan_text
from meshwright.view.html import page
from meshwright.view.words import words

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def settled(text: str) -> str:
    """Without what differs from run to run."""
    return re.sub(r"searched for [\d.]+ s", "searched for N s", text)


def test_a_plan_as_text(small_plan, golden):
    assert golden == settled(plan_text(small_plan))


def test_a_plan_fits_on_a_screen_and_all_of_it_can_be_seen(small_plan):
    lines = plan_text(small_plan).splitlines()
    assert len(lines) <= 50
    full = plan_text(small_plan, everything=True)
    for tensor in small_plan.tensors:
        assert tensor.sharding in full
    assert len(full.splitlines()) > len(lines)


def test_a_plan_shows_itself(small_plan):
    mw.Plan  # noqa: B018  gives plans their looks
    assert repr(small_plan) == str(small_plan) == plan_text(small_plan)
    assert small_plan._repr_html_() == plan_html(small_plan)


def test_html_is_well_formed_static_and_complete(small_plan):
    html = plan_html(small_plan)
    ElementTree.fromstring(f"<div>{html}</div>")
    assert not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)|onclick|<link|@import", html)
    for section in ("Mesh", "What each axis cuts", "Memory", "Tensors", "Communication", "Proof"):
        assert f"<h4>{section}" in html
    for word in words(small_plan):
        assert word in html
    assert html.count("<svg") >= 4 + 3
    assert page(small_plan).startswith("<!doctype html>")


def test_html_escapes_what_users_named(small_plan):
    named = small_plan.model_copy(update={"name": "<b>&step"})
    assert "<b>&step" not in plan_html(named) and "&lt;b&gt;&amp;step" in plan_html(named)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("depth", ["two", pytest.param("whole", marks=pytest.mark.slow)])
def test_notebooks_run_from_top_to_bottom(path, tmp_path, depth):
    """By default with models of the zoo of two layers each."""
    book = nbformat.read(path, 4)
    saved = [cell.get("outputs") for cell in book.cells if cell.cell_type == "code"]
    assert any("text/html" in o.get("data", {}) for outputs in saved for o in outputs), (
        "saved with outputs"
    )
    if depth == "two":
        for cell in book.cells:
            cell.source = re.sub(r'(\bbuild\("[^)]*)\)', r"\1, layers=2)", cell.source)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pages = [
        o["data"]["text/html"]
        for cell in book.cells
        for o in cell.get("outputs", ())
        if "text/html" in o.get("data", {})
    ]
    assert len(pages) == 2 and all("<h4>Proof" in html for html in pages)


def with_states(
    plan: Plan, gathered: dict[str, int], reduced: str = "update", sharding: str = "[x, -]"
) -> Plan:
    """The plan with four layers of one weight, which these phases gather in so many bytes an element."""
    cut = 8 if "x" in sharding else 1
    common = {
        "dtype": "f32",
        "shape": (64, 64),
        "local_shape": (64 // cut, 64),
        "count": 4,
        "local_bytes": 2**16 / cut,
    }
    tensors = [Tensor(name="w", role="parameter", sharding=sharding, **common),
               Tensor(name="m", role="optimizer", sharding="[x, -]", **common),
               Tensor(name="dot", role="activation", sharding="[x, -]", **{**common, "dtype": "bf16"})]  # fmt: skip
    moves = [("all_gather", phase, size) for phase, size in gathered.items()] + [
        ("reduce_scatter", reduced, 2)
    ]
    found = [
        Collective(
            kind=kind,
            axes=("x",),
            nbytes=4096 * size,
            count=4,
            seconds=1.0,
            what="w -> dot",
            phase=phase,
        )
        for kind, phase, size in moves
    ]
    return plan.model_copy(update={"tensors": tuple(tensors), "collectives": tuple(found)})


@pytest.mark.parametrize(
    ("gathered", "reduced", "sharding", "told"),
    [
        ({"forward": 2, "backward": 2}, "backward", "[x, -]", "ZeRO-3 (FSDP)"),
        ({"prepare": 2}, "update", "[x, -]",
         "ZeRO-1: optimizer state and fp32 weights sharded, bf16 weights gathered once per step"),
        ({"prepare": 2}, "backward", "[x, -]",
         "ZeRO-2: optimizer state, gradients and fp32 weights sharded, bf16 weights gathered once per step"),
        ({"prepare": 4}, "update", "[x, -]",
         "ZeRO-1: optimizer state and weights sharded, weights gathered once per step"),
        ({}, "update", "[-, -]", "ZeRO-1: optimizer state sharded"),
        ({}, "backward", "[-, -]", "ZeRO-2: optimizer state and gradients sharded"),
    ],
)  # fmt: skip
def test_a_plan_is_called_after_when_weights_are_gathered(
    small_plan, gathered, reduced, sharding, told
):
    assert words(with_states(small_plan, gathered, reduced, sharding))[1] == told
