"""Environments: saved once, by hand or in the background, shown while they are what they were; and all that can go wrong."""

from __future__ import annotations

import json
import os
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
from bootseer_slurm.env import snapshot
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.image.signing import make_key
from bootseer_slurm.store import FileStore
from tests.integration.node import ALICE, BOB, Node, node, node_of, wait_until
from tests.integration.test_service_recovery import attach, needs_squashfuse

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="needs squashfs-tools"),
    needs_squashfuse,
]
OLD = (1_700_000_000, 1_700_000_000)


def make_venv(node: Node, name: str = "venv") -> Path:
    """A venv of alice's with one package."""
    root = node.folder / "data" / name
    packages = root / "lib" / "python3.11" / "site-packages"
    (packages / "thing-1.0.dist-info").mkdir(parents=True)
    (packages / "thing").mkdir()
    (packages / "thing" / "__init__.py").write_text("VALUE = 1\n")
    (root / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.2\n")
    (root / "lib64").symlink_to("lib")
    (root / "bin").mkdir()
    (root / "bin" / "python").symlink_to(sys.executable)
    give_alice(root)
    return root


def give_alice(root: Path) -> None:
    for folder, folders, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, each) for each in (*folders, *files))):
            os.lchown(path, ALICE, ALICE)
            os.utime(path, OLD, follow_symlinks=False)


def package(root: Path) -> Path:
    return root / "lib" / "python3.11" / "site-packages" / "thing"


def names(node: Node) -> list[dict[str, str]]:
    folder = node.folder / "store/users" / str(ALICE) / "names"
    return [json.loads(path.read_text()) for path in folder.iterdir()] if folder.exists() else []


def blobs(node: Node) -> list[Path]:
    folder = node.folder / "store/users" / str(ALICE) / "blobs"
    return list(folder.iterdir()) if folder.exists() else []


def refused(node: Node, *words: str) -> str:
    """What `bootseer` says when it fails."""
    with pytest.raises(AssertionError) as raised:
        node.bootseer(*words)
    return str(raised.value)


def shown(node: Node, job: int, root: Path, **wishes: object) -> Path | None:
    """The environment as a step of a new job sees it, None when it sees the original."""
    node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, ENV=root, **wishes)
    mount = attach(node, job).get(os.path.realpath(root))
    return None if mount is None else Path(f"/proc/self/fd/{mount}")


def end(node: Node, job: int, view: Path | None = None) -> list[dict[str, object]]:
    if view is not None:
        os.close(int(view.name))
    node.ask("epilog", JOB_ID=job)
    return node.events(job)


def test_saved_once_shown_and_never_when_it_changed(node: Node) -> None:
    root = make_venv(node)
    assert "saved" in node.bootseer("env", "save", str(root))
    assert "in the store already" in node.bootseer("env", "save", str(root))
    assert len(blobs(node)) == 1
    node.start()
    view = shown(node, 1, root)
    assert view is not None
    assert (view / "lib/python3.11/site-packages/thing/__init__.py").read_text() == "VALUE = 1\n"
    cached = list((view / "lib/python3.11/site-packages/thing/__pycache__").iterdir())
    assert cached and not (package(root) / "__pycache__").exists(), "compiled, and the original is as it was"
    end(node, 1, view)
    assert "nothing changed" in node.bootseer("env", "why", str(root))
    (package(root).parent / "thing-1.0.dist-info").rename(package(root).parent / "thing-1.1.dist-info")
    said = refused(node, "env", "why", str(root))
    assert said is not None
    assert shown(node, 2, root) is None
    faults = [str(event.get("message")) for event in end(node, 2) if event["kind"] == "fault"]
    assert any("was changed since it was put into the store: packages" in fault for fault in faults)
    (old,) = blobs(node)
    (package(root) / "large").write_bytes(os.urandom(2**16))  # more than there was
    node.bootseer("env", "save", str(root))
    assert len(blobs(node)) == 2 and (old / "unused").exists(), "it goes a day after it was replaced"


# On a link that is full the check of the original has no answer in time.
_UNCHECKED = """
from bootseer_slurm.artifacts import resolved
from bootseer_slurm.userproc.channel import NoAnswer
from bootseer_slurm.userproc.client import UserProcess
def busy(*_, **__):
    raise NoAnswer("no answer from the file system")
UserProcess.is_same = busy
resolved._FRESH_S = 0
"""


@pytest.mark.parametrize("recent_s", [60, 0])
def test_what_was_looked_up_just_now_is_shown_where_the_check_has_no_answer(
    node: Node, recent_s: int
) -> None:
    root = make_venv(node)
    node.bootseer("env", "save", str(root))
    node.start(f"{_UNCHECKED}resolved._RECENT_S = {recent_s}\n")
    view = shown(node, 1, root)
    assert (view is not None) == (recent_s > 0)
    skipped = [each for each in end(node, 1, view) if (each["kind"], each["name"]) == ("shadow", "skipped")]
    assert [each["message"] for each in skipped] == ([] if recent_s else ["no answer from the file system"])


@pytest.mark.parametrize("uid", [ALICE, BOB])
def test_a_later_step_is_shown_it_when_the_users_process_is_another(node: Node, uid: int) -> None:
    root = make_venv(node)
    node.start("from bootseer_slurm.artifacts import resolved\nresolved._FRESH_S = 0\n")
    node.bootseer("env", "save", "--share", str(root))
    os.close(int(str(shown_to(node, uid, 1, root)).rpartition("/")[2]))
    for worker in psutil.Process(node.agent_pid).children():
        if worker.uids().real == uid:
            worker.kill()
    fds: list[int] = []
    wait_until(lambda: bool(fds.extend(node.request("attach", JOB_ID=1, UID=uid, STEP_ID=1)[1]) or fds))
    (view,) = (Path(f"/proc/self/fd/{fd}") for fd in fds)
    assert (view / package(root).relative_to(root) / "__init__.py").read_text() == "VALUE = 1\n"
    assert ended(node, uid, 1, view) == {}


def test_the_commands(node: Node) -> None:
    root = make_venv(node)
    assert "has no snapshot" in refused(node, "env", "why", str(root))
    node.bootseer("env", "save", str(root))
    key = node.bootseer("env", "key", str(root))
    assert all(part in key for part in ("interpreter", "packages", "thing-1.0", "system", "key"))
    assert names(node)[0]["blob"][:12] in node.bootseer("env", "list")
    assert names(node)[0]["blob"] in node.bootseer("env", "show", str(root))
    assert "0 removed" in node.bootseer("env", "gc") and len(names(node)) == 1
    shutil.rmtree(root)
    assert "is gone" in node.bootseer("env", "gc") and names(node) == []
    again = make_venv(node)
    node.bootseer("env", "save", str(again))
    assert "removed" in node.bootseer("env", "rm", str(again))
    assert names(node) == []
    assert "not a directory" in refused(node, "env", "save", str(again / "pyvenv.cfg"))


def test_the_first_start_saves_it_in_the_background(node: Node) -> None:
    root = make_venv(node)
    node.start()
    assert shown(node, 1, root) is None
    node.ask("mark", JOB_ID=1, NAME="training_started", TIME_NS=time.time_ns())
    kept = node.run / "events" / "1.0"
    wait_until(lambda: '"kind":"snapshot"' in kept.read_text(), 60)
    (event,) = (event for event in end(node, 1) if event["kind"] == "snapshot")
    assert (event["name"], event["target"]) == ("saved", str(root)), event
    view = shown(node, 2, root)
    assert view is not None and (view / "pyvenv.cfg").exists()
    end(node, 2, view)


def test_one_node_of_a_job_saves(node: Node) -> None:
    root = make_venv(node)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=root, NODELIST="n[1-3]", NODENAME="n2")
    attach(node, 1)
    node.ask("mark", JOB_ID=1, NAME="training_started", TIME_NS=time.time_ns())
    time.sleep(4)
    assert all(event["kind"] != "snapshot" for event in end(node, 1)) and names(node) == []


def test_a_background_save_ends_with_the_job() -> None:
    with node_of() as node:
        root = make_venv(node)
        (package(root) / "large").write_bytes(os.urandom(300 * 2**20))
        give_alice(root)
        node.start()
        assert shown(node, 1, root) is None
        node.ask("mark", JOB_ID=1, NAME="training_started", TIME_NS=time.time_ns())
        wait_until(lambda: bool(saves(node)), 20)
        end(node, 1)
        wait_until(lambda: not saves(node) and scratch_folders(Path("/var/tmp")) == [])
        assert names(node) == []


def saves(node: Node) -> list[str]:
    done = subprocess.run(
        ["pgrep", "-fa", f'"env","save","{node.folder}'], capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines()


def scratch_folders(base: Path) -> list[Path]:
    return list(base.glob(f"bootseer-env-{ALICE}-*"))


def test_two_that_save_at_once_save_one(node: Node) -> None:
    root = make_venv(node)
    command = [str(Path(sys.executable).with_name("bootseer")), "env", "save", str(root)]
    environ = {"PATH": "/usr/bin:/bin", "BOOTSEER_CONFIG": str(node.config), "HOME": "/nonexistent"}
    running = [
        subprocess.Popen(
            command, env=environ, user=ALICE, group=ALICE, extra_groups=[], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [each.communicate(timeout=60)[0] for each in running]
    assert sorted("already" in each for each in said) == [False, True, True], said
    assert len(blobs(node)) == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_nothing_that_counts(node: Node, how: signal.Signals) -> None:
    root = make_venv(node)
    (package(root) / "large").write_bytes(os.urandom(200 * 2**20))
    give_alice(root)
    scratch = node.folder / "data" / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    command = [str(Path(sys.executable).with_name("bootseer")), "env", "save", str(root)]
    environ = {
        "PATH": "/usr/bin:/bin",
        "BOOTSEER_CONFIG": str(node.config),
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),
    }
    saving = subprocess.Popen(command, env=environ, user=ALICE, group=ALICE, extra_groups=[])
    wait_until(lambda: bool(scratch_folders(scratch)))
    time.sleep(0.5)
    saving.send_signal(how)
    saving.wait(30)
    assert names(node) == []
    if how == signal.SIGTERM:
        assert list(scratch.iterdir()) == []
    done = subprocess.run(
        command, env=environ, user=ALICE, group=ALICE, extra_groups=[], timeout=100, check=False
    )
    assert done.returncode == 0
    assert list(scratch.iterdir()) == [] and len(names(node)) == 1


def test_changed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "packages"
    (root / "thing-1.dist-info").mkdir(parents=True)
    (root / "thing").mkdir()
    (root / "thing" / "deep.txt").write_text("one")
    (tmp_path / "store").mkdir()
    real = snapshot._packed

    def packed(*arguments: object) -> Path:
        made = real(*arguments)  # type: ignore[arg-type]
        (root / "thing" / "deep.txt").write_text("two")
        return made

    monkeypatch.setattr(snapshot, "_packed", packed)
    with pytest.raises(BootseerError, match="was changed while it was saved"):
        snapshot.save(FileStore(tmp_path / "store"), root)
    assert not list((tmp_path / "store").glob("users/*/names/*"))


def test_what_may_lie_in_an_environment(node: Node) -> None:
    root = make_venv(node)
    place = package(root)
    (place / "out").symlink_to("/etc/hostname")
    (place / "dangling").symlink_to("nowhere")
    (place / "one").write_text("linked")
    os.link(place / "one", place / "two")
    os.mkfifo(place / "pipe")
    os.mknod(place / "null", 0o600 | 0o020000, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "sock"))
    (place / "tool").write_text("#!/bin/sh\n")
    (place / "tool").chmod(0o4755)
    with open(os.fsencode(place) + b"/not-\xff\xfe-utf8", "w") as file:
        file.write("x")
    with (place / "sparse").open("wb") as file:
        file.truncate(3 * 2**30)
        file.seek(2**31)
        file.write(b"end")
    (place / "with\nnewline").write_text("y")
    give_alice(root)
    (place / "tool").chmod(0o4755)
    os.utime(place / "tool", OLD)
    node.bootseer("env", "save", str(root))
    node.start()
    view = shown(node, 1, root)
    assert view is not None
    there = view / "lib/python3.11/site-packages/thing"
    assert os.readlink(there / "out") == "/etc/hostname" and os.readlink(there / "dangling") == "nowhere"
    assert (there / "one").read_text() == (there / "two").read_text() == "linked"
    assert os.path.exists(os.fsencode(there) + b"/not-\xff\xfe-utf8")
    assert (there / "with\nnewline").read_text() == "y"
    assert (there / "sparse").stat().st_size == 3 * 2**30
    with (there / "sparse").open("rb") as file:
        file.seek(2**31)
        assert file.read(3) == b"end"
    assert not any(os.path.lexists(there / name) for name in ("pipe", "null", "sock"))
    flags = os.statvfs(view).f_flag
    assert all(flags & each for each in (os.ST_NOSUID, os.ST_NODEV, os.ST_RDONLY)), (
        "set-user-id bits are of no use"
    )
    assert int((there / "tool").stat().st_mtime) == OLD[0]
    end(node, 1, view)


def test_a_file_that_its_user_cannot_read(node: Node) -> None:
    root = make_venv(node)
    secret = package(root) / "secret"
    secret.write_text("x")
    secret.chmod(0o600)  # root's
    assert f"{secret}: cannot be read" in refused(node, "env", "save", str(root))
    secret.unlink()
    closed = package(root) / "closed"
    closed.mkdir(mode=0o700)
    assert f"{closed}: cannot be read" in refused(node, "env", "save", str(root))
    assert names(node) == []


def test_a_full_disk(node: Node) -> None:
    root = make_venv(node)
    (package(root) / "large").write_bytes(os.urandom(20 * 2**20))
    give_alice(root)
    small = node.folder / "data" / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "tmpfs", str(small)], check=True)
    command = [str(Path(sys.executable).with_name("bootseer")), "env", "save", str(root)]
    environ = {
        "PATH": "/usr/bin:/bin",
        "BOOTSEER_CONFIG": str(node.config),
        "HOME": "/",
        "TMPDIR": str(small),
    }
    done = subprocess.run(
        command,
        env=environ,
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "TMPDIR must name a folder with room" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()[-2:]) <= 2
    assert list(small.iterdir()) == [] and names(node) == []


def test_a_link_to_it_is_it(node: Node) -> None:
    root = make_venv(node)
    link = node.folder / "data" / "current"
    link.symlink_to(root)
    os.lchown(link, ALICE, ALICE)
    node.bootseer("env", "save", str(link))
    assert names(node)[0]["name"] == str(root)
    node.start()
    view = shown(node, 1, link)
    assert view is not None and (view / "pyvenv.cfg").exists()
    end(node, 1, view)


def test_one_for_each_image_it_is_used_in(node: Node) -> None:
    root = make_venv(node)
    image = node.folder / "data" / "image.sqsh"
    subprocess.run(
        ["mksquashfs", str(root), str(image), "-quiet", "-no-progress"], check=True, capture_output=True
    )
    os.utime(image, OLD)
    node.bootseer("env", "save", str(root), "--image", str(image))
    node.start()
    assert shown(node, 1, root) is None, "it was made for an image"
    end(node, 1)
    view = shown(node, 2, root, IMAGE=image)
    assert view is not None
    end(node, 2, view)
    os.utime(image, (OLD[0] + 5, OLD[0] + 5))
    assert shown(node, 3, root, IMAGE=image) is None, "it is another image now"
    end(node, 3)
    node.bootseer("env", "save", str(root))
    view = shown(node, 4, root, IMAGE=image)
    assert view is not None, "what was saved without an image is good for all that have none of their own"
    end(node, 4, view)


def kind_of(view: Path) -> str:
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", f"{view}/."],
        capture_output=True,
        text=True,
        check=True,
        pass_fds=(int(view.name),),
    )
    return done.stdout.strip()


def contents(view: Path) -> dict[str, tuple[object, ...]]:
    """What alice sees of a tree: modes, owners, sizes, times, links and bytes."""
    code = """
import os, sys
for folder, folders, files in os.walk(sys.argv[1]):
    folders.sort()
    for name in sorted((*folders, *files)):
        path = os.path.join(folder, name)
        status = os.lstat(path)
        content = os.readlink(path) if os.path.islink(path) else ""
        if os.path.isfile(path) and not os.path.islink(path):
            content = open(path, "rb").read()
        print(os.path.relpath(path, sys.argv[1]), oct(status.st_mode), status.st_uid, int(status.st_mtime), content)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"{view}/."], capture_output=True, text=True, errors="surrogateescape",
        check=True, user=ALICE, group=ALICE, pass_fds=(int(view.name),),
    )  # fmt: skip
    return {line.split(" ", 1)[0]: tuple(line.split(" ", 1)[1:]) for line in done.stdout.splitlines()}


def start_where_programs_may_lack(node: Node, changes: str = "") -> Path:
    """Start an agent that does not find the programs that are named in this file."""
    without = node.folder / "without"
    without.write_text("")
    node.start(f"""
import shutil, pathlib
from bootseer_slurm.env import mounting
real = shutil.which
def which(name, path=None):
    return None if name in pathlib.Path({str(without)!r}).read_text().split() else real(name, path=path)
mounting.shutil.which = which
{changes}""")
    return without


_LATE_LOOK = """
import os
looked, folder = agent.Agent._close_unused, agent.service_folder
def service_folder():
    while not os.path.exists({folder!r} + "/may-look"):
        time.sleep(0.01)
    return folder()
def _close_unused(self):
    looked(self)
    open({folder!r} + "/has-looked", "w")
agent.service_folder, agent.Agent._close_unused = service_folder, _close_unused
"""


def test_what_a_job_has_unpacked_is_no_leftover_of_an_agent(node: Node) -> None:
    root = make_venv(node)
    late = _LATE_LOOK.replace("{folder!r}", repr(str(node.folder)))
    without = start_where_programs_may_lack(node, late)
    node.bootseer("env", "save", str(root))
    without.write_text("squashfuse_ll squashfuse")
    view = shown(node, 1, root)
    assert view is not None and list((node.folder / "cache" / ".unpacked").iterdir())
    (node.folder / "may-look").touch()
    wait_until((node.folder / "has-looked").exists)
    assert (view / package(root).relative_to(root) / "__init__.py").read_text() == "VALUE = 1\n"
    end(node, 1, view)


def test_each_way_to_mount_it_shows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel where the agent packed it, else squashfuse_ll or squashfuse."""
    with node_of() as node:
        make_key(node.folder / "site.key")
        root = make_venv(node)
        (package(root) / "private").write_text("x")
        (package(root) / "private").chmod(0o600)
        (package(root) / "tool").write_text("#!/bin/sh\n")
        (package(root) / "tool").chmod(0o755)
        give_alice(root)
        without = start_where_programs_may_lack(node)
        seen = {}
        node.bootseer("env", "save", str(root))
        for job, lacking in ((1, ""), (2, "squashfuse_ll"), (6, "squashfuse_ll squashfuse")):
            without.write_text(lacking)
            view = shown(node, job, root)
            assert view is not None and (kind_of(view) == "fuseblk") == (job != 6)
            with pytest.raises(subprocess.CalledProcessError):
                as_alice(view, "touch new")
            if job == 6:
                node.crash()
                assert attach(node, job), "and the next agent finds it"
            seen[f"user's, without {lacking}"] = contents(view)
            end(node, job, view)
        wait_until(lambda: not list((node.folder / "cache" / ".unpacked").iterdir()))
        without.write_text("")
        node.bootseer("env", "rm", str(root))
        assert shown(node, 3, root) is None
        node.ask("mark", JOB_ID=3, NAME="training_started", TIME_NS=time.time_ns())
        kept = node.run / "events" / "3.0"
        wait_until(lambda: '"kind":"snapshot"' in kept.read_text(), 60)
        end(node, 3)
        assert names(node)[0]["signature"], node.log
        view = shown(node, 4, root)
        assert view is not None and kind_of(view) == "squashfs"
        seen["kernel"] = contents(view)
        end(node, 4, view)
        node.config.write_text(
            node.config.read_text().replace("[image]\n", '[image]\nkernel_mount = "off"\n')
        )
        node.processes[-1].send_signal(signal.SIGHUP)
        wait_until(lambda: "loading the code anew" in node.log)
        wait_until(node.answers)
        view = shown(node, 5, root)
        assert view is not None and kind_of(view) == "fuseblk"
        seen["the agent's, by squashfuse"] = contents(view)
        end(node, 5, view)
        original = {name: each for name, each in contents_of(root).items() if "__pycache__" not in name}
        for way, found in seen.items():
            there = {name: each for name, each in found.items() if "__pycache__" not in name}
            assert there == original, way


def contents_of(root: Path) -> dict[str, tuple[object, ...]]:
    fd = os.open(root, os.O_RDONLY)
    try:
        return contents(Path(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


@pytest.mark.parametrize("packed", ["user", "agent"])
def test_what_a_job_writes_goes_with_it_where_the_profile_says_so(packed: str) -> None:
    with node_of() as node:
        if packed == "agent":
            make_key(node.folder / "site.key")
        root = make_venv(node)
        node.start()
        profile = f'environments = ["{root}"]\nwritable = true\n'
        if packed == "agent":
            assert shown(node, 1, root) is None
            node.ask("mark", JOB_ID=1, NAME="training_started", TIME_NS=time.time_ns())
            wait_until(lambda: '"kind":"snapshot"' in (node.run / "events" / "1.0").read_text(), 60)
            end(node, 1)
        else:
            node.bootseer("env", "save", str(root))
        view = shown(node, 2, root)
        assert view is not None
        file = "lib/python3.11/site-packages/thing/__init__.py"
        with pytest.raises(subprocess.CalledProcessError):
            as_alice(view, f"echo VALUE = 2 > {file}")
        end(node, 2, view)
        node.ask("prolog", JOB_ID=3, UID=ALICE, BOOTSEER=1, PROFILE=profile)
        view = Path(f"/proc/self/fd/{attach(node, 3)[str(root)]}")
        as_alice(view, f"echo VALUE = 2 > {file} && mkdir new && echo x > new/x && rm pyvenv.cfg")
        assert (view / file).read_text() == "VALUE = 2\n" and not (view / "pyvenv.cfg").exists()
        assert (package(root) / "__init__.py").read_text() == "VALUE = 1\n" and (root / "pyvenv.cfg").exists()
        second = Path(f"/proc/self/fd/{attach(node, 3)[str(root)]}")
        assert (second / "new" / "x").read_text() == "x\n", "the job's next step sees it"
        os.close(int(second.name))
        node.crash()
        third = Path(f"/proc/self/fd/{attach(node, 3)[str(root)]}")
        assert (third / "new" / "x").read_text() == "x\n"
        os.close(int(third.name))
        end(node, 3, view)
        wait_until(lambda: node.environments() == [])
        wait_until(lambda: list((node.run / "env").iterdir()) == [])
        view = shown(node, 4, root)
        assert view is not None and (view / file).read_text() == "VALUE = 1\n" and not (view / "new").exists()
        end(node, 4, view)


def as_alice(view: Path, script: str) -> None:
    """Run a shell in a folder that only a descriptor leads to, as a step's namespace would show it."""
    subprocess.run(
        ["sh", "-c", f"cd {view} && {script}"],
        check=True,
        capture_output=True,
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        pass_fds=(int(view.name),),
    )


def test_where_root_may_not_read(node: Node) -> None:
    """As on a file system with root_squash: here the agent's root lacks the right to read what is not its own."""
    home = node.folder / "data" / "home"
    home.mkdir()
    made = make_venv(node)
    root = home / "venv"
    made.rename(root)
    os.chown(home, ALICE, ALICE)
    home.chmod(0o700)
    node.bootseer("env", "save", str(root))
    node.start("""
import ctypes
libc = ctypes.CDLL(None)
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24
for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
    libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
header, data = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(ctypes.byref(header), data)
for part in range(3):
    data[part] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
assert libc.capset(ctypes.byref(header), data) == 0
""")
    (status,) = Path(f"/proc/{node.agent_pid}/status").read_text().split("CapEff:")[1].split("\n", 1)[:1]
    assert int(status, 16) & 0b110 == 0
    view = shown(node, 1, root)
    assert view is not None, node.log
    assert (view / "pyvenv.cfg").exists()
    end(node, 1, view)


def shown_to(node: Node, uid: int, job: int, root: Path, **wishes: object) -> Path | None:
    """The environment as a step of a new job of any user's sees it; the job trains at once."""
    node.ask("prolog", JOB_ID=job, UID=uid, BOOTSEER=1, ENV=root, **wishes)
    reply, fds = node.request("attach", JOB_ID=job, UID=uid, STEP_ID=0)
    assert len(fds) == len([key for key, _ in reply if key == "BIND"]) <= 1
    return Path(f"/proc/self/fd/{fds[0]}") if fds else None


def ended(node: Node, uid: int, job: int, view: Path | None) -> dict[str, str]:
    """The job ends; gives its faults."""
    if view is not None:
        os.close(int(view.name))
    node.ask("epilog", JOB_ID=job)
    events = node.events(job, uid)
    return {str(event["name"]): str(event["message"]) for event in events if event["kind"] == "fault"}


def test_a_colleagues_environment_is_shown_once_its_owner_shares_it(node: Node) -> None:
    root = make_venv(node)
    configuration = node.folder / "data" / ".config" / "pip" / "pip.conf"
    configuration.parent.mkdir(parents=True)
    configuration.write_text("[global]\n")  # the owner's, at her home: a part of the key
    node.start()
    node.bootseer("env", "save", str(root))
    faults = ended(node, BOB, 1, shown_to(node, BOB, 1, root))
    assert "bootseer env save --share" in faults["shadow_refused"]
    assert "in the store already" in node.bootseer("env", "save", "--share", str(root))
    view = shown_to(node, BOB, 2, root)
    assert (
        view is not None
        and (view / package(root).relative_to(root) / "__init__.py").read_text() == "VALUE = 1\n"
    )
    assert ended(node, BOB, 2, view) == {}
    (package(root) / "large").write_bytes(os.urandom(2**16))
    (package(root).parent / "thing-1.0.dist-info").rename(package(root).parent / "thing-1.1.dist-info")
    node.bootseer("env", "save", str(root))
    view = shown_to(node, BOB, 3, root)
    assert view is not None and (view / package(root).relative_to(root) / "large").exists(), (
        "what replaces it is shared"
    )
    assert ended(node, BOB, 3, view) == {}
    view = shown_to(node, BOB, 4, root, PROFILE="writable = true\n")
    assert view is None, "and nobody installs to another's"
    assert "cannot install" in ended(node, BOB, 4, view)["shadow_refused"]


def test_what_shows_a_colleagues_environment_is_out_of_its_readers_reach(node: Node) -> None:
    """squashfuse opens the blob as the job's user; traced by him it would show what he likes."""
    root = make_venv(node)
    node.bootseer("env", "save", "--share", str(root))
    node.start()
    view = shown_to(node, BOB, 1, root)
    (server,) = (
        each
        for each in psutil.process_iter()
        if each.name().startswith("squashfuse") and str(node.run) in " ".join(each.cmdline())
    )
    script = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(16, {server.pid}, 0, 0) == -1 and ctypes.get_errno() == 1
for name in ("mem", "fd/0", "root", "maps"):
    try:
        os.open(f"/proc/{server.pid}/{{name}}", os.O_RDONLY)
    except PermissionError:
        continue
    raise AssertionError(name)
"""
    node.as_user(sys.executable, "-c", script, uid=BOB)
    assert ended(node, BOB, 1, view) == {}


def test_where_no_program_mounts_it_a_colleagues_environment_stays(node: Node) -> None:
    """The files that are unpacked elsewhere are the job's user's own."""
    root = make_venv(node)
    node.bootseer("env", "save", "--share", str(root))
    start_where_programs_may_lack(node).write_text("squashfuse_ll squashfuse")
    view = shown_to(node, BOB, 1, root)
    assert view is None
    assert "another user's" in ended(node, BOB, 1, view)["environment_not_used"]


def test_a_users_own_snapshot_of_anothers_environment_is_not_shown(node: Node) -> None:
    root = make_venv(node)
    with pytest.raises(AssertionError, match="belongs to user"):
        node.bootseer("env", "save", str(root), uid=BOB)
    node.bootseer("env", "save", str(root))
    parts = node.folder / "store" / "users"
    shutil.move(parts / str(ALICE), parts / str(BOB))
    for folder, folders, files in os.walk(parts / str(BOB)):
        for path in (folder, *(os.path.join(folder, each) for each in (*folders, *files))):
            os.lchown(path, BOB, BOB)
    for path in (parts / str(BOB) / "names").iterdir():
        path.write_text(path.read_text().replace(f"users/{ALICE}", f"users/{BOB}"))
    node.start()
    view = shown_to(node, BOB, 1, root)
    assert view is None
    assert "neither he nor root" in ended(node, BOB, 1, view)["shadow_refused"]


def test_what_root_saved_is_shown_to_all(node: Node) -> None:
    root = make_venv(node)
    node.bootseer("env", "save", str(root), uid=0)
    node.start()
    for job, uid in enumerate((ALICE, BOB), 1):
        view = shown_to(node, uid, job, root)
        assert view is not None
        assert ended(node, uid, job, view) == {}


def test_an_environment_with_a_mount_in_it_stays(node: Node) -> None:
    """Its owner cannot take that away, and so what lies there is not his."""
    root = make_venv(node)
    node.bootseer("env", "save", str(root))
    mounts.mount("tmpfs", root / "bin", "tmpfs", 0)
    try:
        os.chown(root / "bin", ALICE, ALICE)
        (root / "bin" / "python").symlink_to(sys.executable)
        give_alice(root / "bin")
        node.start()
        view = shown(node, 1, root)
        assert view is None
        assert any("something else is mounted" in str(event.get("message")) for event in end(node, 1, view))
    finally:
        mounts.unmount(root / "bin")
