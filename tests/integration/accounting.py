"""sacct and sacctmgr that answer from a file, for what a real slurmdbd cannot be made to do on demand.

That the real ones take the same commands and give the same rows, tests/slurm/test_collect.py sees.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_SACCT = """
import json, sys
jobs = json.load(open(FOLDER + '/jobs'))
options = dict(a.split('=', 1) for a in sys.argv[1:] if '=' in a)
asked = options['--jobs'].split(',')
try:
    comments = json.load(open(FOLDER + '/comments'))
except OSError:
    comments = {}
for job in jobs:
    if job['JobIDRaw'] in asked:
        job['AdminComment'] = comments.get(job['JobID'], '')
        print(options['--delimiter'].join(job.get(name, '') for name in options['--format'].split(',')))
"""
_SACCTMGR = """
import fcntl, json, re, sys
if 'user' in sys.argv:
    name = next(a for a in sys.argv if a.startswith('name='))[5:]
    print(name + '|' + json.load(open(FOLDER + '/levels')).get(name, 'None'))
    sys.exit()
with open(FOLDER + '/comments', 'a+') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    comments = json.loads(file.read() or '{}')
    for line in sys.stdin:
        job, text = re.fullmatch('modify job where jobid=(\\\\S+) set AdminComment="(.*)"\\n', line).groups()
        comments[job] = text
        print(job, text, file=open(FOLDER + '/written', 'a'))
    file.truncate(0)
    file.write(json.dumps(comments))
"""


class Accounting:
    """A folder that is first on PATH, with what accounting knows in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs: list[dict[str, str]] = []
        folder.mkdir(exist_ok=True)
        for name, script in (("sacct", _SACCT), ("sacctmgr", _SACCTMGR)):
            (folder / name).write_text(f"#!{sys.executable} -IS\nFOLDER = {str(folder)!r}\n{script}")
            (folder / name).chmod(0o755)
        self.set_level()
        self._save()

    def add(
        self, job: int, uid: int, *, start_s: int, end_s: int | None, shown_id: str = "", **more: Any
    ) -> None:
        """A run of a job on n1 with 8 GPUs."""
        row = {
            "JobID": shown_id or str(job), "JobIDRaw": str(job), "JobName": "train", "User": f"user{uid}",
            "UID": str(uid), "Account": "ml", "Partition": "gpu", "State": "COMPLETED" if end_s else "RUNNING",
            "Submit": str(start_s - 10), "Eligible": str(start_s - 5), "Start": str(start_s),
            "End": str(end_s) if end_s else "Unknown", "AllocCPUS": "96", "AllocTRES": "cpu=96,gres/gpu=8",
            "NodeList": "n1",
        }  # fmt: skip
        self._jobs.append(row | more)
        self._save()

    def end(self, job: int, end_s: int) -> None:
        for row in self._jobs:
            if row["JobIDRaw"] == str(job):
                row |= {"End": str(end_s), "State": "COMPLETED"}
        self._save()

    def set_level(self, **levels: str) -> None:
        """The admin levels of users."""
        (self.folder / "levels").write_text(json.dumps(levels))

    @property
    def comments(self) -> dict[str, str]:
        path = self.folder / "comments"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def comment(self, shown_id: str, text: str) -> None:
        """Somebody's own comment."""
        (self.folder / "comments").write_text(json.dumps(self.comments | {shown_id: text}))

    @property
    def writes(self) -> int:
        """How many comments were ever written by sacctmgr."""
        path = self.folder / "written"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _save(self) -> None:
        (self.folder / "jobs").write_text(json.dumps(self._jobs))
