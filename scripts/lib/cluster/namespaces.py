"""A machine of the cluster: its namespaces, its root file system, and how processes get into it.

Each has its own mount, network, UTS, IPC and PID namespace. Its root is a tmpfs on which the host's top-level
folders are bound, so that the host's packages and files are there as they are. What is mounted deeper on the
host is left out (a node would keep it busy), but for what the state folder and the repository lie on. And it
has of its own:

    /etc /var/lib /var/spool   the host's, under an overlay that takes the writes (in memory)
    /run /dev/shm              empty tmpfs; /dev/fuse is everybody's
    /proc                      of its PID namespace
    /shared                    empty, for the shared storage

Processes: `create` forks twice, and the second child is the first process of the new PID namespace; it execs
init.py only after the caller has recorded it. `spawn` forks three times, so that a daemon becomes its child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .layout import ClusterError, Process

MS_BIND, MS_REC, MS_SLAVE, MS_SHARED = 0x1000, 0x4000, 0x80000, 0x100000
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")
OWN_TOP_DIRS = ("proc", "run", "shared")
TOP_DIRS_WITH_MOUNTS = ("dev", "sys")
OVERLAID_DIRS = ("etc", "var/lib", "var/spool")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> None:
    """Call a function of the C library; raises OSError when it returns -1."""
    if getattr(_libc, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{args}: {os.strerror(number)}")


def mount(source: object, target: object, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _call(
        "mount",
        *(str(text).encode() for text in (source, target, kind)),
        ctypes.c_ulong(flags),
        data.encode(),
    )


def build_root(new_root: Path, writes: Path, needed: Sequence[Path]) -> None:
    """Make the root file system described above and move into it (in a fresh mount and PID namespace only).

    new_root, writes: empty folders to mount on.
    needed: folders that must be there whatever they are mounted on.
    """
    mount("none", "/", flags=MS_REC | MS_SLAVE)
    below = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    below = [
        path
        for path in below
        if len(path.parts) > 2 and any(folder.is_relative_to(path) for folder in needed)
    ]
    mount("tmpfs", new_root, "tmpfs", data="mode=0755,size=16m")
    for entry in Path("/").iterdir():
        target = new_root / entry.name
        if entry.is_symlink():
            target.symlink_to(entry.readlink())
        elif entry.name in OWN_TOP_DIRS:
            continue
        elif entry.is_dir():
            target.mkdir()
            mount(entry, target, flags=MS_BIND | (MS_REC if entry.name in TOP_DIRS_WITH_MOUNTS else 0))
        elif entry.is_file():
            target.touch()
            mount(entry, target, flags=MS_BIND)
    for path in sorted(below):
        mount(path, new_root / path.relative_to("/"), flags=MS_BIND)
    for name in OWN_TOP_DIRS:
        (new_root / name).mkdir()
    mount("proc", new_root / "proc", "proc")
    mount("tmpfs", new_root / "run", "tmpfs", data="mode=0755")
    mount("tmpfs", new_root / "dev/shm", "tmpfs", data="mode=1777")
    # Everybody's, as udev makes it; a container may have given this machine one that is root's.
    fuse = new_root / "run" / "fuse"
    os.mknod(fuse, 0o666 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    fuse.chmod(0o666)
    mount(fuse, new_root / "dev/fuse", flags=MS_BIND)
    mount("tmpfs", writes, "tmpfs", data="mode=0700")
    for name in OVERLAID_DIRS:
        upper, work = (writes / name.replace("/", "-") / part for part in ("upper", "work"))
        upper.mkdir(parents=True)
        work.mkdir()
        data = f"lowerdir=/{name},upperdir={upper},workdir={work}"
        mount("overlay", new_root / name, "overlay", data=data)
    os.chdir(new_root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def bind(source: Path, target: str) -> None:
    """Show a folder of the state at a path of this machine."""
    Path(target).mkdir(parents=True, exist_ok=True)
    mount(source, target, flags=MS_BIND)


def share_mounts() -> None:
    """Make all mounts shared, as systemd has them on a real node: who wants privacy has to see to it."""
    mount("none", "/", flags=MS_REC | MS_SHARED)


def create(host_name: str, prepare: Callable[[], None], record: Callable[[Process], None], log: Path) -> None:
    """Make a machine's namespaces, run prepare() in them, and leave init.py there as their first process.

    record(process) is called before that process does anything: when the caller dies first, it ends too.
    Raises ClusterError with what went wrong inside.
    """
    pid_pipe, go_pipe, error_pipe = os.pipe(), os.pipe(), os.pipe()
    outer = _fork()
    if outer == 0:
        with _reporting(error_pipe[1]):
            os.close(go_pipe[1])
            _call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID)
            first = _fork()
            if first:
                os.write(pid_pipe[1], b"%d" % first)
                os._exit(0)
            os.setsid()
            _redirect(log)
            if os.read(go_pipe[0], 1) != b"g":
                os._exit(1)
            _call("sethostname", host_name.encode(), len(host_name))
            prepare()
            # Not the script's own environment: what is started later shall not depend on who called `up`.
            program = Path(__file__).with_name("init.py")
            os.execve("/usr/bin/python3", ["python3", "-ISB", str(program), host_name], {"PATH": PATH})
    _started(outer, pid_pipe, error_pipe, log, go_pipe, record)


def spawn(
    init_pid: int,
    argv: Sequence[str],
    log: Path,
    *,
    uid_gid: tuple[int, int] | None = None,
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start a daemon (a program that stays in the foreground) in a machine, in a session of its own.

    uid_gid: run it with these rights and no further group; default: as root. Its output goes to the log.
    Raises ClusterError when it cannot be started.
    """
    pid_pipe, error_pipe = os.pipe(), os.pipe()
    outer = _fork()
    if outer == 0:
        with _reporting(error_pipe[1]):
            handles = [os.open(f"/proc/{init_pid}/ns/{kind}", os.O_RDONLY) for kind in NAMESPACES]
            host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            _redirect(log)
            for handle in handles:
                _call("setns", handle, 0)
            # Only children enter the PID namespace, and an orphan goes to the first process of its parent's
            # namespace. So the daemon is a grandchild: nobody outside has to collect it.
            inside = _fork()
            if inside:
                os.waitpid(inside, 0)
                os._exit(0)
            if _fork():
                os._exit(0)
            os.write(pid_pipe[1], os.readlink("self", dir_fd=host_proc).encode())
            os.setsid()
            os.chdir("/")
            if uid_gid:
                os.setgroups([])
                os.setgid(uid_gid[1])
                os.setuid(uid_gid[0])
            base = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
            os.execvpe(argv[0], list(argv), base | dict(env or {}))
    return _started(outer, pid_pipe, error_pipe, log)


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _redirect(log: Path) -> None:
    """stdin from /dev/null, stdout and stderr to the log."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)


@contextlib.contextmanager
def _reporting(error_fd: int) -> Iterator[None]:
    """In a child: whatever is raised goes to the parent as text, and the child ends here."""
    try:
        yield
    except BaseException as error:
        traceback.print_exc()
        os.write(error_fd, f"{type(error).__name__}: {error}"[:4000].encode())
        os._exit(1)


def _started(
    outer: int,
    pid_pipe: tuple[int, int],
    error_pipe: tuple[int, int],
    log: Path,
    go_pipe: tuple[int, int] | None = None,
    record: Callable[[Process], None] | None = None,
) -> Process:
    """In the parent: learn the process's number, let it go on, wait for its exec (it closes error_pipe)."""
    os.close(pid_pipe[1])
    os.close(error_pipe[1])
    try:
        os.waitpid(outer, 0)
        process = Process.of(int(os.read(pid_pipe[0], 32) or 0))
        if process and go_pipe and record:
            record(process)
            os.write(go_pipe[1], b"g")
        error = os.read(error_pipe[0], 4096).decode(errors="replace")
        if error or process is None:
            raise ClusterError(error or "a process ended at once", log)
        return process
    finally:
        for handle in (pid_pipe[0], error_pipe[0], *(go_pipe or ())):
            os.close(handle)


def entering(
    init_pid: int,
    argv: Sequence[str],
    *,
    user: str | None = None,
    cwd: str = "/",
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """The command line that runs argv in a machine, as root or as a user, with a clean environment."""
    command = [
        "nsenter",
        f"--target={init_pid}",
        *(f"--{kind}" for kind in ("mount", "net", "uts", "ipc", "pid")),
        "--",
    ]
    if user:
        command += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
    variables = {
        "PATH": PATH,
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
    }
    variables |= dict(env or {})
    return [
        *command,
        "env",
        "-i",
        f"--chdir={cwd}",
        *(f"{name}={value}" for name, value in variables.items()),
        *argv,
    ]


def run(init_pid: int, argv: Sequence[str], *, input_text: str | None = None, timeout_s: float = 60) -> str:
    """Run a command in a machine as root and return its output; raises ClusterError when it fails."""
    try:
        done = subprocess.run(
            entering(init_pid, argv),
            input=input_text,
            stdin=None if input_text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(argv)} took more than {timeout_s:g} s") from None
    if done.returncode != 0:
        raise ClusterError(
            f"{' '.join(argv)} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-1000:]}"
        )
    return done.stdout
