"""Text of others cannot end a line, steer a terminal or begin a record of the log."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.table import Table

from bootseer_slurm import log
from bootseer_slurm.cli.cells import cell
from bootseer_slurm.text import escaped

HOSTILE = "a\n<0>forged: all is lost\r\x1b[2J\x9b31m\u2028\u202e\udc80\x00b"


def test_nothing_ends_the_line_or_steers() -> None:
    said = escaped(HOSTILE)
    assert said.isprintable() and said.isascii() and "\\n<0>forged" in said
    assert escaped("Ümläut 日本 [bold]") == "Ümläut 日本 [bold]"


@pytest.fixture
def lines() -> io.StringIO:
    """What the log has written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log._Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("hostile")
    logger.handlers, logger.propagate = [handler], False
    return stream


def test_a_message_is_one_record(lines: io.StringIO) -> None:
    logging.getLogger("hostile").warning("%s is no file", HOSTILE, extra={"job": "7\n<0>x"})
    (line,) = lines.getvalue().splitlines()
    assert line.startswith("WARNING a\\n<0>forged") and line.endswith("job=7\\n<0>x") and line.isprintable()


def test_no_line_of_a_traceback_begins_a_record(lines: io.StringIO) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("hostile").exception("failed", stack_info=True)
    first, *others = lines.getvalue().rstrip("\n").split("\n")
    assert first == "ERROR failed" and any("Traceback" in line for line in others)
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_a_cell_has_no_markup() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    table = Table("name")
    table.add_row(cell(f"[bold]name[/] [link=file:///etc]x[/link] {HOSTILE.replace(chr(10), '')}\nsecond"))
    console.print(table)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]name[/] [link=file:///etc]x[/link]" in said and "second" in said
    assert "\x1b[2J" not in said and "\u202e" not in said
