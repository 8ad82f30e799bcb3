"""The site's key and the signatures made with it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bootseer_slurm.blob.digest import BLAKE3
from bootseer_slurm.blob.manifest import Layout, Manifest
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.image.signing import Key, is_signed, make_key, read_key, sign

KEY = Key(bytes(range(32)))
ID = "ab" * 32

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the key is root's")


def test_a_signature_is_for_one_user_and_one_manifest_and_one_key() -> None:
    signature = sign(KEY, 1000, ID)
    assert len(signature) == 64
    assert is_signed(KEY, 1000, ID, signature)
    assert not is_signed(KEY, 1001, ID, signature)
    assert not is_signed(KEY, 1000, "cd" * 32, signature)
    assert not is_signed(Key(bytes(32)), 1000, ID, signature)
    assert not is_signed(KEY, 100, "0" + ID[:-1], sign(KEY, 1000, ID))


@needs_root
def test_a_key_is_replaced_while_images_hang_on_it(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    make_key(path)
    before = sign(read_key(path), 1000, ID)
    path.rename(tmp_path / "site.key.old")
    make_key(path)
    key = read_key(path)
    assert is_signed(key, 1000, ID, before) and sign(key, 1000, ID) != before
    assert not is_signed(key, 1001, ID, before)
    (tmp_path / "site.key.old").chmod(0o644)
    assert not is_signed(read_key(path), 1000, ID, before), "a file that others can read is no key"
    (tmp_path / "site.key.old").unlink()
    assert not is_signed(read_key(path), 1000, ID, before)
    assert is_signed(read_key(path), 1000, ID, sign(key, 1000, ID))


def test_a_signature_binds_what_the_digests_are() -> None:
    one, other = (Manifest("image", layout, ID.encode()) for layout in (Layout(5), Layout(5, digest=BLAKE3)))
    assert is_signed(KEY, 1000, one.id, sign(KEY, 1000, one.id))
    assert not is_signed(KEY, 1000, other.id, sign(KEY, 1000, one.id))


@pytest.mark.parametrize("odd", ["\ud800", "", "ä" * 64, "\udcff", "\0", "0" * 64, "x" * 10_000])
def test_odd_signatures_are_none(odd: str) -> None:
    assert not is_signed(KEY, 1000, ID, odd)


@pytest.mark.parametrize("odd", ["", "ab", ID + "\n", ID.upper(), "0\0" + ID])
def test_odd_ids_are_not_signed(odd: str) -> None:
    assert not is_signed(KEY, 1000, odd, sign(KEY, 1000, ID))
    with pytest.raises(ValueError):
        sign(KEY, 1000, odd)


def test_without_a_key_nothing_is_trusted() -> None:
    nothing = Key(b"", "no file")
    assert not nothing
    assert not is_signed(nothing, 1000, ID, sign(KEY, 1000, ID))
    with pytest.raises(ValueError, match="no file"):
        sign(nothing, 1000, ID)


def test_the_secret_is_not_shown() -> None:
    assert "secret" not in repr(KEY)


@needs_root
def test_a_made_key_is_read_again_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "site.key"
    old = os.umask(0)
    try:
        make_key(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o7777 == 0o600
    key = read_key(path)
    assert key and len(key.secret) == 32 and not key.reason
    with pytest.raises(BootseerError, match="File exists"):
        make_key(path)
    assert read_key(path) == key


@needs_root
def test_keys_that_are_not_safe_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    assert "No such file" in read_key(path).reason
    make_key(path)
    for mode in (0o640, 0o604, 0o620, 0o700):
        path.chmod(mode)
        assert not read_key(path) and "0600" in read_key(path).reason
    path.chmod(0o600)
    os.chown(path, 1000, 0)
    assert not read_key(path)
    os.chown(path, 0, 0)
    assert read_key(path)
    link = tmp_path / "link.key"
    link.symlink_to(path)
    assert not read_key(link)
    path.write_bytes(b"x" * 31)
    assert "32" in read_key(path).reason
    path.write_bytes(b"x" * 5000)
    assert not read_key(path)
    assert not read_key(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    assert "regular" in read_key(fifo).reason
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert not read_key(tmp_path / "socket")
