"""The end of what a process says."""

from __future__ import annotations

import subprocess
import time

import pytest

from bootseer_slurm.tail import last_lines


def run(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_the_last_lines_are_kept_and_no_more() -> None:
    assert last_lines(run("echo one; echo; echo two >&2"), 10) == ["one", "two"]
    lines = last_lines(run("yes | head -c 100000000; echo; echo end"), 60)
    assert lines[-1] == "end" and sum(map(len, lines)) < 5000


def test_one_that_leaves_its_output_open_is_not_waited_for() -> None:
    begin_s = time.monotonic()
    process = run("(trap '' HUP; while sleep 0.1; do echo still here; done) & echo $!; exit 3")
    pid = int(last_lines(process, 30)[0])
    subprocess.run(["kill", "-9", str(pid)], check=False)
    assert process.returncode == 3 and time.monotonic() - begin_s < 10


def test_one_that_does_not_end() -> None:
    process = run("exec sleep 60")
    with pytest.raises(subprocess.TimeoutExpired):
        last_lines(process, 0.5)
    process.kill()
    process.wait()
