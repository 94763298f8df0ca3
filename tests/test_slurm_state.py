"""The states of Slurm jobs, on what a real cluster said of every fate (tests/slurm/record.sh)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from membench.sweep.slurm_state import (
    SACCT_FORMAT,
    SQUEUE_FORMAT,
    expand,
    judge,
    read_sacct,
    read_squeue,
)
from membench.sweep.tasks import EXIT, Cause, Report

HERE = Path(__file__).parent / "slurm"


def recorded(scene: str) -> tuple[dict[str, list[str]], str, str]:
    """Job ids by name, and what sacct and squeue said."""
    sacct = (HERE / "recorded" / f"{scene}.sacct").read_text(encoding="utf-8")
    squeue = (HERE / "recorded" / f"{scene}.squeue").read_text(encoding="utf-8")
    names: dict[str, list[str]] = {}
    for line in sacct.splitlines()[1:] + squeue.splitlines():
        job, name = line.split("|")[:2]
        if "." not in job and job not in names.setdefault(name, []):
            names[name].append(job)
    return names, sacct, squeue


def reports(scene: str, name: str) -> list[Report]:
    names, sacct, squeue = recorded(scene)
    runs, queue = read_sacct(sacct), read_squeue(squeue)
    return [judge(job, runs, queue) for job in names[name]]


def only(scene: str, name: str) -> Report:
    (report,) = reports(scene, name)
    return report


def test_recordings_ask_what_the_code_asks():
    text = (HERE / "formats.sh").read_text(encoding="utf-8")
    assert re.search(r"^SACCT_FORMAT=(.*)$", text, re.M)[1] == SACCT_FORMAT
    assert re.search(r"^SQUEUE_FORMAT='(.*)'$", text, re.M)[1] == SQUEUE_FORMAT


@pytest.mark.parametrize(
    ("scene", "name", "cause", "reason"),
    [
        ("alive", "error", Cause.CODE, "exit code 1 on n1"),
        ("alive", "cancelled", Cause.CANCELLED, "cancelled on n2"),
        ("alive", "cancelled_pending", Cause.CANCELLED, "cancelled"),
        ("alive", "killed", Cause.KILLED, "ended by SIGKILL on n2"),
        ("alive", "signalled", Cause.KILLED, "ended by SIGUSR2 on n2"),
        ("alive", "launch_failed", Cause.NODE, "could not be started on n2"),
        ("alive", "done", Cause.KILLED, "ended well on n2, but left no result"),
        ("requeued", "node_fail_lost", Cause.NODE, "NODE_FAIL on n3"),
        ("over", "time_limit", Cause.TIME, "TIMEOUT after "),
        ("oom", "out_of_memory", Cause.MEMORY, "out of memory on n1"),
    ],
)
def test_a_job_that_is_over_has_its_cause(scene, name, cause, reason):
    report = only(scene, name)
    assert (report.state, report.cause) == ("failed", cause)
    assert report.reason.startswith(reason)


@pytest.mark.parametrize(
    ("scene", "name", "reason"),
    [
        ("alive", "dependency", "Dependency"),
        ("alive", "resources", "Resources"),
        ("alive", "never_satisfied", "stuck: DependencyNeverSatisfied"),
        ("alive", "held", "stuck: JobHeldUser"),
        ("alive", "drained_node", "stuck: ReqNodeNotAvail, UnavailableNodes:n3"),
        ("alive", "partition_limit", "stuck: PartitionTimeLimit"),
        ("requeued", "preempted", "BeginTime; requeued once, last PREEMPTED on n2"),
    ],
)
def test_a_job_that_waits_says_why(scene, name, reason):
    report = only(scene, name)
    assert (report.state, report.cause) == ("queued", None)
    assert report.reason.startswith(reason)


def test_a_requeued_job_is_not_over():
    for name, before in (("node_fail", "NODE_FAIL on n3"), ("requeued", "REQUEUED on n1")):
        report = only("requeued", name)
        assert report.state == "running"
        assert report.reason.endswith(f"requeued once, last {before}")
        assert "ended well" in only("over", name).reason  # the run that counts is the last


def test_elements_of_an_array_are_told_apart():
    states = [report.state for report in reports("alive", "array_limit")]
    assert states == ["running", "queued", "queued", "queued"]
    assert reports("alive", "array_limit")[1].reason == "JobArrayTaskLimit"
    assert expand("7_[0-1,4%2]") == ["7_0", "7_1", "7_4"]
    assert expand("7_[3]") == ["7_3"]
    assert expand("7_12") == ["7_12"] and expand("7") == ["7"]


def test_without_the_controller_nothing_that_may_be_requeued_is_called_over():
    names, sacct, _ = recorded("requeued")
    runs = read_sacct(sacct)
    for name in ("preempted", "node_fail", "running"):
        assert judge(names[name][0], runs, None).state == "unknown"
    assert judge(names["error"][0], runs, None).cause == Cause.CODE


def test_without_accounting_the_controller_is_believed_but_not_about_the_cause_of_a_failure():
    names, _, squeue = recorded("requeued")
    queue = read_squeue(squeue)
    assert judge(names["node_fail_lost"][0], {}, queue).cause == Cause.NODE
    failed = judge(names["error"][0], {}, queue)
    assert failed.cause == Cause.KILLED and failed.reason.endswith("accounting does not say how")
    assert judge("99999", {}, queue).cause == Cause.KILLED


@pytest.mark.parametrize(
    ("cause", "code"), [(c, n) for c, n in EXIT.items() if c is not None], ids=lambda v: str(v)
)
def test_exit_codes_of_workers_are_their_causes_though_signals_have_the_same_numbers(cause, code):
    _, sacct, squeue = recorded("alive")
    # the recorded failure, with another exit code in all three lines
    text = sacct.replace("|FAILED|1:0|", f"|FAILED|{code}:0|")
    job = recorded("alive")[0]["error"][0]
    assert judge(job, read_sacct(text), read_squeue(squeue)).cause == cause


def test_a_killed_job_whose_step_accounting_has_lost_is_not_an_error_in_code():
    # seen where the controller was away when the step ended
    names, sacct, squeue = recorded("alive")
    job = names["killed"][0]
    lines = [x for x in sacct.splitlines() if not x.startswith(f"{job}.")]
    report = judge(job, read_sacct("\n".join(lines)), read_squeue(squeue))
    assert (report.cause, report.reason) == (Cause.KILLED, "ended by SIGKILL on n2")
