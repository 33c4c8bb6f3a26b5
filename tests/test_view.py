"""Plans for human eyes: text, HTML, and the notebook."""

import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient import NotebookClient

import meshwright as mw
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
    assert repr(small_plan) == plan_text(small_plan)
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
def test_notebooks_run_from_top_to_bottom(path, tmp_path):
    book = nbformat.read(path, 4)
    saved = [cell.get("outputs") for cell in book.cells if cell.cell_type == "code"]
    assert any("text/html" in o.get("data", {}) for outputs in saved for o in outputs), "saved with outputs"
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pages = [
        o["data"]["text/html"]
        for cell in book.cells
        for o in cell.get("outputs", ())
        if "text/html" in o.get("data", {})
    ]
    assert len(pages) == 2 and all("<h4>Proof" in html for html in pages)
