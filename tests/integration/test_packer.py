"""Packing what users give: real mksquashfs as a packer, real kernel mounts of what came of it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bootseer_slurm.blob.digest import PREFERRED
from bootseer_slurm.blob.manifest import decode
from bootseer_slurm.errors import BootseerError, NotFound
from bootseer_slurm.image import packer as packer_module
from bootseer_slurm.image.kernel_mount import KernelMount
from bootseer_slurm.image.packer import PACKER_UIDS, Packed, Packer
from bootseer_slurm.image.signing import Key, is_signed, sign

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="packing needs root"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="needs squashfs-tools"),
]
_UID = 54321
_TIMEOUT_S = 30.0


@pytest.fixture
def packer(tmp_path: Path) -> Iterator[Packer]:
    instance = Packer(tmp_path / "packing", max_bytes=64 << 20)
    yield instance
    instance.close()
    assert _packers() == []
    assert list((tmp_path / "packing").iterdir()) == []


def _packers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["uids", "status"])
        if process.info["uids"].real in PACKER_UIDS and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.uid, info.gid = kind, len(data), 1234, 1234
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _pack(packer: Packer, stream: bytes, uid: int = _UID) -> Packed:
    fd, ticket = packer.start(uid)
    with os.fdopen(fd, "wb") as pipe:
        with contextlib.suppress(BrokenPipeError):
            pipe.write(stream)
            pipe.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    return packer.finish(uid, ticket, timeout_s=_TIMEOUT_S)


def _content(packed: Packed) -> bytes:
    content = os.pread(packed.fd, packed.size_bytes + 1, 0)
    os.close(packed.fd)
    return content


def test_a_folder_is_packed_signed_and_mounted(packer: Packer, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "tool").write_bytes(os.urandom(700_000))
    os.chown(tree / "bin" / "tool", 77, 77)
    (tree / "bin" / "tool").chmod(0o4750)
    (tree / "link").symlink_to("bin/tool")
    fd, ticket = packer.start(_UID)
    subprocess.run(["tar", "-C", tree, "-c", "."], stdout=fd, check=True)
    os.close(fd)
    packed = packer.finish(_UID, ticket, timeout_s=_TIMEOUT_S)

    manifest = packed.manifest
    assert (manifest.kind, manifest.layout.objects, manifest.layout.size_bytes) == (
        "image",
        1,
        packed.size_bytes,
    )
    assert decode(manifest.encode()) == manifest and manifest.layout.digest == PREFERRED
    status = os.fstat(packed.fd)
    assert (status.st_uid, status.st_mode & 0o7777, status.st_nlink) == (0, 0o400, 0)
    with pytest.raises(OSError):
        os.write(packed.fd, b"x")
    content = _content(packed)
    assert len(content) == packed.size_bytes
    for block in range(manifest.layout.blocks):
        part = content[block * manifest.layout.block_bytes :][: manifest.layout.block_bytes]
        assert manifest.agrees(block, part)

    key = Key(b"k" * 32)
    assert is_signed(key, _UID, manifest.id, sign(key, _UID, manifest.id))
    tampered = bytearray(manifest.encode())
    tampered[-1] ^= 1
    assert not is_signed(key, _UID, decode(bytes(tampered)).id, sign(key, _UID, manifest.id))

    image = tmp_path / "image.sqsh"
    image.write_bytes(content)
    mount = KernelMount.open_image(image, tmp_path / "mounts" / "image", uid=_UID, gid=_UID)
    try:
        shown = (mount.folder / "bin" / "tool").stat()
        assert (shown.st_uid, shown.st_gid, shown.st_mode & 0o7777) == (_UID, _UID, 0o4750)
        assert (mount.folder / "link").read_bytes() == (tree / "bin" / "tool").read_bytes()
    finally:
        mount.close()


def test_names_stay_within_the_image(packer: Packer, tmp_path: Path) -> None:
    packed = _pack(
        packer,
        _tar(
            _member("/etc/abs", data=b"1"),
            _member("../../../../../../../../../../tmp/bootseer-escape", data=b"2"),
            _member("hard", tarfile.LNKTYPE, linkname="/etc/shadow"),
            _member("soft", tarfile.SYMTYPE, linkname="/etc/shadow"),
        ),
    )
    image = tmp_path / "image.sqsh"
    image.write_bytes(_content(packed))
    listed = subprocess.run(["unsquashfs", "-l", image], capture_output=True, text=True, check=True).stdout
    assert "squashfs-root/etc/abs" in listed
    assert "hard" not in listed
    assert not Path("/tmp/bootseer-escape").exists()


def test_devices_are_of_no_use(packer: Packer, tmp_path: Path) -> None:
    """They are in the image, and nobody can open them: nodev, and it cannot be taken away."""
    packed = _pack(packer, _tar(_member("zero", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=5)))
    image = tmp_path / "image.sqsh"
    image.write_bytes(_content(packed))
    mount = KernelMount.open_image(image, tmp_path / "mounts" / "image", uid=_UID, gid=_UID)
    try:
        assert (mount.folder / "zero").is_char_device()
        with pytest.raises(PermissionError):
            (mount.folder / "zero").open("rb")
    finally:
        mount.close()


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        os.urandom(300_000),
        _tar(_member("a", data=b"x" * 1_000_000))[:400_000],
        _tar(_member("d/../../../x", data=b"x")),
    ],
    ids=["nothing", "garbage", "cut short", "dots inside"],
)
def test_what_is_no_whole_tar_gives_no_image(packer: Packer, stream: bytes) -> None:
    with pytest.raises(BootseerError, match="was not packed") as raised:
        _pack(packer, stream)
    assert raised.value.message.isprintable()
    assert _content(_pack(packer, _tar(_member("a", data=b"x"))))  # the user may try again


def test_a_huge_sparse_file_and_one_that_is_too_large(tmp_path: Path) -> None:
    packer = Packer(tmp_path / "packing", max_bytes=2 << 20, time_limit_s=60)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(8 << 30)
    try:
        fd, ticket = packer.start(_UID)
        subprocess.run(["tar", "-C", tmp_path, "-S", "-c", "sparse"], stdout=fd, check=False)
        os.close(fd)
        packed = packer.finish(_UID, ticket, timeout_s=60)
        assert packed.size_bytes < 2 << 20
        os.close(packed.fd)
        with pytest.raises(BootseerError, match="was not packed"):
            _pack(packer, _tar(_member("noise", data=os.urandom(8 << 20))))
    finally:
        packer.close()
    assert list((tmp_path / "packing").iterdir()) == []


def test_a_packer_has_no_rights(packer: Packer) -> None:
    fd, _ = packer.start(_UID)
    try:
        deadline_s = time.monotonic() + 10
        while not (running := [each for each in _packers() if each.name() == "mksquashfs"]):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        (process,) = running
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        assert status["Uid"] == status["Gid"] == [str(PACKER_UIDS[0])] * 4
        assert status["Groups"] == []
        assert status["NoNewPrivs"] == ["1"]
        assert {status[name][0] for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["Seccomp"] == ["2"]
        assert os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(rf"Max file size +{64 << 20} +{64 << 20} ", limits)
        open_files = [entry.resolve() for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert not any(path.name.startswith("socket") or path == Path("/dev/fuse") for path in open_files)
    finally:
        os.close(fd)
        packer.cancel(_UID)


def test_a_user_who_stops_writing_is_ended(tmp_path: Path) -> None:
    packer = Packer(tmp_path / "packing", max_bytes=1 << 20, time_limit_s=0.3)
    fd, ticket = packer.start(_UID)
    try:
        os.write(fd, b"\0" * 100)
        with pytest.raises(BootseerError, match=r"took too long|no such packing"):
            packer.finish(_UID, ticket, timeout_s=10)
        assert _packers() == []
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"\0")
        with pytest.raises(NotFound):
            packer.finish(_UID, ticket, timeout_s=1)
    finally:
        os.close(fd)
        packer.close()


def test_one_that_has_hardly_begun_is_ended_too(packer: Packer) -> None:
    """It is root's until it has become the packer's."""
    for _ in range(5):
        fd, _ = packer.start(_UID)
        packer.cancel(_UID)
        os.close(fd)
        assert _packers() == []


def test_finish_does_not_wait_for_ever(packer: Packer) -> None:
    fd, ticket = packer.start(_UID)
    try:
        with pytest.raises(BootseerError, match="stream did not end"):
            packer.finish(_UID, ticket, timeout_s=0.2)
    finally:
        os.close(fd)


def test_one_for_each_user_a_few_on_a_node_and_nobody_elses(packer: Packer) -> None:
    fds = []
    try:
        for uid in range(_UID, _UID + len(PACKER_UIDS)):
            fd, ticket = packer.start(uid)
            fds.append(fd)
        with pytest.raises(BootseerError, match="uid"):
            packer.start(_UID)
        with pytest.raises(BootseerError, match="too many"):
            packer.start(_UID + 100)
        with pytest.raises(NotFound):
            packer.finish(_UID, ticket, timeout_s=1)
        packer.cancel(_UID)
        fd, ticket = packer.start(_UID + 100)
        fds.append(fd)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_killed_mksquashfs_gives_no_image(packer: Packer) -> None:
    fd, ticket = packer.start(_UID)
    try:
        os.write(fd, _tar(_member("a", data=b"x" * 10_000))[:5000])  # so that it waits for more
        deadline_s = time.monotonic() + 10
        while not (running := [each for each in _packers() if each.name() == "mksquashfs"]):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        running[0].kill()
    finally:
        os.close(fd)
    with pytest.raises(BootseerError, match="killed"):
        packer.finish(_UID, ticket, timeout_s=10)


def test_the_next_agent_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    first = Packer(tmp_path / "packing", max_bytes=1 << 20)
    fd, _ = first.start(_UID)
    try:
        second = Packer(tmp_path / "packing", max_bytes=1 << 20)
        assert _packers() == []
        assert list((tmp_path / "packing").iterdir()) == []
        second.close()
    finally:
        os.close(fd)
        first.close()


def test_something_else_in_place_of_the_image(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"hsqs" + bytes(200))
    for number, make in enumerate(
        (
            lambda path: path.symlink_to(secret),
            lambda path: path.hardlink_to(secret),
            lambda path: path.mkdir(),
            os.mkfifo,
            lambda path: path.write_bytes(b"hsqs"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "image")
        with pytest.raises(BootseerError):
            packer_module._take(folder, 1 << 20)


def test_processes_of_a_user_of_that_number_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = PACKER_UIDS[1]
    monkeypatch.setattr(packer_module, "_is_user", lambda uid: uid == theirs)
    with subprocess.Popen(["sleep", "60"], user=theirs) as sleeping:
        try:
            packer = Packer(tmp_path / "packing", max_bytes=1 << 20)
            assert sleeping.poll() is None
            fds = [packer.start(_UID + number)[0] for number in range(len(PACKER_UIDS) - 1)]
            with pytest.raises(BootseerError, match="too many"):
                packer.start(_UID + 100)
            packer.close()
            for fd in fds:
                os.close(fd)
            assert sleeping.poll() is None
        finally:
            sleeping.kill()


def test_a_result_is_given_once_and_goes_when_nobody_asks(
    packer: Packer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer_module, "_CLAIM_S", 0.3)
    fd, ticket = packer.start(_UID)
    os.write(fd, _tar(_member("a", data=b"x")))
    os.close(fd)
    deadline_s = time.monotonic() + 10
    while list((tmp_path / "packing").iterdir()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    with pytest.raises(NotFound):
        packer.finish(_UID, ticket, timeout_s=1)
    packed = _pack(packer, _tar(_member("a", data=b"x")))
    assert packed.size_bytes > 0
    os.close(packed.fd)


def test_a_user_holds_one_result_at_most(packer: Packer) -> None:
    first = _pack(packer, _tar(_member("a", data=os.urandom(50_000))))
    with pytest.raises(BootseerError, match="still open"):
        packer.start(_UID)
    other = _pack(packer, _tar(_member("a", data=b"x")), uid=_UID + 1)
    os.close(first.fd)
    second = _pack(packer, _tar(_member("a", data=os.urandom(50_000))))
    assert os.fstat(second.fd).st_size > 50_000
    packer.cancel(_UID)
    assert os.fstat(second.fd).st_size == 0 and os.fstat(other.fd).st_size > 0
    os.close(second.fd)
    os.close(other.fd)


def test_a_packer_cannot_have_another_file_read_as_its_log(packer: Packer, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the key")
    fd, ticket = packer.start(_UID)
    log = tmp_path / "packing" / ticket / "log"
    log.unlink()
    log.symlink_to(secret)
    os.write(fd, b"no tar" * 1000)
    os.close(fd)
    with pytest.raises(BootseerError) as raised:
        packer.finish(_UID, ticket, timeout_s=_TIMEOUT_S)
    assert "key" not in raised.value.message
