"""The plugin and the hook in a real Slurm: options, what the prolog sees, and the shadow in a job's steps.

The agent is a stand-in here (stand_in.py).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.stand_in import HOME, NODE, SOCKET, fake_agent, make, output, shown

pytestmark = pytest.mark.slurm

SAVER = Path(__file__).resolve().parents[1] / "spank" / "saver.c"
OPTIONS = ["--bootseer", "--bootseer-image", "--bootseer-env", "--bootseer-checkpoint", "--no-bootseer"]
# Runs after the hook or before it; whichever, each run adds its environment to a file of the node.
DUMP = '#!/bin/sh\n{ /bin/cat /proc/self/environ; echo; } >> "/run/env.$SLURM_SCRIPT_CONTEXT.$SLURM_JOB_ID"\n'


@pytest.fixture(autouse=True)
def _clean_home(cluster: Any) -> Iterator[None]:
    """What a test leaves in alice's home goes."""
    home = cluster.shared / "home" / "alice"
    before = set(home.iterdir())
    yield
    for path in set(home.iterdir()) - before:
        if path.is_file():
            path.unlink()


@pytest.fixture
def dumps(cluster: Any) -> Iterator[None]:
    """A site's own prolog and epilog beside the hook, which write down their environment."""
    scripts = [cluster.state_dir / "etc/slurm" / folder / "70-dump" for folder in ("prolog.d", "epilog.d")]
    for script in scripts:
        script.write_text(DUMP)
        script.chmod(0o755)
    yield
    for script in scripts:
        script.unlink()
    for node in cluster.nodes:
        cluster.exec(node, "sh", "-c", "rm -f /run/env.*")


def environments(
    cluster: Any, job_id: int, node: str = NODE, context: str = "prolog", runs: int = 1
) -> list[dict[str, str]]:
    """The environment of each prolog or epilog of a job on a node; waits for as many runs."""
    path = f"/run/env.{context}_slurmd.{job_id}"
    deadline_s = time.monotonic() + 30
    while True:
        text = cluster.exec(node, "cat", path).stdout
        found = [
            dict(entry.split("=", 1) for entry in block.split("\0") if entry) for block in text.split("\0\n")
        ]
        found = [environment for environment in found if environment]
        if len(found) >= runs:
            return found
        assert time.monotonic() < deadline_s, f"no {path} on {node}"
        time.sleep(0.2)


def bootseer_variables(environment: dict[str, str]) -> dict[str, str]:
    """SPANK_BOOTSEER_* without the prefix; and nothing else of the plugin may be there."""
    assert not [name for name in environment if "OPTION_bootseer" in name]
    return {
        name.removeprefix("SPANK_BOOTSEER_"): value
        for name, value in environment.items()
        if name.startswith("SPANK_BOOTSEER_")
    }


# --- options


@pytest.mark.parametrize("command", ["sbatch", "srun", "salloc"])
def test_help(cluster: Any, command: str) -> None:
    done = cluster.exec("login", command, "--help", user="alice")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for option in OPTIONS:
        assert [line for line in lines if line.split() and line.split()[0].split("=")[0] == option], option


REFUSED = [
    ("--bootseer=fast", "--bootseer=fast: it is neither observe nor a profile (FILE.toml)"),
    ("--bootseer=none.toml", f"cannot use the profile {HOME}/none.toml: No such file or directory"),
    ("--bootseer=/dev/x.toml", "cannot use the profile /dev/x.toml: No such file or directory"),
    ("--bootseer-image=", "--bootseer-image=: it is empty"),
    ("--bootseer-image=HTTP://x", "--bootseer-image=HTTP://x: the scheme before :// must be lower-case"),
    ("--bootseer-checkpoint=a\nb", "--bootseer-checkpoint=a\\nb: it has a control character in it"),
    ("--bootseer-checkpoint=/" + "x" * 4096, "it is longer than 4096 bytes"),
    ("--bootseer-env=s3://x/y", "--bootseer-env=s3://x/y: it must be a folder, not a URI"),
]


@pytest.mark.parametrize("command", ["sbatch", "srun", "salloc"])
@pytest.mark.parametrize(("option", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused_at_submission(cluster: Any, command: str, option: str, words: str) -> None:
    wrap = ["--wrap=true"] if command == "sbatch" else ["true"]
    done = cluster.exec("login", command, option, *wrap, user="alice")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "bootseer: " in line]
    assert len(ours) == 1, done.stderr
    assert ours[0].startswith(f"{command}: error: bootseer: ")
    assert words in ours[0]
    assert "Submitted" not in done.stdout + done.stderr


def test_refused_profiles(cluster: Any, folder: Path) -> None:
    large = make(folder / "large.toml", "#" * 65537)
    binary = make(folder / "binary.toml", "a\0b")
    private = make(folder / "private.toml", "")
    (folder / "private.toml").chmod(0)
    for profile, words in [
        (large, "it is larger than 64 KiB"),
        (binary, "it is not a text file"),
        (private, "Permission denied"),
    ]:
        done = cluster.exec("login", "sbatch", f"--bootseer={profile}", "--wrap=true", user="alice")
        assert done.returncode != 0
        assert words in done.stderr
    (folder / "directory.toml").mkdir()
    done = cluster.exec("login", "sbatch", f"--bootseer={folder}/directory.toml", "--wrap=true", user="alice")
    (folder / "directory.toml").rmdir()
    assert done.returncode != 0


@pytest.fixture
def plugstack(cluster: Any) -> Iterator[Any]:
    """Gives a function that adds arguments to the plugin's line in plugstack.conf."""
    path = cluster.state_dir / "etc/slurm/plugstack.conf.d/bootseer.conf"
    before = path.read_text()

    def add(*args: str) -> None:
        path.write_text(before.rstrip("\n") + " " + " ".join(args) + "\n")

    yield add
    path.write_text(before)


def test_profile_is_checked_by_bootseer(cluster: Any, plugstack: Any, folder: Path) -> None:
    checker = folder / "bootseer"
    profile = make(folder / "job.toml", "imges = []\n")

    def submit(script: str) -> Any:
        make(checker, f"#!/bin/sh\n{script}\n")
        checker.chmod(0o755)
        return cluster.exec("login", "sbatch", f"--bootseer={profile}", "--wrap=true", user="alice")

    plugstack(f"bootseer={shown(checker)}")
    done = submit('echo "$3: imges: unknown key" >&2; echo "hint: images" >&2; exit 2')
    assert done.returncode != 0
    assert f"sbatch: error: bootseer: {profile}: imges: unknown key\n" in done.stderr
    assert "hint" not in done.stderr
    done = submit("exit 0")
    assert (done.returncode, done.stderr) == (0, "")
    # What is our own breakage stops nobody.
    for script in ("echo Traceback >&2; exit 1", "kill -9 $$", "sleep 60"):
        done = submit(script)
        assert done.returncode == 0
        assert "could not be checked" in done.stderr
        assert done.stderr.count("bootseer: ") == 1


def test_unknown_plugstack_argument_stops_nobody(cluster: Any, plugstack: Any) -> None:
    plugstack("sockt=/x", "timeout_ms=0")
    done = cluster.exec("login", "sbatch", "--bootseer", "--wrap=true", user="alice")
    assert done.returncode == 0
    assert "unknown argument sockt=/x" in done.stderr
    assert "timeout_ms must be 1 to 60000, not 0" in done.stderr


# --- what the prolog sees


def test_prolog_of_a_batch_job(cluster: Any, dumps: None, folder: Path) -> None:
    text = '# Größe "$(reboot)" %s\nimages = ["/shared/a.sqsh"]\n'
    profile = make(folder / "job.toml", text)
    job_id = cluster.sbatch(
        "true",
        "--nodes=2",
        "--nodelist=n1,n2",
        "--job-name=train it",
        f"--bootseer={folder.name}/job.toml",
        "--bootseer-image=./img//train.sqsh",
        "--bootseer-env=venv/",
        "--bootseer-checkpoint=hdfs://nn/ckpt",
    )
    assert cluster.wait(job_id) == "COMPLETED"
    assert profile.startswith(HOME)
    for node in ("n1", "n2"):
        for context in ("prolog", "epilog"):
            (environment,) = environments(cluster, job_id, node, context)
            assert bootseer_variables(environment) == {
                "MODE": "1",
                "PROFILE": text,
                "IMAGE": f"{HOME}/img/train.sqsh",
                "ENV": f"{HOME}/venv",
                "CHECKPOINT": "hdfs://nn/ckpt",
                "JOB_NAME": "train it",
            }
            assert environment["SLURM_SCRIPT_CONTEXT"] == f"{context}_slurmd"
            assert environment["SLURMD_NODENAME"] == node
            assert environment["SLURM_JOB_USER"] == "alice"


def test_prolog_of_a_plain_job(cluster: Any, dumps: None) -> None:
    job_id = cluster.sbatch("true", f"--nodelist={NODE}")
    (environment,) = environments(cluster, job_id)
    assert bootseer_variables(environment) == {}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--bootseer"], {"MODE": "1"}),
        (["--bootseer="], {"MODE": "1"}),
        (["--bootseer=observe"], {"MODE": "observe"}),
        (["--bootseer-image=/a.sqsh"], {"MODE": "1", "IMAGE": "/a.sqsh"}),
        (["--bootseer=observe", "--bootseer-env=/venv"], {"MODE": "observe", "ENV": "/venv"}),
        (["--bootseer-image=/a", "--bootseer-image=/b"], {"MODE": "1", "IMAGE": "/b"}),
        (["--no-bootseer", "--bootseer", "--bootseer-image=/a"], {}),
        (["--bootseer", "--no-bootseer"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(cluster: Any, dumps: None, options: Sequence[str], wanted: dict[str, str]) -> None:
    job_id = cluster.sbatch("true", f"--nodelist={NODE}", "--job-name=j", *options)
    (environment,) = environments(cluster, job_id)
    assert bootseer_variables(environment) == (wanted | {"JOB_NAME": "j"} if wanted else {})


def test_options_in_the_script(cluster: Any, dumps: None) -> None:
    script = "#!/bin/bash\n#SBATCH --bootseer --bootseer-image=/script.sqsh --bootseer-env=/script\ntrue\n"
    job_id = cluster.sbatch(script, f"--nodelist={NODE}", "--job-name=j", "--bootseer-image=/line.sqsh")
    (environment,) = environments(cluster, job_id)
    wanted = {"MODE": "1", "IMAGE": "/line.sqsh", "ENV": "/script", "JOB_NAME": "j"}
    assert bootseer_variables(environment) == wanted
    job_id = cluster.sbatch(script, f"--nodelist={NODE}", "--no-bootseer")
    (environment,) = environments(cluster, job_id)
    assert bootseer_variables(environment) == {}


def test_export_none_and_export_file(cluster: Any, dumps: None) -> None:
    for export in ("--export=NONE", "--export=HOME"):
        job_id = cluster.sbatch("true", f"--nodelist={NODE}", export, "--bootseer-image=/a.sqsh")
        (environment,) = environments(cluster, job_id)
        assert bootseer_variables(environment)["IMAGE"] == "/a.sqsh"


def test_array(cluster: Any, dumps: None) -> None:
    job_id = cluster.sbatch("true", f"--nodelist={NODE}", "--array=0-1", "--bootseer-image=/a.sqsh")
    cluster.wait(job_id)
    # The last of an array keeps the array's own number; the others come after it.
    for raw_id in (job_id, job_id + 1):
        (environment,) = environments(cluster, raw_id)
        assert bootseer_variables(environment)["IMAGE"] == "/a.sqsh"


def test_requeue(cluster: Any, dumps: None) -> None:
    script = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then sleep 300; fi'
    job_id = cluster.sbatch(script, f"--nodelist={NODE}", "--requeue", "--bootseer-image=a.sqsh")
    environments(cluster, job_id)
    deadline_s = time.monotonic() + 30
    while cluster.exec("login", "squeue", "-hj", str(job_id), "-o", "%T").stdout.strip() != "RUNNING":
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert cluster.exec("login", "scontrol", "requeue", str(job_id)).returncode == 0
    environments(cluster, job_id, context="epilog")
    # Slurm holds a requeued job back for two minutes. Sooner is fine, but a start in the second of the end
    # would be taken for the one that was ended (credential revoked).
    time.sleep(2.5)
    cluster.exec("login", "scontrol", "update", f"JobId={job_id}", "StartTime=now")
    runs = environments(cluster, job_id, runs=2)
    assert [bootseer_variables(run)["IMAGE"] for run in runs] == [f"{HOME}/a.sqsh"] * 2
    assert [run.get("SLURM_JOB_RESTART_COUNT", "0") for run in runs] == ["0", "1"]
    assert cluster.wait(job_id) == "COMPLETED"


def test_heterogeneous_job(cluster: Any, dumps: None) -> None:
    done = cluster.exec(
        "login",
        *("sbatch", "--parsable", "--nodelist=n1", "--bootseer-image=/a.sqsh"),
        *(":", "--nodelist=n2", "--bootseer-image=/b.sqsh", ":", "--nodelist=n3"),
        user="alice",
        input_text="#!/bin/bash\nsrun --het-group=0,1,2 hostname\n",
    )
    assert done.returncode == 0, done.stderr
    job_id = int(done.stdout.split(";")[0])
    images = [
        bootseer_variables(environments(cluster, job_id + index, node)[0])["IMAGE"]
        for index, node in enumerate(("n1", "n2", "n3"))
    ]
    # Slurm's own way with plugin options: what a component says holds for those after it.
    assert images == ["/a.sqsh", "/b.sqsh", "/b.sqsh"]
    assert cluster.wait(job_id) == "COMPLETED"


@pytest.mark.parametrize("command", ["srun", "salloc"])
def test_prolog_of_srun_and_salloc(cluster: Any, dumps: None, command: str) -> None:
    done = cluster.exec(
        "login",
        *(command, f"--nodelist={NODE}", "--bootseer-image=x.sqsh", "sh", "-c", "echo id=$SLURM_JOB_ID"),
        user="alice",
    )
    assert done.returncode == 0, done.stderr
    job_id = int(done.stdout.split("id=")[1])
    (environment,) = environments(cluster, job_id)
    variables = bootseer_variables(environment)
    assert (variables["MODE"], variables["IMAGE"]) == ("1", f"{HOME}/x.sqsh")


# --- steps


SCRIPT = """
echo batch: $(cat {target}) $BOOTSEER_GREETING
srun --ntasks=2 --overlap sh -c 'echo step: $(cat {target}) $BOOTSEER_GREETING'
srun --no-bootseer sh -c 'echo refused: $(cat {target}) $(env | grep -c SPANK_BOOTSEER)'
srun sh -c 'echo again: $(cat {target})'
"""


def test_shadow(cluster: Any, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    profile = make(folder / "job.toml", "observe = false\n")
    setenv = [
        "--setenv",
        "BOOTSEER_GREETING=hello you=1",
        "--setenv",
        "LD_PRELOAD=/x",
        "--setenv",
        "BOOTSEER-X=1",
    ]
    with fake_agent(cluster, "--bind", f"{blob}={target}", *setenv) as agent:
        script = f"rm {profile}\nenv | grep -E '^(LD_PRELOAD|BOOTSEER-X)'\n" + SCRIPT.format(target=target)
        text = output(
            cluster,
            script,
            "--ntasks=2",
            "--mem=150M",
            f"--bootseer={profile}",
            f"--bootseer-image={folder.name}/x",
        )
        assert sorted(text.splitlines()) == [
            "again: fast",
            "again: fast",
            "batch: fast hello you=1",
            "refused: slow 0",
            "refused: slow 0",
            "step: fast hello you=1",
            "step: fast hello you=1",
        ]
        attaches = agent.requests("attach", 3)
        assert [request["STEP_ID"] for request in attaches] == ["batch", "0", "2"]
        for request in attaches:
            assert request["BOOTSEER"] == "1"
            assert request["PROFILE"] == "observe = false\n"
            assert request["IMAGE"] == f"{HOME}/{folder.name}/x"
            assert (request["UID"], request["GID"]) == ("20001", "20001")
            assert set(request["GIDS"].split(",")) == {"20000", "20001"}
            assert (request["NODENAME"], request["MEMORY_MB"]) == (NODE, "150")
            assert request["_pid_uid_gid"][1] == 0
        stages = agent.requests("stage", 5)
        assert sorted((stage["NAME"], stage["STEP_ID"], stage["TASK"]) for stage in stages) == [
            ("task_start", "0", "0"),
            ("task_start", "0", "1"),
            ("task_start", "2", "0"),
            ("task_start", "2", "1"),
            ("task_start", "batch", "0"),
        ]
        assert all(abs(time.time_ns() - int(stage["TIME_NS"])) < 300e9 for stage in stages)
        (prolog,) = agent.requests("prolog")
        assert prolog["JOB_ID"] == attaches[0]["JOB_ID"]
        assert (prolog["RESTART"], prolog["NODENAME"], prolog["NODELIST"]) == ("0", NODE, NODE)
        assert prolog["PROFILE"] == "observe = false\n"
        (epilog,) = agent.requests("epilog")
        assert epilog["JOB_ID"] == prolog["JOB_ID"]
    assert (folder / "target").read_text() == "slow"
    assert target not in cluster.exec(NODE, "cat", "/proc/1/mountinfo").stdout


def test_what_slurm_says_of_a_jobs_nodes_fits_together(cluster: Any) -> None:
    """Else the agent would refuse the list: of a component, and where the job has the node beside others."""
    with fake_agent(cluster) as agent:
        for options in (["--nodes=3"], ["--nodelist=n1", ":", "--nodelist=n[2-3]"]):
            argv = ["sbatch", "--parsable", "--bootseer=observe", *options]
            script = "#!/bin/bash\ntrue\n"
            done = cluster.exec("login", *argv, user="alice", input_text=script)
            assert done.returncode == 0, done.stderr
            assert cluster.wait(int(done.stdout.split(";")[0])) == "COMPLETED"
        said = [(each["NODELIST"], each["NODES"]) for each in agent.requests("prolog", 2)]
    assert said == [("n[1-3]", "3"), ("n1", "1")]


def test_jobs_without_bootseer_do_not_meet_the_agent(cluster: Any, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    with fake_agent(cluster, "--bind", f"{blob}={target}") as agent:
        assert output(cluster, f"cat {target}; srun cat {target}") == "slowslow"
        assert (
            output(cluster, f"cat {target}; srun cat {target}", "--no-bootseer", "--bootseer") == "slowslow"
        )
        # One step of a plain job may ask for itself.
        assert (
            output(cluster, f"cat {target}; srun --bootseer cat {target}; srun cat {target}")
            == "slowfastslow"
        )
        (attach,) = agent.requests("attach")
        assert (attach["STEP_ID"], attach["BOOTSEER"]) == ("0", "1")


def test_shadow_without_the_environment(cluster: Any, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    script = f"cat {target}; srun /bin/cat {target}; srun --export=NONE /bin/cat {target}"
    with fake_agent(cluster, "--bind", f"{blob}={target}"):
        assert output(cluster, script, "--bootseer", "--export=NONE") == "fastfastfast"
        assert output(cluster, script, "--bootseer", "--export=PATH") == "fastfastfast"


def test_a_step_asks_for_more(cluster: Any, folder: Path) -> None:
    script = f"srun --bootseer-image={folder.name}/b.sqsh --bootseer-checkpoint=/c true\nsrun true\n"
    with fake_agent(cluster) as agent:
        output(cluster, script, f"--chdir={HOME}", "--bootseer-image=/a.sqsh", "--bootseer-env=/venv")
        asked = [
            [request.get(key) for key in ("IMAGE", "ENV", "CHECKPOINT")]
            for request in agent.requests("attach", 3)
        ]
    assert asked == [
        ["/a.sqsh", "/venv", None],
        [f"{HOME}/{folder.name}/b.sqsh", "/venv", "/c"],
        ["/a.sqsh", "/venv", None],
    ]


def test_a_job_from_inside_a_job_starts_afresh(cluster: Any, dumps: None) -> None:
    script = f"sbatch --parsable --nodelist={NODE} --wrap 'env | grep BOOTSEER; true'"
    inner_id = int(output(cluster, script, "--bootseer-image=/a.sqsh", node="n2"))
    (environment,) = environments(cluster, inner_id)
    assert bootseer_variables(environment) == {}
    assert cluster.wait(inner_id) == "COMPLETED"
    assert (cluster.shared / f"home/alice/slurm-{inner_id}.out").read_text() == ""


def test_srun_and_salloc_attach(cluster: Any, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    node = f"--nodelist={NODE}"
    with fake_agent(cluster, "--bind", f"{blob}={target}"):
        done = cluster.exec("login", "srun", node, "--bootseer", "cat", target, user="alice")
        assert done.stdout == "fast", done.stderr
        done = cluster.exec("login", "salloc", node, "--bootseer", "srun", "cat", target, user="alice")
        assert done.stdout == "fast", done.stderr


def test_failed_bind_leaves_the_original(cluster: Any, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    (folder / "link\n<0>forged").symlink_to("target")
    linked = shown(folder / "link\n<0>forged")
    with fake_agent(cluster, "--bind", f"{blob}={linked}", "--bind", f"{blob}={target}") as agent:
        assert output(cluster, f"cat {target}", "--bootseer") == "fast"
        stages = [stage for stage in agent.requests("stage", 2) if stage["NAME"] == "shadow_failed"]
    one_line = shown(folder / "link\\n<0>forged")
    assert [stage["DETAIL"] for stage in stages] == [f"{one_line}: a symbolic link is in the path"]


@pytest.fixture
def saver(cluster: Any) -> Iterator[None]:
    """A plugin that saves over a file after the step, as pyxis does: --save-over=FILE (tests/spank/saver.c)."""
    library = cluster.state_dir / "saver.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-o", library, SAVER], check=True)
    line = cluster.state_dir / "etc/slurm/plugstack.conf.d/saver.conf"
    line.write_text(f"required {library}\n")
    yield
    line.unlink()
    library.unlink()


def test_a_step_that_saves_over_what_it_started_from(cluster: Any, saver: None, folder: Path) -> None:
    """srun --container-image=F --container-save=F: the start is fast, and the work is not lost."""
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    step = f"srun --ntasks=2 --save-over={target} sh -c 'echo $STARTED_FROM $(cat {target})'"
    with fake_agent(cluster, "--bind", f"{blob}={target}"):
        # The batch step has the shadow too, until the file below it is another one.
        script = f"cat {target}; echo; {step}; cat {target}; echo; {step}"
        text = output(cluster, script, "--ntasks=2", "--bootseer")
        assert text == "fast\n" + "fast fast\n" * 2 + "saved\n" + "fast fast\n" * 2
    assert (folder / "target").read_text() == "saved"


def test_what_a_task_writes_is_refused_aloud(cluster: Any, folder: Path) -> None:
    """A shadow cannot be written to, replaced or removed; what fails says so, and the original is as it was."""
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    tries = [f"echo new > {target}", f"mv {shown(folder / 'other')} {target}", f"rm {target}"]
    make(folder / "other", "other")
    with fake_agent(cluster, "--bind", f"{blob}={target}"):
        text = output(
            cluster, "\n".join(f"{each} 2>&1 && echo done" for each in tries) + "\ntrue", "--bootseer"
        )
    lines = text.splitlines()
    assert "Read-only file system" in lines[0]
    assert ["busy" in line for line in lines[1:]] == [True, True]
    assert (folder / "target").read_text() == "slow"


def test_without_an_agent(cluster: Any) -> None:
    cluster.agent(NODE, "stop")
    try:
        assert output(cluster, "echo here; srun echo there", "--bootseer") == "here\nthere\n"
    finally:
        cluster.agent(NODE, "start")


def test_hung_agent_delays_each_step_once(cluster: Any) -> None:
    with fake_agent(cluster, "--hang"):
        start_s = time.monotonic()
        assert output(cluster, "echo here; srun --ntasks=4 --overcommit echo there", "--bootseer") == (
            "here\n" + "there\n" * 4
        )
        # Hook 0.1 s, twice; two steps of 2 s. The rest is Slurm's.
        assert time.monotonic() - start_s < 30


def test_plugstack_names_the_socket_and_the_time(cluster: Any, plugstack: Any, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    plugstack("socket=/run/elsewhere.sock", "timeout_ms=100")
    with fake_agent(cluster, "--bind", f"{blob}={target}"):
        assert output(cluster, f"cat {target}", "--bootseer") == "slow"
        cluster.exec(NODE, "ln", "-s", SOCKET, "/run/elsewhere.sock")
        assert output(cluster, f"cat {target}", "--bootseer") == "fast"
    cluster.exec(NODE, "rm", "-f", "/run/elsewhere.sock")
