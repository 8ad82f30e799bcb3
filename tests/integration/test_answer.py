"""Who may see what: the service that root runs, asked by real users through a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.report import answer
from bootseer_slurm.report.collect import collect
from tests.integration.node import ALICE, BOB, unit_rights, wait_until
from tests.integration.test_collect import Site

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
# The accounts of this machine have neither of the two: the service's process is told of them.
_ANSWER = """
import pwd, sys
users = {%d: "alice", %d: "bob"}
known = pwd.getpwuid
class Entry:
    def __init__(self, uid): self.pw_name, self.pw_gid, self.pw_dir = users[uid], uid, "/"
pwd.getpwuid = lambda uid: Entry(uid) if uid in users else known(uid)
from bootseer_slurm.__main__ import main
sys.argv = ["bootseer", "answer"]
main()
""" % (ALICE, BOB)  # noqa: UP031


class Service:
    """Starts one process for each connection with the socket as stdin, as systemd does with Accept=yes."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.socket = site.records.parent / "answer.sock"
        site.config.write_text(site.config.read_text() + f'socket = "{self.socket}"\n')
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.socket))
        self.socket.chmod(0o666)
        self.listener.listen()
        self.processes: list[subprocess.Popen[bytes]] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self.listener.accept()
                with link:
                    environ = os.environ | {"BOOTSEER_CONFIG": str(self.site.config)}
                    environ["RUNTIME_DIRECTORY"] = str(self.site.records.parent)
                    self.processes.append(self._start(link, environ))

    def _start(self, link: socket.socket, environ: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [*unit_rights("bootseer-answer@.service"), sys.executable, "-c", _ANSWER]
        return subprocess.Popen(command, stdin=link, env=environ)

    def bootseer(self, uid: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, run by a user."""
        return subprocess.run(
            [sys.executable, "-m", "bootseer_slurm", "--config", str(self.site.config), *arguments],
            user=uid, group=uid, extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip

    def jobs_seen(self, uid: int) -> int:
        done = self.bootseer(uid, "overhead", "--format", "json")
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["total"]["starts"])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a test may have closed it
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    folder = Path(tempfile.mkdtemp(prefix="bootseer-answer-"))
    folder.chmod(0o755)
    site = Site(folder)
    monkeypatch.setenv("PATH", f"{site.accounting.folder}:{os.environ['PATH']}")
    made = Service(site)
    site.run(ALICE, 7)
    site.run(BOB, 8)
    site.run(BOB, 9)
    yield made
    made.close()
    shutil.rmtree(folder)


def test_users_see_their_own_starts_operators_and_root_all(service: Service) -> None:
    collect(service.site.uri, service.site.records)
    assert (service.jobs_seen(ALICE), service.jobs_seen(BOB), service.jobs_seen(0)) == (1, 2, 3)
    service.site.accounting.set_level(alice="Operator")
    assert (service.jobs_seen(ALICE), service.jobs_seen(BOB)) == (3, 2)
    service.site.accounting.set_level(bob="Administrator")
    assert (service.jobs_seen(ALICE), service.jobs_seen(BOB)) == (1, 3)


def test_the_records_themselves_are_closed(service: Service) -> None:
    collect(service.site.uri, service.site.records)
    done = subprocess.run(
        ["ls", service.site.records],
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0 and b"Permission denied" in done.stderr


def test_when_accounting_does_not_answer_nobody_is_an_operator(service: Service) -> None:
    collect(service.site.uri, service.site.records)
    service.site.accounting.set_level(alice="Operator")
    (service.site.accounting.folder / "sacctmgr").write_text("#!/bin/sh\necho 'alice|Operator'\nexit 1\n")
    assert service.jobs_seen(ALICE) == 1


def test_the_report_of_another_users_job_is_for_operators(service: Service) -> None:
    own = service.bootseer(BOB, "report", "8", "--format", "json")
    assert json.loads(own.stdout)["start_to_training_s"] == 40.0
    refused = service.bootseer(ALICE, "report", "8", "--format", "json")
    assert refused.returncode == 2 and "another user's" in refused.stderr and refused.stdout == ""
    service.site.accounting.set_level(alice="Operator")
    seen = service.bootseer(ALICE, "report", "8", "--format", "json")
    assert json.loads(seen.stdout)["start_to_training_s"] == 40.0, seen.stderr
    assert json.loads(service.bootseer(0, "report", "8", "--format", "json").stdout)["uid"] == BOB


def test_without_accounting_a_user_is_asked_about_his_own_events_only(service: Service) -> None:
    (service.site.accounting.folder / "sacct").unlink()
    service.site.put(ALICE, 8, training_s=900)  # as if it were hers
    done = service.bootseer(BOB, "report", "8", "--format", "json")
    assert json.loads(done.stdout)["start_to_training_s"] == 40.0, done.stderr


def test_without_the_service_a_user_still_has_his_own_reports(service: Service) -> None:
    service.close()
    assert json.loads(service.bootseer(BOB, "report", "8", "--format", "json").stdout)["uid"] == BOB
    done = service.bootseer(BOB, "overhead")
    assert (
        done.returncode == 2 and "nobody answers" in done.stderr and "bootseer-answer.socket" in done.stderr
    )


def ask(service: Service, request: bytes, uid: int) -> bytes:
    """All that the service says to a request as it stands, of a user."""
    code = ("import socket, sys\n"
            "link = socket.socket(socket.AF_UNIX)\nlink.connect(sys.argv[1])\n"
            "link.sendall(sys.stdin.buffer.read())\nlink.shutdown(1)\n"
            "while part := link.recv(65536): sys.stdout.buffer.write(part)\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-IS", "-c", code, str(service.socket)], input=request, user=uid, group=uid,
                          extra_groups=[], capture_output=True, check=True)  # fmt: skip
    return done.stdout


def test_what_is_no_request_gets_one_line_and_nothing_else(service: Service) -> None:
    collect(service.site.uri, service.site.records)
    for request_ in (
        b"\n", b"rubbish\n", b"[]\n", b"[" * 5000, b'{"op": "records"}\n', b'{"op": "records", "since_ms": -1}\n', b'{"op": "records", "since_ms": 281474976710655}\n',
        b'{"op": "records", "since_ms": "0"}\n', b'{"op": ["records"]}\n', b'{"op": "events", "uid": 0}\n',
        b'{"op": "secrets"}\n', b'{"op": "events", "uid": "../../0", "job": 1, "restart": 0}\n', b"\xff\xfe\n",
    ):  # fmt: skip
        reply = json.loads(ask(service, request_, 0))
        assert reply["class"] == "InputError" and reply["error"] == "not a request", request_


def test_a_request_says_nothing_of_who_asks(service: Service) -> None:
    for request_ in (
        {"op": "users"},
        {"op": "restarts", "uid": BOB, "job": 8},
        {"op": "events", "uid": BOB, "job": 8, "restart": 0},
    ):
        reply = json.loads(
            ask(service, json.dumps(request_ | {"peer": 0, "user": "root"}).encode() + b"\n", ALICE)
        )
        assert "operators" in reply["error"]


def test_one_who_says_nothing_and_one_who_hears_nothing_hold_up_no_other(service: Service) -> None:
    collect(service.site.uri, service.site.records)
    with contextlib.ExitStack() as stack:
        for request in (b"", b'{"op": "records", "since_ms": 0}\n'):
            link = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            link.connect(str(service.socket))
            link.sendall(request)
        assert service.jobs_seen(BOB) == 2


def test_a_user_with_many_connections_is_refused_at_once_and_keeps_nobody_out(service: Service) -> None:
    collect(service.site.uri, service.site.records)
    code = ("import socket, sys\nlinks = []\n"
            f"for _ in range({answer._MOST_OF_USER}):\n"
            "    links.append(socket.socket(socket.AF_UNIX))\n    links[-1].connect(sys.argv[1])\n"
            "print('there', flush=True)\nsys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-IS", "-c", code, str(service.socket)], user=ALICE, group=ALICE,
                          extra_groups=[], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout and child.stdout.readline() == b"there\n"
        locks = service.site.records.parent
        wait_until(lambda: len(list(locks.glob(f"{ALICE}.*"))) == answer._MOST_OF_USER, timeout_s=60)
        request = b'{"op": "records", "since_ms": 0}\n'
        assert b"connections already" in ask(service, request, ALICE)
        assert (service.jobs_seen(BOB), service.jobs_seen(0)) == (2, 3)
        child.kill()
    for process in list(service.processes):
        process.wait(60)
    assert service.jobs_seen(ALICE) == 1, "the room is given back"


def test_a_process_ends_by_itself(service: Service) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(str(service.socket))
        deadline_s = time.monotonic() + 20
        while not service.processes and time.monotonic() < deadline_s:
            time.sleep(0.02)
    assert service.processes[0].wait(20) == 0  # its client went away


def test_stdin_that_is_no_socket_is_said(service: Service) -> None:
    done = service.bootseer(0, "answer")
    assert done.returncode == 2 and "stdin" in done.stderr


@pytest.mark.parametrize("arguments", [("--by", "moon"), ("--format", "html"), ("--since", "yesterday")])
def test_what_overhead_cannot_do_is_said_in_a_line(service: Service, arguments: tuple[str, str]) -> None:
    done = service.bootseer(ALICE, "overhead", *arguments)
    assert done.returncode == 2 and arguments[1] in done.stderr and "Traceback" not in done.stderr
