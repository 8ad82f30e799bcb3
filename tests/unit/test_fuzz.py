"""Hostile inputs for every parser: some hundreds each, always the same ones; scripts/fuzz tries more."""

from __future__ import annotations

import pytest

from scripts.lib.fuzz.target import Broken, Target, try_some
from scripts.lib.fuzz.targets import TARGETS

INPUTS = 400


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_input_breaks_a_rule(target: Target) -> None:
    run = try_some(target, INPUTS)
    assert run.found is None, f"{run.found.content!r:.500}: {run.found.error!r}"
    assert run.inputs >= INPUTS and run.read > 0


@pytest.mark.parametrize("fault", ["an error", "another value"])
def test_a_broken_rule_is_found_and_made_small(fault: str) -> None:
    def parse(content: bytes) -> bytes:
        if b"\xff" in content and fault == "an error":
            raise KeyError(fault)
        return content

    def render(content: bytes) -> bytes:
        return content if fault != "another value" else content.replace(b"\xff", b"")

    run = try_some(Target("of the test", lambda: [b"a valid input"], parse, render=render), 2000)
    assert run.found is not None and b"\xff" in run.found.content
    assert len(run.found.content) < 30


def test_an_input_that_takes_too_much_breaks_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(content: bytes) -> int:
        while content == b"time":
            content = bytes(content)
        return len(content * 2**28)

    monkeypatch.setattr("scripts.lib.fuzz.target.CPU_S", 0.2)
    for content in (b"time", b"memory"):
        with pytest.raises(Broken, match="takes"):
            Target("of the test", list, parse).check(content)
