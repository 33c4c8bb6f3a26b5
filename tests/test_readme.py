"""Every command and every snippet of the README runs as it stands."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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
SLOW = ("gpt3-175b", "demo", "calibrate")
TOGETHER = "stages.json"  # of a block whose commands run side by side


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.S)
    lines = [
        line.removeprefix("$ ")
        for block in blocks
        if TOGETHER not in block
        for line in block.splitlines()
    ]
    return [line.partition("  #")[0].strip() for line in lines]


def run(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code, line


def test_quick_commands_run_in_the_order_shown(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quick = [c for c in commands() if c.startswith("meshwright") and not any(s in c for s in SLOW)]
    assert len(quick) == 14
    Path("graph.json").write_text(json.dumps(GRAPH))
    for line in quick:
        run(line, monkeypatch)
    assert {"plan.json", "plan.html"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("page", ["price", "schedules"])
def test_commands_of_the_pages_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            run(line.removeprefix("$ "), monkeypatch)


@pytest.mark.slow
def test_slow_commands_run_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line in commands():
        if line.startswith("meshwright") and any(s in line for s in SLOW):
            run(line, monkeypatch)


@pytest.mark.slow
def test_the_block_of_several_processes_runs(tmp_path):
    block = next(b for b in re.findall(r"```console\n(.*?)```", README, re.S) if TOGETHER in b)
    script = (
        re.sub(r"^\$ meshwright", f"{sys.executable} -m meshwright", block, flags=re.M)
        + "wait %1\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 3 and "simulated" in done.stdout


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in commands():
        if line.startswith("make"):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_python_snippets_run():
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        with contextlib.redirect_stdout(None):
            exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_links_lead_somewhere():
    for file in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name} -> {target}"


def test_exit_codes_are_those_of_the_errors():
    from meshwright.ir import errors

    kinds = [
        e
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, errors.MeshwrightError)
    ]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    assert {e.exit_code for e in kinds} <= listed
