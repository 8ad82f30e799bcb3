"""Layers over snapshots: what changed in an environment, and what the start of a job installed to one."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.blob.gc import GRACE_S, collect_garbage
from bootseer_slurm.blob.names import Name, list_names, write_name
from bootseer_slurm.env import snapshot
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User
from bootseer_slurm.image.signing import make_key
from bootseer_slurm.job.background.run_as_user import SeenAt, Task
from bootseer_slurm.store import FileStore
from tests.integration.node import ALICE, BOB, Node, node, node_of, wait_until
from tests.integration.test_env_snapshot import (
    OLD,
    as_alice,
    blobs,
    contents,
    contents_of,
    end,
    ended,
    give_alice,
    kind_of,
    make_venv,
    names,
    package,
    pytestmark,
    shown,
    shown_to,
    start_where_programs_may_lack,
)
from tests.integration.test_service_recovery import attach

__all__ = ["node", "pytestmark"]
PACKAGES = "lib/python3.11/site-packages"


def make_large_venv(node: Node) -> Path:
    """A venv of which little will change."""
    root = make_venv(node)
    place = package(root)
    (place / "large").write_bytes(os.urandom(4 * 2**20))
    for name in ("same", "edited", "removed"):
        (place / f"{name}.py").write_text(f"NAME = {name!r}\n")
    (place / "folder" / "deep").mkdir(parents=True)
    (place / "folder" / "deep" / "file.py").write_text("DEEP = 1\n")
    (place / "link").symlink_to("same.py")
    (place / "mode").write_text("x")
    (place / "kept").mkdir()
    (place / "kept" / "gone").write_text("x")
    give_alice(root)
    return root


def change(root: Path) -> None:
    """All that an installer may do."""
    place = package(root)
    (place / "edited.py").write_text("NAME = 'another'\n")
    (place / "removed.py").unlink()
    shutil.rmtree(place / "folder")
    (place / "folder").write_text("now a file")
    (place / "link").unlink()
    (place / "link").symlink_to("edited.py")
    (place / "mode").chmod(0o755)
    (place / "kept" / "gone").unlink()
    (place / "kept" / "[a] *\\ new").write_text("an odd name")
    with open(os.fsencode(place / "kept") + b"/\xff\xfe", "w") as file:
        file.write("no UTF-8")
    os.mkfifo(place / "kept" / "pipe")
    (place.parent / "thing-1.0.dist-info").rename(place.parent / "thing-2.0.dist-info")
    (place.parent / "more").mkdir()
    (place.parent / "more" / "__init__.py").write_text("MORE = 1\n")
    (place.parent / "more-1.0.dist-info").mkdir()
    large = (place / "large").stat()
    give_alice(root)
    os.utime(place / "edited.py", (OLD[0] + 5, OLD[0] + 5))
    assert (place / "large").stat().st_mtime == large.st_mtime


def without_byte_code(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    return {name: each for name, each in found.items() if "__pycache__" not in name and "pipe" not in name}


def blob_bytes(folder: str, node: Node) -> int:
    return (node.folder / "store" / folder / "0").stat().st_size


def install(view: Path, name: str) -> None:
    """As pip does, in a step of a job."""
    as_alice(
        view, f"cd {PACKAGES} && mkdir {name} {name}-1.0.dist-info && echo VALUE = 3 > {name}/__init__.py"
    )


def start_is_over(node: Node, job: int) -> None:
    node.ask("mark", JOB_ID=job, NAME="training_started", TIME_NS=time.time_ns())


def saved(node: Node, job: int) -> None:
    """Have the start of a job be over, and what it installed saved."""
    start_is_over(node, job)
    wait_until(lambda: '"kind":"snapshot"' in (node.run / "events" / f"{job}.0").read_text(), 60)


def writable(node: Node, job: int, root: Path, **fields: object) -> Path:
    """The environment as a step of a job sees it that may write there."""
    profile = f'environments = ["{root}"]\nwritable = true\n'
    node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, PROFILE=profile, **fields)
    return Path(f"/proc/self/fd/{attach(node, job)[str(root)]}")


def start_that_installs(node: Node) -> tuple[Path, Path]:
    """A saved environment, and how job 1 sees it, which installs a package there."""
    root = make_large_venv(node)
    node.bootseer("env", "save", str(root))
    node.start()
    view = writable(node, 1, root)
    install(view, "extra")
    return root, view


def test_only_what_changed_is_saved_and_each_way_shows_the_same() -> None:
    with node_of() as node:
        root = make_large_venv(node)
        node.bootseer("env", "save", str(root))
        (whole,) = names(node)
        change(root)
        assert "over" in node.bootseer("env", "save", str(root))
        (layer,) = names(node)
        assert layer["base"] == {"blob": whole["blob"], "folder": whole["folder"], "signature": ""}
        assert blob_bytes(layer["folder"], node) < blob_bytes(whole["folder"], node) / 100
        listed = node.bootseer("env", "list")
        assert layer["blob"][:12] in listed and whole["blob"][:12] in listed
        assert whole["blob"] in node.bootseer("env", "show", str(root))
        without = start_where_programs_may_lack(node)
        for job, lacking in ((1, ""), (2, "squashfuse_ll"), (3, "squashfuse_ll squashfuse")):
            without.write_text(lacking)
            view = shown(node, job, root)
            assert view is not None, node.log
            assert (kind_of(view) == "overlayfs") == (job != 3)
            with pytest.raises(subprocess.CalledProcessError):
                as_alice(view, "touch new")
            found = contents(view)
            assert without_byte_code(found) == without_byte_code(contents_of(root)), lacking
            compiled = {name.rpartition("/")[2].split(".")[0] for name in found if name.endswith(".pyc")}
            assert compiled == {"__init__", "same", "edited"}, "of what there is, and no more"
            node.crash()
            again = Path(f"/proc/self/fd/{attach(node, job)[str(root)]}")
            assert without_byte_code(contents(again)) == without_byte_code(contents_of(root))
            os.close(int(again.name))
            end(node, job, view)
        wait_until(lambda: node.environments() == [])
        wait_until(lambda: list((node.run / "env").iterdir()) == [])


def test_the_kernel_mounts_both_where_agents_packed_them() -> None:
    with node_of() as node:
        make_key(node.folder / "site.key")
        root = make_large_venv(node)
        node.start()
        assert shown(node, 1, root) is None
        saved(node, 1)
        end(node, 1)
        change(root)
        assert shown(node, 2, root) is None, "it changed"
        saved(node, 2)
        end(node, 2)
        (layer,) = names(node)
        assert layer["signature"] and layer["base"]["signature"]  # type: ignore[index]
        view = shown(node, 3, root)
        assert view is not None and kind_of(view) == "overlayfs"
        kinds = [mount.fstype for mount in node.environments()]
        assert sorted(kinds) == ["overlay", "squashfs", "squashfs"], "two mounts of the kernel's"
        assert without_byte_code(contents(view)) == without_byte_code(contents_of(root))
        events = end(node, 3, view)
        assert not [event for event in events if event["kind"] == "fault"]
        read = {event["target"] for event in events if event["kind"] == "access"}
        assert read == {str(root), f"{root}, below its layer"}
        blob = layer["base"]["blob"]  # type: ignore[index]
        assert list((node.folder / f"store/users/{ALICE}/traces").glob(f"*/{blob}/*")), (
            "the layer is read by mounting it"
        )


def test_the_kernel_mounts_for_a_colleague_what_an_agent_packed_for_the_owner() -> None:
    with node_of() as node:
        make_key(node.folder / "site.key")
        root = make_large_venv(node)
        node.start()
        assert shown(node, 1, root) is None
        saved(node, 1)
        end(node, 1)
        node.bootseer("env", "save", "--share", str(root))
        view = shown_to(node, BOB, 2, root)
        assert view is not None and kind_of(view) == "squashfs"
        assert ended(node, BOB, 2, view) == {}


def test_a_file_with_the_size_and_time_of_another(node: Node) -> None:
    """Archives set times: two releases of a package may differ in nothing but the bytes of a file."""
    root = make_large_venv(node)
    node.bootseer("env", "save", str(root))
    (package(root) / "same.py").write_text("NAME = 'SAME'\n")
    (package(root).parent / "thing-1.0.dist-info").rename(package(root).parent / "thing-2.0.dist-info")
    give_alice(root)
    os.link(package(root) / "large", node.folder / "data" / "linked")  # which changes its time of change
    node.bootseer("env", "save", str(root))
    (layer,) = names(node)
    assert layer["base"] and blob_bytes(layer["folder"], node) < 2**20
    node.start()
    view = shown(node, 1, root)
    assert view is not None
    assert (view / PACKAGES / "thing" / "same.py").read_text() == "NAME = 'SAME'\n"
    code = f"import sys; sys.path.insert(0, '{view}/{PACKAGES}'); import thing.same as same; print(same.NAME)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        pass_fds=(int(view.name),),
    )
    assert done.stdout == "SAME\n", "and not the byte code of the other"
    end(node, 1, view)


def test_it_is_saved_whole_where_much_changed_or_the_list_is_damaged(node: Node) -> None:
    root = make_large_venv(node)
    node.bootseer("env", "save", str(root))
    (first,) = blobs(node)
    (package(root) / "large").write_bytes(os.urandom(5 * 2**20))
    (package(root).parent / "a-1.0.dist-info").mkdir()
    node.bootseer("env", "save", str(root))
    assert names(node)[0].get("base") is None
    (second,) = (blob for blob in blobs(node) if blob != first)
    content = (second / "files").read_bytes()
    for number, damaged in enumerate((content[:-20], b"", content[:200] + b"\0" * 50 + content[250:])):
        (second / "files").write_bytes(damaged)
        (package(root).parent / f"b{number}-1.0.dist-info").mkdir()
        node.bootseer("env", "save", str(root))
        assert names(node)[0].get("base") is None
        second = node.folder / "store" / names(node)[0]["folder"]
    (package(root).parent / "c-1.0.dist-info").mkdir()
    node.bootseer("env", "save", str(root))
    assert names(node)[0].get("base")
    (package(root) / "folder" / "deep" / "file.py").unlink()
    (package(root) / "mode").unlink()
    (package(root) / "mode").mkdir()
    (package(root) / "mode" / "x").write_text("a file became a folder")
    (package(root).parent / "d-1.0.dist-info").mkdir()
    node.bootseer("env", "save", str(root))
    assert names(node)[0].get("base") is None


def test_what_it_lies_over_stays_as_long_as_it(node: Node) -> None:
    root = make_large_venv(node)
    node.bootseer("env", "save", str(root))
    change(root)
    node.bootseer("env", "save", str(root))
    store = FileStore(node.folder / "store")
    assert collect_garbage(store, ALICE, now_s=time.time() + 2 * GRACE_S).removed == []
    assert len(blobs(node)) == 2
    node.bootseer("env", "rm", str(root))
    assert blobs(node) == [] and names(node) == []


def test_what_it_lies_over_is_gone(node: Node) -> None:
    root = make_large_venv(node)
    node.bootseer("env", "save", str(root))
    (whole,) = names(node)
    change(root)
    node.bootseer("env", "save", str(root))
    shutil.rmtree(node.folder / "store" / whole["folder"])
    node.start()
    assert shown(node, 1, root) is None
    faults = [str(event.get("message")) for event in end(node, 1) if event["kind"] == "fault"]
    assert any(whole["folder"] in fault for fault in faults), faults
    node.bootseer("env", "save", str(root))
    assert names(node)[0].get("base") is None
    view = shown(node, 2, root)
    assert view is not None and without_byte_code(contents(view)) == without_byte_code(contents_of(root))
    end(node, 2, view)


@pytest.mark.parametrize("packed", ["user", "agent"])
def test_what_a_start_installs_is_there_at_the_next(packed: str) -> None:
    with node_of() as node:
        if packed == "agent":
            make_key(node.folder / "site.key")
        root = make_large_venv(node)
        node.start()
        if packed == "agent":
            assert shown(node, 1, root) is None
            saved(node, 1)
            end(node, 1)
        else:
            node.bootseer("env", "save", str(root))
        before = contents_of(root)
        view = writable(node, 2, root, JOB_NAME="train")
        install(view, "extra")
        as_alice(view, f"rm -r {PACKAGES}/thing/folder")
        edit = f"cd {PACKAGES}/thing && echo \"NAME = 'SAME'\" > same.py && touch -d @{OLD[0]} same.py"
        as_alice(view, edit)  # as large and as old as it was
        saved(node, 2)
        (event,) = (event for event in end(node, 2, view) if event["kind"] == "snapshot")
        assert (event["name"], event["target"]) == ("saved", str(root)), event
        (whole,) = (name for name in names(node) if not name.get("base"))
        (layer,) = (name for name in names(node) if name.get("base"))
        assert blob_bytes(layer["folder"], node) < blob_bytes(whole["folder"], node) / 100
        assert bool(layer["signature"]) == (packed == "agent")
        assert contents_of(root) == before, "the environment itself is as it was"

        view = writable(node, 3, root, JOB_NAME="train")
        assert (view / PACKAGES / "extra" / "__init__.py").read_text() == "VALUE = 3\n"
        assert not (view / PACKAGES / "thing" / "folder").exists()
        assert (view / PACKAGES / "thing" / "same.py").exists()
        start_is_over(node, 3)
        time.sleep(4)
        assert all(event["kind"] != "snapshot" for event in end(node, 3, view)), "nothing was installed"

        view = writable(node, 4, root, JOB_NAME="train")
        install(view, "second")
        as_alice(view, f"cd {PACKAGES}/extra && echo VALUE = 4 > __init__.py")
        saved(node, 4)
        end(node, 4, view)
        (layer,) = (name for name in names(node) if name.get("base"))
        assert layer["base"]["blob"] == whole["blob"], "over the snapshot, not over another layer"  # type: ignore[index]
        view = writable(node, 5, root, JOB_NAME="train")
        assert (view / PACKAGES / "extra" / "__init__.py").read_text() == "VALUE = 4\n"
        assert (view / PACKAGES / "second" / "__init__.py").exists()
        assert (view / PACKAGES / "thing" / "same.py").read_text() == "NAME = 'SAME'\n", (
            "from the layer before"
        )
        end(node, 5, view)

        for job, view in (
            (6, writable(node, 6, root, JOB_NAME="another")),
            (7, shown(node, 7, root, JOB_NAME="train")),
        ):
            assert view is not None and not (view / PACKAGES / "extra").exists(), (
                "it is for this class, to write"
            )
            end(node, job, view)

        (package(root).parent / "thing-1.0.dist-info").rename(package(root).parent / "thing-2.0.dist-info")
        node.bootseer("env", "save", str(root))
        view = writable(node, 8, root, JOB_NAME="train")
        assert not (view / PACKAGES / "extra").exists(), "the environment is another one now"
        end(node, 8, view)
        assert [name["name"] for name in names(node)] == [str(root)]


def test_what_a_start_installed_over_a_snapshot_that_was_replaced(node: Node) -> None:
    """Saved over another one it would show files that the job never saw."""
    root, view = start_that_installs(node)
    (package(root).parent / "thing-1.0.dist-info").rename(package(root).parent / "thing-2.0.dist-info")
    node.bootseer("env", "save", str(root))
    saved(node, 1)
    (event,) = (event for event in end(node, 1, view) if event["kind"] == "snapshot")
    assert event["name"] == "failed" and "was replaced meanwhile" in str(event["message"])
    assert len(names(node)) == 1


def test_a_job_that_ends_while_it_is_saved(node: Node) -> None:
    root = make_large_venv(node)
    (package(root) / "larger").write_bytes(os.urandom(300 * 2**20))
    give_alice(root)
    node.bootseer("env", "save", str(root))
    node.start()
    view = writable(node, 1, root)
    install(view, "extra")
    as_alice(view, f"head -c 100M /dev/urandom > {PACKAGES}/extra/data")
    start_is_over(node, 1)

    def saves() -> bool:
        done = subprocess.run(
            ["pgrep", "-f", f'save-installed","{node.folder}'], capture_output=True, check=False
        )
        return done.returncode == 0

    wait_until(saves, 20)
    end(node, 1, view)
    wait_until(lambda: not saves() and not list(Path("/var/tmp").glob(f"bootseer-env-{ALICE}-*")))
    assert len(names(node)) == 1
    wait_until(lambda: node.environments() == [])


def test_a_layer_of_another_snapshot_in_the_record(node: Node) -> None:
    """The record is the user's to change: what it names must be the user's own."""
    root = make_large_venv(node)
    node.bootseer("env", "save", str(root))
    change(root)
    node.bootseer("env", "save", str(root))
    (file,) = (node.folder / "store/users" / str(ALICE) / "names").iterdir()
    record = json.loads(file.read_text())
    node.start()
    for job, base in enumerate(
        (
            record["base"] | {"folder": "users/0/blobs/x"},
            record["base"] | {"blob": "0" * 64},
            record["base"] | {"more": ""},
            record["base"] | {"signature": 1},
            [],
        ),
        start=1,
    ):
        file.write_text(json.dumps(record | {"base": base}))
        assert shown(node, job, root) is None
        faults = [str(event.get("message")) for event in end(node, job) if event["kind"] == "fault"]
        assert any("damaged" in fault or "not the one that was saved" in fault for fault in faults), (
            base,
            faults,
        )


def run_within(
    place: Path, original: os.stat_result, script: str, seen: Path
) -> subprocess.CompletedProcess[str]:
    """What a script prints that the program runs; timeit is a module that runs what it is told."""
    fd = mounts.bind_clone(seen)
    user = User(54321, 54322, (54322, 54323))
    code = f"import subprocess; subprocess.run(['/bin/sh', '-c', {script!r}])"
    seen_at = SeenAt(fd, original.st_dev, original.st_ino, str(place))
    task = Task(user, ("timeit", "-n", "1", "-r", "1", code), seen_at)
    done = subprocess.run(task.command(), capture_output=True, text=True, check=False, pass_fds=(fd,))
    os.close(fd)
    return done


def test_a_command_within_a_mount_gains_no_rights(node: Node) -> None:
    seen, place = node.folder / "data" / "seen", node.folder / "data" / "place"
    for folder in (seen, place):
        folder.mkdir()
    (seen / "here").touch()
    script = f"id -u; id -G; grep NoNewPrivs /proc/self/status; ls {place}; touch {place}/new"
    done = run_within(place, place.stat(), script, seen)
    assert done.stdout.split()[:6] == ["54321", "54322", "54323", "NoNewPrivs:", "1", "here"], done
    assert "Read-only" in done.stderr and list(place.iterdir()) == []
    assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 0, "and this process is as it was"


def test_a_mount_is_seen_only_where_the_folder_was(node: Node) -> None:
    """The path is the user's to change: root neither follows its links nor mounts on another folder."""
    seen, data = node.folder / "data" / "seen", node.folder / "data"
    (data / "outer" / "place").mkdir(parents=True)
    (data / "other" / "place").mkdir(parents=True)
    seen.mkdir()
    original = (data / "outer" / "place").stat()
    (data / "outer").rename(data / "moved")
    (data / "other").rename(data / "outer")
    done = run_within(data / "outer" / "place", original, "echo ran", seen)
    assert done.returncode and "is not any more what it was" in done.stderr and not done.stdout
    (data / "outer" / "place").rmdir()
    (data / "outer").rmdir()
    (data / "outer").symlink_to("moved")
    done = run_within(data / "outer" / "place", original, "echo ran", seen)
    assert done.returncode and "Not a directory" in done.stderr and not done.stdout
    home = data / "home"  # as on a file system with root_squash: the user may enter it, and opens it
    (data / "moved").rename(home)
    os.chown(home, 54321, 54322)
    home.chmod(0o700)
    done = run_within(home / "place", original, "echo ran", seen)
    assert done.stdout.startswith("ran\n"), done


@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_a_file_that_changes_while_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    root = tmp_path / "packages"
    (root / "thing-1.dist-info").mkdir(parents=True)
    (root / "data").write_bytes(bytes(2**20))
    (tmp_path / "store").mkdir()
    real = snapshot.write_tar

    def write_tar(*arguments: object, **more: object) -> object:
        if how == "gone":
            (root / "data").unlink()
        else:
            real_open = Path.open

            def shrunk(path: Path, *mode: str) -> object:
                file = real_open(path, *mode)  # type: ignore[call-overload]
                if path.name == "data":
                    os.truncate(path, 2**19)
                return file

            monkeypatch.setattr(Path, "open", shrunk)
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "write_tar", write_tar)
    with pytest.raises(BootseerError, match=r"data: was changed while it was saved"):
        snapshot.save(FileStore(tmp_path / "store"), root)
    assert not list((tmp_path / "store").glob("users/*/names/*"))


def test_what_is_installed_in_a_container(node: Node) -> None:
    """The job names its image; the snapshot was saved without one."""
    root = make_large_venv(node)
    image = node.folder / "data" / "image.sqsh"
    subprocess.run(
        ["mksquashfs", str(root), str(image), "-quiet", "-no-progress"], check=True, capture_output=True
    )
    os.utime(image, OLD)
    node.bootseer("env", "save", str(root))
    node.start()
    view = writable(node, 1, root, IMAGE=image)
    install(view, "extra")
    saved(node, 1)
    (event,) = (event for event in end(node, 1, view) if event["kind"] == "snapshot")
    assert event["name"] == "saved", event
    view = writable(node, 2, root, IMAGE=image)
    assert (view / PACKAGES / "extra" / "__init__.py").exists()
    end(node, 2, view)


def test_an_installer_that_runs_on_after_the_start_was_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    with node_of(settings='[prefetch]\nstart_quiet = "1s"\n') as node:
        root = make_large_venv(node)
        node.bootseer("env", "save", str(root))
        node.start()
        view = writable(node, 1, root)
        (view / PACKAGES / "thing" / "large").read_bytes()
        time.sleep(5)  # quiet, and nothing was installed
        assert '"kind":"snapshot"' not in (node.run / "events" / "1.0").read_text()
        install(view, "extra")
        saved(node, 1)
        (event,) = (event for event in end(node, 1, view) if event["kind"] == "snapshot")
        assert event["name"] == "saved"


def test_an_agent_that_is_killed_after_the_layer_was_saved(node: Node) -> None:
    """What the job sees stays what it was, and what it wrote since."""
    root, view = start_that_installs(node)
    saved(node, 1)
    as_alice(view, f"echo later > {PACKAGES}/later")
    node.crash()
    again = Path(f"/proc/self/fd/{attach(node, 1)[str(root)]}")
    assert (again / PACKAGES / "later").read_text() == "later\n" and (again / PACKAGES / "extra").exists()
    os.close(int(again.name))
    end(node, 1, view)
    wait_until(lambda: node.environments() == [])


def test_a_squashfuse_that_died_below_a_layer(node: Node) -> None:
    root, view = start_that_installs(node)
    subprocess.run(["pkill", "-9", "-f", f"squashfuse.*{node.folder}"], check=True)
    node.crash()
    again = Path(f"/proc/self/fd/{attach(node, 1)[str(root)]}")
    assert (again / PACKAGES / "thing" / "same.py").exists() and (again / PACKAGES / "extra").exists()
    os.close(int(again.name))
    end(node, 1, view)


def test_where_the_kernel_has_no_overlay_for_it() -> None:
    with node_of() as node:
        root = make_large_venv(node)
        node.bootseer("env", "save", str(root))
        change(root)
        node.bootseer("env", "save", str(root))
        node.start("""
from bootseer_slurm import mounts
real = mounts.mount
def mount(source, target, fstype, flags, data=None):
    if fstype == "overlay":
        raise OSError(22, "Invalid argument")
    return real(source, target, fstype, flags, data)
mounts.mount = mount
""")
        view = shown(node, 1, root)
        assert view is not None, node.log
        assert without_byte_code(contents(view)) == without_byte_code(contents_of(root))
        faults = [event["name"] for event in end(node, 1, view) if event["kind"] == "fault"]
        assert faults == ["overlay_failed"]


def test_what_was_installed_is_damaged_but_the_snapshot_is_not(node: Node) -> None:
    root, view = start_that_installs(node)
    saved(node, 1)
    end(node, 1, view)
    (layer,) = (name for name in names(node) if name.get("base"))
    shutil.rmtree(node.folder / "store" / layer["folder"])
    view = writable(node, 2, root)
    assert (view / PACKAGES / "thing" / "same.py").exists() and not (view / PACKAGES / "extra").exists()
    end(node, 2, view)


def test_jobs_that_are_never_called_the_same_leave_no_heap(tmp_path: Path) -> None:
    store, uid = FileStore(tmp_path), os.getuid()
    folder = f"users/{uid}/blobs/x"
    plain = Name("environment", "/a", "f", "0" * 64, folder, made_ns=100)
    made = [
        Name("environment", f"/a for {number:032x}", "f", "0" * 64, folder, number) for number in range(20)
    ]
    others = [Name("environment", f"/a{rest}", "f", "0" * 64, folder, 1) for rest in ("b", f"b for {0:032x}")]
    for name in (plain, *made, *others):
        write_name(store, uid, name)
    snapshot.forget_installed(store, made[-1])
    kept, _ = list_names(store, uid)
    wanted = {name.name for name in (plain, *made[4:], *others)}
    assert {name.name for name in kept} == wanted, "the newest"
    snapshot.forget_installed(store, Name("environment", "/a", "g", "0" * 64, folder, made_ns=200))
    assert {name.name for name in list_names(store, uid)[0]} == {plain.name, *(each.name for each in others)}


def test_what_others_keep_beside_byte_code(node: Node) -> None:
    """numba has files of its own in __pycache__, which do not follow from the source alone."""
    root = make_large_venv(node)
    cache = package(root) / "__pycache__"
    cache.mkdir()
    for name in ("same.f-1.py311.nbi", "edited.f-1.py311.nbi"):
        (cache / name).write_text("old")
    give_alice(root)
    node.bootseer("env", "save", str(root))
    (cache / "same.f-1.py311.nbi").write_text("new!")
    (cache / "edited.f-1.py311.nbi").unlink()
    (package(root).parent / "thing-1.0.dist-info").rename(package(root).parent / "thing-2.0.dist-info")
    node.bootseer("env", "save", str(root))
    assert names(node)[0].get("base")
    node.start()
    view = shown(node, 1, root)
    assert view is not None
    shown_cache = view / PACKAGES / "thing" / "__pycache__"
    assert (shown_cache / "same.f-1.py311.nbi").read_text() == "new!"
    assert not (shown_cache / "edited.f-1.py311.nbi").exists() and list(shown_cache.glob("same.*.pyc"))
    end(node, 1, view)
