"""The units of conf/systemd: settings without which any user could stop a service."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bootseer_slurm.report import answer

UNITS = Path(__file__).resolve().parents[2] / "conf" / "systemd"


def settings(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z]+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE))


def test_a_flood_of_connections_cannot_stop_the_answer_socket() -> None:
    """systemd fails a socket for good after 200 connections in 2 s, unless this limit is off."""
    unit = settings("bootseer-answer.socket")
    assert unit["Accept"] == "yes" and unit["TriggerLimitIntervalSec"] == "0"
    assert int(unit["MaxConnections"]) == 64, "what bounds the load instead"
    assert int(unit["MaxConnectionsPerSource"]) == answer._MOST_OF_USER < 64
    assert settings("bootseer-answer@.service")["RuntimeDirectory"], (
        "where older systemd's connections are counted"
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_each_setting(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():  # the program is not installed here
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/bootseer", "/bin/true"))
    units = [tmp_path / name for name in ("bootseer-answer.socket", "bootseer-answer@.service")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
