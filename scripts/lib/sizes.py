"""The check that classes, functions and modules stay small: `python -m scripts.lib.sizes FOLDER...`

What is larger says why, in a comment `# size: <why>`: of a class or function at the end of its first line or
alone above it (or above its decorators), of a module alone in one of its first 40. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_METHODS = 12
MOST_ATTRIBUTES = 12
MOST_PARAMETERS = 6
MOST_FUNCTION_LINES = 60
MOST_MODULE_LINES = 400
_HEAD_LINES = 40  # of a module, where its own comment may stand
_ALONE = re.compile(r"\s*# size: \S")
_AT_END = re.compile(r".*# size: \S")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def findings(source: str, name: str) -> list[str]:
    """The parts that are too large and give no reason, as `name:line: part`, in the order of lines."""
    lines = source.splitlines()
    alone = {number for number, line in enumerate(lines, 1) if _ALONE.match(line)}
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, _Function)):
            above = _lines_above(node)
            if not above & alone and not _AT_END.match(lines[node.lineno - 1]):
                what = _of_class(node) if isinstance(node, ast.ClassDef) else _of_function(node)
                found += [(node.lineno, each) for each in what]
            alone -= above
    if len(lines) > MOST_MODULE_LINES and not any(line <= _HEAD_LINES for line in alone):
        found.append((1, f"module has {_over(len(lines), 'lines', MOST_MODULE_LINES)}"))
    return [f"{name}:{line}: {what}" for line, what in sorted(found)]


def _lines_above(node: ast.ClassDef | _Function) -> set[int]:
    """The line above `class` or `def`, and the one above its decorators: the comment may stand on either."""
    return {line - 1 for line in (node.lineno, *(each.lineno for each in node.decorator_list[:1]))}


def _of_class(node: ast.ClassDef) -> Iterator[str]:
    methods = [each for each in node.body if isinstance(each, _Function)]
    for count, what, most in (
        (len(methods), "methods", MOST_METHODS),
        (len(_attributes(node)), "attributes", MOST_ATTRIBUTES),
    ):
        if count > most:
            yield f"class {node.name} has {_over(count, what, most)}"


def _attributes(node: ast.ClassDef) -> set[str]:
    """The names that are assigned to self, and the annotated fields of the class."""
    assigned = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }
    fields = {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    return assigned | fields


def _of_function(node: _Function) -> Iterator[str]:
    parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = sum(each.arg not in ("self", "cls") for each in parameters)
    if count > MOST_PARAMETERS:
        yield f"function {node.name} has {_over(count, 'parameters', MOST_PARAMETERS)}"
    line_count = (node.end_lineno or node.lineno) - node.lineno + 1
    if line_count > MOST_FUNCTION_LINES:
        yield f"function {node.name} has {_over(line_count, 'lines', MOST_FUNCTION_LINES)}"


def _over(count: int, what: str, most: int) -> str:
    return f"{count} {what} ({most} at most)"


def main() -> int:
    """Print the findings of all modules below the folders; 1 when there are some."""
    parser = argparse.ArgumentParser(prog="python -m scripts.lib.sizes", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--report-only", action="store_true", help="exit with 0 whatever was found")
    options = parser.parse_args()
    found = [
        finding
        for folder in options.folders
        for path in sorted(folder.rglob("*.py"))
        for finding in findings(path.read_text(), str(path))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found and not options.report_only else 0


if __name__ == "__main__":
    sys.exit(main())
