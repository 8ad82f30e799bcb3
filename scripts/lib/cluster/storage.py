"""Shared storage that is really remote: sftp.py on the store server, sshfs over each node's own link.

The store server has a link of its own, which all nodes share: its rate limits what they read and write
together. On the controller /shared is the folder of the state. The nodes mount it as root with allow_other
and default_permissions: the kernel checks permissions by the true owners. sshfs alone would leave what a user
creates to root, so owner.c hands it over (see there). Like NFS it shows others' changes after 2 seconds at
most, and the time stamps of SFTP have whole seconds.

sshfs ends (libfuse 3.14, unlink_node) when a node renames a file to a name that it knew and that another
machine has removed meanwhile. Whoever removes files behind the nodes mounts it anew on them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .layout import STORE, ClusterError, Layout, State, poll
from .namespaces import run, spawn
from .settings import GROUP_ID, USERS

# noforget: a file keeps its inode number, as on any shared file system, also after its caches were dropped.
SSHFS_OPTIONS = "allow_other,default_permissions,noforget,dcache_timeout=1,reconnect"
PORT = 2049  # as NFS


def prepare(layout: Layout) -> None:
    """Make the shared folder with the users' homes and the store, and compile what sshfs lacks."""
    layout.shared.mkdir(mode=0o755)
    home = layout.shared / "home"
    home.mkdir(mode=0o755)
    for user, number in USERS.items():
        (home / user).mkdir(mode=0o700)
        os.chown(home / user, number, number)
    for name, group, mode in (("bootseer", 0, 0o755), ("data", GROUP_ID, 0o2775)):
        folder = layout.shared / name
        folder.mkdir()
        os.chown(folder, 0, group)
        folder.chmod(mode)
    compile_library(
        Path(__file__).with_name("owner.c"), _owner_library(layout), "-I/usr/include/fuse3", "-ldl"
    )


def compile_library(source: Path, library: Path, *options: str) -> None:
    """Compile a library that a process is given by LD_PRELOAD; raises ClusterError."""
    library.parent.mkdir(exist_ok=True)
    command = [
        "gcc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(source),
        *options,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{source.name} does not compile:\n{done.stderr[-2000:]}")


def serve(state: State) -> None:
    """Start the server; it listens when this returns."""
    layout = state.layout
    log = layout.log(STORE, "sftp")
    clients = [layout.address(node) for node in state.nodes]
    argv = [
        sys.executable,
        "-I",
        str(Path(__file__).with_name("sftp.py")),
        layout.address(STORE),
        str(PORT),
    ]
    process = spawn(state.init(STORE), [*argv, *clients], log)
    state.add(STORE, "sftp", process)
    if not poll(lambda: "serving" in log.read_text() or not process.alive, timeout_s=20) or not process.alive:
        raise ClusterError("the server of /shared does not start", log)


def mount(state: State, node: str) -> None:
    """Mount /shared on a node."""
    layout, pid = state.layout, state.init(node)
    log = layout.log(node, "sshfs")
    options = f"directport={PORT},{SSHFS_OPTIONS}{_symlink_option()}"
    argv = ["sshfs", "-f", "-o", options, f"{layout.address(STORE)}:/shared", "/shared"]
    process = spawn(pid, argv, log, env={"LD_PRELOAD": str(_owner_library(layout))})
    state.add(node, "sshfs", process)


def unmount(state: State, node: str) -> None:
    """Unmount a node's /shared; raises ClusterError when something there is in use."""
    process = state.process(node, "sshfs")
    run(state.init(node), ["umount", "/shared"])
    if process and not process.wait(10):
        raise ClusterError(f"{node}: sshfs does not end", state.layout.log(node, "sshfs"))


def wait_mounted(state: State, node: str) -> None:
    """Wait until a node's /shared answers; raises ClusterError."""
    process, pid = state.process(node, "sshfs"), state.init(node)
    assert process
    mounts = Path(f"/proc/{pid}/mounts")
    if not poll(lambda: " /shared fuse.sshfs " in mounts.read_text() or not process.alive, timeout_s=20) or (
        not process.alive
    ):
        raise ClusterError(f"{node}: /shared could not be mounted", state.layout.log(node, "sshfs"))
    run(pid, ["stat", "/shared/home"], timeout_s=20)


def drop_caches() -> None:
    """Forget all cached pages and names, of all nodes at once: they share the kernel."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def empty(folder: Path) -> None:
    """Delete what is in a folder."""
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _owner_library(layout: Layout) -> Path:
    return layout.dir / "lib" / "owner.so"


def _symlink_option() -> str:
    """Newer versions of sshfs refuse absolute links unless told otherwise; a venv's python is one."""
    usage = subprocess.run(["sshfs", "--help"], capture_output=True, text=True, check=False)
    return ",no_contain_symlinks" if "no_contain_symlinks" in usage.stdout + usage.stderr else ""
