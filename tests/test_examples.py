"""Steps as each library writes them train under `verify=True` as under the library's own jit."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import meshwright as mw

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {"haiku_transform": "haiku"}  # the others need what the zoo needs
WAYS = (
    "command_line",
    "decorate",
    "pipeline",
    "pytorch",
)  # to use meshwright; the others are of libraries
HERE = [
    f.stem
    for f in sorted(FOLDER.glob("*.py"))
    if f.stem not in WAYS and importlib.util.find_spec(NEEDS.get(f.stem, "jax"))
]


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", HERE)
def test_an_example_trains_as_its_library_does(name):
    example = load(name)
    step = mw.parallelize(
        example.jit(example.train_step), cluster="8xcpu", verify=True, time_limit=10
    )
    (losses, state), (expected, wanted) = (
        example.train(step),
        example.train(example.jit(example.train_step)),
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0]
    for a, b in zip(
        map(plain, jax.tree.leaves(state)), map(plain, jax.tree.leaves(wanted)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["decorate", "pipeline"])
def test_a_program_trains_and_prints_its_plan(name, capsys):
    assert len(jax.devices()) == 8  # it emulates as many or fewer
    losses = load(name).main(steps=2)
    assert losses[1] < losses[0]
    assert "predicted" in capsys.readouterr().out


def test_lines_for_the_command_line_are_tested_ones():
    lines = [
        x for x in (load("command_line").__doc__ or "").splitlines() if "--" in x or "run" in x
    ]
    pages = (FOLDER.parent / "docs" / "commands.md").read_text()
    assert len(lines) == 2 and all(f"$ {line}\n" in pages for line in lines)


def plain(leaf):
    return np.asarray(
        jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )


def test_the_list_of_examples_is_whole():
    text = (FOLDER / "README.md").read_text()
    assert all(f"`{file.name}`" in text for file in FOLDER.glob("*.py"))
