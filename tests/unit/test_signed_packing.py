"""Who signs what was packed."""

from __future__ import annotations

from pathlib import Path

from bootseer_slurm.image.signed_packing import AgentPacking


def test_what_was_stored_with_other_digests_than_the_agents_is_not_signed() -> None:
    said: list[str] = []
    packing = AgentPacking(Path("/none"), "1", warn=said.append)
    assert packing.signature("a blob") == "" and said == [], "nothing was packed"
    packing._signed = ("a blob", "signature")
    assert packing.signature("a blob") == "signature" and said == []
    assert packing.signature("another") == ""
    assert said == ["stored with other digests than the agent's, so the kernel will not mount it"]
