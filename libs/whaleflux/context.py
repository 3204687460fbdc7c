"""Which fleet a client talks to: front door, certificates, inference URL. Written by `whaleflux up`, read by all clients."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from whaleflux.contexts import Contexts, config_folder
from whaleflux.errors import FieldViolation, InvalidArgument

VARIABLE = "WHALEFLUX_CONTEXT"


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
    renew_after: str = ""  # Unix seconds; of a login (`whaleflux login`), whose certificate is renewed from then on
    expires: str = ""  # Unix seconds; when that certificate ends

    @classmethod
    def load(cls, path: Path) -> Context:
        """Reads one file; refuses a missing or malformed one, naming it."""
        try:
            content = json.loads(path.read_text())
            known = {field.name for field in fields(cls)}
            made = cls(**{key: str(value) for key, value in content.items() if key in known})
            for seconds in (made.renew_after, made.expires):
                float(seconds or 0)  # whoever reads them later expects numbers
            return made
        except OSError as error:
            raise InvalidArgument(FieldViolation("context", f"cannot read {path}: {error.strerror}")) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidArgument(FieldViolation("context", f"{path} is not a context file: {error}")) from None


def find(explicit: str = "", *, environ: Mapping[str, str] | None = None, start: Path | None = None) -> Path:
    """The context file to use: named, from WHALEFLUX_CONTEXT, the nearest .whaleflux upwards, or the one in use.

    What is named is a path, or a name that `whaleflux config list` shows. Raises InvalidArgument when there is none.
    """
    variables = os.environ if environ is None else environ
    folder = config_folder(environ)
    contexts = Contexts(folder) if folder else None
    if named := explicit or variables.get(VARIABLE, ""):
        is_path = "/" in named or named.endswith(".json") or contexts is None or Path(named).exists()
        return Path(named) if is_path or contexts is None else contexts.known(named)
    here = (start or Path.cwd()).resolve()
    for candidate in (upwards / ".whaleflux" / "context.json" for upwards in (here, *here.parents)):
        if candidate.exists():
            return candidate
    if contexts and (found := _in_use(contexts)):
        return found
    raise InvalidArgument(
        FieldViolation(
            "context",
            "no fleet is known here; log in to one with: whaleflux login --server HOST:PORT, start one with: whaleflux up, "
            f"or name a context file in {VARIABLE}",
        )
    )


def _in_use(contexts: Contexts) -> Path | None:
    name = contexts.current()
    if not name:
        return contexts.own_file if contexts.own_file.exists() else None
    path = contexts.file(name)
    if path.exists():
        return path
    where = f" ({path.readlink()} is gone)" if path.is_symlink() else ""
    raise InvalidArgument(
        FieldViolation(
            "context",
            f"the fleet in use, {name!r}, is not running or was removed{where}; start it with: whaleflux up, "
            "or choose another with: whaleflux config use NAME",
        )
    )
