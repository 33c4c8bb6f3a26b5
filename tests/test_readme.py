"""Every command and snippet of README.md and docs/ runs as it stands and prints what is shown.

In a `console` block `$ ` begins a command; the lines below it, if any, are what it prints, where
`...` stands for anything. Each page runs in a folder of its own that has `examples/` in it.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from meshwright import Cluster
from meshwright.cli import main

ROOT = Path(__file__).parents[1]
PAGES = {
    page.stem: page.read_text()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
}
GRAPH = {
    "problem": {
        "name": "two nodes",
        "nodes": {
            "intervals": [[0, 2], [1, 3]],
            "costs": [[1, 2], [3, 4]],
            "usages": [[5, 1], [5, 1]],
        },
        "edges": {"nodes": [[0, 1]], "costs": [[0, 9, 9, 0]]},
        "usage_limit": 6,
    }
}
SLOW = ("gpt3-175b", "meshwright demo", "meshwright calibrate")
TOGETHER = " &\n$ "  # in a block whose commands run side by side


def blocks(kind: str, page: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGES[page], re.S | re.M)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Each command with the lines that it prints, as far as they are shown."""
    text = "".join(block for block in blocks("console", page) if TOGETHER not in block)
    found = text.replace("\\\n", " ").split("$ ")[1:]
    lines = [part.splitlines() for part in found]
    return [(first.partition("  #")[0].strip(), shown) for first, *shown in lines]


def with_commands(which: Callable[[str], bool]) -> list[str]:
    return [page for page in sorted(PAGES) if any(which(c) for c, _ in commands(page))]


def quick(command: str) -> bool:
    return command.startswith("meshwright") and not slow(command)


def slow(command: str) -> bool:
    return command.startswith("meshwright") and any(word in command for word in SLOW)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    monkeypatch.chdir(tmp_path)
    assert len(jax.devices()) == 8  # commands that emulate fewer take the first of these
    return tmp_path


def run(command: str, shown: list[str], monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as done:
        main()
    printed = capfd.readouterr().out
    assert not done.value.code, command
    pattern = ".*".join(map(re.escape, "\n".join(shown).split("...")))
    assert not shown or re.fullmatch(pattern, printed.rstrip("\n"), re.S), f"{command}\n{printed}"


@pytest.mark.parametrize("page", with_commands(quick))
def test_commands_run_in_the_order_shown(page, folder, monkeypatch, capfd):
    for command, shown in commands(page):
        if quick(command):
            run(command, shown, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_commands(slow))
def test_slow_commands_run_too(page, folder, monkeypatch, capfd):
    for command, shown in commands(page):
        if slow(command):
            run(command, shown, monkeypatch, capfd)


def test_every_command_is_shown(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["meshwright", "--help"])
    with pytest.raises(SystemExit):
        main()
    listed = re.findall(r"^  ([a-z]+)  ", capfd.readouterr().out.partition("Commands:")[2], re.M)
    shown = {c.split()[1] for page in PAGES for c, _ in commands(page) if quick(c) or slow(c)}
    assert listed and set(listed) <= shown


@pytest.mark.slow
def test_the_block_of_several_processes_runs(folder):
    (block,) = (b for page in PAGES for b in blocks("console", page) if TOGETHER in b)
    script = (
        re.sub(r"^\$ meshwright", f"{sys.executable} -m meshwright", block, flags=re.M)
        + "wait %1\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 3 and "simulated" in done.stdout


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for command, _ in commands(page):
            if command.startswith("make"):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", sorted(page for page in PAGES if blocks("python", page)))
def test_python_snippets_run(page, folder):
    for snippet in blocks("python", page):
        with contextlib.redirect_stdout(None):
            exec(compile(snippet, f"{page}.md", "exec"), {"__name__": page})


def test_cluster_files_load(folder):
    for page in PAGES:
        for text in blocks("yaml", page):
            Path("lab.yaml").write_text(text)
            assert Cluster.load("lab.yaml").describe()


def test_links_lead_somewhere():
    files = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/**/*.md")]
    for file in files:
        for target, heading in re.findall(r"\]\(([^)#:]*)(#[^)]+)?\)", file.read_text()):
            page = file.parent / target if target else file
            assert page.exists(), f"{file.name} -> {target}"
            assert not heading or heading[1:] in anchors(page), f"{file.name} -> {target}{heading}"


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as links write them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_exit_codes_are_those_of_the_errors():
    from meshwright.ir import errors

    kinds = [
        e
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, errors.MeshwrightError)
    ]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["exit-codes"], re.M)}
    assert {e.exit_code for e in kinds} <= listed


def test_names_of_the_glossary_exist():
    code = "".join(
        file.read_text()
        for folder in ("ir", "planner", "backends", "src/meshwright")
        for file in (ROOT / folder).rglob("*.py")
    )
    words = set(re.findall(r"\w+", code))
    for row in re.findall(r"^\|.*\|$", PAGES["glossary"], re.M):
        for name in re.findall(r"`([^`]+)`", row):
            assert set(re.findall(r"\w+", name)) <= words, f"{name}: {row}"


def test_pages_that_are_to_be_short_are():
    assert len(PAGES["README"].split()) <= 700
    for record in ROOT.glob("docs/adr/0*.md"):
        assert len(record.read_text().split()) <= 200, record.name


def test_files_that_pages_name_exist():
    files = [file.as_posix() for file in ROOT.glob("[!.]*/**/*.py")]
    pages = [ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for name in re.findall(r"\b[a-z]\w*(?:/\w+)*\.py\b", page.read_text()):
            assert any(file.endswith(f"/{name}") for file in files), f"{page.name}: {name}"
