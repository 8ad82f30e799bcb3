"""Which checkpoint is the newest that is complete, as each framework leaves them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bootseer_slurm.checkpoint import locate
from bootseer_slurm.checkpoint.locate import NamedFile, named_files, newest, share_of
from bootseer_slurm.checkpoint.writer import StripedWriter
from bootseer_slurm.errors import NotFound

NOW_S = 1_800_000_000.0


def make(root: Path, *names: str, age_s: float = 3600) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        os.utime(path, (NOW_S - age_s, NOW_S - age_s))


def found(path: Path) -> str:
    return newest(str(path), now_s=NOW_S).path


def test_a_file_and_a_folder_of_steps(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    make(root, "step_900.pt", "step_1000.pt", "step_9.pt", "readme", "slurm-123456.out", "train_20240611.log")
    assert found(root) == "ckpt/step_1000.pt"
    assert found(root / "step_9.pt") == "step_9.pt"
    assert found(root / "step_9*.pt") == "step_900.pt"
    make(root, "step_2000.pt", age_s=5)
    assert found(root) == "ckpt/step_1000.pt", "it may still be written"
    make(root, "step_3000.pt.tmp")
    assert found(root) == "ckpt/step_1000.pt"
    assert found(root / "step_2000.pt") == "step_2000.pt", "it was named"


def test_megatron(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    make(root, "iter_0000100/mp_rank_00/model_optim_rng.pt", "iter_0000200/mp_rank_00/model_optim_rng.pt")
    make(root, "latest_checkpointed_iteration.txt")
    (root / "latest_checkpointed_iteration.txt").write_text("100\n")
    one = newest(str(root), now_s=NOW_S)
    assert one.path == "ckpt/iter_0000100", "200 is being written"
    assert one.files == ("ckpt/iter_0000100/mp_rank_00/model_optim_rng.pt",)
    assert found(root / "iter_0000200") == "iter_0000200"
    (root / "latest_checkpointed_iteration.txt").write_text("300\n")
    assert found(root) == "ckpt/iter_0000200", "it names what is not there"


def test_deepspeed(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    for step in (10, 20):
        make(
            root,
            f"global_step{step}/mp_rank_00_model_states.pt",
            f"global_step{step}/zero_pp_rank_0_optim_states.pt",
        )
    make(root, "latest")
    (root / "latest").write_text("global_step10")
    assert found(root) == "ckpt/global_step10"


def test_torch_dcp(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    make(root, "step_1/__0_0.distcp", "step_1/__1_0.distcp", "step_1/.metadata", age_s=1)
    make(root, "step_2/__0_0.distcp")
    one = newest(str(root), now_s=NOW_S)
    assert (one.path, len(one.files)) == ("ckpt/step_1", 3)
    with pytest.raises(NotFound, match="no complete checkpoint"):
        newest(str(root / "step_2"), now_s=NOW_S)


def test_transformers(tmp_path: Path) -> None:
    root = tmp_path / "out"
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    make(root, *(f"checkpoint-500/{name}" for name in (*shards, "trainer_state.json")), "runs/events")
    make(root, *(f"checkpoint-1000/{name}" for name in shards))
    assert found(root) == "out/checkpoint-500"
    make(tmp_path, *(f"final/{name}" for name in shards))
    assert len(newest(str(tmp_path / "final"), now_s=NOW_S).files) == 2, "shards are one checkpoint"


def test_striped(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    root.mkdir()
    for step in (1, 2):
        with StripedWriter(str(root / f"step_{step}.pt")) as file:
            file.write(b"x" * 100)
    assert newest(str(root), now_s=time.time()).files == ("ckpt/step_2.pt",)
    (root / "step_2.pt" / "manifest").unlink()
    assert newest(str(root), now_s=time.time()).files == ("ckpt/step_1.pt",), "its writer died"


def test_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("none", "empty", "*.pt"):
        with pytest.raises(NotFound):
            newest(str(tmp_path / path), now_s=NOW_S)


def test_the_shards_of_one_are_no_steps(tmp_path: Path) -> None:
    root = tmp_path / "model"
    make(root, "consolidated.00.pth", "consolidated.01.pth", "params.json")
    assert len(newest(str(root), now_s=NOW_S).files) == 3


def test_a_folder_of_striped_files_is_seen_to_settle(tmp_path: Path) -> None:
    root = tmp_path / "ckpt" / "step_1"
    root.mkdir(parents=True)
    for name in ("a", "b"):
        with StripedWriter(str(root / name)) as file:
            file.write(b"x")
    with pytest.raises(NotFound):
        newest(str(tmp_path / "ckpt"), now_s=time.time())
    found = newest(str(tmp_path / "ckpt"), now_s=time.time() + 100)
    assert found.striped == {"ckpt/step_1/a", "ckpt/step_1/b"}
    (root / "c").write_bytes(b"x")
    os.utime(root / "c", (1, 1))
    (root / ".metadata").write_bytes(b"x")
    files, _ = named_files(str(root.parent))
    striped = [(f"file://{root}/{name}", f"{root.parent}/{name}", name) for name in ("a", "b")]
    plain = [(f"{root}/{name}", f"{root.parent}/{name}", name) for name in (".metadata", "c")]
    assert sorted(files) == sorted(striped + plain)
    assert named_files(str(root / "a")) == ([(str(root / "a"), str(root.parent / "step_*/a"), "")], "")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("/c/step_9000.pt", "/c/step_*.pt"),
        ("/c/step_9000/", "/c/step_*"),
        ("hdfs://h/c/iter_0000100", "hdfs://h/c/iter_*"),
        ("/c/latest.pt", "/c/latest.pt"),
        ("/c/step_9000/model.safetensors", "/c/step_*/model.safetensors"),
        ("/models/llama2/model.safetensors", "/models/llama2/model.safetensors"),
        ("/c/model-00001-of-00030.safetensors", "/c/model-00001-of-00030.safetensors"),
        ("/c/rank7", "/c/rank7"),
    ],
)
def test_what_the_checkpoints_of_all_steps_are_called_alike(name: str, place: str) -> None:
    assert locate._without_step(name) == place


@pytest.mark.parametrize(
    ("learned", "newest_is"),
    [
        ("step_1.pt", "step_20.pt"),
        ("step_3.pt", "step_20.pt"),  # which is gone
        ("runs/epoch-1/model.bin", "runs/epoch-2/model.bin"),
        ("llama2.safetensors", "llama2.safetensors"),
        ("7/weights.pt", "7/weights.pt"),
        ("final.pt", "final.pt"),
    ],
)
def test_of_a_learned_checkpoint_the_newest_step_is_found(
    tmp_path: Path, learned: str, newest_is: str
) -> None:
    root = tmp_path / "data"
    make(root, "step_1.pt", "step_20.pt", "runs/epoch-1/model.bin", "runs/epoch-2/model.bin")
    make(root, "llama2.safetensors", "llama3.safetensors", "7/weights.pt", "final.pt", "8/other.pt")
    for path in root.rglob("*.*"):
        os.utime(path, (1, 1))
    files, _ = named_files(str(root / learned), newest_step=True)
    assert [name for name, _, _ in files] == [str(root / newest_is)]
    role = named_files(str(root / newest_is))[0][0].role
    assert files[0].role == role, "what a node read of the last step is known of this one"


@pytest.mark.parametrize(
    ("rank", "nodes", "numbers"),
    [
        (0, 4, range(10)),
        (1, 4, range(8, 18)),
        (3, 4, range(22, 32)),
        (0, 1, range(10)),
        (31, 32, range(22, 32)),
    ],
)
def test_of_many_files_a_node_has_its_share(rank: int, nodes: int, numbers: range) -> None:
    names = [f"__{number}_0.distcp" for number in range(32)] + [".metadata", "config.json"]
    files = [NamedFile(f"/c/{name}", name, name) for name in sorted(names)]
    found = [name for _, _, name in share_of(files, 12, rank=rank, nodes=nodes)]
    assert found == [".metadata", "config.json", *(f"__{number}_0.distcp" for number in numbers)]
    assert share_of(files, 34, rank=rank, nodes=nodes) == files


def test_more_files_for_all_than_may_be() -> None:
    files = [NamedFile(name, name, name) for name in "abcdef1"]
    assert [name for name, _, _ in share_of(files, 3, rank=1, nodes=2)] == ["a", "b", "c"]
    assert locate._natural("a10b2") > locate._natural("a9b3") > locate._natural("a9b")
