"""The pyxis importer as pyxis calls it, with an agent that answers what a test says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.blob.names import read_name
from bootseer_slurm.image.reference import registry_reference
from bootseer_slurm.store import FileStore
from tests.integration.registry import Registry, lacking, running_registry

UID = os.getuid()
ENROOT = shutil.which("enroot")
# Stands for enroot: writes down what it is asked for, and hangs or fails when told to.
STANDIN = """#!/bin/sh
echo "$*" >> "{log}"
echo "noise on stdout"
[ ! -e "{log}.hang" ] || {{ : > "$3"; exec sleep 60; }}
[ ! -e "{log}.fail" ] || {{ : > "$3"; exit 3; }}
echo squashfs > "$3"
"""

Answer = Callable[[protocol.Message], protocol.Message]
REFUSED: protocol.Message = [("STATUS", "error"), ("MESSAGE", "job 7 did not ask for Bootseer")]


class Agent:
    """A Unix socket that gives each request the next answer, the last one again and again. Packs nothing."""

    def __init__(self, path: Path) -> None:
        self.asked: list[dict[str, str]] = []
        self.answers: list[protocol.Message | Answer] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))  # NUL first: an abstract name
        self._server.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                return
            with link:
                message = protocol.receive_request(link, 5)
                if protocol.first(message, "OP") == "pack":
                    link.sendall(protocol.encode([("STATUS", "error"), ("MESSAGE", "no key")]))
                    continue
                self.asked.append(dict(message))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                link.sendall(protocol.encode(answer(message) if callable(answer) else answer))

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


class Step:
    """A job step on a node: what pyxis would set, and tools of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        self.tools.mkdir()
        for tool in ("skopeo", "umoci", "mksquashfs", "sh", "sleep"):
            if found := shutil.which(tool):
                (self.tools / tool).symlink_to(found)
        self.log = folder / "enroot.log"
        (folder / "store").mkdir()
        self.store = FileStore(folder / "store")
        self.runtime = folder / "pyxis"
        self.file = self.runtime / str(UID) / "7.0.squashfs"
        (folder / "scratch").mkdir()
        self.environ = {
            "PATH": str(self.tools),
            "HOME": str(folder),
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_UID": str(UID),
            "PYXIS_RUNTIME_PATH": str(self.runtime),
            "BOOTSEER_AGENT_SOCKET": str(folder / "agent.sock"),
            "BOOTSEER_STORE_URI": f"file://{folder / 'store'}",
            "ENROOT_TEMP_PATH": str(folder / "scratch"),
        }

    def with_enroot(self) -> None:
        (self.tools / "enroot").write_text(STANDIN.format(log=self.log))
        (self.tools / "enroot").chmod(0o755)

    def enroot_calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bootseer_slurm.image.pyxis_importer", *words],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(tmp_path)


@pytest.fixture
def agent(step: Step) -> Iterator[Agent]:
    running = Agent(step.folder / "agent.sock")
    yield running
    running.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if lacking():
        pytest.skip(f"not installed: {', '.join(lacking())}")
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


FILES = {"bin/sh": (b"#!/bin/true\n", 0o755)}
DEAD = "docker://127.0.0.1:9#x:1"  # where no registry is


def ok(*entries: tuple[str, str]) -> protocol.Message:
    return [("STATUS", "ok"), *entries]


def stored_only_with(digest: str, path: str) -> Answer:
    """What an agent answers whose store has the image of this digest only."""

    def answer(message: protocol.Message) -> protocol.Message:
        if protocol.first(message, "DIGEST", digest) != digest:
            return ok(("NOTFOUND", "1"))
        return ok(("PATH", path), ("DIGEST", digest))

    return answer


def test_the_agents_path_is_printed_and_nothing_else(step: Step, agent: Agent, registry: Registry) -> None:
    digest = registry.push("here:1", FILES)
    agent.answers = [stored_only_with(digest, "/run/x/image")]
    assert step.run("get", f"docker://{registry.host}#here:1") == (0, "/run/x/image\n", "")
    assert agent.asked == [
        {"OP": "image", "JOB_ID": "7", "STEP_ID": "0", "URI": f"docker://{registry.host}/here:1"}
    ]
    assert step.enroot_calls() == [] and not step.runtime.exists()


def test_a_tag_that_moved_is_put_into_the_store(step: Step, agent: Agent, registry: Registry) -> None:
    digest = registry.push("moved:1", {**FILES, "new": b"1"})
    agent.answers = [
        ok(("PATH", "/old"), ("DIGEST", "sha256:" + "0" * 64)),
        ok(("NOTFOUND", "1")),
        stored_only_with(digest, "/new"),
    ]
    status, output, errors = step.run("get", f"docker://{registry.host}#moved:1")
    assert (status, output) == (0, "/new\n"), errors
    assert [each.get("DIGEST") for each in agent.asked] == [None, digest, digest]
    record = read_name(step.store, UID, registry_reference(f"{registry.host}/moved:1").name)
    assert record is not None and record.fingerprint == digest
    assert os.listdir(step.folder / "scratch") == []


def test_an_agent_that_tells_no_digest_is_asked_with_it(step: Step, agent: Agent, registry: Registry) -> None:
    digest = registry.push("plain:1", FILES)
    agent.answers = [ok(("PATH", "/a"))]
    assert step.run("get", f"docker://{registry.host}#plain:1") == (0, "/a\n", "")
    assert [each.get("DIGEST") for each in agent.asked] == [None, digest]


def test_a_registry_that_is_down_leaves_the_agents_answer(step: Step, agent: Agent) -> None:
    agent.answers = [ok(("PATH", "/stored"), ("DIGEST", "sha256:" + "0" * 64))]
    status, output, errors = step.run("get", DEAD)
    assert (status, output) == (0, "/stored\n")
    assert "its registry did not answer; what the store has is used" in errors
    assert len(agent.asked) == 1


@pytest.mark.skipif(bool(lacking()), reason="no skopeo")
def test_a_registry_that_hangs_is_waited_for_two_seconds(step: Step, agent: Agent) -> None:
    agent.answers = [ok(("PATH", "/stored"))]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        uri = f"docker://127.0.0.1:{silent.getsockname()[1]}#x:1"
        status, output, errors = step.run("get", uri)
        assert (status, output) == (0, "/stored\n") and "its registry did not answer" in errors
        assert 1.5 < time.monotonic() - start < 4.5


def fallback(step: Step, uri: str, reason: str) -> None:
    """`get` gives what pyxis itself would have imported, and says in one line why."""
    step.with_enroot()
    status, output, errors = step.run("get", uri)
    assert (status, output) == (0, f"{step.file}\n"), errors
    assert step.file.read_text() == "squashfs\n"
    assert step.enroot_calls()[-1] == f"import --output {step.file} {uri}"
    lines = [line for line in errors.splitlines() if line.startswith("bootseer: ") and "falling back" in line]
    assert len(lines) == 1 and reason in lines[0]
    assert step.file.parent.stat().st_mode & 0o777 == 0o700


def test_without_an_agent_it_is_stock(step: Step) -> None:
    fallback(step, DEAD, "; falling back to enroot import")


def test_whoever_has_the_public_name_is_not_asked_for_an_image(step: Step) -> None:
    """Any user can have it while no agent runs, and could give a container his files."""
    impostor = Agent(Path(protocol.ABSTRACT_SOCKET))
    try:
        impostor.answers = [ok(("PATH", "/evil.sqsh"))]
        fallback(step, DEAD, "no agent answers")
        assert impostor.asked == []
    finally:
        impostor.close()


def test_an_agent_that_hangs_costs_seconds(step: Step) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hung:
        hung.bind(str(step.folder / "agent.sock"))
        hung.listen()
        start_s = time.monotonic()
        fallback(step, DEAD, "no agent answers")
        assert time.monotonic() - start_s < 40, "and not the two minutes that an image may take"


def test_a_job_that_did_not_ask_is_stock(step: Step, agent: Agent) -> None:
    agent.answers = [REFUSED]
    fallback(step, DEAD, "job 7 did not ask for Bootseer")
    assert [path.name for path in (step.folder / "store").iterdir()] == []


def test_an_image_that_cannot_be_stored_is_stock(step: Step, agent: Agent) -> None:
    agent.answers = [ok(("NOTFOUND", "1"))]
    fallback(step, DEAD, "image docker://127.0.0.1:9/x:1")


def test_what_only_enroot_knows_is_stock(step: Step, agent: Agent) -> None:
    agent.answers = [ok(("PATH", "/never"))]
    fallback(step, "dockerd://local:1", "only docker://, dir:/path and paths are known")
    assert agent.asked == []


@pytest.mark.parametrize("path", ["relative", "/two\nlines", ""])
def test_a_path_that_pyxis_cannot_use_is_stock(step: Step, agent: Agent, path: str) -> None:
    agent.answers = [ok(("PATH", path))]
    fallback(step, DEAD, "the agent")


def test_the_file_of_an_earlier_run_of_the_step_is_replaced(step: Step) -> None:
    step.file.parent.mkdir(parents=True, mode=0o700)
    step.file.write_text("left by a killed step")
    fallback(step, DEAD, "falling back")


def test_without_enroot_it_says_so(step: Step) -> None:
    status, output, errors = step.run("get", DEAD)
    assert status != 0 and output == ""
    assert errors.splitlines()[-1].endswith("cannot be imported: enroot is not installed on this node")
    assert not step.file.exists()


def test_an_import_that_fails_leaves_nothing(step: Step) -> None:
    step.with_enroot()
    Path(f"{step.log}.fail").touch()
    status, output, errors = step.run("get", DEAD)
    assert status == 1 and output == "" and "enroot import failed with exit status 3" in errors
    assert not step.file.exists()


def test_an_import_that_is_stopped_leaves_nothing(step: Step) -> None:
    step.with_enroot()
    Path(f"{step.log}.hang").touch()
    process = step.start("get", DEAD)
    deadline = time.monotonic() + 20
    while not step.file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert step.file.exists()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and output == ""
    assert not step.file.exists()


def test_release_takes_what_get_made_and_may_come_again(step: Step) -> None:
    fallback(step, DEAD, "falling back")
    others = [step.file.with_name(name) for name in ("7.1.squashfs", "8.0.squashfs", "70.0.squashfs")]
    for other in others:
        other.write_text("another step's")
    for _ in range(3):
        assert step.run("release") == (0, "", "")
        assert not step.file.exists() and all(other.exists() for other in others)
    del step.environ["PYXIS_RUNTIME_PATH"]
    assert step.run("release") == (0, "", "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SLURM_JOB_ID", "../../etc/x"),
        ("SLURM_STEP_ID", "0/../.."),
        ("SLURM_JOB_UID", ".."),
        ("PYXIS_RUNTIME_PATH", "x"),
    ],
)
def test_hostile_variables_reach_no_file(step: Step, key: str, value: str) -> None:
    step.with_enroot()
    step.environ[key] = value
    status, output, errors = step.run("get", DEAD)
    assert status == 2 and output == "" and key in errors.splitlines()[-1]
    assert [call for call in step.enroot_calls() if not call.startswith("digest ")] == []
    assert step.run("release") == (0, "", "")


@pytest.mark.parametrize("words", [(), ("get",), ("get", "a", "b"), ("release", "x"), ("other",)])
def test_other_arguments_are_refused(step: Step, words: tuple[str, ...]) -> None:
    status, output, errors = step.run(*words)
    assert (status, output) == (2, "") and errors.startswith("bootseer: usage: ")


def test_it_starts_without_what_is_heavy(step: Step) -> None:
    code = "import sys, bootseer_slurm.image.pyxis_importer; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pyarrow", "typer", "rich", "tomli", "bootseer_slurm.store", "bootseer_slurm.config"} & set(
        loaded
    )


@pytest.mark.pyxis
@pytest.mark.skipif(ENROOT is None, reason="no enroot")
def test_the_fallback_with_the_real_enroot(step: Step, registry: Registry) -> None:
    registry.push("stock:1", FILES, {"Env": ["A=1"]})
    step.environ |= {"PATH": os.environ["PATH"], "ENROOT_ALLOW_HTTP": "y"}
    for name in ("CACHE", "DATA", "RUNTIME"):
        step.environ[f"ENROOT_{name}_PATH"] = str(step.folder / name)
    status, output, errors = step.run("get", f"docker://{registry.host}#stock:1")
    assert (status, output) == (0, f"{step.file}\n"), errors
    assert step.file.read_bytes()[:4] == b"hsqs"
    assert step.run("release") == (0, "", "") and not step.file.exists()
