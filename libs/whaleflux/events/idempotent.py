"""What a consumer needs to bear repeats: the last revision it has seen of each key."""

from __future__ import annotations

from collections import OrderedDict

from whaleflux.errors import FieldViolation, Invalid


class LastSeen:
    """`if seen.is_news(key, revision): handle(event)`; then `seen.note(key, revision)` once it is handled.

    Bounded: beyond `capacity` keys the one not touched for longest is forgotten, and an old event of it would count
    as news again, which a consumer that compares with the store's state bears.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        if capacity < 1:
            raise Invalid(FieldViolation("capacity", f"{capacity}: use 1 or more keys"))
        self._capacity = capacity
        self._revisions: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._revisions)

    def is_news(self, key: str, revision: int) -> bool:
        """Whether nothing as new as this was noted for the key: repeats and late old ones are not news."""
        return key not in self._revisions or revision > self._revisions[key]

    def note(self, key: str, revision: int) -> bool:
        """Remembers; returns whether it was news."""
        news = self.is_news(key, revision)
        if news:
            self._revisions[key] = revision
        self._revisions.move_to_end(key)
        if len(self._revisions) > self._capacity:
            self._revisions.popitem(last=False)
        return news

    def forget(self, key: str) -> None:
        """Drops a key, for instance when its resource is gone for good."""
        self._revisions.pop(key, None)
