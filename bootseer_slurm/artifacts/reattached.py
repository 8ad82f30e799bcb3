"""Blobs that a job used under an agent that was killed, served again by the agent after that one.

After a restart the agent keeps serving the blob that the job uses, even if its name now points elsewhere. So
each layer leaves a record in the job's journal, and its blob is served from the cache at once. The bytes that
the cache lacks come from where they came from before; that is opened when the first of them is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from bootseer_slurm.artifacts.handle import BlobHandle
from bootseer_slurm.artifacts.open_blobs import OpenBlobs, Use
from bootseer_slurm.artifacts.source import OriginalFile, ProcessOfJob, original_source, store_source
from bootseer_slurm.cache.sources import OnFault


@dataclass(frozen=True, slots=True)
class Found:
    """A blob that the job was given. path: of an unmanaged file. folder: of a blob in the store."""

    blob: str
    kind: str
    path: str
    folder: str


def reattach(
    found: Found, blobs: OpenBlobs, use: Use, process: ProcessOfJob, on_fault: OnFault
) -> BlobHandle:
    """A handle to a blob that a job used before. Raises BootseerError or OSError."""
    description = blobs.describe(found.blob, use.uid)
    layout = description.layout
    if found.folder:
        source = store_source(process, found.blob, found.folder, layout)
    else:
        file = OriginalFile(found.kind, found.path, use.uid, found.blob)
        source = original_source(process, file, layout)
    description.sources.append(source)
    return blobs.open(description, use, on_fault)
