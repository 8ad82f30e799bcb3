"""The demo's result on a terminal."""
from __future__ import annotations
from typing import Any
from rich.console import Console
def show(result: dict[str, Any], console: Console) -> None:
    console.print_json(data=result)
