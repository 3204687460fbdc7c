"""YAML that people write, as plain data with the line of each field.

Apart from `reader`, because services know fields and read no files: yaml is 1 MB of each process.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Fields, WrittenNumber, WrittenWhole

MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 20
# YAML 1.1 takes 010 for 8, 1:30 for 90 and 1_0 for 10, where people and YAML 1.2 mean something else: these stay text.
_PLAIN_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NOT_PLAIN = re.compile("[:_]")


class _Loader(yaml.SafeLoader):
    """Plain data only; no aliases (a few bytes of them can stand for gigabytes); lines kept; duplicate keys refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = True) -> Fields:
        content = Fields()
        content.lines, content.written = {}, {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            # `on:` is a boolean in YAML 1.1, and people mean the word.
            key = {True: "on", False: "off"}.get(key, key) if isinstance(key, bool) else str(key)
            if key in content:
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands here twice", problem_mark=key_node.start_mark)
            content[key] = self.construct_object(value_node, deep=True)
            content.lines[key] = key_node.start_mark.line + 1
            if isinstance(value_node, yaml.ScalarNode):
                content.written[key] = value_node.value
        return content

    def construct_whole(self, node: Any) -> WrittenWhole | str:
        if not _PLAIN_WHOLE.fullmatch(node.value):
            return str(node.value)
        return WrittenWhole.of(self.construct_yaml_int(node), node.value)

    def construct_number(self, node: Any) -> WrittenNumber | str:
        if _NOT_PLAIN.search(node.value):
            return str(node.value)
        return WrittenNumber.of(self.construct_yaml_float(node), node.value)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def written(text: str) -> str | None:
    """How the one plain value is written that `text` holds; None for lists, fields and nothing. For what `load` takes."""
    node = yaml.compose(text, Loader=_Loader)
    return node.value if isinstance(node, yaml.ScalarNode) else None


def load(text: str) -> object:
    """The content of a file. Raises InvalidArgument where it is no YAML, several documents, or more than `MAX_FILE_BYTES`."""
    documents = load_all(text)
    if len(documents) > 1:
        raise InvalidArgument(FieldViolation("file", f"has {len(documents)} documents; one is taken here"))
    return documents[0]


def load_all(text: str) -> list[object]:
    """The documents of a file, which `---` divides; empty ones are left out, and an empty file is one that is None.

    Raises InvalidArgument as `load` does.
    """
    if len(text) > MAX_FILE_BYTES:
        raise InvalidArgument(FieldViolation("file", f"is longer than {MAX_FILE_BYTES} characters"))
    try:
        found: list[object] = list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        said = " ".join(
            str(error).replace('in "<unicode string>", ', "at ").split()
        )  # PyYAML's name for what is no file
        raise InvalidArgument(FieldViolation("file", f"is not YAML: {said[:500]}")) from None
    except (ValueError, RecursionError, OverflowError) as error:  # odd dates and numbers
        raise InvalidArgument(FieldViolation("file", _odd(error))) from None
    return [one for one in found if one is not None] or [None]


def _odd(error: Exception) -> str:
    """What is wrong with a value that is YAML, and nothing that there can be."""
    if isinstance(error, RecursionError):
        return "is nested too deep"
    if "digits" in str(error):  # Python's own limit
        return "has a number of thousands of digits; write the number that is meant"
    return f"has a date or a number that there is not: {str(error)[:200]}"
