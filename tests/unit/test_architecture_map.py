"""The map in docs/architecture.md: every module in one line, which is the first sentence of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import tomli

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "bootseer_slurm"


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0].rstrip(".:")


def rows(folder: Path) -> list[str]:
    modules = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    return [f"| `{path.stem}` | {first_sentence(path)} |" for path in modules]


def chapter() -> str:
    """The map, between its mark and the end of the page: rooms from the top of the layers to the ground."""
    contracts = tomli.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(
        each["layers"] for each in contracts if each["type"] == "layers" and "containers" not in each
    )
    names = [name.strip().removeprefix("bootseer_slurm.") for layer in layers for name in layer.split("|")]
    parts = []
    for name in names:
        folder = PACKAGE / name.replace(".", "/")
        if folder.is_dir():
            parts += [
                f"### {name}/",
                "",
                f"{first_sentence(folder / '__init__.py')}.",
                "",
                "| module | |",
                "|---|---|",
            ]
            for inner in (folder, *sorted(path.parent for path in folder.glob("*/__init__.py"))):
                prefix = "" if inner is folder else f"{inner.name}/"
                parts += [row.replace("| `", f"| `{prefix}", 1) for row in rows(inner)]
            parts += [""]
    ground = [row for row in rows(PACKAGE) if row]
    return "\n".join([*parts, "### the ground floor", "", "| module | |", "|---|---|", *ground, ""])


def test_the_map_names_every_module() -> None:
    page = (REPO / "docs/architecture.md").read_text()
    assert page.split("<!-- map -->\n")[1] == chapter(), "put what `chapter` gives there"


def test_every_module_says_what_it_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        sentence = first_sentence(path)
        assert 10 < len(sentence) < 160 and not sentence.startswith("What "), f"{path}: {sentence}"
