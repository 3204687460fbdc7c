"""Which jobs name a job in their records: who is to make room for whom, who waits for whose end."""

from __future__ import annotations

from collections.abc import Iterable


class JobPointers:
    """An index from the named to those who name them, kept as records change."""

    def __init__(self) -> None:
        self._naming: dict[str, set[str]] = {}
        self._named_by: dict[str, tuple[str, ...]] = {}

    def set(self, name: str, named: Iterable[str]) -> None:
        """The jobs that the record of `name` names now."""
        for one in self._named_by.pop(name, ()):
            self._naming[one].discard(name)
            if not self._naming[one]:
                del self._naming[one]
        if kept := tuple(dict.fromkeys(named)):
            self._named_by[name] = kept
        for one in kept:
            self._naming.setdefault(one, set()).add(name)

    def to(self, named: str) -> frozenset[str]:
        """The jobs whose records name it."""
        return frozenset(self._naming.get(named, ()))
