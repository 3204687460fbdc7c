"""Looks for literals that are words of `whaleflux.reasons`."""

import ast
from pathlib import Path

from whaleflux import reasons
from whaleflux.reasons import LISTS

ROOT = Path(__file__).parents[2]
VALUES = {word.value for words in LISTS for word in words}


def python_files():
    """Every module of ours but the lists themselves and what is generated."""
    found = [file for folder in ("libs/whaleflux", "services") for file in (ROOT / folder).rglob("*.py")]
    return sorted(file for file in found if "/v1/" not in str(file) and file != Path(reasons.__file__))


def enum_bodies(tree):
    """States of resources have enums of their own, in which a word may be written again."""
    return [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and any("Enum" in ast.unparse(b) for b in n.bases)]


def strays(text):
    """Literals that are words of the lists, or that are given as a reason."""
    tree = ast.parse(text)
    inside = {id(n) for body in enum_bodies(tree) for n in ast.walk(body)}
    inside |= {
        id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "code"
    }  # of gRPC
    found = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.keyword)
            and node.arg == "reason"
            and isinstance(node.value, ast.Constant)
            and str(node.value.value).isupper()
        ):
            found.append(node.value.value)
        if (
            isinstance(node, ast.Constant)
            and node.value in VALUES
            and "_" in str(node.value)
            and id(node) not in inside
        ):
            found.append(node.value)
    return found
