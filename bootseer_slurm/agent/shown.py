"""What the steps of a job are shown: mounts over originals, and variables that name what has no path.

Owns nothing but the folders of named.py; what is there to be shown is wanted.py's. Thread-safe.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bootseer_slurm.agent.named import Named
from bootseer_slurm.agent.request import Wish
from bootseer_slurm.agent.target import Bind, Target
from bootseer_slurm.agent.wanted import Sought, Wanted
from bootseer_slurm.errors import NotFound
from bootseer_slurm.events import EventLog


class Shown:
    """For one job."""

    def __init__(self, wanted: Wanted, named: Named, log: EventLog) -> None:
        self._wanted = wanted
        self._named = named
        self._log = log
        self._told: set[tuple[str, Wish]] = set()
        self._readable: set[Wish] = set()
        self._lock = threading.Lock()

    def to_step(self, *, is_first: bool) -> tuple[list[Bind], dict[str, str]]:
        """Fresh mounts for a step (the caller closes them) and its variables, of what is looked up by now.

        is_first: see Target.bind.
        """
        wanted = {wish: sought for wish, sought in self._wanted.all().items() if not sought.dropped}
        targets = [sought.target for sought in wanted.values() if sought.target is not None]
        with ThreadPoolExecutor(len(targets) or 1) as pool:  # one that does not answer holds up no other
            made = pool.map(lambda target: self._bind(target, is_first), targets)
            binds = [bind for bind in made if bind]
        for wish, sought in wanted.items():
            if not sought.looked_up.is_set():
                self._tell("skipped", wish, "the store had not answered when the step started")
        # An inner target is shown first: below an outer one it could no longer be told from the original.
        return sorted(binds, key=lambda bind: -len(bind.path)), self._variables(wanted)

    def is_readable(self, wish: Wish) -> bool:
        """Whether some step was shown it, at its path or by a variable."""
        with self._lock:
            return wish in self._readable

    def close(self) -> None:
        """Take the folders away."""
        with self._lock:
            self._named.close()

    def _bind(self, target: Target, is_first: bool) -> Bind | None:
        try:
            bind = target.bind(is_first=is_first)
        except Exception as error:  # the binds of others are to be shown, or closed
            self._tell("skipped", target.wish, str(error))
            return None
        if target.path is not None:
            self._tell("shown", target.wish, None)
            self._note_readable(target.wish)
        return bind

    def _variables(self, wanted: dict[Wish, Sought]) -> dict[str, str]:
        in_folders = {file for sought in wanted.values() for file in sought.files.values()}
        variables: dict[str, str] = {}
        for wish, sought in sorted(wanted.items(), key=lambda each: bool(each[1].files)):  # folders win
            try:
                if sought.files:
                    files = {name: _served(wanted, file) for name, file in sought.files.items()}
                    with self._lock:
                        variables["BOOTSEER_CHECKPOINT"] = str(self._named.show(wish.name, files))
                    self._note_readable(*sought.files.values())
                elif sought.target is not None and sought.target.path is None and wish not in in_folders:
                    variables[f"BOOTSEER_{wish.kind.upper()}"] = str(sought.target.served_path())
                    self._note_readable(wish)
            except Exception as error:  # the binds are to be shown, or closed
                self._tell("skipped", wish, str(error))
        return variables

    def _note_readable(self, *wishes: Wish) -> None:
        with self._lock:
            self._readable.update(wishes)

    def _tell(self, name: str, wish: Wish, message: str | None) -> None:
        """Once for all steps: there may be thousands, with as many files each."""
        with self._lock:
            if (name, wish) in self._told:
                return
            self._told.add((name, wish))
        level = "info" if name == "shown" else "warning"
        self._log.emit("shadow", name, target=wish.name, what=wish.kind, message=message, level=level)


def _served(wanted: dict[Wish, Sought], wish: Wish) -> Path:
    target = wanted[wish].target if wish in wanted else None
    if target is None:
        raise NotFound(f"{wish.name}: not there, so the checkpoint is not whole")
    return target.served_path()
