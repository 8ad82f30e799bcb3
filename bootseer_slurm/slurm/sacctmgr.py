"""Calls of sacctmgr: who may see all jobs, and a line in a job's AdminComment.

The only caller of sacctmgr in this package. Keeps nothing; processes with a time limit, several at once where
there are many comments.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from bootseer_slurm.errors import InputError
from bootseer_slurm.slurm.jobs import AccountingError

_LEVELS = ("Operator", "Administrator")
_COMMENT = re.compile(r"[a-z0-9 .,:;()/+-]{1,200}")  # sacctmgr makes letters small, and ends texts at quotes
_SHOWN_ID = re.compile(r"[0-9]{1,10}([_+][0-9]{1,10})?")
_PARALLEL = 32  # a change takes 0.2 s, nearly all of it waiting for one another: seen with Slurm 22.05
_TIMEOUT_S = 30.0
_EACH_S = 2.0


def is_operator(user: str) -> bool:
    """Whether Slurm's accounting has this user as Operator or Administrator.

    Raises AccountingError when it cannot be asked.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}", user):
        return False
    argv = ["--noheader", "--parsable2", "show", "user", f"name={user}", "format=User,AdminLevel"]
    output = _run(argv, "", timeout_s=_TIMEOUT_S)
    return any(line.split("|") in ([user, level] for level in _LEVELS) for line in output.splitlines())


def set_admin_comments(comments: Mapping[str, str]) -> None:
    """Write the AdminComment of the last run of each of these jobs; whoever cares reads them back.

    comments: by the job's id as sacct shows it ("12", "12_3", "12+1"), for the number of an array's task may
    be that of the array, and would change them all. Raises InputError (a text that sacctmgr would not take
    as it is), AccountingError.
    """
    for shown_id, text in comments.items():
        if not _SHOWN_ID.fullmatch(shown_id) or not _COMMENT.fullmatch(text):
            raise InputError(f"job {shown_id[:40]!r}: not a comment that sacctmgr takes: {text[:60]!r}")
    commands = [
        f'modify job where jobid={shown_id} set AdminComment="{text}"\n'
        for shown_id, text in comments.items()
    ]
    shares = [share for share in (commands[start::_PARALLEL] for start in range(_PARALLEL)) if share]

    def write(share: list[str]) -> None:
        # Its status is 1 when one job was not found: the others are changed all the same.
        _run([], "".join(share), timeout_s=_TIMEOUT_S + _EACH_S * len(share), statuses=(0, 1))

    with ThreadPoolExecutor(len(shares) or 1) as pool:
        list(pool.map(write, shares))


def _run(argv: list[str], text: str, *, timeout_s: float, statuses: tuple[int, ...] = (0,)) -> str:
    """The output of sacctmgr; `text` are commands for its stdin. Raises AccountingError."""
    try:
        done = subprocess.run(
            ["sacctmgr", "--immediate", *argv],
            env={**os.environ, "LC_ALL": "C", "LANG": "C"},
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise AccountingError("sacctmgr is not installed here") from None
    except subprocess.TimeoutExpired:
        raise AccountingError(f"sacctmgr did not answer in {timeout_s:g} s") from None
    except OSError as error:
        raise AccountingError(f"sacctmgr cannot be run: {error.strerror}") from error
    if done.returncode not in statuses:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"exit status {done.returncode}"
        raise AccountingError(f"sacctmgr failed: {''.join(c if c.isprintable() else ' ' for c in why)[:200]}")
    return done.stdout
