"""sacctmgr: who is an operator, and comments that it takes; a small script on PATH plays its part.

What a real sacctmgr does with them is in tests/slurm/test_collect.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bootseer_slurm.errors import InputError
from bootseer_slurm.slurm import sacctmgr
from bootseer_slurm.slurm.jobs import AccountingError


def play(folder: Path, output: str = "", *, errors: str = "", status: int = 0) -> None:
    script = folder / "sacctmgr"
    script.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\n"
        f"open({str(folder)!r} + '/called.' + str(os.getpid()), 'w').write('\\n'.join(sys.argv[1:]) + '\\n' + sys.stdin.read())\n"
        f"print({output!r}, end='')\nsys.stderr.write({errors!r})\nsys.exit({status})\n"
    )
    script.chmod(0o755)


def called(folder: Path) -> list[str]:
    return sorted(line for path in folder.glob("called.*") for line in path.read_text().splitlines())


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("output", "expected"), [
    ("alice|Operator\n", True), ("alice|Administrator\n", True), ("alice|None\n", False), ("", False),
    ("malice|Administrator\n", False), ("alice|Operator|x\n", False), ("nobody|None\nalice|Operator\n", True),
])  # fmt: skip
def test_only_what_accounting_says_of_this_user_counts(path: Path, output: str, expected: bool) -> None:
    play(path, output)
    assert sacctmgr.is_operator("alice") is expected


@pytest.mark.parametrize("name", ["", "-i", "a,b", "a b", "a|b", "a\nb", "x" * 65])
def test_a_name_that_could_mean_more_than_a_user_is_no_operators(path: Path, name: str) -> None:
    play(path, f"{name}|Administrator\n")
    assert sacctmgr.is_operator(name) is False
    assert called(path) == []


def test_accounting_that_does_not_answer_is_an_error(path: Path) -> None:
    with pytest.raises(AccountingError, match="not installed"):
        sacctmgr.is_operator("alice")
    play(path, errors="sacctmgr: error: Connection\x1b refused\n", status=1)
    with pytest.raises(AccountingError, match="Connection  refused"):
        sacctmgr.is_operator("alice")


def test_every_comment_is_given_once_and_named_as_sacct_shows_its_job(path: Path) -> None:
    play(path)
    comments = {str(number): f"bootseer: start {number}s" for number in range(1, 20)} | {
        "30_2": "bootseer: a",
        "40+1": "b",
    }
    sacctmgr.set_admin_comments(comments)
    commands = [line for line in called(path) if line.startswith("modify")]
    assert commands == sorted(
        f'modify job where jobid={job} set AdminComment="{text}"' for job, text in comments.items()
    )


@pytest.mark.parametrize(("job", "text"), [
    ("1", 'x" where jobid=2'), ("1", "a\nmodify job"), ("1", "Capital"), ("1", ""), ("1", "x" * 201),
    ("1,2", "a"), ("1 or 2", "a"), ("", "a"), ("1_[1-3]", "a"),
])  # fmt: skip
def test_what_sacctmgr_would_read_otherwise_never_gets_there(path: Path, job: str, text: str) -> None:
    play(path)
    with pytest.raises(InputError):
        sacctmgr.set_admin_comments({"7": "fine", job: text})
    assert called(path) == []


def test_one_job_that_is_not_found_is_no_failure_of_the_others(path: Path) -> None:
    play(path, status=1, errors="Nothing modified")
    sacctmgr.set_admin_comments({"1": "a"})
    play(path, status=2)
    with pytest.raises(AccountingError, match="exit status 2"):
        sacctmgr.set_admin_comments({"1": "a"})
