"""Ending by a signal, in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def test_it_cleans_up_and_says_which_signal() -> None:
    code = """
import os, signal, sys
from bootseer_slurm.signals import exit_on
exit_on(signal.SIGTERM, signal.SIGHUP)
try:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
finally:
    print("cleaned up")
"""
    for name, status in (("SIGTERM", 143), ("SIGHUP", 129)):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (status, "cleaned up\n")
