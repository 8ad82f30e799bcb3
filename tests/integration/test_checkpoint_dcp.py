"""Checkpoints of torch: read by torch.distributed.checkpoint through our reader, and as files through FUSE."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.checkpoint.striped import read_manifest
from bootseer_slurm.checkpoint.writer import StripedWriter
from bootseer_slurm.errors import IntegrityError, NotFound
from bootseer_slurm.store import open_store
from tests.integration.node import ALICE, Node, node
from tests.stores import check_dcp

torch = pytest.importorskip("torch", reason="needs scripts/torch")
import safetensors.torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner  # noqa: E402
from torch.distributed.checkpoint.metadata import MetadataIndex  # noqa: E402
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem  # noqa: E402

from bootseer_slurm.checkpoint.dcp import ParallelReader  # noqa: E402

__all__ = ["node"]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:fsync not supported"),
]
LARGE = (3000, 1024)  # float32: more than what is read whole


def random(*shape: int) -> Any:
    return torch.randn(*shape)


def same(found: Any, expected: Any) -> bool:
    return bool(found.dtype == expected.dtype and found.equal(expected))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder that torch wrote, of three files, and what is in it."""
    state = {f"layer.{number}": random(*LARGE) for number in range(5)}
    state |= {f"bias.{number}": random(1024) for number in range(20)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "step_1", thread_count=3))
    return tmp_path / "step_1", state


def empty(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def load(folder: object, state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, storage_reader=ParallelReader(str(folder)))
    return state


def test_on_a_folder(tmp_path: Path) -> None:
    check_dcp(f"file://{tmp_path}/ckpt")


def test_large_tensors_go_to_their_place_unseen_by_torch(
    saved: tuple[Path, dict[str, Any]], mocker: MockerFixture
) -> None:
    folder, state = saved
    assert len(list(folder.glob("*.distcp"))) == 3
    seen = mocker.spy(torch, "load")
    found = load(folder, empty(state))
    assert all(same(found[name], tensor) for name, tensor in state.items())
    assert seen.call_count == 20, "the small ones alone"


def test_the_place_may_be_of_another_kind(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, state = saved
    found = load(
        folder,
        {
            "layer.0": torch.zeros(LARGE, dtype=torch.float64),
            "layer.1": torch.zeros(LARGE[::-1]).t(),
            "layer.2": torch.nn.Parameter(torch.zeros(LARGE)),
            "bias.3": torch.zeros(1024, dtype=torch.bfloat16),
        },
    )
    assert found["layer.0"].dtype == torch.float64 and found["layer.0"].float().equal(state["layer.0"])
    assert not found["layer.1"].is_contiguous() and same(found["layer.1"], state["layer.1"])
    assert same(found["layer.2"].data, state["layer.2"])
    assert same(found["bias.3"], state["bias.3"].bfloat16())


def test_kinds_that_torch_reads_itself(tmp_path: Path) -> None:
    """A tensor that was transposed, and types that older torches had no storage for."""
    state = {
        "transposed": random(*LARGE).t(),
        "float8": random(4096, 4096).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
    }
    dcp.save(state, checkpoint_id=tmp_path)
    found = load(tmp_path, empty(state))
    assert same(found["transposed"], state["transposed"]) and same(found["scalar"], state["scalar"])
    assert same(found["float8"].view(torch.uint8), state["float8"].view(torch.uint8))


def test_large_objects_that_are_no_tensors(tmp_path: Path) -> None:
    """A dict that was not flattened is saved by torch.save too, with the tensors in it."""
    state = {"optimizer": {"steps": 7, "moments": random(*LARGE)}}
    dcp.save(state, checkpoint_id=tmp_path, planner=DefaultSavePlanner(False, False))
    found: dict[str, Any] = {"optimizer": {}}
    dcp.load(found, storage_reader=ParallelReader(tmp_path), planner=DefaultLoadPlanner(False, False))
    assert found["optimizer"]["steps"] == 7 and same(
        found["optimizer"]["moments"], state["optimizer"]["moments"]
    )


class Places:
    """A planner that gives parts of tensors new places."""

    def __init__(self) -> None:
        self.read: dict[str, Any] = {}
        self.committed: list[str] = []

    def resolve_tensor(self, item: Any) -> Any:
        return self.read.setdefault(item.dest_index.fqn, torch.zeros(item.lengths))

    def commit_tensor(self, item: Any, tensor: Any) -> None:
        assert tensor is not None
        self.committed.append(item.dest_index.fqn)


def test_parts_of_tensors(saved: tuple[Path, dict[str, Any]], mocker: MockerFixture) -> None:
    """As a start with another number of ranks reads them: rows, columns, and both."""
    folder, state = saved
    parts = {
        "rows": ("layer.0", (100, 0), (900, 1024)),
        "a part of a row": ("layer.0", (7, 10), (1, 100)),
        "columns": ("layer.1", (0, 512), (3000, 512)),
        "both": ("layer.2", (5, 6), (7, 8)),
        "small": ("bias.4", (10,), (20,)),
    }
    items = [
        ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(name),
            dest_offsets=torch.Size([0] * len(lengths)),
            storage_index=MetadataIndex(source, torch.Size([0] * len(lengths))),
            storage_offsets=torch.Size(offsets),
            lengths=torch.Size(lengths),
        )
        for name, (source, offsets, lengths) in parts.items()
    ]
    reader = ParallelReader(folder)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    seen = mocker.spy(torch, "load")
    places = Places()
    reader.read_data(LoadPlan(items), places).wait()
    assert sorted(places.committed) == sorted(parts)
    assert seen.call_count == 3, "columns, both, small"
    for name, (source, offsets, lengths) in parts.items():
        cut = tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
        assert same(places.read[name], state[source][cut]), name


_RANK = """
import os, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from bootseer_slurm.checkpoint.dcp import ParallelReader

how, folder, world, rank = sys.argv[1:]
dist.init_process_group("gloo", f"file://{folder}.{how}", world_size=int(world), rank=int(rank))
mesh = init_device_mesh("cpu", (int(world),))
torch.manual_seed(1)
whole = {"large": torch.randn(12_000, 1024), "small": torch.randn(100, 3)}

def sharded(state):
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in state.items()}

if how == "save":
    dcp.save(sharded(whole), storage_writer=dcp.FsspecWriter(f"bootseer+file://{folder}"))
else:
    found = sharded({name: torch.zeros_like(tensor) for name, tensor in whole.items()})
    dcp.load(found, storage_reader=ParallelReader(folder))
    assert all(found[name].to_local().equal(tensor.to_local()) for name, tensor in sharded(whole).items())
dist.destroy_process_group()
# A thread of gloo may still hold a tensor, and aborts a Python that ends (pytorch/pytorch#179291).
os._exit(0)
"""


def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Two ranks write what three read, over gloo."""
    for how, world in (("save", 2), ("load", 3)):
        command = [sys.executable, "-W", "ignore", "-c", _RANK, how, str(tmp_path / "ckpt"), str(world)]
        ranks = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        try:
            failed = [
                said for rank in ranks if (said := rank.communicate(timeout=120)[1]) and rank.returncode
            ]
        finally:
            for rank in ranks:
                rank.kill()
        assert not failed and not any(rank.returncode for rank in ranks), failed
    assert len(list((tmp_path / "ckpt").glob("*.distcp"))) == 2


class Reversed:
    """Bytes backwards, in a compression's place (a StreamTransformExtension)."""

    @classmethod
    def from_descriptor(cls, version: str) -> Reversed:
        return cls()

    def get_descriptor(self) -> str:
        return "reversed/1"

    def transform_to(self, output: Any) -> Any:
        class Out:
            def __init__(self) -> None:
                self.content = b""

            def write(self, content: Any) -> int:
                self.content += bytes(content)
                return len(content)

            def flush(self) -> None: ...

            def close(self) -> None:
                output.write(self.content[::-1])

        return Out()

    def transform_from(self, input: Any) -> Any:
        class In:
            def seekable(self) -> bool:
                return False

            def read(self, size: int = -1) -> bytes:
                return bytes(input.read()[::-1])

        return In()


def test_what_was_transformed(tmp_path: Path) -> None:
    extension = pytest.importorskip(
        "torch.distributed.checkpoint._extension", reason="this torch has no extensions"
    )
    made = type(
        "Made",
        (Reversed, extension.StreamTransformExtension),
        {"registry_name": staticmethod(lambda: "reversed")},
    )
    state = {"a": random(100)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[made()]))
    reader = ParallelReader(tmp_path)
    reader.transforms.extension_registry.register(made)
    found = empty(state)
    dcp.load(found, storage_reader=reader)
    assert same(found["a"], state["a"])


# Faults


def caused(error: BaseException) -> list[BaseException]:
    """What torch's error is made of."""
    return [pair[0] for pair in getattr(error, "failures", {}).values()]


def test_wrong_bytes_are_not_loaded(tmp_path: Path) -> None:
    state = {"large": random(*LARGE), "small": random(10)}
    for name in state:
        folder = tmp_path / name
        dcp.save(state, storage_writer=dcp.FsspecWriter(f"bootseer+file://{folder}"))
        manifest = read_manifest(open_store(f"file://{folder}", plain=True), "__0_0.distcp")
        assert manifest
        reader = ParallelReader(folder)
        place = reader.read_metadata().storage_data[MetadataIndex(name, torch.Size([0] * state[name].dim()))]
        extent = manifest.layout.extent(place.offset + place.length // 2, 1)
        object_ = folder / "__0_0.distcp" / manifest.generation / str(extent.object)
        with object_.open("r+b") as out:
            out.seek(extent.offset)
            byte = out.read(1)
            out.seek(extent.offset)
            out.write(bytes([byte[0] ^ 1]))
        with pytest.raises(BaseException) as failure:  # torch's is none of Exception's
            load(folder, {name: torch.zeros_like(state[name])})
        assert [type(each) for each in caused(failure.value)] == [IntegrityError]


def test_what_is_missing_or_of_another_shape(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, state = saved
    with pytest.raises(BaseException) as failure:
        load(folder / "none", empty(state))
    assert f"{folder}/none/.metadata: no such file" in str(failure.value)
    places = Places()
    places.read["layer.0"] = torch.zeros(7, 7)
    reader = ParallelReader(folder)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    index = MetadataIndex("layer.0", torch.Size([0, 0]))
    zeros = torch.Size([0, 0])
    item = ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, torch.Size(LARGE))
    with pytest.raises(ValueError, match=r"\(3000, 1024\) is read to \(7, 7\)"):
        reader.read_data(LoadPlan([item]), places)
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(BaseException) as failure:
        load(folder, empty(state))
    assert [type(each) for each in caused(failure.value)] == [NotFound]


def test_it_only_reads(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="for reading only"),
        ParallelReader(tmp_path).fs.create_stream(tmp_path / "a", "wb"),
    ):
        pass
    ids = ("/ckpt", "hdfs://nn:8020/ckpt", "bootseer+s3://bucket/ckpt", "gs://bucket/ckpt")
    assert [ParallelReader.validate_checkpoint_id(each) for each in ids] == [True, True, True, False]


# As files

_LOAD = """
import sys, torch, safetensors
from safetensors.torch import load_file
pt, st = sys.argv[1:]
of_torch = torch.load(pt, mmap=True, weights_only=True)
with safetensors.safe_open(st, framework="pt") as file:
    one = file.get_tensor("a"), file.get_slice("b")[3:5]
whole = load_file(st)
assert one[0].equal(whole["a"]) and one[1].equal(whole["b"][3:5])
print(*(tensor.double().sum().item() for tensor in (of_torch["a"], of_torch["b"], whole["a"], whole["b"])))
"""


def saved_by_torch(state: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse")
def test_mapped_files_of_a_job(node: Node) -> None:
    """What maps files finds them in the FUSE file system, while they come and afterwards."""
    state = {"a": random(4000, 1024), "b": random(100, 7)}
    source = node.folder / "data"
    for name, content in (
        ("model.pt", saved_by_torch(state)),
        ("model.safetensors", safetensors.torch.save(state)),
    ):
        with StripedWriter(str(source / name)) as file:
            file.write(content)
    sums = [tensor.double().sum().item() for tensor in state.values()]
    node.start()
    paths = []
    for job, name in enumerate(("model.pt", "model.safetensors"), start=1):
        node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, CHECKPOINT=f"file://{source}/{name}")
        reply, fds = node.request("attach", JOB_ID=job, UID=ALICE, STEP_ID=0)
        for fd in fds:
            os.close(fd)  # the cache's file, where it came whole already
        values = dict(value.split("=", 1) for key, value in reply if key == "SETENV")
        paths.append(values["BOOTSEER_CHECKPOINT"])
        assert (
            os.stat(paths[-1]).st_dev == os.stat(node.run / "checkpoints").st_dev != os.stat(node.run).st_dev
        )
    done = subprocess.run([sys.executable, "-c", _LOAD, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [float(each) for each in done.stdout.split()] == sums * 2
