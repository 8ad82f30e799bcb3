"""The threat model in docs/security.md: each test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_each_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (REPO / "docs/security.md").read_text())
    assert len(named) > 50
    gone = [
        f"{file}::{name}"
        for file, name in named
        if not (REPO / file).is_file() or not re.search(rf"def {name}\(", (REPO / file).read_text())
    ]
    assert gone == []
