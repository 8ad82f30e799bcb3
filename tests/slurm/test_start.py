"""Starts of real jobs: shown at their own paths, reported, and never harmed."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import textwrap
import time
from collections.abc import Iterator

import pytest

from scripts.lib.cluster.client import BOOTSEER, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

HOME = "/shared/home/alice/start"
JOB = textwrap.dedent(
    f"""\
    #!/bin/bash
    #SBATCH -N3 --ntasks-per-node=1 -o {HOME}/%j.out --open-mode=append
    srun bash -c '
    echo "$SLURM_NODEID image $(sha256sum < {HOME}/img.sqsh | cut -c1-64) $(grep -c {HOME}/img.sqsh /proc/self/mountinfo)"
    echo "$SLURM_NODEID model $(sha256sum < {HOME}/model.bin | cut -c1-64) $(grep -c {HOME}/model.bin /proc/self/mountinfo)"
    echo "$SLURM_NODEID toy $({HOME}/venv/bin/python -c "import toy; print(toy.VALUE)") $(grep -c {HOME}/venv /proc/self/mountinfo)"
    {BOOTSEER} mark training_started 2>/dev/null'
    """
)
WISHES = (
    "--bootseer",
    f"--bootseer-image={HOME}/img.sqsh",
    f"--bootseer-env={HOME}/venv",
    f"--bootseer-checkpoint={HOME}/model.bin",
)
MAKE = f"""
set -e
mkdir -p {HOME}/src && cd {HOME}
head -c 3000000 /dev/urandom > src/payload
mksquashfs src img.sqsh -noappend -quiet -no-progress >/dev/null
head -c 20000000 /dev/urandom > model.bin
python3 -m venv --without-pip venv
packages=$(echo venv/lib/python3*/site-packages)
mkdir -p $packages/toy $packages/toy-1.0.dist-info
echo "VALUE = 'imported'" > $packages/toy/__init__.py
echo "Name: toy" > $packages/toy-1.0.dist-info/METADATA
{BOOTSEER} image push img.sqsh
{BOOTSEER} checkpoint stripe model.bin --stripes 3
{BOOTSEER} env save venv
sha256sum img.sqsh model.bin | cut -c1-64
"""


class Inputs:
    """alice's image, environment and checkpoint, saved in the store."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        assert cluster.exec("login", BOOTSEER, "store", "init").returncode == 0
        done = cluster.exec("login", "bash", "-c", MAKE, user="alice", timeout_s=120)
        assert done.returncode == 0, done.stderr
        self.image, self.model = done.stdout.split()[-2:]
        self.folder = cluster.shared / "home/alice/start"
        self.numbers = itertools.count()

    def run(self, *args: str, script: str = JOB) -> tuple[int, list[tuple[str, ...]]]:
        """Submit, wait, and give the job's lines, sorted; the job must have ended well.

        Unless the script has a name, it is of a class of its own, which has learned nothing.
        """
        if " -J " not in script:
            script = script.replace("#SBATCH", f"#SBATCH -J start{next(self.numbers)}\n#SBATCH", 1)
        job_id = self.cluster.sbatch(script, *args)
        state = self.cluster.wait(job_id, 120)
        output = (self.folder / f"{job_id}.out").read_text()
        assert state == "COMPLETED", output
        return job_id, sorted(tuple(line.split()) for line in output.splitlines())

    def expected(self, **shown: int) -> list[tuple[str, ...]]:
        """The lines of a job that read the right bytes, and how many mounts it saw at each path."""
        rows = []
        for node in ("0", "1", "2"):
            rows.append((node, "image", self.image, str(shown.get("image", 0))))
            rows.append((node, "model", self.model, str(shown.get("model", 0))))
            rows.append((node, "toy", "imported", str(shown.get("toy", 0))))
        return sorted(rows)

    def report(self, job_id: int, nodes: int = 3) -> dict[str, object]:
        """The report, when all nodes have written their events (their epilogs do)."""
        folder = self.cluster.shared / f"bootseer/users/20001/events/{job_id}.0"
        deadline = time.monotonic() + 30
        while (
            sum('"kind":"session","name":"end"' in path.read_text() for path in folder.glob("*.jsonl"))
            < nodes
        ):
            assert time.monotonic() < deadline, f"{folder} is not complete"
            time.sleep(0.2)
        done = self.cluster.exec("login", BOOTSEER, "report", "--format", "json", str(job_id), user="alice")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def inputs(cluster: Cluster) -> Inputs:
    return Inputs(cluster)


@pytest.fixture(autouse=True)
def agents_well(cluster: Cluster) -> Iterator[None]:
    yield
    for node in cluster.nodes:
        cluster.agent(node, "start")


def text(report: dict[str, object]) -> str:
    return json.dumps(report)


def test_everything_is_shown_at_its_own_path(inputs: Inputs) -> None:
    job_id, lines = inputs.run(*WISHES)
    assert lines == inputs.expected(image=1, model=1, toy=1)
    report = text(inputs.report(job_id))
    assert "training" in report
    for node in ("n1", "n2", "n3"):
        assert f'"{node}"' in report


def test_a_second_start_reads_nothing_from_the_store(inputs: Inputs) -> None:
    inputs.run(*WISHES)
    job_id, lines = inputs.run(*WISHES)
    assert lines == inputs.expected(image=1, model=1, toy=1)
    inputs.report(job_id)
    events = (inputs.cluster.shared / f"bootseer/users/20001/events/{job_id}.0/n2.jsonl").read_text()
    told = [each for each in map(json.loads, events.splitlines()) if each["kind"] == "prefetch"]
    ends = [each for each in told if each["name"] in ("end", "stopped")]  # stopped: the job was over first
    assert len(ends) == 3
    assert [end["bytes"] for end in ends] == [0, 0, 0]


def test_other_jobs_and_the_node_see_the_original(inputs: Inputs) -> None:
    inputs.run(*WISHES)
    _, lines = inputs.run()
    assert lines == inputs.expected()
    mounts = inputs.cluster.exec("n1", "cat", "/proc/self/mountinfo").stdout
    assert HOME not in mounts
    assert "squashfuse" not in mounts, "no mount of an ended job is left"


def test_no_bootseer_and_observe_show_the_original(inputs: Inputs) -> None:
    assert inputs.run(*WISHES, "--no-bootseer")[1] == inputs.expected()
    job_id, lines = inputs.run("--bootseer=observe", *WISHES[1:])
    assert lines == inputs.expected()
    assert "observe" in text(inputs.report(job_id))


def test_a_profile_names_what_to_bring(inputs: Inputs) -> None:
    (inputs.folder / "p.toml").write_text(f'images = "{HOME}/img.sqsh"\n')
    assert inputs.run(f"--bootseer={HOME}/p.toml")[1] == inputs.expected(image=1)
    (inputs.folder / "bad.toml").write_text('imges = "/x"\n')
    done = inputs.cluster.exec(
        "login", "sbatch", f"--bootseer={HOME}/bad.toml", "--wrap", "true", user="alice"
    )
    assert done.returncode != 0
    assert "imges: unknown key" in done.stderr


def test_two_environments_of_a_profile_are_both_shown(inputs: Inputs) -> None:
    copy = f"cp -a {HOME}/venv {HOME}/tools && {BOOTSEER} env save {HOME}/tools"
    assert inputs.cluster.exec("login", "bash", "-c", copy, user="alice").returncode == 0
    (inputs.folder / "two.toml").write_text(f'environments = ["{HOME}/venv", "{HOME}/tools"]\n')
    assert inputs.run(f"--bootseer={HOME}/two.toml")[1] == inputs.expected(toy=1)
    script = JOB.replace(f"{HOME}/venv", f"{HOME}/tools")
    assert inputs.run(f"--bootseer={HOME}/two.toml", script=script)[1] == inputs.expected(toy=1)


def test_an_unsaved_file_is_read_as_it_lies(inputs: Inputs) -> None:
    inputs.cluster.exec("login", "cp", f"{HOME}/model.bin", f"{HOME}/plain.bin", user="alice")
    script = JOB.replace(f"{HOME}/model.bin", f"{HOME}/plain.bin")
    _, lines = inputs.run("--bootseer", f"--bootseer-checkpoint={HOME}/plain.bin", script=script)
    assert lines == inputs.expected(model=1)


@pytest.mark.parametrize("state", ["stop", "kill", "hang"])
def test_an_agent_that_is_not_there_costs_no_job(inputs: Inputs, state: str) -> None:
    inputs.cluster.agent("n2", state)
    _, lines = inputs.run(*WISHES)
    full, plain = inputs.expected(image=1, model=1, toy=1), inputs.expected()
    with_shadow = {row for row in full if row[0] != "1"} | {row for row in plain if row[0] == "1"}
    assert set(lines) == with_shadow


@pytest.mark.parametrize(
    ("prepare", "option", "message"),
    [
        ("true", f"--bootseer-image={HOME}/none.sqsh", "No such file"),
        (
            f"head -c 9000 /dev/zero > {HOME}/zero.sqsh",
            f"--bootseer-image={HOME}/zero.sqsh",
            "not a squashfs",
        ),
        (f"head -c 9000 {HOME}/img.sqsh > {HOME}/cut.sqsh", f"--bootseer-image={HOME}/cut.sqsh", "truncated"),
        (f"mkdir -p {HOME}/noenv", f"--bootseer-env={HOME}/noenv", "not a Python environment"),
        ("true", "--bootseer-image=/etc/hostname", "too short"),
        ("true", "--bootseer-checkpoint=/etc/passwd", "where this site allows"),
        ("true", "--bootseer-checkpoint=/shared/home/bob/x", "Permission denied"),
        ("true", "--bootseer-image=docker://none/none", "not in the store"),
    ],
)
def test_bad_input_gives_one_clear_line_and_the_job_runs(
    inputs: Inputs, prepare: str, option: str, message: str
) -> None:
    assert inputs.cluster.exec("login", "bash", "-c", prepare, user="alice").returncode == 0
    job_id, lines = inputs.run("--bootseer", option)
    assert lines == inputs.expected()
    inputs.report(job_id)
    shown = inputs.cluster.exec("login", BOOTSEER, "report", str(job_id), user="alice").stdout
    assert message in re.sub(r"\s+", " ", shown)


def test_an_environment_that_changed_is_not_shown(inputs: Inputs) -> None:
    site = next((inputs.folder / "venv/lib").glob("python3*")) / "site-packages"
    added = site / "late-2.0.dist-info"
    added.mkdir()
    try:
        time.sleep(2.5)  # sshfs keeps a listing for a second or two
        job_id, lines = inputs.run(*WISHES)
        assert lines == inputs.expected(image=1, model=1)
        assert "was changed" in text(inputs.report(job_id))
    finally:
        added.rmdir()
        time.sleep(2.5)


def test_a_missing_stripe_leaves_the_original(inputs: Inputs) -> None:
    names = inputs.cluster.shared / "bootseer/users/20001/names"
    records = [json.loads(path.read_text()) for path in names.iterdir()]
    folder = next(record["folder"] for record in records if record["name"].endswith("model.bin"))
    stripe = inputs.cluster.shared / f"bootseer/users/20001/{folder.removeprefix('users/20001/')}/1"
    hidden = stripe.with_suffix(".hidden")
    stripe.rename(hidden)
    try:
        inputs.cluster.script("drop-caches", "--bootseer")
        job_id, lines = inputs.run(*WISHES)
        assert lines == inputs.expected(image=1, model=1, toy=1), "read from the original, in parallel"
        assert "stripe 1 is missing" in text(inputs.report(job_id))
    finally:
        hidden.rename(stripe)


def test_an_unreachable_store_costs_no_job(inputs: Inputs) -> None:
    store = inputs.cluster.shared / "bootseer"
    away = inputs.cluster.shared / "bootseer-away"
    store.rename(away)
    try:
        _, lines = inputs.run(*WISHES)
    finally:
        if store.exists():
            store.rmdir()
        away.rename(store)
    assert lines == inputs.expected(image=1, model=1), "files are read as they lie"


def test_a_full_cache_disk_costs_no_job(inputs: Inputs) -> None:
    inputs.cluster.script("drop-caches", "--bootseer")
    mount = "mkdir -p /var/lib/bootseer/cache; mount -t tmpfs -o size=2m none /var/lib/bootseer/cache"
    inputs.cluster.agent("n1", "stop")
    assert inputs.cluster.exec("n1", "sh", "-c", mount).returncode == 0
    inputs.cluster.agent("n1", "start")
    try:
        job_id, lines = inputs.run(*WISHES)
        assert lines == inputs.expected(image=1, model=1, toy=1)
        assert "disk is full" in text(inputs.report(job_id))
    finally:
        inputs.cluster.agent("n1", "stop")
        inputs.cluster.exec("n1", "umount", "-l", "/var/lib/bootseer/cache")
        inputs.cluster.agent("n1", "start")


def test_a_requeued_job_is_two_starts(inputs: Inputs) -> None:
    (inputs.folder / "first").unlink(missing_ok=True)
    script = JOB + f'\n[ "$SLURM_RESTART_COUNT" = 1 ] || {{ touch {HOME}/first; sleep 60; }}\n'
    job_id = inputs.cluster.sbatch(script, "--requeue", *WISHES)
    deadline = time.monotonic() + 60
    while not (inputs.folder / "first").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert inputs.cluster.exec("login", "scontrol", "requeue", str(job_id)).returncode == 0
    while inputs.cluster.exec("login", "squeue", "-hj", str(job_id), "-o", "%T").stdout.strip() == "RUNNING":
        time.sleep(0.2)
    inputs.cluster.exec("login", "scontrol", "update", f"JobId={job_id}", "StartTime=now+2")
    assert inputs.cluster.wait(job_id, 200) == "COMPLETED"
    events = inputs.cluster.shared / "bootseer/users/20001/events"
    deadline = time.monotonic() + 20
    while not all((events / f"{job_id}.{restart}" / "n1.jsonl").exists() for restart in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_bob_cannot_mark_or_read_alices_job(inputs: Inputs) -> None:
    job_id = inputs.cluster.sbatch("#!/bin/bash\n#SBATCH -o /dev/null\nsleep 8\n", "-w", "n1", *WISHES)
    deadline = time.monotonic() + 30
    while str(job_id) not in inputs.cluster.exec("n1", BOOTSEER, "status").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    mark = ["env", f"SLURM_JOB_ID={job_id}", BOOTSEER, "mark", "training_started"]
    assert "not taken" in inputs.cluster.exec("n1", *mark, user="bob").stderr
    while inputs.cluster.exec("n1", "test", "-d", "/run/bootseer/blobs/20001").returncode != 0:
        assert time.monotonic() < deadline, "the agent knows of a job before it has looked up what it wishes"
        time.sleep(0.1)
    blobs = inputs.cluster.exec("n1", "sh", "-c", "ls /run/bootseer/blobs/20001", user="bob")
    assert "Permission denied" in blobs.stderr
    inputs.cluster.wait(job_id, 60)


def test_a_bare_second_start_brings_what_the_script_named_in_its_srun_lines(inputs: Inputs) -> None:
    """The learned plan: in the prolog nothing is known of the image but what this class asked for last time."""
    srun = f"srun --bootseer-image={HOME}/img.sqsh bash -c"
    # A script works before its srun; what the prolog began takes some tenths of a second.
    script = JOB.replace("srun bash -c", f"sleep 2\n{srun}").replace(
        "#SBATCH", "#SBATCH --bootseer -J learns\n#SBATCH", 1
    )
    first, lines = inputs.run(script=script)
    assert lines == inputs.expected(image=1)
    assert not any('"learned"' in node for node in events(inputs, first))
    inputs.cluster.script("drop-caches", "--bootseer")
    second, lines = inputs.run(script=script)
    assert lines == inputs.expected(image=1)
    for node in events(inputs, second):
        assert node.index('"name":"learned"') < node.index('"name":"attach","step":"0"'), "not by the step"


def events(inputs: Inputs, job_id: int, nodes: int = 3) -> list[str]:
    """Each node's events."""
    inputs.report(job_id, nodes)
    folder = inputs.cluster.shared / f"bootseer/users/20001/events/{job_id}.0"
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) == nodes
    return [path.read_text() for path in files]


LOAD = textwrap.dedent(
    f"""\
    #!/bin/bash
    #SBATCH -N2 --ntasks-per-node=1 --mem=200M -J loads -o {HOME}/%j.out
    sleep 2
    srun bash -c '
    file=$(ls -d {HOME}/ckpt/step_* | tail -1)/model.bin
    echo "$SLURM_NODEID $(tail -c +$((SLURM_NODEID * 32000000 + 1)) $file | head -c 32000000 | sha256sum)"
    {BOOTSEER} mark training_started'
    """
)


def test_each_node_brings_what_that_of_its_rank_read_of_the_last_checkpoint(inputs: Inputs) -> None:
    """Two nodes, of which each reads its half of the newest checkpoint."""
    brought = []
    for step in (1, 2):
        make = f"mkdir -p {HOME}/ckpt/step_{step} && cd $_ && head -c 64000000 /dev/urandom > model.bin && touch -d -1hour model.bin"
        assert inputs.cluster.exec("login", "bash", "-c", make, user="alice").returncode == 0
        job_id, lines = inputs.run("--bootseer", f"--bootseer-checkpoint={HOME}/ckpt", script=LOAD)
        content = (inputs.folder / f"ckpt/step_{step}/model.bin").read_bytes()
        halves = [hashlib.sha256(content[rank * 32_000_000 :][:32_000_000]).hexdigest() for rank in (0, 1)]
        assert [line[:2] for line in lines] == [(str(rank), halves[rank]) for rank in (0, 1)]
        transfers = inputs.report(job_id, nodes=2)["transfers"]
        assert isinstance(transfers, list)
        brought.append([row["fetched_bytes"] for row in transfers if row["what"] == "checkpoint"])
    assert brought[0] == [64_000_000, 64_000_000]
    seen = (brought, transfers, events(inputs, job_id, nodes=2))
    assert all(32_000_000 <= bytes_ < 40_000_000 for bytes_ in brought[1]), seen  # the kernel reads ahead


def test_a_step_that_begins_when_a_striped_checkpoint_is_there_sees_the_caches_own_file(
    inputs: Inputs,
) -> None:
    """Without the FUSE server on the way: the plugin shows it over the FUSE file that BOOTSEER_CHECKPOINT names."""
    uri = f"file://{HOME}/striped.bin"
    make = f"{BOOTSEER} checkpoint stripe {HOME}/model.bin {HOME}/striped.bin"
    assert inputs.cluster.exec("login", "bash", "-c", make, user="alice").returncode == 0
    script = textwrap.dedent(
        f"""\
        #!/bin/bash
        #SBATCH -N1 -w n1 -o {HOME}/%j.out
        echo batch $(sha256sum < $BOOTSEER_CHECKPOINT | cut -c1-64) $(stat -fc %T $BOOTSEER_CHECKPOINT)
        sleep 4
        srun bash -c 'echo step $(sha256sum < $BOOTSEER_CHECKPOINT | cut -c1-64) $(stat -fc %T $BOOTSEER_CHECKPOINT)'
        """
    )
    inputs.cluster.script("drop-caches", "--bootseer")
    _, lines = inputs.run("--bootseer", f"--bootseer-checkpoint={uri}", script=script)
    batch, step = lines
    assert batch[:2] == ("batch", inputs.model) and step[:2] == ("step", inputs.model)
    assert "fuse" in batch[2] and "fuse" not in step[2]
