"""The table of operations: docs/protocol.md shows it, the server answers all of it, and clients ask by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bootseer_slurm import config
from bootseer_slurm.agentapi.client import PUBLIC
from bootseer_slurm.agentapi.operations import OPERATIONS, Asker, Field
from bootseer_slurm.service.answers import Answers, slow_operations
from bootseer_slurm.service.sockets.server import _may_ask

REPO = Path(__file__).resolve().parents[2]
# Where each client's messages are written, and how a key stands there.
HOOK, PLUGIN = REPO / "prolog.d/50-bootseer", [REPO / "spank/stepd.c", REPO / "spank/options.c"]


def shown(fields: tuple[Field, ...]) -> str:
    return "; ".join(f"`{field.key}` {field.what}" for field in fields) or "nothing"


def chapter() -> str:
    """What docs/protocol.md has of the table, between its two marks."""
    parts = []
    for each in OPERATIONS.values():
        parts += [
            f"### {each.name}",
            "",
            f"{each.what[0].upper()}{each.what[1:]}. Asked by {each.asker.value}.",
            "",
        ]
        parts += [f"- asks: {shown(each.fields)}", f"- reply: {shown(each.reply)}"]
        parts += [f"- descriptors: {each.descriptors}"] if each.descriptors else []
        parts += ["- begins with `WAIT`"] if each.slow else []
        parts += [""]
    return "\n".join(parts)


def test_the_documentation_shows_the_table() -> None:
    page = (REPO / "docs/protocol.md").read_text()
    found = page.split("<!-- operations -->\n")[1]
    assert found == chapter(), "put what `chapter` gives there"


def test_the_agent_answers_each() -> None:
    assert all(callable(getattr(Answers, op)) for op in OPERATIONS)


def test_for_each_slow_one_it_is_known_how_long_it_may_take() -> None:
    assert set(slow_operations(config.Config())) == {name for name, each in OPERATIONS.items() if each.slow}


def test_the_public_ones_are_those_that_anyone_may_ask() -> None:
    assert set(PUBLIC) == {name for name, each in OPERATIONS.items() if each.asker is Asker.ANYONE}


@pytest.mark.parametrize(
    ("op", "by"),
    [
        ("status", {"abstract, root", "abstract, user", "path, root", "path, user"}),
        ("image", {"path, root", "path, user"}),
        ("attach", {"path, root"}),
        ("no such", {"path, root"}),  # who is told so
    ],
)
def test_who_may_ask(op: str, by: set[str]) -> None:
    asked = [
        (f"{name}, {who}", name == "abstract", uid)
        for name in ("abstract", "path")
        for who, uid in (("root", 0), ("user", 1000))
    ]
    assert {name for name, public, uid in asked if _may_ask(OPERATIONS.get(op), public, uid)} == by


def keys(op: str) -> set[str]:
    return {field.name for field in OPERATIONS[op].fields}


def test_the_hook_sends_no_key_that_is_not_in_the_table() -> None:
    sent = set(re.findall(r'b"([A-Z_]+)": b"S', HOOK.read_text())) | set(
        re.findall(r'\(b"([A-Z_]+)", ', HOOK.read_text())
    )
    assert {key for key in sent if not key.startswith("SLURM_")} - {"OP"} == keys("prolog"), (
        "and all of these"
    )


def test_the_stand_in_of_squashfuse_asks_for_a_mount() -> None:
    code = (REPO / "libexec/squashfuse").read_text()
    assert set(re.findall(r"OP=([a-z]+)\\0([A-Z_]+)=", code)) == {("mount", "IMAGE")} and keys("mount") == {
        "IMAGE"
    }


def test_the_plugin_sends_no_key_that_is_not_in_the_table() -> None:
    code = "".join(path.read_text() for path in PLUGIN)
    sent = set(re.findall(r'agent_addf?\(&?message, "([A-Z_]+)"', code))
    wires = set(re.findall(r'\[REQUEST_\w+\] = \{ "\w+",\s*"\w+",\s*"(\w+)"', code))
    assert "BOOTSEER" in wires
    assert (sent | wires) - {"OP"} <= keys("attach") | keys("stage")
    required = {field.name for op in ("attach", "stage") for field in OPERATIONS[op].fields if field.required}
    assert required <= sent
