"""prolog.d/50-bootseer against real sockets: what it says, and that nothing makes it fail or wait."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodelists import nodelist_of

HOOK = Path(__file__).resolve().parents[2] / "prolog.d" / "50-bootseer"
# For an agent that hangs: the hook gives up after 0.1 s. Far more here, as machines for tests are busy.
HUNG_LIMIT_S = 5.0

PROLOG = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_UID": "1000",
    "SLURM_JOB_GID": "1001",
    "SLURM_JOB_USER": "alice",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURMD_NODENAME": "n1",
    "SLURM_JOB_PARTITION": "main",
    "SLURM_JOB_ACCOUNT": "research",
    "SLURM_JOB_RESTART_COUNT": "2",
    "SLURM_SCRIPT_CONTEXT": "prolog_slurmd",
    "SPANK_BOOTSEER_MODE": "1",
}
EPILOG = PROLOG | {"SLURM_SCRIPT_CONTEXT": "epilog_slurmd"}


class Agent:
    """A listener that takes what one client at a time says, and answers with fixed bytes, or never."""

    def __init__(self, path: Path, reply: bytes | None = b"STATUS=ok\0") -> None:
        self.path = path
        self.reply = reply
        self.requests: list[dict[bytes, bytes]] = []
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            link, _ = self._listener.accept()
            with link:
                if self._ended.is_set():
                    return
                if self.reply is None:
                    self._ended.wait()
                    return
                request = b"".join(iter(lambda link=link: link.recv(65536), b""))
                assert not request or request.endswith(b"\0")
                entries = [entry.partition(b"=") for entry in request.split(b"\0")[:-1]]
                assert len({key for key, _, _ in entries}) == len(entries)
                self.requests.append({key: value for key, _, value in entries})
                with contextlib.suppress(BrokenPipeError):  # the hook has a limit for replies
                    link.sendall(self.reply)

    def stop(self) -> None:
        self._ended.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            if link.connect_ex(str(self.path)) == 0:
                self._thread.join()
        self._listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    instance = Agent(tmp_path / "agent.sock")
    yield instance
    instance.stop()


def run_hook(
    path: Path, env: dict[str, str] | dict[bytes, bytes], timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    """Run the hook as slurmd does: no PATH, only these variables."""
    return subprocess.run(
        [HOOK, path],
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def assert_silent(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def assert_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.startswith("50-bootseer: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")


def test_prolog_says_all_it_knows(agent: Agent) -> None:
    before_ns = time.time_ns()
    extra = {
        "SPANK_BOOTSEER_PROFILE": 'images = ["/shared/a.sqsh"]\n',
        "SPANK_BOOTSEER_IMAGE": "docker://nvcr.io/x",
        "SPANK_BOOTSEER_ENV": "/shared/venv",
        "SPANK_BOOTSEER_CHECKPOINT": "/shared/ckpt",
        "SPANK_BOOTSEER_CONTAINER_IMAGE": "/shared/b.sqsh",
        "SPANK_BOOTSEER_JOB_NAME": "train",
        "SPANK_BOOTSEER_UNHEARD_OF": "x",
        "SLURM_JOB_GPUS": "0,1",
    }
    assert_silent(run_hook(agent.path, PROLOG | extra))
    (request,) = agent.requests
    start_ns = int(request.pop(b"HOOK_START_NS"))
    assert before_ns <= start_ns <= time.time_ns()
    assert request == {
        b"OP": b"prolog",
        b"JOB_ID": b"42",
        b"RESTART": b"2",
        b"UID": b"1000",
        b"GID": b"1001",
        b"NODELIST": b"n[1-2]",
        b"NODES": b"2",
        b"NODENAME": b"n1",
        b"PARTITION": b"main",
        b"ACCOUNT": b"research",
        b"GPUS": b"0,1",
        b"BOOTSEER": b"1",
        b"PROFILE": b'images = ["/shared/a.sqsh"]\n',
        b"IMAGE": b"docker://nvcr.io/x",
        b"ENV": b"/shared/venv",
        b"CHECKPOINT": b"/shared/ckpt",
        b"CONTAINER_IMAGE": b"/shared/b.sqsh",
        b"JOB_NAME": b"train",
    }


def test_first_start_is_restart_zero(agent: Agent) -> None:
    env = {key: value for key, value in PROLOG.items() if key != "SLURM_JOB_RESTART_COUNT"}
    assert_silent(run_hook(agent.path, env))
    assert agent.requests[0][b"RESTART"] == b"0"


def test_epilog(agent: Agent) -> None:
    before_ns = time.time_ns()
    assert_silent(run_hook(agent.path, EPILOG))
    (request,) = agent.requests
    assert before_ns <= int(request.pop(b"HOOK_START_NS")) <= time.time_ns()
    assert request == {b"OP": b"epilog", b"JOB_ID": b"42", b"RESTART": b"2"}


def test_epilog_without_a_restart_count_invents_none(agent: Agent) -> None:
    env = {key: value for key, value in EPILOG.items() if key != "SLURM_JOB_RESTART_COUNT"}
    assert_silent(run_hook(agent.path, env))
    assert set(agent.requests[0]) == {b"OP", b"JOB_ID", b"HOOK_START_NS"}


@pytest.mark.parametrize("env", [PROLOG, EPILOG], ids=["prolog", "epilog"])
def test_a_job_without_bootseer_does_not_connect(agent: Agent, env: dict[str, str]) -> None:
    assert_silent(run_hook(agent.path, {k: v for k, v in env.items() if k != "SPANK_BOOTSEER_MODE"}))
    assert agent.requests == []


@pytest.mark.parametrize(
    ("job_id", "told"), [("42", True), ("43", False), ("", False), (None, False), ("x $(reboot) *", False)]
)
def test_the_epilog_of_a_job_that_asked_in_a_step_only(
    agent: Agent, tmp_path: Path, job_id: str | None, told: bool
) -> None:
    """The agent keeps a file for the sessions that it has; here it lies where no root is needed."""
    jobs = tmp_path / "run" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "42").touch()
    hook = tmp_path / "50-bootseer"
    hook.write_text(HOOK.read_text().replace("/run/bootseer/jobs/", f"{jobs}/"))
    hook.chmod(0o755)
    env = {key: value for key, value in EPILOG.items() if key not in ("SPANK_BOOTSEER_MODE", "SLURM_JOB_ID")}
    if job_id is not None:
        env["SLURM_JOB_ID"] = job_id
    done = subprocess.run(
        [hook, agent.path], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert_silent(done)
    assert [request[b"JOB_ID"] for request in agent.requests] == ([b"42"] if told else [])


@pytest.mark.parametrize("observed", [True, False])
def test_where_the_agent_observes_all_every_job_is_told(agent: Agent, tmp_path: Path, observed: bool) -> None:
    if observed:
        (tmp_path / "observe-all").touch()
    hook = tmp_path / "50-bootseer"
    hook.write_text(HOOK.read_text().replace("/run/bootseer/observe-all", f"{tmp_path}/observe-all"))
    hook.chmod(0o755)
    env = {key: value for key, value in PROLOG.items() if key != "SPANK_BOOTSEER_MODE"}
    done = subprocess.run(
        [hook, agent.path], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert_silent(done)
    assert [request[b"JOB_ID"] for request in agent.requests] == ([b"42"] if observed else [])
    assert all(b"BOOTSEER" not in request for request in agent.requests), "it did not ask"


@pytest.mark.parametrize("env", [PROLOG, EPILOG], ids=["prolog", "epilog"])
def test_no_agent(tmp_path: Path, env: dict[str, str]) -> None:
    assert_one_line(run_hook(tmp_path / "agent.sock", env), "No such file")


def test_dead_agent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(str(tmp_path / "agent.sock"))
    assert_one_line(run_hook(tmp_path / "agent.sock", PROLOG), "Connection refused")


@pytest.mark.parametrize("env", [PROLOG, EPILOG], ids=["prolog", "epilog"])
def test_hung_agent(tmp_path: Path, env: dict[str, str]) -> None:
    instance = Agent(tmp_path / "agent.sock", reply=None)
    try:
        assert_one_line(run_hook(instance.path, env, timeout_s=HUNG_LIMIT_S), "did not answer in time")
    finally:
        instance.stop()


@pytest.mark.parametrize(
    "reply", [None, b"", b"STATUS=error\0MESSAGE=no\0"], ids=["hung", "nothing", "error"]
)
def test_an_epilog_that_was_not_taken_leaves_a_word(tmp_path: Path, reply: bytes | None) -> None:
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / "42").touch()
    os.utime(tmp_path / "ended" / "42", (1, 1))  # of an earlier start
    instance = Agent(tmp_path / "agent.sock", reply=reply)
    before_s = time.time() - 1  # the kernel's clock of files is late by some milliseconds
    try:
        run_hook(instance.path, PROLOG, timeout_s=HUNG_LIMIT_S)
        assert (tmp_path / "ended" / "42").stat().st_mtime == 1, "the word is the epilog's"
        assert_one_line(run_hook(instance.path, EPILOG, timeout_s=HUNG_LIMIT_S), "")
    finally:
        instance.stop()
    assert before_s < (tmp_path / "ended" / "42").stat().st_mtime <= time.time()


def test_an_epilog_that_is_killed_leaves_a_word(tmp_path: Path) -> None:
    (tmp_path / "ended").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        with subprocess.Popen(
            [HOOK, tmp_path / "agent.sock"], env=EPILOG, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            link, _ = listener.accept()
            os.killpg(process.pid, signal.SIGKILL)
            link.close()
    assert [path.name for path in (tmp_path / "ended").iterdir()] == ["42"]


def test_an_epilog_without_an_agent_leaves_a_word(tmp_path: Path) -> None:
    (tmp_path / "ended").mkdir()
    done = run_hook(tmp_path / "agent.sock", EPILOG)
    assert_one_line(done, "it finds that the job is over")
    assert [path.name for path in (tmp_path / "ended").iterdir()] == ["42"]


def test_an_epilog_that_was_taken_leaves_nothing(agent: Agent) -> None:
    (agent.path.parent / "ended").mkdir()
    assert_silent(run_hook(agent.path, EPILOG))
    assert list((agent.path.parent / "ended").iterdir()) == []


def test_hung_agent_and_more_to_say_than_the_socket_holds(tmp_path: Path) -> None:
    instance = Agent(tmp_path / "agent.sock", reply=None)
    env = PROLOG | {f"SPANK_BOOTSEER_{key}": "x" * 4096 for key in ("IMAGE", "ENV", "CHECKPOINT", "JOB_NAME")}
    env["SPANK_BOOTSEER_PROFILE"] = "#" * 65536
    try:
        assert_one_line(run_hook(instance.path, env, timeout_s=HUNG_LIMIT_S), "did not answer in time")
    finally:
        instance.stop()


def test_agent_that_takes_no_more_connections(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    waiting = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(0)
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.setblocking(False)
            waiting.append(link)
            if link.connect_ex(str(path)) != 0:
                break
        assert_one_line(run_hook(path, PROLOG, timeout_s=HUNG_LIMIT_S), "did not answer in time")
    for link in waiting:
        link.close()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "no reply"),
        (b"\xff\xfe\x00garbage", "no reply"),
        (b"x" * 300_000, "no reply"),
        (
            b"STATUS=error\0MESSAGE=disk \xff full\nsecond line\x1b[31m\0",
            "disk \\ufffd full?second line?[31m",
        ),
        (b"NOTSTATUS=ok\0XSTATUS=ok\0", "no reply"),
    ],
    ids=["nothing", "garbage", "too much", "error", "not quite"],
)
def test_odd_replies(tmp_path: Path, reply: bytes, words: str) -> None:
    instance = Agent(tmp_path / "agent.sock", reply=reply)
    try:
        assert_one_line(run_hook(instance.path, PROLOG), words)
    finally:
        instance.stop()


def test_agent_that_closes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        closer = threading.Thread(target=lambda: listener.accept()[0].close())
        closer.start()
        done = run_hook(path, PROLOG | {"SPANK_BOOTSEER_PROFILE": "#" * 65536})
        closer.join()
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1


def test_values_are_bytes(agent: Agent) -> None:
    env = {key.encode(): value.encode() for key, value in PROLOG.items()}
    env |= {
        b"SPANK_BOOTSEER_IMAGE": b"/shared/\xff\xfe\n;$(reboot)`id`'\"",
        b"SPANK_BOOTSEER_JOB_NAME": b"a\nSTATUS=ok\nOP=epilog\t\x1b[0m=",
        b"SPANK_\xff\xfe": b"\xff",
    }
    assert_silent(run_hook(agent.path, env))
    (request,) = agent.requests
    assert request[b"OP"] == b"prolog"
    assert request[b"IMAGE"] == env[b"SPANK_BOOTSEER_IMAGE"]
    assert request[b"JOB_NAME"] == env[b"SPANK_BOOTSEER_JOB_NAME"]


def test_python_takes_nothing_from_the_environment(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "_socket.py").write_text("raise SystemExit(3)")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(3)")
    env = PROLOG | {"PYTHONPATH": str(tmp_path), "PYTHONHOME": str(tmp_path), "PYTHONINSPECT": "1"}
    done = subprocess.run(
        [HOOK, agent.path], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert_silent(done)
    assert len(agent.requests) == 1


def test_a_value_that_is_too_long_is_left_out(agent: Agent) -> None:
    # One variable can be 128 KiB at most (MAX_ARG_STRLEN of execve(2)).
    done = run_hook(agent.path, PROLOG | {"SPANK_BOOTSEER_IMAGE": "x" * 130_000})
    assert_one_line(done, "SPANK_BOOTSEER_IMAGE is 130000 bytes long and ignored")
    assert b"IMAGE" not in agent.requests[0]


def test_the_longest_nodelist_that_slurm_passes_goes_whole(agent: Agent) -> None:
    # Slurm leaves out a variable of 128 KiB with its name and the NUL (setenvf of its src/common/env.c).
    nodelist = nodelist_of(10_000, size_bytes=131_055)
    assert_silent(run_hook(agent.path, PROLOG | {"SLURM_NODELIST": nodelist, "SLURM_JOB_NUM_NODES": "10000"}))
    assert agent.requests[0][b"NODELIST"].decode() == nodelist
    assert agent.requests[0][b"NODES"] == b"10000"


def test_a_longer_nodelist_is_refused_and_not_cut(agent: Agent) -> None:
    # Slurm gives none; the kernel passes one byte more than Slurm does (MAX_ARG_STRLEN of execve(2)).
    nodelist = nodelist_of(10_000, size_bytes=131_056)
    done = run_hook(agent.path, PROLOG | {"SLURM_NODELIST": nodelist, "SLURM_JOB_NUM_NODES": "10000"})
    assert_one_line(done, "SLURM_NODELIST is 131056 bytes long and ignored")
    assert b"NODELIST" not in agent.requests[0]
    assert agent.requests[0][b"NODES"] == b"10000", "the agent is told that the job has more nodes than one"


def test_a_job_whose_nodelist_slurm_left_out(agent: Agent) -> None:
    env = {key: value for key, value in PROLOG.items() if key != "SLURM_NODELIST"}
    assert_silent(run_hook(agent.path, env | {"SLURM_JOB_NUM_NODES": "12000"}))
    assert b"NODELIST" not in agent.requests[0]
    assert agent.requests[0][b"NODES"] == b"12000"


def test_much_that_does_not_concern_it(agent: Agent) -> None:
    env = PROLOG | {f"SPANK_OTHER_{number}": "x" * 100_000 for number in range(12)}
    assert_silent(run_hook(agent.path, env))
    assert len(agent.requests) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "4 2"}, "SLURM_JOB_ID"),
        ({"SLURM_SCRIPT_CONTEXT": "prolog_slurmctld"}, "prolog_slurmctld"),
        ({"SLURM_SCRIPT_CONTEXT": ""}, "SLURM_SCRIPT_CONTEXT"),
    ],
)
def test_not_from_slurmd(agent: Agent, change: dict[str, str], words: str) -> None:
    assert_one_line(run_hook(agent.path, PROLOG | change), words)
    assert agent.requests == []


def test_only_the_mode(agent: Agent) -> None:
    assert_one_line(run_hook(agent.path, {"SPANK_BOOTSEER_MODE": "1"}), "SLURM_JOB_ID")


def test_closed_standard_files(agent: Agent) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" "$1" <&- >&- 2>&-', HOOK, agent.path],
        env=PROLOG,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert agent.requests[0][b"OP"] == b"prolog"


def test_error_with_closed_standard_files(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" "$1" <&- >&- 2>&-', HOOK, tmp_path / "agent.sock"],
        env=PROLOG,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0


def test_nobody_reads_its_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([HOOK, tmp_path / "agent.sock"], env=PROLOG, stderr=writer, timeout=30, check=False)
    os.close(writer)
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_do_not_make_it_fail(tmp_path: Path, number: signal.Signals) -> None:
    arrived = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()

        def hang() -> None:
            link, _ = listener.accept()
            arrived.set()
            with link:
                while link.recv(65536):
                    pass
                time.sleep(HUNG_LIMIT_S / 10)

        thread = threading.Thread(target=hang)
        thread.start()
        with subprocess.Popen(
            [HOOK, tmp_path / "agent.sock"], env=PROLOG, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            assert arrived.wait(30)
            os.killpg(process.pid, number)
            assert process.wait(30) == 0
        thread.join()


def test_broken_python_does_not_fail_the_prolog(tmp_path: Path) -> None:
    broken = tmp_path / "50-bootseer"
    for interpreter in ("/nonexistent/python3", "/bin/false", "/bin/sh -c 'kill -9 $$'"):
        broken.write_text(HOOK.read_text().replace("/usr/bin/python3 -IS", interpreter))
        broken.chmod(0o755)
        done = subprocess.run([broken], env=PROLOG, capture_output=True, timeout=30, check=False)
        assert done.returncode == 0


def test_leaves_nothing_behind(agent: Agent, tmp_path: Path) -> None:
    with subprocess.Popen(
        [HOOK, agent.path], env=PROLOG, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.wait(30) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["agent.sock"]
