"""Becoming a user, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootseer_slurm.identity import User, out_of_reach, without_rights

PACKAGE = Path(__file__).resolve().parents[2] / "bootseer_slurm"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def run(code: str) -> str:
    imports = "import os; from bootseer_slurm.identity import User, close_to_tracers, gain_no_rights\n"
    done = subprocess.run([sys.executable, "-c", imports + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@as_root
def test_all_ids_and_groups_are_the_users() -> None:
    said = run(
        "User(20001, 20002, (20002, 20003)).become(); print(os.getresuid(), os.getresgid(), os.getgroups())"
    )
    assert said == "(20001, 20001, 20001) (20002, 20002, 20002) [20002, 20003]"


@as_root
def test_a_program_out_of_reach_opens_files_as_the_user_who_cannot_trace_it() -> None:
    command = [*out_of_reach(User(20001, 20002, (20002, 20003))), "sleep", "60"]
    program = subprocess.Popen(command)
    try:
        path = Path(f"/proc/{program.pid}/status")
        deadline_s = time.monotonic() + 30
        while "Name:\tsleep" not in (status := path.read_text()):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert found["Uid"].split()[1:] == ["20001"] * 3 and found["NoNewPrivs"] == "1"
        assert found["Groups"].split() == ["20002", "20003"]
        look = f"User(20001, 20002, ()).become()\ntry: open('/proc/{program.pid}/mem')\n"
        assert run(look + "except PermissionError: print('refused')") == "refused"
    finally:
        program.kill()
        program.wait()


@as_root
def test_a_user_is_become_where_oom_scores_cannot_be_set() -> None:
    fixed = 'mount --bind /proc /proc && mount -o remount,ro,bind /proc && exec "$@"'
    here = ["unshare", "--mount", "sh", "-c", fixed, "sh"]
    code = "from bootseer_slurm.identity import User; User(20001, 20002, ()).become(); print('is')"
    for command in ([sys.executable, "-c", code], [*without_rights(61999), "echo", "is"]):
        done = subprocess.run([*here, *command], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("is\n", "")


@as_root
def test_a_program_without_rights() -> None:
    command = [*without_rights(61999), "cat", "/proc/self/status"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
    assert found["Uid"].split() == found["Gid"].split() == ["61999"] * 4 and found["Groups"].split() == []
    assert found["NoNewPrivs"] == "1" and {
        int(found[each], 16) for each in ("CapInh", "CapPrm", "CapBnd")
    } == {0}


@as_root
@pytest.mark.parametrize("call", ["os.setresuid(0, 0, 0)", "os.setgroups([0])", "os.setresgid(0, 0, 0)"])
def test_there_is_no_way_back(call: str) -> None:
    said = run(f"User(20001, 20001, ()).become()\ntry: {call}\nexcept PermissionError: print('refused')")
    assert said == "refused"


@as_root
def test_a_process_that_is_closed_belongs_to_root_in_proc() -> None:
    look = "print(os.stat('/proc/self/mem').st_uid)"
    assert run(f"User(20001, 20001, ()).become(); close_to_tracers(); {look}") == "0"


def test_no_rights_are_gained() -> None:
    look = "print(open('/proc/self/status').read().split('NoNewPrivs:')[1].split()[0])"
    assert run(f"gain_no_rights(); {look}") == "1"


def test_a_user_whom_nobody_knows_has_one_group() -> None:
    assert User.of(54321, 777) == User(54321, 777, (777,))


def test_no_other_module_becomes_a_user() -> None:
    calls = (
        "os.setresuid(",
        "os.setresgid(",
        "os.setgroups(",
        "os.setuid(",
        "os.seteuid(",
        "extra_groups",
        "setpriv",
    )
    found = {path.name for path in PACKAGE.rglob("*.py") if any(call in path.read_text() for call in calls)}
    assert found == {"identity.py"}
