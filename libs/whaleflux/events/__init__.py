"""Events: the Bus protocol, its memory and NATS implementations, and the publisher that derives events from the store."""

from whaleflux.events.api import Ack, Bus, Delivery, Start, Subscription
from whaleflux.events.subjects import HUB, Subject, change_id, observation_id, pattern

__all__ = [
    "HUB",
    "Ack",
    "Bus",
    "Delivery",
    "Start",
    "Subject",
    "Subscription",
    "change_id",
    "observation_id",
    "pattern",
]
