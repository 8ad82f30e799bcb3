"""Records of names: what a damaged or forged one is worth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bootseer_slurm.blob.names import Name, read_name, user_folder, write_name
from bootseer_slurm.errors import IntegrityError
from bootseer_slurm.store import FileStore

UID = os.geteuid()


def record(folder: str) -> Name:
    return Name("image", "/shared/a.sqsh", "1@2", "0" * 64, folder, 3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    name = record(f"{user_folder(UID)}/blobs/abc")
    write_name(FileStore(tmp_path), UID, name)
    assert read_name(FileStore(tmp_path), UID, name.name) == name
    assert read_name(FileStore(tmp_path), UID, "/shared/other") is None


@pytest.mark.parametrize(
    "folder",
    [
        f"users/{UID + 1}/blobs/abc",
        f"/{user_folder(UID)}/blobs/abc",
        f"{user_folder(UID)}/blobs/../../{UID + 1}/blobs/abc",
        f"{user_folder(UID)}/blobs",
        f"{user_folder(UID)}/events/1.0",
        "/etc",
        "",
    ],
)
def test_a_blob_of_another_folder_is_refused(tmp_path: Path, folder: str) -> None:
    write_name(FileStore(tmp_path), UID, record(folder))
    with pytest.raises(IntegrityError, match="damaged: its folder"):
        read_name(FileStore(tmp_path), UID, "/shared/a.sqsh")
