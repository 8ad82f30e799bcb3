"""The plugin's parts without Slurm: what it exports, its checks of values, its wire, its mounts.

driver.c calls them; sockets, processes, namespaces and mounts are real. The plugin as a whole, in Slurm, is
tested in tests/slurm/test_plugin.py.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SPANK = HERE.parents[1] / "spank"
# For whatever must not hang: the plugin's own limits in these tests are far below.
HUNG_LIMIT_S = 20.0
USER = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of spank/, built, with the driver."""
    if not Path("/usr/include/slurm/spank.h").exists() or not shutil.which("gcc"):
        pytest.skip("needs gcc and Slurm's headers (libslurm-dev)")
    folder = tmp_path_factory.mktemp("spank") / "spank"
    shutil.copytree(SPANK, folder, ignore=shutil.ignore_patterns("*.o", "*.so"))
    subprocess.run(["make", "-C", folder], check=True, stdout=subprocess.DEVNULL)
    parts = [folder / f"{part}.c" for part in ("options", "profile", "agent", "attach", "gate", "text")]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", "-I", folder]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", folder / "driver"]
    subprocess.run(["gcc", *flags, HERE / "driver.c", HERE / "no_slurm.c", *parts], check=True)
    return folder


@pytest.fixture
def drive(build: Path) -> Callable[..., str]:
    """Runs the driver, which must succeed, and returns what it prints."""

    def run(*args: object, **more: object) -> str:
        done = subprocess.run(
            [build / "driver", *map(str, args)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HUNG_LIMIT_S,
            check=False,
            **more,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    return run


# --- the library


def test_exports_only_what_slurm_looks_for(build: Path) -> None:
    done = subprocess.run(
        ["nm", "-D", "--defined-only", build / "spank_bootseer.so"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split()[2] for line in done.stdout.splitlines()}
    assert names == {
        "plugin_name",
        "plugin_type",
        "plugin_version",
        "slurm_spank_exit",
        "slurm_spank_init",
        "slurm_spank_init_post_opt",
        "slurm_spank_task_init_privileged",
        "slurm_spank_task_post_fork",
    }


def test_install(build: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["make", "-C", build, "install", f"DESTDIR={tmp_path}", "PLUGINDIR=/usr/lib64/slurm"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.so")] == [
        "usr/lib64/slurm/spank_bootseer.so"
    ]


# --- values of options


@pytest.mark.parametrize(
    ("value", "kind", "canonical"),
    [
        ("/a/b.sqsh", "uri", "/a/b.sqsh"),
        ("b.sqsh", "uri", "/work/b.sqsh"),
        ("./x//y/./z/", "path", "/work/x/y/z"),
        ("../x", "path", "/work/../x"),
        ("/", "path", "/"),
        ("//", "path", "/"),
        (".", "path", "/work"),
        ("/.hidden/..x/a.", "path", "/.hidden/..x/a."),
        ("/a b/ü", "path", "/a b/ü"),
        ("docker://nvcr.io/nvidia/pytorch:24.01", "uri", "docker://nvcr.io/nvidia/pytorch:24.01"),
        ("s3+x.y-1://bucket/key//x", "uri", "s3+x.y-1://bucket/key//x"),
        ("/odd://name", "path", "/odd:/name"),
        ("/" + "x" * 4095, "path", "/" + "x" * 4095),
        ("", "uri", "refused: it is empty"),
        ("/" + "x" * 4096, "path", "refused: it is longer than 4096 bytes"),
        ("x" * 4092, "path", "refused: it is longer than 4096 bytes when made absolute"),
        ("/a\nb", "path", "refused: it has a control character in it"),
        ("/a\x7f", "path", "refused: it has a control character in it"),
        ("docker://x", "path", "refused: it must be a folder, not a URI"),
        (
            "Docker://x",
            "uri",
            "refused: the scheme before :// must be lower-case letters, digits, + . -",
        ),
        ("://x", "uri", "refused: the scheme before :// must be lower-case letters, digits, + . -"),
        ("3s://x", "uri", "refused: the scheme before :// must be lower-case letters, digits, + . -"),
        ("docker://", "uri", "refused: nothing follows the ://"),
    ],
)
def test_values(drive: Callable[..., str], value: str, kind: str, canonical: str) -> None:
    assert drive("canonical", value, kind, "/work") == canonical + "\n"


def test_relative_value_in_a_folder_that_is_gone(drive: Callable[..., str]) -> None:
    assert drive("canonical", "x", "path", "").startswith("refused: it is relative")
    assert drive("canonical", "/x", "path", "") == "/x\n"


def test_profile_text(drive: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    text = '# Größe\r\nimages = ["/shared/a.sqsh"]\n\tx'
    path.write_bytes(text.encode())
    assert drive("read-profile", path, 65536).encode() == text.replace("\r\n", "\n").encode()
    path.write_text("#" * 100)
    assert drive("read-profile", path, 100) == "#" * 100


def test_profiles_that_cannot_be(drive: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    assert drive("read-profile", path, 100) == "refused: No such file or directory"
    assert drive("read-profile", tmp_path, 100) == "refused: it is not a regular file"
    path.write_bytes(b"x" * 2049)
    assert drive("read-profile", path, 2048) == "refused: it is larger than 2 KiB"
    path.write_bytes(b"a\0b")
    assert drive("read-profile", path, 100) == "refused: it is not a text file"
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    assert drive("read-profile", pipe, 100) == "refused: it is not a regular file"


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("exit 0", "valid: "),
        ("echo chatter >&2; exit 0", "valid: "),
        (
            "echo 'job.toml: imges: unknown key' >&2; echo hint >&2; exit 2",
            "invalid: job.toml: imges: unknown",
        ),
        ("exit 2", "invalid: the profile /p.toml is invalid"),
        ("printf '\\n\\nred\\033[31m' >&2; exit 2", "invalid: red?[31m"),
        ("exit 1", "unchecked: "),
        ("exit 127", "unchecked: "),
        ("kill -SEGV $$", "unchecked: "),
        ("sleep 60 & sleep 60", "unchecked: "),
        ("exec 2>&-; sleep 60", "unchecked: "),
        ("yes >&2", "unchecked: "),
        ("test $# = 3 && test $1 = profile && test $2 = check && test $3 = /p.toml || exit 2", "valid: "),
        ("read line && exit 2; exit 0", "valid: "),
    ],
)
def test_profile_check(drive: Callable[..., str], tmp_path: Path, script: str, verdict: str) -> None:
    checker = tmp_path / "bootseer"
    checker.write_text(f"#!/bin/sh\n{script}\n")
    checker.chmod(0o755)
    assert drive("check-profile", checker, "/p.toml", 2000).startswith(verdict)


def test_profile_check_without_checker(drive: Callable[..., str], tmp_path: Path) -> None:
    assert drive("check-profile", tmp_path / "none", "/p.toml", 2000).startswith("unchecked: ")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("0:1:2:/a:b", "0 1 2 /a:b"),
        ("2:18446744073709551615:7:/", "2 18446744073709551615 7 /"),
        ("3:1:2:/a", "refused"),
        ("-1:1:2:/a", "refused"),
        ("0:1:/a", "refused"),
        ("0:1:2:a", "refused"),
        ("0:1:2:", "refused"),
        ("0:1: 2:/a", "refused"),
        ("0:1:18446744073709551616:/a", "refused"),
        ("", "refused"),
        ("0:1:2:/" + "x" * 4096, "refused"),
    ],
)
def test_bind_of_a_reply(drive: Callable[..., str], text: str, parsed: str) -> None:
    assert drive("parse-bind", text, 3) == parsed + "\n"


# --- the wire


@contextmanager
def answering(path: Path, reply: bytes, fd_count: int = 0) -> Iterator[list[bytes]]:
    """A listener that answers one client; gives the list that the request will be in."""
    requests: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(HUNG_LIMIT_S)  # for a client that never comes

        def serve() -> None:
            link, _ = listener.accept()
            link.settimeout(HUNG_LIMIT_S)
            with link:
                requests.append(b"".join(iter(lambda: link.recv(65536), b"")))
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * fd_count))
                try:
                    link.sendmsg([reply[:1]], [rights] if fd_count else [])
                    link.sendall(reply[1:])
                except ConnectionError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join()


@needs_root
def test_request_and_reply(drive: Callable[..., str], tmp_path: Path) -> None:
    with answering(tmp_path / "s", b"STATUS=ok\0BIND=0:1:2:/x\0EMPTY=\0", 3) as requests:
        printed = drive("call", tmp_path / "s", 5000, "OP=attach", "PROFILE=a=1\nb=2\n", "ENV=")
    assert requests == [b"OP=attach\0PROFILE=a=1\nb=2\n\0ENV=\0"]
    assert printed == "STATUS=ok\nBIND=0:1:2:/x\nEMPTY=\n3 descriptors\n"


@needs_root
@pytest.mark.parametrize(
    ("reply", "fd_count", "printed"),
    [
        (b"STATUS=ok\0" * 100_000, 64, "64 descriptors"),
        (b"STATUS=ok\0", 65, "EBADMSG"),
        (b"STATUS=ok\0", 253, "EBADMSG"),
        (b"STATUS=ok", 5, "EBADMSG"),
        (b"\0", 0, "0 descriptors"),
        (b"", 0, "EBADMSG"),
        (b"x" * (1 << 20) + b"\0", 9, "EBADMSG"),
    ],
    ids=["large", "65 fds", "253 fds", "not whole", "one nul", "nothing", "too large"],
)
def test_replies(
    drive: Callable[..., str], tmp_path: Path, reply: bytes, fd_count: int, printed: str
) -> None:
    with answering(tmp_path / "s", reply, fd_count):
        assert drive("call", tmp_path / "s", 5000, "OP=attach").splitlines()[-1] == printed


@needs_root
@pytest.mark.parametrize(
    ("said", "printed"),
    [
        (b"WAIT=5000\0", "WAIT=5000\nSTATUS=ok\n0 descriptors\n"),
        (b"WAIT=50\0", "ETIMEDOUT\n"),
        (b"WAIT=99999999999999999999\0", "ETIMEDOUT\n"),
        (b"WAIT=-1\0", "ETIMEDOUT\n"),
        (b"X=1\0WAIT=5000\0", "ETIMEDOUT\n"),
    ],
)
def test_agent_that_asks_for_patience(
    drive: Callable[..., str], tmp_path: Path, said: bytes, printed: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def answer_late() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(65536)
                link.sendall(said)
                time.sleep(0.6)
                with contextlib.suppress(ConnectionError):
                    link.sendall(b"STATUS=ok\0")

        thread = threading.Thread(target=answer_late)
        thread.start()
        assert drive("call", tmp_path / "s", 200, "OP=attach") == printed
        thread.join()


def test_no_agent(drive: Callable[..., str], tmp_path: Path) -> None:
    assert drive("call", tmp_path / "s", 60_000, "OP=attach") == "ENOENT\n"
    assert drive("tell", tmp_path / "s", 60_000) == "ENOENT\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(str(tmp_path / "s"))
    assert drive("call", tmp_path / "s", 60_000, "OP=attach") == "ECONNREFUSED\n"
    assert drive("call", "/" + "x" * 200, 60_000, "OP=attach") == "ENAMETOOLONG\n"


@needs_root
def test_hung_agent(drive: Callable[..., str], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        assert drive("call", tmp_path / "s", 200, "OP=attach") == "ETIMEDOUT\n"
        # More than the socket's buffer takes: the sender would wait too.
        large = [f"PROFILE={'x' * 120_000}"] * 5
        assert drive("call", tmp_path / "s", 200, "OP=attach", *large) == "ETIMEDOUT\n"
        assert drive("tell", tmp_path / "s", 200) == "told\n"


@needs_root
def test_agent_that_drips(drive: Callable[..., str], tmp_path: Path) -> None:
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def drip() -> None:
            link, _ = listener.accept()
            with link:
                while not ended.wait(0.05):
                    try:
                        link.send(b"X=1\0", socket.MSG_NOSIGNAL)
                    except ConnectionError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        assert drive("call", tmp_path / "s", 300, "OP=attach") == "ETIMEDOUT\n"
        ended.set()
        thread.join()


@needs_root
def test_agent_that_takes_no_more_connections(drive: Callable[..., str], tmp_path: Path) -> None:
    waiting = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.setblocking(False)
            waiting.append(link)
            if link.connect_ex(str(tmp_path / "s")) != 0:
                break
        assert drive("call", tmp_path / "s", 200, "OP=attach") == "ETIMEDOUT\n"
        assert drive("tell", tmp_path / "s", 50) == "ETIMEDOUT\n"
    for link in waiting:
        link.close()


@needs_root
def test_agent_that_is_not_root(drive: Callable[..., str], tmp_path: Path) -> None:
    for parent in tmp_path.parents[:-2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o777)
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('up')"
    )
    with subprocess.Popen(
        [sys.executable, "-uc", f"{code}; print('up'); sys.stdin.read()", tmp_path / "s"],
        user=USER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as listener:
        assert listener.stdout
        assert listener.stdout.readline() == b"up\n"
        assert drive("call", tmp_path / "s", 5000, "OP=attach") == "EPERM\n"
        assert drive("tell", tmp_path / "s", 5000) == "EPERM\n"
        listener.kill()


# --- the shadow


class Place:
    """A folder that everybody may enter, and agents that show one thing in it over another."""

    def __init__(self, root: Path, drive: Callable[..., str]) -> None:
        self.root = root
        self._drive = drive

    def file(self, name: str, content: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def attach(
        self, *binds: str, command: str = "true", agent: tuple[str, ...] = (), stop: str = "go"
    ) -> str:
        """What the driver prints, attached as USER to an agent that gives these binds."""
        sock = self.root / "agent.sock"
        argv = [sys.executable, str(HERE / "fake_agent.py"), str(sock), str(self.root / "log"), *agent]
        argv += [word for bind in binds for word in ("--bind", bind)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline().startswith(b"ready ")
            try:
                return self._drive("attach", sock, 1000 if stop == "stop" else 15_000, USER, stop, command)
            finally:
                process.kill()


@pytest.fixture
def place(tmp_path: Path, drive: Callable[..., str]) -> Place:
    for parent in [tmp_path, *tmp_path.parents[:-2]]:
        parent.chmod(0o755)
    return Place(tmp_path, drive)


@needs_root
def test_shadow_of_a_file_and_a_folder(place: Place) -> None:
    original, blob = place.file("original", "slow"), place.file("blob", "fast")
    place.file("venv/pyvenv.cfg", "slow"), place.file("snapshot/pyvenv.cfg", "fast")
    folder = place.root / "venv"
    command = f"cat {original} {folder}/pyvenv.cfg; touch {original} {folder}/x 2>&1 | grep -c Read-only"
    printed = place.attach(
        f"{blob}={original}", f"{place.root / 'snapshot'}={folder}", command=f"{command}; true"
    )
    assert printed == f"shown {original}\nshown {folder}\nno child is left\nfastfast2\n"
    # Nobody else sees it.
    assert original.read_text() == "slow"
    assert (folder / "pyvenv.cfg").read_text() == "slow"
    assert str(original) not in Path("/proc/self/mountinfo").read_text()


@needs_root
def test_mounts_are_harmless_also_when_the_agent_forgot(place: Place) -> None:
    original, blob = place.file("original", "slow"), place.file("blob", "fast")
    command = f"grep ' {original} ' /proc/self/mountinfo; grep ' / / ' /proc/self/mountinfo"
    printed = place.attach(f"{blob}={original}", command=f"{command}; true", agent=("--plain",))
    flags = next(line.split()[5] for line in printed.splitlines() if f" {original} " in line)
    assert {"ro", "nosuid", "nodev"} <= set(flags.split(","))


@needs_root
def test_a_bind_that_fails_leaves_the_others(place: Place) -> None:
    blob, first, last = place.file("blob", "fast"), place.file("first", "slow"), place.file("last", "slow")
    hidden = place.file("private/original", "slow")
    hidden.parent.chmod(0o700)
    real = place.file("real/original", "slow")
    (place.root / "link").symlink_to("real")
    (place.root / "linked").symlink_to("real/original")
    binds = [first, hidden, place.root / "link/original", place.root / "linked", last]
    printed = place.attach(*(f"{blob}={target}" for target in binds), command=f"cat {first} {real} {last}")
    assert printed.splitlines() == [
        f"shown {first}",
        f"not shown {hidden}: opening the path: Permission denied",
        f"not shown {place.root}/link/original: a symbolic link is in the path",
        f"not shown {place.root}/linked: a symbolic link is in the path",
        f"shown {last}",
        "no child is left",
        "fastslowfast",
    ]


@needs_root
def test_a_bind_below_another_is_not_what_the_agent_saw(place: Place) -> None:
    place.file("venv/lib/x", "slow"), place.file("snapshot/lib/x", "fast")
    blob = place.file("blob", "faster")
    folder, inner = place.root / "venv", place.root / "venv/lib/x"
    printed = place.attach(f"{place.root / 'snapshot'}={folder}", f"{blob}={inner}", command=f"cat {inner}")
    assert f"not shown {inner}: another file is there than the agent saw" in printed
    assert printed.endswith("fast")


@needs_root
def test_a_file_that_is_no_longer_the_same(place: Place, drive: Callable[..., str]) -> None:
    original = place.file("original", "new")
    before = place.file("before", "old").stat()
    reply = f"STATUS=ok\0BIND=0:{before.st_dev}:{before.st_ino}:{original}\0".encode()
    with answering(place.root / "s", reply, 1):
        printed = drive("attach", place.root / "s", 15_000, USER, "go", f"cat {original}")
    assert f"not shown {original}: another file is there than the agent saw" in printed
    assert printed.endswith("new")


@needs_root
def test_a_descriptor_that_is_no_mount(place: Place, drive: Callable[..., str]) -> None:
    original = place.file("original", "slow")
    seen = original.stat()
    reply = f"STATUS=ok\0BIND=0:{seen.st_dev}:{seen.st_ino}:{original}\0".encode()
    with answering(place.root / "s", reply, 1):
        printed = drive(
            "attach", place.root / "s", 15_000, USER, "go", f"cat {original}", stdin=subprocess.DEVNULL
        )
    assert f"not shown {original}: mount_setattr:" in printed
    assert printed.endswith("slow")


@needs_root
def test_a_user_who_stops_the_opener_stops_nothing_else(place: Place) -> None:
    original, blob = place.file("original", "slow"), place.file("blob", "fast")
    start_s = time.monotonic()
    printed = place.attach(f"{blob}={original}", command=f"cat {original}", stop="stop")
    assert f"not shown {original}: opening the path took too long" in printed
    assert printed.endswith("no child is left\nslow")
    assert time.monotonic() - start_s < HUNG_LIMIT_S


@needs_root
def test_a_user_may_not_trace_the_opener(place: Place) -> None:
    """Not even where the kernel lets users trace what has changed its user."""
    original, blob = place.file("original", "slow"), place.file("blob", "fast")
    setting = Path("/proc/sys/fs/suid_dumpable")
    before = setting.read_text()
    try:
        setting.write_text("1")
        printed = place.attach(f"{blob}={original}", command=f"cat {original}", stop="owner")
    finally:
        setting.write_text(before)
    assert printed == f"shown {original}\nthe opener is root's\nno child is left\nfast"


@needs_root
def test_mounts_of_the_host_still_arrive(build: Path, tmp_path: Path) -> None:
    """Inside a namespace whose mounts are shared, as systemd has them, the step's are its slaves."""
    for name in ("original", "blob"):
        (tmp_path / name).write_text(name)
    fake = f"{sys.executable} {HERE / 'fake_agent.py'} {tmp_path}/s {tmp_path}/log"
    script = f"""
        {fake} --bind {tmp_path}/blob={tmp_path}/original > {tmp_path}/ready & agent=$!
        while [ ! -s {tmp_path}/ready ]; do sleep 0.05; done
        cd {tmp_path}
        {build}/driver attach s 15000 0 go 'grep -m1 -o " / / .*" /proc/self/mountinfo; cat original'
        cat original
        kill $agent
    """
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "shared", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=HUNG_LIMIT_S,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert " master:" in lines[2], done.stdout + done.stderr
    assert " shared:" not in lines[2]
    assert lines[3] == "bloboriginal"


# --- the gate, where the tasks of a step meet


def meet(drive: Callable[..., str], tasks: int, first: str, timeout_ms: int = 15_000) -> list[list[str]]:
    """What the tasks say: their turn, their mount namespace and their folder. The first one comes first."""
    said = [line.split() for line in drive("gate", tasks, timeout_ms, first, cwd="/tmp").splitlines()]
    return sorted(said, key=lambda words: words[0] != "first")


@needs_root
def test_tasks_share_the_namespace_that_the_first_one_makes(drive: Callable[..., str]) -> None:
    before = os.readlink("/proc/self/ns/mnt")
    first, *others = meet(drive, 40, "shares")
    assert first[0] == "first"
    assert first[1] != before
    assert others == [["entered", first[1], "/tmp"]] * 39
    assert meet(drive, 1, "shares")[0][0] == "first"


@needs_root
def test_tasks_stay_where_the_first_one_has_nothing(drive: Callable[..., str]) -> None:
    before = os.readlink("/proc/self/ns/mnt")
    assert meet(drive, 5, "keeps") == [["first", before, "/tmp"]] + [["nothing", before, "/tmp"]] * 4


@needs_root
def test_a_first_task_that_dies_costs_the_others_their_wait(drive: Callable[..., str]) -> None:
    before = os.readlink("/proc/self/ns/mnt")
    assert meet(drive, 3, "dies", 200) == [["ETIMEDOUT", before, "/tmp"]] * 2


# --- text of others in our lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b c.pt", "/a/b c.pt"),
        ("/größe/模型/🙂", "/größe/模型/🙂"),
        ("a\nNov 28 slurmd: error: forged", "a\\nNov 28 slurmd: error: forged"),
        ("a\n<0>panic", "a\\n<0>panic"),
        ("a\\nb", "a\\\\nb"),  # a backslash is no line end
        ("\x1b[2Ja\r\t\x7f", "\\x1b[2Ja\\x0d\\x09\\x7f"),
        (b"\xc2\x9b2J", "\\xc2\\x9b2J"),  # a terminal may take it for ESC [
        (b"\xe2\x80\xa8x\xe2\x80\xaey", "\\xe2\\x80\\xa8x\\xe2\\x80\\xaey"),  # a line end; right to left
        (b"\xff\xc0\xaf\xed\xa0\x80\xe2\x82", "\\xff\\xc0\\xaf\\xed\\xa0\\x80\\xe2\\x82"),  # no UTF-8
        ("", ""),
    ],
    ids=range(10),
)
def test_text_stays_in_its_line(drive: Callable[..., str], text: str | bytes, shown: str) -> None:
    raw = text if isinstance(text, str) else os.fsdecode(text)
    assert drive("show", raw, 200) == shown + "\n"


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        ("x" * 9, 10, "xxxxxx..."),
        ("x" * 6, 10, "xxxxxx"),
        ("xxxxx\n\n", 10, "xxxxx..."),
        ("ü" * 5, 10, "üüü..."),
    ],
)
def test_text_that_is_too_long(drive: Callable[..., str], text: str, size: int, shown: str) -> None:
    assert drive("show", text, size) == shown + "\n"
