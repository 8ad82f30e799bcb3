"""A store in a folder: whose it is, and folders that others planted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store import FileStore


def test_a_fifo_is_no_object(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):
        FileStore(tmp_path).open("pipe")


def test_folders_of_a_user_are_closed(tmp_path: Path) -> None:
    FileStore(tmp_path).write("users/1/a", b"")
    assert (tmp_path / "users/1").stat().st_mode & 0o777 == 0o700


def plant_other(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 20002, 20002)


def plant_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")


def plant_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        pytest.param(
            plant_other,
            "belongs to another user",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's folder"),
        ),
        (plant_link, "belongs to another user, or is no folder"),
        (plant_open, "others can write to it"),
    ],
)
def test_a_folder_that_another_user_planted_is_not_used(
    tmp_path: Path, plant: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "users" / str(os.geteuid())
    folder.parent.mkdir()
    plant(folder)
    (folder / "names").mkdir()
    (folder / "names/a").write_bytes(b"planted")
    store, path = FileStore(tmp_path), f"users/{os.geteuid()}/names"
    for use in (
        lambda: store.open(f"{path}/a"),
        lambda: store.read(f"{path}/a", limit_bytes=10),
        lambda: store.write(f"{path}/b", b""),
        lambda: store.write(f"{path}/new/b", b""),
        lambda: store.list(path),
        lambda: store.remove(f"{path}/a"),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            use()
        assert caught.value.hint
    assert os.listdir(folder / "names") == ["a"]


def test_a_folder_planted_while_ours_is_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "users" / str(os.geteuid())
    make = Path.mkdir

    def lose_the_race(path: Path, mode: int = 0o777, exist_ok: bool = False) -> None:
        make(path, 0o777)
        if path == folder:
            path.chmod(0o777)
        make(path, mode, exist_ok=exist_ok)

    monkeypatch.setattr(Path, "mkdir", lose_the_race)
    with pytest.raises(StoreError, match="others can write"):
        FileStore(tmp_path).write(f"users/{os.geteuid()}/names/a", b"")
    assert os.listdir(folder) == []


def test_a_user_without_a_folder_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        FileStore(tmp_path).read(f"users/{os.geteuid()}/names/a", limit_bytes=10)
    assert FileStore(tmp_path).list(f"users/{os.geteuid()}/events") == []
