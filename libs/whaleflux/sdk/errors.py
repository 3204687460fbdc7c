"""What a training loop can be told."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """Something about checkpoints that the program or its user has to know; every rank gets the same one."""


class SaveFailed(CheckpointError):
    """The state was not saved: the last committed checkpoint is still the one before. Training can go on."""


class RankSilent(SaveFailed):
    """A rank took no part in what all ranks do together, so nobody knows how it ended."""


class RestoreFailed(CheckpointError):
    """There are checkpoints, and none of them can be restored here. Nothing was started over."""


class WorldChanged(RestoreFailed):
    """The checkpoint was written by another number of ranks, and part of it belongs to single ranks."""
