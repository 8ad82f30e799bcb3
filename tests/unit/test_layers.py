"""The layers of pyproject.toml, which import-linter checks, name every module; and no room is too full."""

from __future__ import annotations

import re
from pathlib import Path

import tomli

REPO = Path(__file__).resolve().parents[2]


def test_every_module_is_in_a_layer() -> None:
    contracts = tomli.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    named = {name.strip() for layer in layers for name in layer.split("|")}
    modules = {
        re.sub(r"\.__init__$", "", ".".join(path.relative_to(REPO).with_suffix("").parts))
        for path in (REPO / "bootseer_slurm").rglob("*.py")
    }
    assert named <= modules, "a layer of a module that is gone"
    left_out = [
        each
        for each in modules - {"bootseer_slurm"}
        if not any(each == name or each.startswith(f"{name}.") for name in named)
    ]
    assert left_out == []


def test_a_room_holds_at_most_a_dozen_modules() -> None:
    for folder in (REPO / "bootseer_slurm").glob("*/**/"):
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 12, folder.name
