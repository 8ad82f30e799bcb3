"""An agent that is killed while jobs start: no reader gets an error or a wrong byte, and jobs keep their session."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol
from tests.integration.node import ALICE, Node, digest_of, node, wait_until

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
needs_squashfuse = pytest.mark.skipif(shutil.which("squashfuse") is None, reason="no squashfuse")
# Reads a file in pieces and prints its digest.
_READ = """
import hashlib, os, sys
fd, digest = os.open(sys.argv[1], os.O_RDONLY), hashlib.sha256()
while part := os.read(fd, int(sys.argv[2])):
    digest.update(part)
print(digest.hexdigest())
"""


def make_file(node: Node, name: str, size_bytes: int) -> Path:
    """A file of alice's that is old enough to be used."""
    path = node.folder / "data" / name
    path.write_bytes(random.Random(name).randbytes(size_bytes))
    os.chown(path, ALICE, ALICE)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def attach(node: Node, job: int) -> dict[str, int]:
    """What a step is shown: path -> descriptor of its mount."""
    reply, fds = node.request("attach", JOB_ID=job, UID=ALICE, STEP_ID=0)
    binds = [value for key, value in reply if key == "BIND"]
    return {bind.split(":", 3)[3]: fds[int(bind.split(":")[0])] for bind in binds}


def reader(path: str, step_bytes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _READ, path, str(step_bytes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_again_and_again_while_jobs_read(node: Node) -> None:
    model = make_file(node, "model.bin", 150 * 2**20)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    # Slow enough that most is still to come: alice's process is stopped every now and then.
    mount = attach(node, 1)[str(model)]
    readers = [reader(f"/proc/{os.getpid()}/fd/{mount}", step) for step in (1 << 20, 70_000)]
    rng = random.Random(1)
    for _ in range(8):
        time.sleep(rng.random() * 0.2)
        node.crash()
    for each in readers:
        output, errors = each.communicate(timeout=60)
        assert errors == ""
        assert output.strip() == digest_of(model)
    assert node.jobs() == {1}
    os.close(mount)
    node.ask("epilog", JOB_ID=1)
    events = node.events(1)
    assert {"begin", "end"} <= {event["name"] for event in events if event["kind"] == "session"}
    assert sum(event["name"] == "agent_restarted" for event in events) == 8
    wait_until(lambda: not any(mount.root == "/1" for mount in mounts.mounts_below(node.run)))


def test_what_was_fetched_is_not_fetched_again(node: Node) -> None:
    model = make_file(node, "model.bin", 40 * 2**20)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    kept = node.run / "events" / "1.0"

    def ends() -> int:
        return kept.read_text().count('"kind":"prefetch","name":"end"')

    wait_until(lambda: kept.exists() and ends() == 1)
    node.crash()
    wait_until(lambda: ends() == 2)
    node.ask("epilog", JOB_ID=1)
    first, second = (
        event for event in node.events(1) if (event["kind"], event["name"]) == ("prefetch", "end")
    )
    assert first["bytes"] == 40 * 2**20
    assert (second["bytes"], second["bytes_cached"]) == (0, 40 * 2**20)


def test_an_upgrade_loads_code_anew_and_keeps_the_mounts(node: Node) -> None:
    model = make_file(node, "model.bin", 30 * 2**20)
    supervisor = node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    before = [entry.mount_id for entry in mounts.mounts_below(node.run)]
    pid = node.agent_pid
    supervisor.send_signal(signal.SIGHUP)
    node.wait_for_another(pid)
    assert supervisor.poll() is None
    assert [entry.mount_id for entry in mounts.mounts_below(node.run)] == before
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        output, errors = each.communicate(timeout=60)
    assert (output.strip(), errors) == (digest_of(model), ""), node.log
    os.close(mount)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 0
    assert mounts.mounts_below(node.run) == []


@pytest.mark.parametrize("broken", ["config", "code"])
def test_an_upgrade_that_cannot_start_leaves_the_old_agent(node: Node, broken: str) -> None:
    flag = node.folder / "broken"
    supervisor = node.start(f"""
import pathlib
if pathlib.Path({str(flag)!r}).exists():
    raise ImportError("no such thing")
""")
    model = make_file(node, "model.bin", 2**20)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    pid, text = node.agent_pid, node.config.read_text()
    if broken == "config":
        node.config.write_text(text + "\n[cash]\n")
    else:
        flag.touch()
    supervisor.send_signal(signal.SIGHUP)
    wait_until(lambda: "the old goes on" in node.log)
    assert ("cash" if broken == "config" else "no such thing") in node.log
    assert (node.agent_pid, node.jobs()) == (pid, {1})
    node.config.write_text(text)
    flag.unlink(missing_ok=True)
    supervisor.send_signal(signal.SIGHUP)
    node.wait_for_another(pid)
    assert node.jobs() == {1}


def test_an_upgrade_to_another_layout_leaves_the_old_agent(node: Node) -> None:
    flag = node.folder / "newer"
    supervisor = node.start(f"""
import pathlib
if pathlib.Path({str(flag)!r}).exists():
    layouts.LAYOUTS["journal"] += 1
""")
    model = make_file(node, "model.bin", 50 * 2**20)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    pid = node.agent_pid
    flag.touch()
    supervisor.send_signal(signal.SIGHUP)
    wait_until(lambda: "the old goes on" in node.log)
    assert "keeps its jobs in layouts" in node.log and "restart bootseer-agent when no job" in node.log
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        output, errors = each.communicate(timeout=60)
    assert (output.strip(), errors) == (digest_of(model), ""), node.log
    os.close(mount)
    assert (node.agent_pid, node.jobs()) == (pid, {1})
    flag.unlink()
    supervisor.send_signal(signal.SIGHUP)
    node.wait_for_another(pid)
    assert node.jobs() == {1}


def test_a_stop_that_comes_during_an_upgrade_is_not_lost(node: Node) -> None:
    supervisor = node.start()
    supervisor.send_signal(signal.SIGHUP)
    time.sleep(0.1)  # it tries the new code
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 0
    assert mounts.mounts_below(node.run) == []


def test_a_stop_ends_a_trial_of_new_code_that_hangs(node: Node) -> None:
    flag = node.folder / "hangs"
    supervisor = node.start(f"""
import pathlib
if pathlib.Path({str(flag)!r}).exists():
    time.sleep(60)
""")
    flag.touch()
    supervisor.send_signal(signal.SIGHUP)
    wait_until(lambda: len(psutil.Process(supervisor.pid).children()) == 2)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(15) == 0, "systemd kills it after 30 s"
    assert "told to stop meanwhile" in node.log and mounts.mounts_below(node.run) == []


def test_what_was_replaced_while_a_slow_store_was_asked_is_not_shown(node: Node) -> None:
    node.start(f"""
import os
from bootseer_slurm.artifacts import resolved
from bootseer_slurm.userproc.client import UserProcess
real = UserProcess.resolve
def resolve(self, request):
    found = real(self, request)
    open({str(node.folder / "seen")!r}, "w").close()
    while not os.path.exists({str(node.folder / "answers")!r}):
        time.sleep(0.01)
    return found
UserProcess.resolve = resolve
resolved._FRESH_S = 1.0
""")
    model = make_file(node, "model.bin", 2**20)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    wait_until((node.folder / "seen").exists)
    model.write_bytes(os.urandom(2**20))
    time.sleep(1.2)
    (node.folder / "answers").touch()
    assert node.request("attach", JOB_ID=1, UID=ALICE, STEP_ID="batch")[1] == []
    assert skipped(node, 1) == [f"{model}: was changed after it was looked up"]


def test_a_checkpoint_is_not_shown_where_nobody_says_whether_it_was_replaced(node: Node) -> None:
    node.start("""
from bootseer_slurm.userproc.channel import NoAnswer
from bootseer_slurm.userproc.client import UserProcess
def busy(*_, **__):
    raise NoAnswer("no answer from the file system")
UserProcess.is_same = busy
""")
    model = make_file(node, "model.bin", 2**20)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    assert attach(node, 1) == {}
    assert skipped(node, 1) == ["no answer from the file system"]


def skipped(node: Node, job: int) -> list[str]:
    """Why a job's steps were not shown what it named; the job ends."""
    node.ask("epilog", JOB_ID=job)
    shadows = [event for event in node.events(job) if event["kind"] == "shadow"]
    return [str(event["message"]) for event in shadows if event["name"] == "skipped"]


def test_what_a_job_has_mounted_stays_what_it_was_when_the_file_was_replaced(node: Node) -> None:
    model, other = make_file(node, "model.bin", 40 * 2**20), make_file(node, "other.bin", 40 * 2**20)
    expected = digest_of(model)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    kept = node.run / "events" / "1.0"
    wait_until(lambda: kept.exists() and '"kind":"prefetch","name":"end"' in kept.read_text())
    (served,) = (node.run / "checkpoints" / str(ALICE)).iterdir()
    with served.open("rb") as file:
        os.replace(other, model)
        node.crash()
        with reader(f"/proc/{os.getpid()}/fd/{file.fileno()}", 1 << 20) as each:
            assert each.communicate(timeout=60) == (expected + "\n", ""), node.log
    node.ask("epilog", JOB_ID=1)
    assert node.events(1)
    wait_until(lambda: not list((node.run / "cache").iterdir()))


def test_a_name_that_cannot_be_looked_up_again_costs_nothing(node: Node) -> None:
    """What is not in the cache yet comes from where the blob was found before the agent was killed."""
    model, flag = make_file(node, "model.bin", 40 * 2**20), node.folder / "stalls"
    node.start(f"""
import pathlib
from bootseer_slurm.cache import reader
from bootseer_slurm.job import loading
reader.Reader.prefetch_run = lambda *_: (0, 0)
real = loading.resolve_artifact
def look_up(*arguments, **fields):
    if pathlib.Path({str(flag)!r}).exists():
        time.sleep(1000)
    return real(*arguments, **fields)
loading.resolve_artifact = look_up
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    flag.touch()
    node.crash()
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        assert each.communicate(timeout=30) == (digest_of(model) + "\n", ""), node.log
    os.close(mount)


def make_environment(node: Node) -> Path:
    """An environment of alice's, saved."""
    folder = node.folder / "data" / "packages"
    (folder / "thing-1.dist-info").mkdir(parents=True)
    (folder / "thing.txt").write_text("thing")
    for path in (folder, *folder.iterdir()):
        os.chown(path, ALICE, ALICE)
    node.bootseer("env", "save", str(folder))
    return folder


def shown_text(mount: int) -> str:
    return Path(f"/proc/self/fd/{mount}/thing.txt").read_text()


def squashfuses(node: Node) -> list[psutil.Process]:
    """Those that serve a blob of this node."""
    found = psutil.process_iter(["name", "cmdline"])
    return [
        each
        for each in found
        if (each.info["name"] or "").startswith("squashfuse")
        and str(node.folder) in str(each.info["cmdline"])
    ]


@needs_squashfuse
def test_an_environment_goes_on_under_the_next_agent_or_is_mounted_anew(node: Node) -> None:
    folder = make_environment(node)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
    first = attach(node, 1)[str(folder)]
    node.crash()
    assert shown_text(first) == "thing"
    assert len(squashfuses(node)) == 1
    second = attach(node, 1)[str(folder)]
    assert shown_text(second) == "thing"
    for each in squashfuses(node):
        each.kill()
    node.crash()
    third = attach(node, 1)[str(folder)]
    assert shown_text(third) == "thing", node.log
    for mount in (first, second, third):
        os.close(mount)
    node.ask("epilog", JOB_ID=1)
    wait_until(lambda: node.environments() == [] and squashfuses(node) == [])
    wait_until(lambda: list((node.run / "env").iterdir()) == [])


@needs_squashfuse
def test_an_environment_of_a_session_that_was_ending_goes_too(node: Node) -> None:
    folder, flag = make_environment(node), node.folder / "passes"
    node.start(f"""
import pathlib
if not pathlib.Path({str(flag)!r}).exists():
    session.Publisher.write = lambda *_, **__: time.sleep(1000)
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
    os.close(attach(node, 1)[str(folder)])
    node.ask("epilog", JOB_ID=1)
    flag.touch()
    pid = node.agent_pid
    node.processes[0].send_signal(signal.SIGHUP)
    node.wait_for_another(pid)
    wait_until(lambda: node.environments() == [] and squashfuses(node) == [])
    wait_until(lambda: list((node.run / "env").iterdir()) == [])


def test_an_agent_that_waits_for_its_own_files_can_be_killed(node: Node) -> None:
    """A thread of it that looks a file of its own up cannot end before that is answered: by the next agent."""
    model = make_file(node, "model.bin", 2**20)
    flag = node.folder / "hang"
    node.start(f"""
import os, pathlib
from bootseer_slurm.fuse import answers
flag = pathlib.Path({str(flag)!r})
real = answers.Answers._look_up
def look_up(self, request):
    if flag.exists():
        time.sleep(1000)
    return real(self, request)
answers.Answers._look_up = look_up
def touch():
    while not flag.exists():
        time.sleep(0.01)
    with open({str(node.folder / "touched")!r}, "w"):
        os.stat({str(node.run / "checkpoints" / str(ALICE) / "nothing")!r})
threading.Thread(target=touch, daemon=True).start()
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    pid = node.agent_pid
    flag.touch()
    wait_until((node.folder / "touched").exists)
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    flag.unlink()
    node.wait_for_another(pid)
    mount = attach(node, 1)[str(model)]
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        output, errors = each.communicate(timeout=60)
    assert (output.strip(), errors) == (digest_of(model), ""), node.log
    os.close(mount)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def test_an_agent_that_cannot_live_is_started_ever_later_and_ends_with_its_status(node: Node) -> None:
    process = node.launch(
        "supervisor._PAUSES_S = (0.0, 0.2)\nagent.Agent.run = lambda self: __import__('os').kill(__import__('os').getpid(), 9)"
    )
    time.sleep(3)
    assert process.poll() is None
    killed = node.log.count("is started again")
    assert 3 < killed < 40
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    broken = node.launch("def fail(self): raise server.InputError('cannot')\nagent.Agent.run = fail")
    assert broken.wait(30) == 2
    assert mounts.mounts_below(node.run) == []


def test_an_agent_that_fails_later_costs_no_mounts(node: Node) -> None:
    model = make_file(node, "model.bin", 2**20)
    flag = node.folder / "fails"
    supervisor = node.start(f"""
import pathlib
supervisor._SHORT_LIFE_S, supervisor._PAUSES_S = 0.2, (0.1,)
run = agent.Agent.run
def fail(self):
    if pathlib.Path({str(flag)!r}).exists():
        raise server.InputError("cannot")
    run(self)
agent.Agent.run = fail
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    time.sleep(0.3)
    flag.touch()
    os.kill(node.agent_pid, signal.SIGKILL)
    wait_until(lambda: node.log.count("ended with 2 and is started again") > 2)
    assert supervisor.poll() is None
    flag.unlink()
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        assert each.communicate(timeout=60) == (digest_of(model) + "\n", "")
    os.close(mount)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 0


def test_a_supervisor_that_is_killed_takes_its_agent_with_it(node: Node) -> None:
    supervisor = node.start()
    pid = node.agent_pid
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    node.start()
    assert node.jobs() == set()


def test_the_session_of_a_killed_agent_knows_what_steps_asked_for(node: Node) -> None:
    first, second = make_file(node, "a.bin", 2**20), make_file(node, "b.bin", 2**20)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=first, JOB_NAME="train", ACCOUNT="a")
    reply, fds = node.request("attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER=1, CHECKPOINT=second)
    for fd in fds:
        os.close(fd)
    assert len(fds) == 2, reply
    node.ask("mark", JOB_ID=1, NAME="image_loaded", TIME_NS=time.time_ns())
    node.crash()
    shown = attach(node, 1)
    assert set(shown) == {str(first), str(second)}
    for fd in shown.values():
        os.close(fd)
    node.ask("epilog", JOB_ID=1)
    names = [event["name"] for event in node.events(1)]
    assert "image_loaded" in names and names.count("agent_restarted") == 1
    assert (node.run / "jobs").is_dir() and node.job_files() == set()
    wait_until(lambda: list((node.run / "events").iterdir()) == [])


def test_killed_while_a_session_ends_its_events_are_written(node: Node) -> None:
    model = make_file(node, "a.bin", 2**20)
    upgraded = node.folder / "upgraded"  # until then the store hangs
    node.start(f"""
import pathlib
if not pathlib.Path({str(upgraded)!r}).exists():
    session.Publisher.write = lambda *_, **__: time.sleep(1000)
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    node.ask("mark", JOB_ID=1, NAME="checkpoint_loaded", TIME_NS=time.time_ns())
    node.ask("epilog", JOB_ID=1)
    assert node.job_files() == set()
    supervisor = node.processes[0]
    upgraded.touch()
    pid = node.agent_pid
    supervisor.send_signal(signal.SIGHUP)
    node.wait_for_another(pid)
    names = [event["name"] for event in node.events(1)]
    assert "checkpoint_loaded" in names and "end" in names
    wait_until(
        lambda: not list((node.run / "events").iterdir()) and not list((node.run / "ending").iterdir())
    )


def test_a_damaged_journal_costs_its_job_only(node: Node) -> None:
    model = make_file(node, "a.bin", 2**20)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    jobs = node.run / "jobs"
    (jobs / "2").write_text((jobs / "1").read_text())  # another job's
    (jobs / "3").write_text("[[[")
    (jobs / "4").write_text(
        '{"Began": {"job": {"job_id": 4}}}\n{"Added": []}\n{"Found": 1}\n{"else": {}}\n[]\n'
    )
    with contextlib.suppress(OSError):
        (jobs / "x").write_text("[]\n")
    with (jobs / "1").open("a") as file:
        file.write('{"Found": {"blob": "file-')  # killed while it wrote
    reply, fds = node.request(
        "attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER=1, CHECKPOINT=make_file(node, "b.bin", 9)
    )
    for fd in fds:
        os.close(fd)
    assert len(fds) == 2, reply
    node.crash()
    assert node.jobs() == {1}
    shown = attach(node, 1)
    assert len(shown) == 2, "what came behind the torn line is known too"
    for fd in shown.values():
        os.close(fd)
    assert protocol.first(node.ask("status"), "STATUS") == "ok"


def test_one_job_cannot_fill_memory_with_what_it_asks_for(node: Node) -> None:
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1)
    answers = []
    for number in range(80):
        with node.connect() as link:
            fields = [("OP", "image"), ("JOB_ID", "1"), ("URI", f"dir:/none/{number}")]
            link.sendall(protocol.encode(fields))
            link.shutdown(socket.SHUT_WR)
            answers.append(protocol.receive(link)[0])
    assert ("NOTFOUND", "1") in answers[0]
    assert ("STATUS", "error") in answers[-1] and "too much" in protocol.first(answers[-1], "MESSAGE")
    journal, events = node.run / "jobs" / "1", node.run / "events" / "1.0"
    before = journal.stat().st_size, events.stat().st_size
    for _ in range(20):
        with node.connect() as link:
            link.sendall(protocol.encode([("OP", "image"), ("JOB_ID", "1"), ("URI", "dir:/none/more")]))
            link.shutdown(socket.SHUT_WR)
            protocol.receive(link)
    assert (journal.stat().st_size, events.stat().st_size) == before
    node.ask("epilog", JOB_ID=1)
    assert node.events(1)


def test_one_job_cannot_fill_memory_with_digests(node: Node) -> None:
    node.start("from bootseer_slurm.artifacts import table\ntable._DIGESTS_LIMIT_BYTES = 150")
    first, second = make_file(node, "a.bin", 2**20), make_file(node, "b.bin", 2**20)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=first)
    os.close(attach(node, 1)[str(first)])
    _, fds = node.request("attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER=1, CHECKPOINT=second)
    assert len(fds) == 1
    os.close(fds[0])
    node.ask("epilog", JOB_ID=1)
    assert any("asked for too much" in str(event.get("message")) for event in node.events(1))
