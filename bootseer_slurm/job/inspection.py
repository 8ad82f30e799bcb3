"""The state of one job on this node, for people who look why its start is slow (`bootseer debug job`)."""

from __future__ import annotations

from typing import Any

from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.job.session import Session


def inspect(session: Session) -> dict[str, Any]:
    """The job's phase, artifacts, queues and link, as JSON has it; sizes in bytes, rates in bytes a second."""
    context = session.context
    hot, whole = session.scheduler.queued()
    return {
        "job": context.job.job_id,
        "restart": context.job.restart,
        "node": context.node,
        "class": context.job_class,
        "phase": context.phase.now.value,
        "observed": session.intake.only_observes,
        "queues": {"hot": hot, "whole": whole},
        "link_bytes_per_s": int(session.link.bytes_per_s),
        "artifacts": [_artifact(each) for each in session.artifacts.all()],
    }


def _artifact(artifact: Artifact) -> dict[str, Any]:
    resolved = artifact.resolved
    return {
        "kind": artifact.ref.kind,
        "name": artifact.ref.name,
        "state": artifact.state.value,
        "asked_by": "class" if artifact.is_learned else "job",
        "dropped": artifact.dropped,
        "reason": artifact.reason,
        "shown_at": resolved.path if resolved else "",
        "layers": [_layer(each) for each in resolved.layers] if resolved else [],
    }


def _layer(layer: Layer) -> dict[str, Any]:
    handle = layer.handle
    blob, usage = handle.reader.blob, handle.usage
    return {
        "blob": blob.id,
        "size_bytes": blob.layout.size_bytes,
        "present_bytes": blob.present_bytes,
        "fetched_bytes": usage.fetched_bytes,
        "reads_blocked": usage.reads_blocked,
        "waited_s": round(handle.waited.waited_s, 3),
        "sources": [source.name for source in handle.reader.sources.all],
        "planned_blocks": len(layer.plan.blocks) if layer.plan.full_starts or layer.plan.blocks else None,
        "mounted": layer.mounted is not None,
    }
