"""The configuration: TOML into frozen dataclasses, one table for each room.

Owns every key, its default and its meaning; `conf/bootseer.toml` is written from here (`bootseer config
template`). A value comes from the default, the file or the environment (BOOTSEER_<TABLE>_<KEY>), the later
one winning. Every unknown key and every bad value is reported, all at once. No library: msgspec ends at the
first problem, and pydantic-settings does not tell where a value came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli

from bootseer_slurm.errors import BootseerError, ConfigError
from bootseer_slurm.units import parse_bytes, parse_duration

DEFAULT_PATH = Path("/etc/bootseer/bootseer.toml")


def _absolute(value: str) -> Path:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return Path(value)


def _absolute_or_none(value: str) -> Path | None:
    return _absolute(value) if value else None


def _uri(value: str) -> str:
    if "://" not in value:
        raise ValueError('must be a URI such as "file:///lustre/bootseer"')
    return value.rstrip("/")


def _roots(value: object) -> tuple[Path, ...]:
    if isinstance(value, str):
        value = value.split(":")
    if not isinstance(value, list):
        raise ValueError("must be a list of absolute paths")
    roots = tuple(_absolute(str(each)) for each in value)
    if Path("/") in roots:
        raise ValueError("may not hold /: a shadow over /etc or /usr would be a way to become root")
    return roots


def _count(value: object) -> int:
    number = int(str(value))
    if not 1 <= number <= 256:
        raise ValueError("must be between 1 and 256")
    return number


def _ports(value: object) -> tuple[int, ...]:
    found = re.fullmatch(r"(\d{4,5})(?:-(\d{4,5}))?", str(value))
    ports = tuple(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else ()
    if not ports or not 1024 <= ports[0] <= ports[-1] <= 65535 or len(ports) > 256:
        raise ValueError('must be a port or a range of at most 256 ports from 1024 on, such as "7070-7085"')
    return ports


def _host_pattern(value: str) -> str:
    if "{node}" not in value:
        raise ValueError('must have {node} in it, such as "{node}-ib"')
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be {', '.join(choices[:-1])} or {choices[-1]}")
        return value

    return parse


def _setting(default: str | int | list[str], parse: Callable[[Any], Any], meaning: str) -> Any:
    return field(
        default_factory=lambda: parse(default),
        metadata={"default": default, "parse": parse, "meaning": meaning},
    )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """[store]: where blobs, names and events live, shared by all nodes."""

    uri: str = _setting(
        "file:///var/lib/bootseer/store",
        _uri,
        "any pyarrow file system: file:// (NFS, Lustre …), hdfs://, s3://",
    )
    timeout_s: float = _setting("30s", parse_duration, "a read that takes longer has failed")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """[cache]: the node's own copy of blocks."""

    path: Path = _setting("/var/lib/bootseer/cache", _absolute, "on a local disk; made 0700, owned by root")
    max_bytes: int = _setting(
        "200GiB", parse_bytes, "blobs that no job uses are removed, oldest first, above this"
    )
    min_free_bytes: int = _setting("10GiB", parse_bytes, "and when the disk has less than this left")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """[agent]: the node agent."""

    socket: Path = _setting(
        "/run/bootseer/agent.sock",
        _absolute,
        "where jobs and people find it; root.sock beside it is the hook's",
    )
    mounts: Path = _setting(
        "/run/bootseer", _absolute, "the folder of all mounts: blobs, checkpoints, images, environments"
    )
    log_level: str = _setting(
        "info", _choice("debug", "info", "warning", "error"), "debug, info, warning or error"
    )
    metrics: Path | None = _setting(
        "", _absolute_or_none, "a file for node_exporter's textfile collector, …/bootseer.prom; empty: none"
    )


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """[prefetch]: how data is brought to the node."""

    streams: int = _setting(8, _count, "parallel reads of one job on one node")
    attach_wait_s: float = _setting(
        "5s", parse_duration, "a step waits at most this long for names to be looked up"
    )
    hot_wait_s: float = _setting(
        "10s", parse_duration, "a container waits at most this long for the blocks that its start needs"
    )
    cold_rate_bytes: int = _setting(
        "64MiB", parse_bytes, "per second, for what no earlier start needed; 0: such blocks only when read"
    )
    start_quiet_s: float = _setting(
        "30s", parse_duration, "a start that does not say training_started is over when nothing new is read"
    )
    start_cap_s: float = _setting("15m", parse_duration, "and at the latest after this time")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """[image]: container images."""

    kernel_mount: str = _setting(
        "auto",
        _choice("auto", "off"),
        "auto or off: mount images that the agent or the site made by the kernel, not by squashfuse",
    )
    site_key: Path = _setting(
        "/etc/bootseer/site.key", _absolute, "signs what the agents made; 0600, the same on all nodes"
    )


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """[peers]: the nodes of a job get blocks from one another; needs [image] site_key."""

    mode: str = _setting("auto", _choice("auto", "off"), "auto or off")
    address: str = _setting("{node}", _host_pattern, 'the name by which nodes reach one another; "{node}-ib"')
    ports: tuple[int, ...] = _setting("7070-7085", _ports, "TCP ports, open between all nodes")
    upload_bytes: int = _setting("1GiB", parse_bytes, "per second, the most that a job sends from one node")


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """[report]: which starts are measured."""

    observe: str = _setting(
        "asked",
        _choice("asked", "all"),
        "asked: jobs with --bootseer; all: every job, those without it are only observed",
    )


@dataclass(frozen=True, slots=True)
class ShadowConfig:
    """[shadow]: showing blobs at the paths that jobs use."""

    roots: tuple[Path, ...] = _setting(
        ["/home", "/shared", "/scratch", "/lustre", "/gpfs", "/fsx", "/mnt", "/data"],
        _roots,
        "only below these; never a place where programs of root read their files",
    )


@dataclass(frozen=True, slots=True)
class RecordsConfig:
    """[records]: what `bootseer collect` gathers of all starts, on one machine."""

    path: Path = _setting("/var/lib/bootseer/records", _absolute, "made 0700, owned by root")
    socket: Path = _setting(
        "/run/bootseer-answer.sock", _absolute, "where users ask for theirs, as in bootseer-answer.socket"
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All tables, and where each value came from ("table.key" → "default", a file or a variable)."""

    store: StoreConfig = field(default_factory=StoreConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    peers: PeersConfig = field(default_factory=PeersConfig)
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    origins: Mapping[str, str] = field(default_factory=dict)


_TABLES: dict[str, type] = {
    "store": StoreConfig,
    "cache": CacheConfig,
    "agent": AgentConfig,
    "prefetch": PrefetchConfig,
    "image": ImageConfig,
    "peers": PeersConfig,
    "shadow": ShadowConfig,
    "records": RecordsConfig,
    "report": ReportConfig,
}


def load(path: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of this machine.

    path: the file; without it $BOOTSEER_CONFIG, else /etc/bootseer/bootseer.toml, which may be absent.
    Raises ConfigError that names every unknown key and every bad value.
    """
    named = path or (Path(environ["BOOTSEER_CONFIG"]) if environ.get("BOOTSEER_CONFIG") else None)
    loader = _Loader(named or DEFAULT_PATH, environ)
    content = _read(loader.source, required=named is not None)
    for name in content.keys() - _TABLES.keys():
        loader.problems.append(f"{loader.source}: {name}: unknown table")
    tables = {name: loader.table(name, kind, content.get(name, {})) for name, kind in _TABLES.items()}
    if loader.problems:
        raise ConfigError(
            "\n".join(loader.problems), hint="`bootseer config template` shows every key with its default"
        )
    return Config(**tables, origins=loader.origins)


def shown(value: object) -> str:
    """A value as a person may write it."""
    if isinstance(value, tuple) and value and isinstance(value[0], int):
        return f"{value[0]}-{value[-1]}"  # ports
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def template() -> str:
    """The text of conf/bootseer.toml: every key, commented, with its default."""
    lines = ["# bootseer-slurm. Every key with its default; remove the # to change one."]
    for name, kind in _TABLES.items():
        lines += ["", f"# {(kind.__doc__ or '').split(': ', 1)[1]}", f"[{name}]"]
        for key in fields(kind):
            default = key.metadata["default"]
            value = str(default) if isinstance(default, int) else str(default).replace("'", '"')
            value = f'"{value}"' if isinstance(default, str) else value
            lines.append(f"#{key.name.removesuffix('_s').removesuffix('_bytes')} = {value}")
            lines[-1] += f"  # {key.metadata['meaning']}"
    return "\n".join(lines) + "\n"


def _read(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{path}: no such file") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


@dataclass
class _Loader:
    """Takes the tables out of a file, and notes where each value comes from and all that is wrong."""

    source: Path
    environ: Mapping[str, str]
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def table(self, table: str, kind: type, given: object) -> Any:
        """The table as an object of its class. given: what the file has of it."""
        if not isinstance(given, dict):
            self.problems.append(f"{self.source}: {table}: must be a table")
            given = {}
        keys = {key.name.removesuffix("_s").removesuffix("_bytes"): key for key in fields(kind)}
        for unknown in given.keys() - keys.keys():
            self.problems.append(f"{self.source}: {table}.{unknown}: unknown key")
        return kind(**{key.name: self._value(table, name, key, given) for name, key in keys.items()})

    def _value(self, table: str, name: str, key: Field[Any], given: dict[str, Any]) -> Any:
        variable = f"BOOTSEER_{table}_{name}".upper()
        origin, raw = "default", key.metadata["default"]
        if name in given:
            origin, raw = str(self.source), given[name]
        if variable in self.environ:
            origin, raw = f"${variable}", self.environ[variable]
        self.origins[f"{table}.{name}"] = origin
        try:
            return key.metadata["parse"](raw)
        except (BootseerError, ValueError, TypeError, AttributeError) as error:
            self.problems.append(f"{origin}: {table}.{name}: {error}")
            return key.metadata["parse"](key.metadata["default"])
