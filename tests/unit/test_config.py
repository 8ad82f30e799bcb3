"""The configuration file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bootseer_slurm import config
from bootseer_slurm.errors import ConfigError


def test_defaults_without_a_file() -> None:
    loaded = config.load(environ={})
    assert loaded.prefetch.streams == 8
    assert loaded.store.timeout_s == 30
    assert loaded.origins["store.uri"] == "default"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text('[prefetch]\nstreams = 3\n[cache]\nmax = "1GiB"\n')
    loaded = config.load(path, environ={"BOOTSEER_PREFETCH_STREAMS": "5"})
    assert loaded.prefetch.streams == 5
    assert loaded.cache.max_bytes == 2**30
    assert loaded.origins["prefetch.streams"] == "$BOOTSEER_PREFETCH_STREAMS"
    assert loaded.origins["cache.max"] == str(path)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text(
        '[store]\nurl = "x"\nuri = "no"\n[colour]\n[shadow]\nroots = ["/"]\n[cache]\nmax = "many"\n'
    )
    with pytest.raises(ConfigError) as caught:
        config.load(path, environ={})
    for part in ("store.url: unknown key", "store.uri", "colour: unknown table", "shadow.roots", "cache.max"):
        assert part in caught.value.message


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        config.load(tmp_path / "none", environ={})


def test_the_shipped_file_is_the_template() -> None:
    shipped = Path(__file__).parents[2] / "conf" / "bootseer.toml"
    assert shipped.read_text() == config.template()
    assert config.load(shipped, environ={}).store == config.load(environ={}).store


def test_the_units_socket_is_the_default() -> None:
    unit = Path(__file__).parents[2] / "conf/systemd/bootseer-answer.socket"
    assert f"ListenStream={config.RecordsConfig().socket}\n" in unit.read_text()


@pytest.mark.parametrize("text", [f"a = {'[' * 50_000}", f"a = {'9' * 5000}"])
def test_toml_that_cannot_be_read_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(tmp_path / "b.toml", environ={})


def test_quantities_beyond_all_reason_are_said(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text(f'[cache]\nmax = "{"9" * 400}TiB"\n[prefetch]\nstart_cap = "{"9" * 400}h"\n')
    with pytest.raises(ConfigError) as caught:
        config.load(path, environ={})
    assert "cache.max" in caught.value.message and "prefetch.start_cap" in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("ports", '"80-90"', "from 1024 on"),
        ("ports", '"7085-7070"', "range"),
        ("ports", '"x"', "ports"),
        ("address", '"nodes"', "{node}"),
        ("mode", '"on"', "auto or off"),
    ],
)
def test_what_peers_cannot_use_is_said(tmp_path: Path, key: str, value: str, why: str) -> None:
    path = tmp_path / "bootseer.toml"
    path.write_text(f"[peers]\n{key} = {value}\n")
    with pytest.raises(ConfigError, match=rf"peers\.{key}: .*{re.escape(why)}"):
        config.load(path, environ={})


def test_ports_are_shown_as_they_are_written() -> None:
    assert config.shown(config.load(environ={"BOOTSEER_PEERS_PORTS": "7070-7072"}).peers.ports) == "7070-7072"
    assert config.shown((Path("/a"), Path("/b"))) == "/a:/b"
