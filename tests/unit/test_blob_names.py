"""Records of names: what a damaged or forged one is worth."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bootseer_slurm.blob.names import Name, list_names, read_name, remove_name, user_folder, write_name
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


def test_a_record_without_a_signature_has_none(tmp_path: Path) -> None:
    name = record(f"{user_folder(UID)}/blobs/abc")
    store = FileStore(tmp_path)
    write_name(store, UID, replace(name, signature="signed"))
    read = read_name(store, UID, name.name)
    assert read is not None and read.signature == "signed"
    (file,) = (tmp_path / user_folder(UID) / "names").iterdir()
    older = json.loads(file.read_text())
    del older["signature"]
    file.write_text(json.dumps(older))
    assert read_name(store, UID, name.name) == name
    file.write_text(json.dumps({**older, "signature": 1}))
    with pytest.raises(IntegrityError, match="signature is not text"):
        read_name(store, UID, name.name)


def test_all_names_are_listed_and_damaged_records_told(tmp_path: Path) -> None:
    store, first = FileStore(tmp_path), record(f"{user_folder(UID)}/blobs/abc")
    second = replace(first, name="/shared/0.sqsh")
    write_name(store, UID, first)
    write_name(store, UID, second)
    names = tmp_path / user_folder(UID) / "names"
    (names / "moved.json").write_bytes(next(names.iterdir()).read_bytes())
    (names / "broken.json").write_text("{")
    found, damaged = list_names(store, UID)
    assert found == [second, first]
    assert len(damaged) == 2 and all("is damaged" in each for each in damaged)
    odd = (names / "moved.json").read_text().replace("/shared/", "/shared\\ud800/")
    (names / "moved.json").write_text(odd)
    assert list_names(store, UID)[0] == found and len(list_names(store, UID)[1]) == 2
    remove_name(store, UID, first.name)
    remove_name(store, UID, first.name)
    assert list_names(store, UID)[0] == [second]
