"""scripts/lib/sizes.py: what is too large is found, and a comment that says why is enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lib.sizes import findings

REPO = Path(__file__).resolve().parents[2]


def a_class(methods: int = 0, attributes: int = 0, fields: int = 0, head: str = "class X:") -> str:
    lines = [head, *(f"    field{number}: int" for number in range(fields))]
    lines += [f"    def method{number}(self): pass" for number in range(methods)]
    lines += [
        "    def __init__(self):",
        "        pass",
        *(f"        self.a{number} = 0" for number in range(attributes)),
    ]
    return "\n".join(lines)


def a_function(lines: int = 2, parameters: str = "", head: str = "def f(PARAMETERS):") -> str:
    return "\n".join([head.replace("PARAMETERS", parameters), *["    pass"] * (lines - 1)])


@pytest.mark.parametrize(
    "source",
    [
        a_class(methods=11),
        a_class(attributes=12),
        a_class(attributes=6, fields=6),
        a_function(lines=60),
        a_function(parameters="a, b, /, c, *args, d, e, f, **kwargs"),
        "class X:\n    def f(self, a, b, c, d, e, f): pass\n    @classmethod\n    def g(cls, a, b, c, d, e, f): pass",
        "pass\n" * 400,
    ],
)
def test_what_is_at_the_limit_is_no_finding(source: str) -> None:
    assert findings(source, "m.py") == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (a_class(methods=12), ["m.py:1: class X has 13 methods (12 at most)"]),
        (a_class(attributes=13), ["m.py:1: class X has 13 attributes (12 at most)"]),
        (a_class(attributes=6, fields=7), ["m.py:1: class X has 13 attributes (12 at most)"]),
        ("\n" + a_function(lines=61), ["m.py:2: function f has 61 lines (60 at most)"]),
        (
            a_function(parameters="a, b, /, c, d, *, e, f, g"),
            ["m.py:1: function f has 7 parameters (6 at most)"],
        ),
        (
            a_function(head="async def f(PARAMETERS):", lines=61),
            ["m.py:1: function f has 61 lines (60 at most)"],
        ),
        ("pass\n" * 401, ["m.py:1: module has 401 lines (400 at most)"]),
    ],
)
def test_what_is_above_it_is_found(source: str, found: list[str]) -> None:
    assert findings(source, "m.py") == found


def test_tuples_and_nested_functions_count_too() -> None:
    assigned = "class X:\n    def f(self):\n        self.a, (self.b, *self.c) = x\n        def g():\n            self.d += 1\n"
    assigned += "".join(f"        self.e{number}: int = 0\n" for number in range(9))
    assert findings(assigned, "m.py") == ["m.py:1: class X has 13 attributes (12 at most)"]


@pytest.mark.parametrize(
    "source",
    [
        "# size: mirrors a format\n" + a_class(fields=13),
        a_class(fields=13, head="class X:  # size: mirrors a format"),
        "# size: mirrors a format\n@dataclass\n@final\n" + a_class(fields=13),
        "@dataclass\n# size: mirrors a format\n" + a_class(fields=13),
        "class Y:\n    # size: a table\n    def f():\n" + "        pass\n" * 60,
        '"""A module."""\n\n# size: one table\n' + "pass\n" * 400,
    ],
)
def test_a_comment_that_says_why_is_enough(source: str) -> None:
    assert findings(source, "m.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "# size:\n" + a_class(fields=13),  # it does not say why
        "# size: far above\n\n" + a_class(fields=13),
        "# size: of another\ndef f(): pass\n" + a_class(fields=13),
        "# size: of the function\n" + a_function(lines=61) + "\n" + "pass\n" * 340,  # and not of the module
        "pass\n" * 40 + "# size: too late\n" + "pass\n" * 361,
    ],
)
def test_a_comment_elsewhere_is_not(source: str) -> None:
    assert len(findings(source, "m.py")) == 1


def test_the_command_fails_with_findings_unless_it_shall_only_report(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(a_class(methods=13))
    command = [sys.executable, "-B", "-m", "scripts.lib.sizes", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        1,
        f"{tmp_path}/large.py:1: class X has 14 methods (12 at most)\n",
    )
    assert (
        subprocess.run(
            [*command, "--report-only"], cwd=REPO, stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )
    (tmp_path / "large.py").write_text("")
    assert subprocess.run(command, cwd=REPO, check=False).returncode == 0
