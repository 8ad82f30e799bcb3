"""A process with the filter executes and traces nothing, and does all else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bootseer_slurm.seccomp import with_files_only

_BEFORE = """
import ctypes, os, subprocess, sys
from bootseer_slurm.identity import gain_no_rights
from bootseer_slurm.seccomp import forbid_execution
gain_no_rights()
assert forbid_execution()
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", _BEFORE + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "call",
    [
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execve(os.open('/bin/true', os.O_RDONLY), ['true'], {})",
    ],
)
def test_nothing_is_executed(call: str) -> None:
    assert run(f"try: {call}\nexcept PermissionError: print('refused')") == "refused"


def test_no_shell_is_run() -> None:
    assert run("print(os.system('echo ran'))") == str(127 << 8)


def test_what_it_forks_has_the_filter_too() -> None:
    code = """
if os.fork() == 0:
    try: os.execv('/bin/true', ['true'])
    except PermissionError: os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert run(code) == "7"


def test_nothing_is_traced() -> None:
    assert run("print(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))") == "-1"


@pytest.mark.parametrize("family", ["AF_UNIX", "AF_INET", "AF_NETLINK"])
def test_a_program_with_files_only_has_no_sockets(family: str) -> None:
    code = f"import socket\ntry: socket.socket(socket.{family})\nexcept PermissionError: print('refused')"
    command = with_files_only([sys.executable, "-c", code])
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"


def test_a_program_with_files_only_traces_and_unshares_nothing() -> None:
    code = "import ctypes; c = ctypes.CDLL(None); print(c.ptrace(0, 0, 0, 0), c.unshare(0x10000000), c.setns(0, 0))"
    command = with_files_only([sys.executable, "-c", code])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "-1 -1 -1"


def test_threads_and_files_are_as_before() -> None:
    code = "import threading; t = threading.Thread(target=lambda: print(open('/proc/self/comm').read())); t.start()"
    assert run(code)


@pytest.mark.parametrize("forbidden", [False, True])
def test_a_profile_of_a_user_runs_no_program(tmp_path: Path, forbidden: bool) -> None:
    """The AWS library runs `credential_process` to get keys, and would do so in the agent's service."""
    marker = tmp_path / "ran"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = /usr/bin/touch {marker}\n")
    code = "forbid_execution()\n" if forbidden else ""
    code += """
from pyarrow import fs
s3 = fs.S3FileSystem(region="us-east-1", scheme="http", endpoint_override="127.0.0.1:1", connect_timeout=1,
                     retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1))
try: s3.get_file_info("bucket/key")
except OSError: print("no keys")
"""
    imports = _BEFORE.replace("assert forbid_execution()", "")
    environ = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/"}
    done = subprocess.run(
        [sys.executable, "-c", imports + code],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "no keys\n" and marker.exists() != forbidden
