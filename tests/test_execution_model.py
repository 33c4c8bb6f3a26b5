"""The execution model: what a backend states, and that nothing else decides by the kind of device."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from meshwright.ir.cluster.parts import Device
from meshwright.ir.execution_model import Backend, ExecutionModel, execution_model, runs_on

ROOT = Path(__file__).parents[1]
KINDS = get_args(Device.model_fields["kind"].annotation)


@pytest.mark.parametrize("backend", get_args(Backend))
def test_a_backend_has_a_model_of_each_kind_of_device_that_it_runs_on(backend):
    kinds = runs_on(backend)
    models = [execution_model(kind, backend) for kind in kinds]
    assert len(set(models)) > 1 and all(hash(model) is not None for model in models)
    assert kinds == ({"cpu", "cuda"} if backend == "torch" else {*KINDS})


@pytest.mark.parametrize("name", [field.name for field in fields(ExecutionModel)])
def test_each_field_is_read_and_explained(name):
    files = [*(ROOT / "planner").rglob("*.py"), *(ROOT / "ir").rglob("*.py")]
    assert any(re.search(rf"\.{name}\b", file.read_text()) for file in files)
    assert f"        {name}: " in str(ExecutionModel.__doc__)
