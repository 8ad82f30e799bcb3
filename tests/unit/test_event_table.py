"""The table of events: docs/events.md shows it, writers record nothing else, the report asks for nothing else."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.event_table import ANY, COMMON, EVENTS, FIELDS, Field, unlisted
from bootseer_slurm.events import Event, EventLog, parse_line

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "bootseer_slurm"
TABLE = {PACKAGE / "event_table.py", PACKAGE / "events.py"}


def row(field: Field) -> str:
    unit = f", {field.unit}" if field.unit else ""
    return f"| `{field.key}` | {field.type}{unit} | {field.meaning} |"


def field_chapter() -> str:
    """The table of fields in docs/events.md, between its two marks."""
    return "\n".join(["| field | type | meaning |", "|---|---|---|", "| `v` | integer | 1: version of the format |",
                      *map(row, FIELDS.values()), ""])  # fmt: skip


def event_chapter() -> str:
    """The table of events in docs/events.md, between its two marks."""
    lines = ["| kind | name | meaning | fields |", "|---|---|---|---|"]
    for each in EVENTS.values():
        shown = (
            f"`{field.key}`" + ("" if field.meaning == FIELDS[field.key].meaning else f" ({field.meaning})")
            for field in each.fields
        )
        name = "any" if each.name == ANY else f"`{each.name}`"
        lines.append(f"| `{each.kind}` | {name} | {each.meaning} | {', '.join(shown)} |")
    return "\n".join([*lines, ""])


def test_the_documentation_shows_the_table() -> None:
    page = (REPO / "docs/events.md").read_text()
    assert page.split("<!-- fields -->\n")[1] == field_chapter(), "put what `field_chapter` gives there"
    assert page.split("<!-- events -->\n")[1] == event_chapter(), "put what `event_chapter` gives there"


def test_the_attributes_of_an_event_are_fields_in_this_order() -> None:
    attributes = [name for name in Event.__slots__ if name != "extra"]
    assert list(FIELDS)[: len(attributes)] == attributes


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path not in TABLE:
            yield path, ast.parse(path.read_text())


def constants(tree: ast.AST) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def emits() -> Iterator[tuple[str, ast.Call]]:
    """The calls of EventLog.emit in the package, each with where it is. (Other emits take one argument.)"""
    for path, tree in modules():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "emit"
                and len(node.args) == 2
            ):
                yield f"{path.relative_to(REPO)}:{node.lineno}", node


def names(node: ast.expr) -> list[str]:
    """The names that may stand there; none where only the run tells."""
    if isinstance(node, ast.IfExp):
        return names(node.body) + names(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) else []


def test_writers_record_only_events_and_fields_of_the_table() -> None:
    """Fields given as ** are seen by the integration tests: Node.events looks at what agents recorded."""
    count = 0
    for where, call in emits():
        count += 1
        (kind,) = names(call.args[0])
        of_kind = [each for each in EVENTS.values() if each.kind == kind]
        assert of_kind, f"{where}: {kind}"
        keys = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        for name in names(call.args[1]):
            assert unlisted(kind, name, keys) == "", where
        if not names(call.args[1]):
            known = {field.key for each in of_kind for field in (*COMMON, *each.fields)}
            assert keys <= known, where
    assert count > 20


def test_every_event_and_field_of_the_table_is_recorded_somewhere() -> None:
    said: set[str] = set()
    for path, tree in modules():
        if "report" not in path.relative_to(PACKAGE).parts:
            said |= constants(tree) | {
                node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg
            }
    assert {each.kind for each in EVENTS.values()} <= said
    assert {each.name for each in EVENTS.values()} - {ANY} <= said
    made = {"cpu_s", "io_s", "memory_s"}  # of the names of files in /proc/pressure
    # EventLog fills in those that every event has.
    assert set(FIELDS) - {field.key for field in COMMON} - made <= said


def test_the_report_asks_only_for_events_and_fields_of_the_table() -> None:
    pairs, keys = set(), set()
    for path, tree in modules():
        if "report" not in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "number"
            ):
                keys.update(names(node.args[0]))
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "first"
                and len(node.args) == 3
            ):
                pairs.update((kind, name) for kind in names(node.args[1]) for name in names(node.args[2]))
            if isinstance(node, ast.Compare) and ast.unparse(node.left) == "(event.kind, event.name)":
                (right,) = node.comparators
                assert isinstance(right, ast.Tuple)
                pairs.update((kind, name) for kind in names(right.elts[0]) for name in names(right.elts[1]))
    assert len(pairs) > 8 and len(keys) > 8
    assert keys <= set(FIELDS)
    assert [pair for pair in pairs if unlisted(*pair, ())] == []


def test_an_event_that_the_table_lacks_is_logged_and_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(7, 0, "n1")
    with caplog.at_level(logging.ERROR):
        log.emit("prefetch", "paused", target="/a")
        log.emit("prefetch", "begin", target="/a", colour="red")
    assert [event.name for event in log.events()] == ["paused", "begin"]
    assert [record.getMessage() for record in caplog.records] == [
        "job=7 not in the table of events: event prefetch paused",
        "job=7 not in the table of events: event prefetch begin: colour",
    ]


def test_a_reader_keeps_events_of_newer_nodes_and_no_field_of_another_type() -> None:
    event = parse_line(
        '{"v":1,"t_ns":1,"job":2,"restart":0,"node":"n1","kind":"orbit","name":"low","moons":2,"reads":"x","mode":1}'
    )
    assert (event.kind, event.name, event.extra) == ("orbit", "low", {"moons": 2})
