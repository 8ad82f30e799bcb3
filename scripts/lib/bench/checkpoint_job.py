"""The job that loads a file of safetensors: ARM PATH [SOURCE]. Its Python has torch and the peers.

First there is a model of its shapes, in memory that was touched. It says "ready", and at a line on stdin
loads the file into the model and prints the seconds. With SOURCE the model must be what that file holds.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from typing import Any

BUFFER_BYTES = 4 * 2**20


def header_of(path: str) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a file by name, and where their bytes begin."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def read(path: str) -> None:
    """One reader, from the beginning to the end."""
    buffer = bytearray(BUFFER_BYTES)
    fd = os.open(path, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)


def load(arm: str, path: str, model: dict[str, Any]) -> None:
    """Each tensor copied into the model's."""
    if arm == "safetensors":
        from safetensors.torch import load_file

        for name, tensor in load_file(path).items():
            model[name].copy_(tensor)
    elif arm == "runai":
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            for name, tensor in streamer.get_tensors():
                model[name].copy_(tensor)
    else:
        import torch
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: [path]})
        files = loader.copy_files_to_device()
        for name in model:
            model[name].copy_(files.get_tensor(name))
        files.close()
        loader.close()


def main(arm: str, path: str, source: str = "") -> None:
    model: dict[str, Any] = {}
    if arm != "read":
        import fastsafetensors  # noqa: F401
        import runai_model_streamer  # noqa: F401
        import safetensors.torch  # noqa: F401
        import torch

        header, begin = header_of(source or path)
        model = {name: torch.zeros(each["shape"], dtype=torch.bfloat16) for name, each in header.items()}
    print("ready", flush=True)
    sys.stdin.readline()
    begin_s = time.perf_counter()
    if arm == "read":
        read(path)
    else:
        load(arm, path, model)
    print(time.perf_counter() - begin_s, flush=True)
    if source and model:
        whole = torch.from_file(source, size=os.path.getsize(source), dtype=torch.uint8)
        for name, each in header.items():
            first, last = each["data_offsets"]
            same = model[name].view(torch.uint8).reshape(-1).equal(whole[begin + first : begin + last])
            assert same, f"{arm} {path}: {name} is not what was written"
    os._exit(0)  # a peer's threads are not waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
