"""The site of the docs has the pages of docs/ alone: what they link to elsewhere in the repository is named there, not linked."""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"`[^`]+`")
_LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs calls this for each page before it is rendered."""
    depth = str(page.file.src_uri).count("/")
    return with_bars(named(markdown, depth))


def with_bars(markdown: str) -> str:
    """Within code in a table GitHub wants a backslash before a bar, and Python-Markdown would show it."""
    return "\n".join(
        _CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.split("\n")
    )


def named(markdown: str, depth: int) -> str:
    """Links that leave docs/ as words; `depth` is the number of folders between the page and docs/."""
    outside = "../" * (depth + 1)

    def replaced(link: re.Match[str]) -> str:
        words, target = link.groups()
        if not target.startswith(outside):
            return link.group(0)
        path = f"`{target.removeprefix(outside)}`"
        return path if words in {path, target.removeprefix(outside)} else f"{words} ({path})"

    return _LINK.sub(replaced, markdown)
