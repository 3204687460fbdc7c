"""Subjects of accounting, `wf.account.<queue>.<user>.<job>.<record>`: by these a server finds a queue's, a user's or a job's records.

Each subject keeps its newest record alone. So one that is told again replaces itself, and one that is corrected what it was before.
"""

from __future__ import annotations

import re

from whaleflux.events.subjects import ACCOUNT_ROOT, check, check_filters

_MOST = 63
_OTHERS = re.compile(r"[^a-z0-9]+")


def user_token(user: str) -> str:
    """role/name as a token; different names may give the same, so what is found is compared."""
    return _OTHERS.sub("-", user.lower()).strip("-")[:_MOST].strip("-") or "unknown"


def account_subject(queue: str, user: str, job: str, record: str) -> str:
    """The subject of one record; `record` tells it from all others of the job's name."""
    return check(f"{ACCOUNT_ROOT}.{queue}.{user_token(user)}.{job}.{record}")


def account_pattern(queue: str = "*", user: str = "", job: str = "*") -> str:
    """A filter for reading; what is not given matches anything. `user` in full, role/name."""
    return check_filters([f"{ACCOUNT_ROOT}.{queue}.{user_token(user) if user else '*'}.{job}.*"])[0]
