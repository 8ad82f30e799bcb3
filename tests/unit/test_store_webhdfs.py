"""The addresses of NameNodes' web servers, as hdfs-site.xml has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootseer_slurm.store.webhdfs import WebHdfs


@pytest.mark.parametrize(
    ("settings", "authority", "addresses"),
    [
        ({}, "nn:8020", [("nn", 9870)]),
        ({"dfs.namenode.http-address": "0.0.0.0:50070"}, "nn:8020", [("nn", 50070)]),
        (
            {
                "dfs.ha.namenodes.prod": "a, b",
                "dfs.namenode.rpc-address.prod.a": "nn1:8020",
                "dfs.namenode.rpc-address.prod.b": "nn2:8020",
                "dfs.namenode.http-address.prod.b": "web2:50070",
            },
            "prod",
            [("nn1", 9870), ("web2", 50070)],
        ),
    ],
)
def test_address(
    settings: dict[str, str],
    authority: str,
    addresses: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        f"<property><name>{name}</name><value>{value}</value></property>" for name, value in settings.items()
    ]
    (tmp_path / "hdfs-site.xml").write_text(f"<configuration>{''.join(rows)}</configuration>")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    assert WebHdfs(authority).addresses == addresses
