"""`bootseer doctor`: what this node can do, found by trying, and what it means when it cannot.

Owns the questions and the table. Changes nothing; what it makes to try something is gone afterwards. One
thread, since the kernel's probe forks, but for the store, which may hang.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bootseer_slurm.cli import peers, settings
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.units import format_duration

# What pyxis has when slurmd was started without PATH; enroot looks for squashfuse there.
_STEP_PATH = "/usr/local/bin:/usr/bin:/bin"
_STAND_IN_MARK = b"Stands in for squashfuse"
_PLUGSTACK = Path("/etc/slurm")
_STORE_TIMEOUT_S = 5.0
_COLLECT_LATE_S = 3600.0  # the timer's rounds are ten minutes
_MKSQUASHFS_VERSION = (4, 5)
_SLURM_TIMEOUT_S = 5.0
# By 22.05 to 25.05 and from 25.11 on.
_NAMESPACE_SETTING = re.compile(r"^(?:JobContainerType|NamespaceType)\s*=\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing. works: None when it cannot be told. meaning: of that answer."""

    thing: str
    works: bool | None
    meaning: str


def doctor(
    nodelist: Annotated[
        str | None,
        typer.Option("--peers", metavar="NODELIST", help="Instead: which of these nodes can be reached."),
    ] = None,
) -> None:
    """Show what this node can do. Exit status 0 whatever it is; root sees most.

    With --peers, which needs no root: whether jobs on these nodes can exchange blocks, tried from this one.
    Exit status 1 where a node is silent or has no address.
    """
    config = settings.config()
    if nodelist is not None:
        if not peers.show_reach(config, nodelist):
            raise typer.Exit(1)
        return
    table = Table(show_edge=False, pad_edge=False)
    for title in ("", "", "what it means"):
        table.add_column(title, overflow="fold")
    for finding in findings(config):
        answer = {True: "[green]yes[/]", False: "[red]no[/]", None: "[yellow]?[/]"}[finding.works]
        table.add_row(finding.thing, answer, finding.meaning.replace("[", r"\["))
    Console(highlight=False).print(table)


def findings(config: Config) -> Iterator[Finding]:
    """All findings, in the order of a job's start."""
    yield _agent(config)
    yield _job_groups(config)
    yield from _store_and_cache(config)
    yield _digests()
    yield _fuse()
    yield _job_namespace()
    by_kernel = list(_kernel_mounts(config))
    yield from by_kernel
    yield Finding("peers", *peers.state(config))
    yield _packing()
    yield _stand_in()
    for program in ("squashfuse", "squashfuse_ll"):
        yield _squashfuse(program)
    yield _environments(by_kernel[-1].works is True)
    yield from _enroot()
    yield _importer()
    yield _records(config)
    yield Finding(
        "FUSE passthrough", None, "not needed: a blob that is whole is given to jobs as the plain file it is"
    )


def _agent(config: Config) -> Finding:
    from bootseer_slurm.agentapi import client

    try:
        client.request("status", socket_path=str(config.agent.socket))
    except BootseerError as error:
        return Finding("node agent", False, f"jobs start without Bootseer: {error.message}")
    return Finding("node agent", True, f"answers at {config.agent.socket}")


def _job_groups(config: Config) -> Finding:
    """Whether what runs for jobs in the agent's service is bounded."""
    from bootseer_slurm.agentapi import client, protocol

    name = "groups of jobs"
    try:
        reply = client.request("status", socket_path=str(config.agent.socket))
        pid = json.loads(protocol.first(reply, "STATUS_JSON"))["pid"]
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (BootseerError, OSError, ValueError, LookupError) as error:
        return Finding(name, None, f"not known: {error}")
    if any(line.startswith("0::") and line.endswith("/agent") for line in groups):
        return Finding(name, True, "what runs for a job is bounded, and ends with the job (cgroups)")
    return Finding(
        name, None, "processes that work for jobs are not bounded: the agent has no cgroup v2 that is its own"
    )


def _records(config: Config) -> Finding:
    """Whether this is the machine that collects, and does so."""
    lock = config.records.path / "lock"
    try:
        age_s = time.time() - lock.stat().st_mtime
    except PermissionError:
        return Finding("records", None, "root sees whether starts are collected here")
    except OSError:
        return Finding(
            "records", None, "starts are not collected here; one machine does it (docs/overhead.md)"
        )
    shown = f"{config.records.path}: `bootseer collect` ran {format_duration(max(0.0, age_s))} ago"
    if age_s > _COLLECT_LATE_S:
        return Finding("records", False, f"{shown}: see `systemctl list-timers bootseer-collect.timer`")
    return Finding("records", True, shown)


def _store_and_cache(config: Config) -> Iterator[Finding]:
    problem = _within(lambda: _list_store(config.store.uri), _STORE_TIMEOUT_S)
    meaning = f"{config.store.uri} can be read" if not problem else f"{config.store.uri}: {problem}"
    yield Finding("store", not problem, meaning)
    folder = next(each for each in (config.cache.path, *config.cache.path.parents) if _exists(each))
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("cache", False, f"{folder}: {error.strerror}")
        return
    room_bytes = free_bytes - config.cache.min_free_bytes
    shown = f"{config.cache.path}: {free_bytes / 2**30:.1f} GiB free"
    if room_bytes > 0:
        yield Finding("cache", True, f"{shown}, {config.cache.min_free_bytes / 2**30:.1f} of it left alone")
    else:
        yield Finding("cache", False, f"{shown}, less than cache.min_free: blocks are not kept")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # below a folder of root
        return False


def _digests() -> Finding:
    from bootseer_slurm.blob.digest import BLAKE3, PREFERRED

    if PREFERRED == BLAKE3:
        return Finding("digests", True, "new blobs have blake3; those with sha256 are read too")
    return Finding(
        "digests", False, "Python lacks the package blake3: jobs start without what was stored with it"
    )


def _list_store(uri: str) -> None:
    from bootseer_slurm.store import open_store

    open_store(uri).list("users")


def _within(action: Callable[[], object], timeout_s: float) -> str:
    """Do it in a thread; why it failed, or that it did not come back."""
    problems = [f"no answer in {timeout_s:g} s"]

    def run() -> None:
        try:
            action()
            problems[0] = ""
        except Exception as error:
            problems[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return problems[0]


def _fuse() -> Finding:
    if not Path("/dev/fuse").exists():
        return Finding("FUSE", False, "nothing can be shown before it is whole: modprobe fuse")
    return Finding("FUSE", True, "blobs are shown while they are still coming")


def _job_namespace() -> Finding:
    """What Slurm itself does with a job's mounts, by `scontrol show config`."""
    thing = "namespace of a job"
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SLURM_TIMEOUT_S,
            check=False,
        )
    except OSError:
        return Finding(thing, None, "scontrol is not installed here")
    except subprocess.TimeoutExpired:
        return Finding(thing, None, f"scontrol did not answer in {_SLURM_TIMEOUT_S:g} s")
    if done.returncode != 0:
        return Finding(thing, None, f"scontrol: {done.stderr.strip() or done.returncode}")
    setting = _NAMESPACE_SETTING.search(done.stdout)
    name = setting[1] if setting else "(null)"
    if name in ("(null)", "job_container/none"):
        return Finding(thing, True, "Slurm gives it none; each step is shown its files in one of its own")
    if name in ("job_container/tmpfs", "namespace/tmpfs", "namespace/linux"):
        return Finding(
            thing, True, f"{name}: each step is shown its files in a copy of it; not those in private folders"
        )
    return Finding(thing, None, f"{name} was not tried: a step may start with the originals")


def _kernel_mounts(config: Config) -> Iterator[Finding]:
    """Loop devices, squashfs, owners and attaching; and whether anything is trusted to go that way."""
    from bootseer_slurm.image.kernel_mount import STEPS, probe
    from bootseer_slurm.image.signing import read_key

    if os.geteuid() != 0:
        yield from (Finding(step, None, "only root can try") for step in STEPS)
        yield Finding("site key", None, "only root can read it")
        return
    meanings = {
        "loop devices": "an image can be a block device",
        "squashfs driver": "the kernel can read it",
        "idmapped mounts": "root's files in it can be the user's",
        "locked mounts": "the user cannot take away nosuid and nodev",
        "attached by a user": "in a container's namespaces, as the stand-in for squashfuse does",
    }
    rows = probe()
    for name, ok, reason in rows:
        yield Finding(name, ok, meanings[name] if ok else reason)
    key = read_key(config.image.site_key)
    reason = key.reason or "images that the agents pack are known again"
    yield Finding("site key", bool(key), reason if key else f"no image is trusted: {reason}")
    off = config.image.kernel_mount == "off"
    if off or not key or not all(ok for _, ok, _ in rows):
        why = "image.kernel_mount is off" if off else "see the lines above"
        yield Finding("kernel mounts", False, f"all images go through squashfuse, which is slower: {why}")
    else:
        yield Finding("kernel mounts", True, "images that the site packed do not go through squashfuse")


def _packing() -> Finding:
    thing, path = "packing", shutil.which("mksquashfs")
    if path is None:
        return Finding(thing, False, "no images can be made here: apt-get install squashfs-tools")
    done = subprocess.run([path, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if version is None or (int(version[1]), int(version[2])) < _MKSQUASHFS_VERSION:
        return Finding(thing, False, f"{path} is older than 4.5, and cannot read a tar")
    return Finding(thing, True, f"{path} {version[1]}.{version[2]} makes images")


def _programs(name: str) -> list[Path]:
    """All programs of this name on the steps' PATH, without those that are one and the same."""
    found: list[Path] = []
    for folder in _STEP_PATH.split(":"):
        path = Path(folder, name)
        if os.access(path, os.X_OK) and path.is_file() and not any(path.samefile(each) for each in found):
            found.append(path)
    return found


def _is_stand_in(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _STAND_IN_MARK in file.read(200)
    except OSError:
        return False


def _stand_in() -> Finding:
    thing = "stand-in for squashfuse"
    found = [_is_stand_in(path) for path in _programs("squashfuse")]
    if True not in found:
        return Finding(thing, False, f"not on {_STEP_PATH}: install libexec/squashfuse in /usr/local/bin")
    if not found[0]:
        return Finding(thing, False, f"another squashfuse comes first on {_STEP_PATH}")
    if all(found):
        return Finding(thing, False, "the real one is missing: images that are not trusted cannot be mounted")
    return Finding(thing, True, f"{_programs('squashfuse')[0]}, before the real one")


def _squashfuse(program: str) -> Finding:
    found = [path for path in _programs(program) if not _is_stand_in(path)]
    if found:
        return Finding(program, True, f"{found[0]}")
    needed = {
        "squashfuse": "containers cannot start from an image as it lies",
        "squashfuse_ll": "environments are mounted with squashfuse, which is slower",
    }
    return Finding(program, False, f"{needed[program]}: apt-get install squashfuse")


def _environments(by_kernel: bool) -> Finding:
    """The ways in which this node can show a snapshot, the fastest first."""
    thing, ways = "environments", ["by the kernel, where an agent packed them"] if by_kernel else []
    mounting = [name for name in ("squashfuse_ll", "squashfuse") if _programs(name)]
    if mounting:
        ways.append(f"by {mounting[0]}")
    elif _programs("unsquashfs"):
        ways.append("unpacked by unsquashfs, which is slow")
    if ways:
        return Finding(thing, True, "snapshots are shown " + ", else ".join(ways))
    return Finding(thing, False, "snapshots are not used: apt-get install squashfuse")


def _enroot() -> Iterator[Finding]:
    found = _programs("enroot")
    if not found:
        yield Finding("enroot", False, "no containers on this node")
        return
    yield Finding("enroot", True, f"{found[0]}")
    # The program is a shell script, and names its defaults: they differ between its versions.
    program = found[0].read_text(errors="replace")
    folder = re.search(r'^config::export ENROOT_SYSCONF_PATH\s+"?(/[^"\s]+)', program, re.MULTILINE)
    lines = [
        *program.splitlines(),
        *_lines(Path(folder[1] if folder else "/etc/enroot"), "enroot.conf", "enroot.conf.d/*"),
    ]
    setting = re.compile(r"^(?:config::export )?ENROOT_NATIVE_OVERLAYFS\s+(\S+)")
    values = [match[1] for match in map(setting.match, lines) if match]
    native = bool(values) and values[-1].strip("\"'").lower() in ("y", "yes", "true", "1")
    meaning = "what a container reads comes from the kernel alone"
    lacking = (
        "what a container reads goes through fuse-overlayfs: set ENROOT_NATIVE_OVERLAYFS yes in enroot.conf"
    )
    yield Finding("enroot's kernel overlay", native, meaning if native else lacking)


def _importer() -> Finding:
    thing = "pyxis importer"
    if not _PLUGSTACK.is_dir():
        return Finding(thing, None, f"{_PLUGSTACK}: no such folder")
    lines = [line for line in _lines(_PLUGSTACK, "plugstack.conf", "plugstack.conf.d/*") if "pyxis" in line]
    if not lines:
        return Finding(thing, False, f"no pyxis in {_PLUGSTACK}/plugstack.conf")
    if not any("importer=" in line and "bootseer" in line for line in lines):
        return Finding(thing, False, "pyxis imports images itself: give it importer=…/bootseer-importer")
    if not any("use_squashfuse=1" in line for line in lines):
        return Finding(thing, False, "pyxis unpacks what the importer gives: add use_squashfuse=1")
    return Finding(thing, True, "containers are started from images as they lie")


def _lines(folder: Path, *patterns: str) -> Iterator[str]:
    """The lines of configuration files, without comments; those that cannot be read are left out."""
    for pattern in patterns:
        for path in sorted(path for path in folder.glob(pattern) if path.is_file()):
            try:
                text = path.read_text(errors="replace")
            except OSError:
                continue
            yield from (line for line in text.splitlines() if not line.lstrip().startswith("#"))
