"""The table of a job's artifacts: each once, within its bounds; and the states of an artifact, in races too."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.artifacts import table
from bootseer_slurm.artifacts.artifact import Artifact, State
from bootseer_slurm.artifacts.table import Artifacts, Quota, image_name, remembered
from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import InputError
from bootseer_slurm.shares import NodeShares, Share

IMAGE, MODEL = ArtifactRef("image", "/a.sqsh"), ArtifactRef("checkpoint", "/model")


def asked(ref: ArtifactRef, *, by_job: bool = True, **about: Any) -> Artifact:
    return Artifact(ref, by_job=by_job, **about)


def shares(digests: int = 10**9) -> NodeShares:
    return NodeShares(
        Share("memory for digests", digests), Share("memory for plans", 1000), Share("descriptors", 1000)
    )


def test_each_thing_is_in_it_once() -> None:
    artifacts = Artifacts(shares(), 7)
    first, is_new = artifacts.request(asked(MODEL, by_job=False, owner=7))
    assert is_new and first.is_learned and artifacts.has_new((MODEL,)), "learned is not asked for"
    again, is_new = artifacts.request(asked(MODEL, role="model"))
    assert again is first and not is_new
    assert first.by_job and first.role == "model" and not artifacts.has_new((MODEL,))
    assert artifacts.all() == [first] and artifacts.find(IMAGE) is None


def test_what_is_too_much_is_refused_and_holds_nobody_up(mocker: MockerFixture) -> None:
    mocker.patch.object(table, "_LOOK_UPS", 2)
    artifacts = Artifacts(shares(), 7)
    for number in range(2):
        artifacts.request(asked(ArtifactRef("image", f"/{number}")))
    late, is_new = artifacts.request(asked(IMAGE))
    assert not is_new and late.looked_up.is_set() and late.begun.is_set()
    assert not artifacts.can_come(late) and not artifacts.has_new((IMAGE,))
    assert len(artifacts.all()) == 2


def test_the_quota_counts_what_artifacts_cost(mocker: MockerFixture) -> None:
    mocker.patch.object(table, "_LOOK_UPS", 1)
    mocker.patch.object(table, "_DIGESTS_LIMIT_BYTES", 100)
    quota = Quota(shares(), 7)
    quota.count_look_up(IMAGE)
    assert not quota.has_look_ups
    with pytest.raises(InputError, match=r"image /a\.sqsh: this job asked for too much"):
        quota.count_look_up(IMAGE)
    quota.allow_digests(100)
    with pytest.raises(InputError, match="too many blocks"):
        quota.allow_digests(1)


def test_all_jobs_of_a_user_together_take_his_share_until_they_end() -> None:
    """Each job is within its own bound; a hundred of them were not."""
    node = shares(digests=100)
    first, second, other = Artifacts(node, 7), Artifacts(node, 7), Artifacts(node, 8)
    first.quota.allow_digests(40)
    with pytest.raises(InputError, match="user 7's share of this node's memory for digests is used up"):
        second.quota.allow_digests(20)
    other.quota.allow_digests(50)
    second.quota.allow_digests(10)
    for allow, share in (
        (second.quota.allow_plan, "plans"),
        (lambda _: second.quota.count_look_up(MODEL), "descriptors"),
    ):
        with pytest.raises(InputError, match=share):
            for _ in range(64):
                allow(501)
            other.quota._shares.artifacts.take(7, 500 - 63)
    first.close()
    first.close()
    second.quota.allow_digests(40)
    with pytest.raises(InputError, match="the job is over"):
        first.quota.allow_digests(1)


def test_only_what_was_learned_is_dropped(mocker: MockerFixture) -> None:
    artifacts, resolved = Artifacts(shares(), 7), mocker.Mock(layers=["layer"])
    learned, _ = artifacts.request(asked(IMAGE, by_job=False))
    own, _ = artifacts.request(asked(MODEL))
    of_own, _ = artifacts.request(asked(ArtifactRef("checkpoint", "/model/a"), by_job=False, folder=own))
    learned.become_ready(resolved)
    assert artifacts.drop(lambda ref: True) == ["layer"]
    assert (learned.dropped, own.dropped, of_own.dropped) == (True, False, False)
    assert artifacts.drop(lambda ref: True) == [], "once"
    assert remembered(artifacts) == [Remembered("checkpoint", "/model", None)]
    assert image_name(artifacts) == "/a.sqsh"


def test_what_is_resolved_when_the_job_has_ended_is_closed(mocker: MockerFixture) -> None:
    artifacts, resolved, late = Artifacts(shares(), 7), mocker.Mock(), mocker.Mock()
    artifact, _ = artifacts.request(asked(MODEL))
    assert artifacts.add_resolved(artifact, resolved)
    artifacts.refuse_more()
    assert not artifacts.add_resolved(artifact, late)
    late.close.assert_called_once()
    resolved.close.assert_not_called()  # the report still asks it
    artifacts.close()
    resolved.close.assert_called_once()
    assert artifact.state is State.CLOSED and artifacts.layers() == []


def test_one_that_cannot_be_closed_holds_up_no_other(mocker: MockerFixture) -> None:
    artifacts, bad, good = Artifacts(shares(), 7), mocker.Mock(), mocker.Mock()
    bad.close.side_effect = OSError("busy")
    artifact, _ = artifacts.request(asked(MODEL))
    for each in (bad, good):
        artifacts.add_resolved(artifact, each)
    artifacts.close()
    good.close.assert_called_once()


def test_waiting_ends_when_all_are_looked_up_or_the_time_is_over(mocker: MockerFixture) -> None:
    artifacts = Artifacts(shares(), 7)
    artifact, _ = artifacts.request(asked(MODEL))
    begin_s = time.monotonic()
    artifacts.wait_looked_up(begin_s + 0.1)
    assert 0.1 <= time.monotonic() - begin_s < 5
    threading.Timer(0.05, lambda: artifact.become_ready(mocker.Mock())).start()
    artifacts.wait_looked_up(time.monotonic() + 10)
    assert artifact.looked_up.is_set() and time.monotonic() - begin_s < 5


def test_the_states_of_an_artifact(mocker: MockerFixture) -> None:
    artifact, resolved = asked(IMAGE), mocker.Mock()
    assert artifact.state is State.REQUESTED
    artifact.begin_resolving()
    artifact.fail("not in the store")
    artifact.finish()
    assert artifact.state is State.FAILED and artifact.reason == "not in the store"
    artifact.begin_resolving()  # an importer has made it
    artifact.become_ready(resolved)
    assert artifact.state is State.READY and artifact.resolved is resolved
    artifact.begin_resolving()
    artifact.fail("the store does not answer")
    assert artifact.state is State.READY and artifact.resolved is resolved, "what is in use stays in use"


def test_what_was_learned_and_is_another_users_now_is_not_used() -> None:
    folder = asked(MODEL, by_job=False, owner=7)
    file = asked(ArtifactRef("checkpoint", "/model/a"), by_job=False, folder=folder)
    file.set_owner(7)
    with pytest.raises(InputError, match="belongs to user 8, at the last start it was user 7's"):
        file.set_owner(8)
    own = asked(MODEL, owner=7)
    own.set_owner(8)
    assert own.owner == 8, "the job named it"
