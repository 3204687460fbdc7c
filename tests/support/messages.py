"""Random protobuf messages of any type, made from their descriptors: what a hostile or broken client may send."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.internal.encoder import _VarintBytes
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

NAMES = [
    "", "a", "x" * 300, "sites/a", "sites/a/nodes/n1", "sites/-/nodes/-", "queues/default", "queues/q",
    "queues/default/jobs/j", "queues/q/jobs/j/checkpoints/s000000000001-e1", "queues/-/jobs/-", "models/m", "datasets/d",
    "models/m/replicas/r", "incidents/i", "joinTokens/t", "apiKeys/k", "../../etc", "queues/default/jobs/", "QUEUES/Q", '"1"', '"999"',
    "h200", "H200", "NaN", "\x00", "é" * 64, "default", "/tmp/x", "s3://bucket/x",
]  # fmt: skip
TEXT = st.sampled_from(NAMES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
INT32 = st.sampled_from([0, 1, 2, 8, -1, 10**9, 2**31 - 1, -(2**31)])
INT64 = st.sampled_from([0, 1, 4096, -1, 10**9, 2**63 - 1, -(2**63)])
DOUBLE = st.sampled_from([0.0, 1.0, -1.0, 1e308, -0.0, float("nan"), float("inf"), float("-inf")])
_UNKNOWN_FIELD = _VarintBytes(60_000 << 3) + b"\x07"  # a number that no message of ours has

_SCALARS = {
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: DOUBLE,
    FieldDescriptor.TYPE_FLOAT: DOUBLE.map(lambda value: min(max(value, -3e38), 3e38)),
    FieldDescriptor.TYPE_INT32: INT32,
    FieldDescriptor.TYPE_ENUM: st.sampled_from([0, 1, 2, 3, 7, 99, -1]),
    FieldDescriptor.TYPE_INT64: INT64,
    FieldDescriptor.TYPE_UINT32: INT32.map(abs),
    FieldDescriptor.TYPE_UINT64: INT64.map(abs),
}


@st.composite
def messages(draw: Any, descriptor: Descriptor, depth: int = 0) -> Message:
    """A message of this type, some fields set, half of the outermost ones with a field that nobody knows."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.integers(0, 3)) > (0 if depth == 0 else 1):  # rarer with depth: most of a message is its top
            _set(draw, message, field, depth)
    if depth == 0 and draw(st.booleans()):
        message = type(message).FromString(message.SerializeToString() + _UNKNOWN_FIELD)
    return message


def _set(draw: Any, message: Message, field: FieldDescriptor, depth: int) -> None:
    if field.message_type is None:
        value = draw(st.lists(_SCALARS[field.type], max_size=3) if field.is_repeated else _SCALARS[field.type])
        getattr(message, field.name).extend(value) if field.is_repeated else setattr(message, field.name, value)
    elif depth >= 4:
        return
    elif field.message_type.GetOptions().map_entry:
        _set_map(draw, message, field, depth)
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(messages(field.message_type, depth + 1), max_size=2)))
    else:
        getattr(message, field.name).CopyFrom(draw(messages(field.message_type, depth + 1)))


def _set_map(draw: Any, message: Message, field: FieldDescriptor, depth: int) -> None:
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    target = getattr(message, field.name)
    for at in draw(st.lists(_SCALARS[key.type], max_size=2)):
        if value.message_type is None:
            target[at] = draw(_SCALARS[value.type])
        else:
            target[at].CopyFrom(draw(messages(value.message_type, depth + 1)))
