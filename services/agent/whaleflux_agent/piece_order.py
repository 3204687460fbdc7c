"""Which chunks of a dataset a pull brings next, and from where. Pure: bitmaps are integers, bit i is the chunk of that index.

Nodes that pull one version at the same time share the work at its source: each chunk belongs to one of them, by rendezvous hashing (Thaler
and Ravishankar, 1998), who reads it there, and the others take it from whoever has it. A node that is heard no more has no share. What
nobody who is heard brings for `PATIENCE_S` everybody reads at the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from whaleflux.data.manifest import Chunk

PATIENCE_S = 10.0  # without a chunk more at any peer
REST_S = 10.0  # of a peer that failed
BUSY_S = 1.0  # of one that has enough to do: nobody goes to the source for that
MAX_FELLOWS = 64  # among whom chunks are shared out
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Take:
    """Chunks that follow one another in one file. `peer`: a node's name; "": from the source."""

    chunks: tuple[Chunk, ...]
    peer: str = ""


class PieceOrder:
    """What is missing, who has it, and whose business it is. For one thread at a time. `source`: whether that is asked at all."""

    def __init__(
        self,
        me: str,
        version: str,
        chunks: Sequence[Chunk],
        *,
        lanes: int,
        run_bytes: int,
        ranged: bool = True,
        source: bool = True,
    ) -> None:
        self._me, self._version, self._chunks = me, version, chunks
        self._lanes, self._run_bytes, self._ranged, self._source = lanes, run_bytes, ranged, source
        self._missing = (1 << len(chunks)) - 1
        self._pieces: dict[str, int] = {}
        self._fellows, self._own = frozenset[str](), self._missing
        self._begin = _number(f"{me} {version}") % max(1, len(chunks))  # so that not all ask for the same first
        self._resting: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._dropped = set[str]()
        self._asked: dict[str, int] = {}  # takes that run, by whom they are asked of
        self._grew_s = 0.0
        self._reading, self._theirs = 0, 0  # bitmaps: read at the source now, by this node and by those that are heard

    @property
    def coming(self) -> int:
        """A bitmap of what this node reads at the source now."""
        return self._reading

    @property
    def over(self) -> bool:
        """Whether nothing is missing and nothing on its way."""
        return not self._missing and not any(self._asked.values())

    def have(self, index: int) -> None:
        """A chunk is here."""
        self._missing &= ~(1 << index)

    def seen(self, pieces: Mapping[str, int], fellows: frozenset[str], now_s: float, coming: int = 0) -> None:
        """What peers say that they have and (`coming`) read at the source, and which nodes pull the same now (without this one)."""
        everything = (1 << len(self._chunks)) - 1
        self._theirs = coming & everything
        said = {node: bits & everything for node, bits in pieces.items()}
        if _union(said.values()) & ~_union(self._pieces.values()) & self._missing:
            self._grew_s = now_s
        self._pieces = said
        if fellows != self._fellows:
            self._fellows, self._grew_s = fellows, now_s
            self._own = self._shared_out()

    def _shared_out(self) -> int:
        """Chunks that this node reads at the source; of one that gives no ranges all of them are one node's."""
        nodes = sorted([self._me, *self._fellows], key=lambda node: _number(f"{self._version} {node}"))[:MAX_FELLOWS]
        seeds = {node: _number(f"{node} {self._version}") for node in nodes}
        mine, others = seeds.get(self._me), [seed for node, seed in seeds.items() if node != self._me]
        everything = (1 << len(self._chunks)) - 1
        if mine is None or not self._ranged:
            return everything if mine is not None and all(_mixed(mine, 0) > _mixed(s, 0) for s in others) else 0
        return _bits(i for i in range(len(self._chunks)) if all(_mixed(mine, i) > _mixed(s, i) for s in others))

    def next(self, now_s: float) -> Take | None:
        """What a lane is to bring, and until `done` or `failed` nobody else; None when there is nothing to do at this time."""
        if not self._missing:
            return None
        known = {node: bits for node, bits in self._pieces.items() if self._counts(node, now_s)}
        usable = {node: bits for node, bits in known.items() if self._busy.get(node, 0.0) <= now_s}
        alone = self._missing & ~_union(known.values()) & ~self._theirs
        theirs = self._fellows - self._dropped
        at_source = self._lanes // 2 if theirs or usable else self._lanes
        if self._asked.get("", 0) < at_source and (take := self._from_source(alone & self._own)):
            return take
        if take := self._from_peer(usable):
            return take
        patient = (theirs or known) and now_s - self._grew_s < PATIENCE_S
        return self._from_source(alone & self._own if patient else self._missing & ~_union(usable.values()))

    def _counts(self, node: str, now_s: float) -> bool:
        return node not in self._dropped and self._resting.get(node, 0.0) <= now_s

    def _from_source(self, wanted: int) -> Take | None:
        """The first of those, and what follows it in its file as far as one request goes; one at a time where it gives no ranges."""
        if not wanted or not self._source or (self._asked.get("", 0) and not self._ranged):
            return None
        run = [self._chunks[self._first(wanted) if self._ranged else _lowest(wanted)]]
        size = run[0].size_bytes
        for chunk in self._chunks[run[0].index + 1 :]:
            size += chunk.size_bytes
            if chunk.file != run[0].file or not wanted >> chunk.index & 1 or (self._ranged and size > self._run_bytes):
                break
            run.append(chunk)
        return self._taken(Take(tuple(run)))

    def _from_peer(self, usable: Mapping[str, int]) -> Take | None:
        """One chunk that some peer has, of the peer that this node asks least of: of its own share first, for which others wait."""
        there = _union(usable.values()) & self._missing
        if not there:
            return None
        index = self._first(there & self._own or there)
        holders = [node for node, bits in usable.items() if bits >> index & 1]
        peer = min(holders, key=lambda node: (self._asked.get(node, 0), _mixed(_number(node), self._begin + index)))
        return self._taken(Take((self._chunks[index],), peer))

    def _first(self, wanted: int) -> int:
        """The lowest index from this node's begin on, else from 0."""
        above = wanted >> self._begin
        return _lowest(above) + self._begin if above else _lowest(wanted)

    def _taken(self, take: Take) -> Take:
        taken = _bits(chunk.index for chunk in take.chunks)
        self._missing &= ~taken
        self._reading |= 0 if take.peer else taken
        self._asked[take.peer] = self._asked.get(take.peer, 0) + 1
        return take

    def ended(self, take: Take, left: Sequence[Chunk] = ()) -> None:
        """A take is over; `left`: what it did not bring."""
        self._asked[take.peer] -= 1
        self._reading &= ~_bits(chunk.index for chunk in take.chunks)
        self._missing |= _bits(chunk.index for chunk in left)

    def rest(self, peer: str, now_s: float) -> None:
        """It did not answer as it should: not asked for a while."""
        self._resting[peer] = now_s + REST_S

    def busy(self, peer: str, now_s: float) -> None:
        """It is as it should be, and has no time now."""
        self._busy[peer] = now_s + BUSY_S

    def drop(self, peer: str) -> None:
        """It gave what it should not: never asked again."""
        self._dropped.add(peer)


def _union(bitmaps: Iterable[int]) -> int:
    found = 0
    for bits in bitmaps:
        found |= bits
    return found


def _bits(indices: Iterable[int]) -> int:
    """The bitmap of these; bytes first, since an integer is copied with each bit."""
    made = bytearray()
    for index in indices:
        if (byte := index >> 3) >= len(made):
            made.extend(bytes(byte + 1 - len(made)))
        made[byte] |= 1 << (index & 7)
    return int.from_bytes(made, "little")


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(seed: int, index: int) -> int:
    """A hash of both (splitmix64, Steele et al., 2014)."""
    value = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
