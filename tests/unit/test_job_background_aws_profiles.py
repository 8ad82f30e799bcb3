"""Programs in a user's AWS profiles do not run; his keys are found as before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ASK = """
import os
from bootseer_slurm.job.background.aws_profiles import hide_programs
from pyarrow import fs
if os.environ["HIDE"]: hide_programs()
s3 = fs.S3FileSystem(region="us-east-1", scheme="http", endpoint_override="127.0.0.1:1", connect_timeout=1,
                     retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1))
try: s3.get_file_info("bucket/key")
except OSError: pass
"""


def ask(home: Path, *, hide: bool) -> None:
    environ = {"HOME": str(home), "HIDE": "1" if hide else "", "AWS_EC2_METADATA_DISABLED": "true"}
    subprocess.run(
        [sys.executable, "-c", _ASK], env=environ, capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.parametrize("file", ["config", "credentials"])
def test_a_program_of_a_profile_does_not_run(tmp_path: Path, file: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / file).write_text(f"[default]\ncredential_process = /usr/bin/touch {marker}\n")
    ask(tmp_path, hide=True)
    assert not marker.exists()
    ask(tmp_path, hide=False)
    assert marker.exists(), "without it the program runs"


def test_all_else_of_a_profile_is_there(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    keys = "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n"
    (tmp_path / ".aws" / "credentials").write_text(f"{keys}credential_process = /bin/false\n")
    code = (
        "from bootseer_slurm.job.background.aws_profiles import hide_programs; import os; hide_programs()\n"
    )
    code += "print(open(os.environ['AWS_SHARED_CREDENTIALS_FILE']).read(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == keys
