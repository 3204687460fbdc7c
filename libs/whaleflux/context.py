"""Which fleet a client talks to: front door, certificates, inference URL. Written by `whaleflux up`, read by all clients."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from whaleflux.errors import FieldViolation, Invalid

VARIABLE = "WHALEFLUX_CONTEXT"
_USER_FILE = Path("~/.config/whaleflux/context.json")


@dataclass(frozen=True, slots=True)
class Context:
    """Where the front door is and who we are there. Paths are absolute; `server` is host:port."""

    server: str
    ca: str
    cert: str
    key: str
    inference_url: str = ""  # http://host:port/v1, for OpenAI clients
    api_key: str = ""
    server_name: str = "frontdoor.whaleflux"

    @classmethod
    def load(cls, path: Path) -> Context:
        """Reads one file; refuses a missing or malformed one, naming it."""
        try:
            content = json.loads(path.read_text())
            known = {field.name for field in fields(cls)}
            return cls(**{key: str(value) for key, value in content.items() if key in known})
        except OSError as error:
            raise Invalid(FieldViolation("context", f"cannot read {path}: {error.strerror}")) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise Invalid(FieldViolation("context", f"{path} is not a context file: {error}")) from None


def find(explicit: str = "", *, environ: Mapping[str, str] | None = None, start: Path | None = None) -> Path:
    """The context file to use: named, from WHALEFLUX_CONTEXT, the nearest .whaleflux upwards, or the user's own."""
    variables = os.environ if environ is None else environ
    named = explicit or variables.get(VARIABLE, "")
    if named:
        return Path(named)
    here = (start or Path.cwd()).resolve()
    candidates = [folder / ".whaleflux" / "context.json" for folder in (here, *here.parents)]
    for candidate in (*candidates, _USER_FILE.expanduser()):
        if candidate.exists():
            return candidate
    raise Invalid(
        FieldViolation(
            "context", f"no fleet is known here; start one with: whaleflux up, or name a context file in {VARIABLE}"
        )
    )
