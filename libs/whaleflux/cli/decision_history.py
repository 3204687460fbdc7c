"""`whaleflux explain --history`: what was decided about a job, one line each, oldest first."""

from __future__ import annotations

import time
from typing import Any

from whaleflux.cli import output


def show(answer: Any) -> None:
    """An ExplainJobResponse with its history; of a job that waits, why it does so now."""
    from whaleflux.v1 import scheduler_pb2

    job, last_s = answer.job, answer.job.create_time.seconds
    rows = [[_at(last_s), "", "submitted", "", ""]]
    for one in answer.history:
        after_s, last_s = one.time.seconds - last_s, one.time.seconds
        rows.append([_at(last_s), _after(after_s), _what(one), _position(one), one.message])
    if job.state == scheduler_pb2.JOB_STATE_QUEUED and answer.decision.summary:
        after_s = int(time.time()) - last_s
        rows.append(["now", _after(after_s), "waits", _position(answer.decision), _bare(answer.decision.summary)])
    output.say(f"{job.name} is {output.job_state(job)}")
    output.table(["TIME", "AFTER", "WHAT", "POSITION", "WHY"], rows)


def _what(one: Any) -> str:
    """preempted, or placed (2) of its second attempt."""
    from whaleflux.v1 import scheduler_pb2

    word = output.enum_name(scheduler_pb2.DecisionKind, one.kind, "DECISION_KIND_").lower().replace("_", " ")
    return f"{word} ({one.attempt})" if one.attempt else word


def _position(one: Any) -> str:
    return str(one.position) if one.position else ""


def _bare(summary: str) -> str:
    return summary.removeprefix("waits: ")


def _at(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _after(seconds: int) -> str:
    from whaleflux.quantities import shown_duration

    return f"+{shown_duration(seconds)}" if seconds > 0 else ""
