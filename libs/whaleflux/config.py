"""Settings of services: defaults, then a file, then WHALEFLUX_* variables, then flags; the later wins.

    class SchedulerSettings(ServiceSettings):
        plan_every_s: float = Field(0.5, description="Longest pause between two plans, seconds.")

    settings = load(SchedulerSettings, sys.argv[1:])

Each field is a flag (--plan-every-s 0.5), a variable (WHALEFLUX_PLAN_EVERY_S) and a key of the YAML or TOML file that
--config or WHALEFLUX_CONFIG names; of an object given in several places, the keys are put together. Unknown flags and
keys are refused with the nearest known name. For services only: pydantic takes a tenth of a second and 8 MB to import
(pydantic-settings would take 4 MB more of each process, for the few lines that read variables).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.nearness import near

PREFIX = "WHALEFLUX_"
S = TypeVar("S", bound="ServiceSettings")
_URL_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]+(?=@)")


class ServiceSettings(BaseModel):
    """What every service can be told. Paths are files; durations end in `_s` and are seconds."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # what --help shows of it, title -> settings; none: all
    examples: ClassVar[tuple[str, ...]] = ()  # lines of --help before the flags

    name: str = Field("1", description="This replica among those of its service; part of its identity in the store.")
    listen: str = Field("127.0.0.1:0", description="Where gRPC is served, host:port; port 0 picks a free one.")
    advertise: str = Field("", description="host:port under which others reach it; empty: the bound address.")
    metrics_listen: str = Field("127.0.0.1:0", description="Where /metrics, /healthz and /readyz are served over HTTP.")
    port_file: Path | None = Field(None, description="Written when serving: a JSON object of the bound ports.")

    store: str = Field("", description="etcd endpoints, comma separated (https://host:2379), or memory://.")
    nats: str = Field("", description="NATS servers, comma separated (tls://host:4222), or memory://.")
    nats_timeout_s: float = Field(30.0, gt=0, description="Seconds to wait for NATS when starting.")
    nats_location: str = Field("hub", description='"hub", or the site whose leaf server this is.')
    nats_user: str = Field("", description="User at NATS; empty for none.")
    nats_password: SecretStr = Field(SecretStr(""), description="Password at NATS.")

    audit_dir: Path | None = Field(
        None,
        description="Folder of its own in which records of the audit trail wait for NATS, so that they survive the process; empty: memory.",
    )
    audit_spool_bytes: int = Field(64 << 20, ge=1 << 20, description="Most bytes of records that wait.")
    audit_required: bool = Field(
        False, description="Refuse changes while no more records can wait; else they are counted as lost."
    )

    tls_cert: Path = Field(Path("tls/service.crt"), description="Certificate chain of this service, PEM.")
    tls_key: Path = Field(Path("tls/service.key"), description="Its private key, PEM.")
    tls_ca: Path = Field(Path("tls/ca.crt"), description="The CA that everybody's certificate must come from, PEM.")
    store_cert: Path | None = Field(None, description="Certificate that etcd and NATS are shown, PEM; none: tls_cert.")
    store_key: Path | None = Field(None, description="Its private key, PEM; none: tls_key.")
    store_ca: Path | None = Field(None, description="The CA of etcd's and NATS' certificates, PEM; none: tls_ca.")
    plain_loopback: bool = Field(
        False, description="Take http:// and nats:// at loopback addresses: no certificates, for evaluation only."
    )
    trust_domain: str = Field("whaleflux", description="Trust domain of identities: spiffe://<trust domain>/...")

    # generated: addresses (libs/whaleflux/services.py, `make generate`)
    inventory: str = Field("", description="Where inventory is, host:port.")
    health_monitor: str = Field("", description="Where health_monitor is, host:port.")
    checkpoint: str = Field("", description="Where checkpoint is, host:port.")
    scheduler: str = Field("", description="Where scheduler is, host:port.")
    console: str = Field("", description="Where console is, host:port.")
    inference_router: str = Field("", description="Where inference_router is, host:port.")
    # end of addresses

    otlp_endpoint: str = Field("", description="OTLP/gRPC collector of traces (http://host:4317); empty: none.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line shown.")
    drain_grace_s: float = Field(10.0, ge=0, le=600, description="Seconds that stopping may take, all in all.")

    def model_post_init(self, _context: Any) -> None:
        """The standard variable of OpenTelemetry counts when ours is not set."""
        if not self.otlp_endpoint:
            self.otlp_endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


def load(kind: type[S], argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> S:
    """The effective settings. Raises InvalidArgument naming each wrong flag, key or value, and what would be right.

    `--help` and `--print-config` print to stdout and raise SystemExit(0).
    """
    environment = os.environ if environ is None else environ
    if {"--help", "-h", "--help-all"} & set(argv):
        print(usage(kind, everything="--help-all" in argv))
        raise SystemExit(0)
    flags = _parse(kind, [arg for arg in argv if arg != "--print-config"])
    path = flags.pop("config", "") or environment.get(f"{PREFIX}CONFIG", "")
    content = _read(kind, Path(path)) if path else {}
    _warn_of_misspelt(kind, environment)
    try:
        settings = kind(**_merged(content, _from_environment(kind, environment), flags))
    except ValidationError as error:
        raise InvalidArgument([_violation(kind, problem) for problem in error.errors()]) from None
    if "--print-config" in argv:
        print(shown(settings), end="")
        raise SystemExit(0)
    return settings


def shown(settings: ServiceSettings) -> str:
    """The settings as YAML, without secrets, as a file that `--config` would take."""
    import yaml  # 1 MB that a service does not need which is told all by variables

    values = {key: _presentable(value) for key, value in settings.model_dump().items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def usage(kind: type[ServiceSettings], *, everything: bool = False) -> str:
    """The flags with their meaning and default: in the groups of the kind where it has some, else all of them."""
    lines: list[str | None] = [f"{kind.__doc__ or kind.__name__}".strip().splitlines()[0], "", *kind.examples]
    groups = {"Flags (or variables, or keys of the file)": tuple(kind.model_fields)}
    if kind.groups and not everything:
        grouped = {name for names in kind.groups.values() for name in names}
        rest = tuple(name for name in kind.model_fields if name not in {*grouped, *ServiceSettings.model_fields})
        groups = {**kind.groups, **({"Other": rest} if rest else {})}
    for title, names in groups.items():
        lines += ["" if lines[-1] else None, f"{title}:"]
        for name in names:
            lines += _flag_lines(name, kind.model_fields[name])
    lines += ["  --config FILE  (WHALEFLUX_CONFIG)", "      YAML or TOML with these keys."]
    lines += ["  --print-config", "      Print the result and exit."]
    if kind.groups and not everything:
        lines += ["  --help-all", "      The settings that every service has, too."]
    return "\n".join(line for line in lines if line is not None)


def _flag_lines(name: str, field: FieldInfo) -> list[str]:
    default = _presentable(field.default)
    shown = "none" if default in (None, "") else default
    return [f"  {_flag(name)}  ({PREFIX}{name.upper()})", f"      {field.description or ''} [{shown}]"]


def table(kind: type[ServiceSettings], leave_out: Iterable[str] = ()) -> str:
    """The settings as a table of Markdown, without those of the names given."""
    lines = ["| setting | default | limits | |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        if name not in set(leave_out):
            default = _presentable(field.default)
            shown = (
                ""
                if default in (None, "", {})
                else f"`{str(default).lower() if isinstance(default, bool) else default}`"
            )
            lines.append(f"| `{name}` | {shown} | {_limits(field)} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def _limits(field: FieldInfo) -> str:
    """Of a number: "0 to 600", "above 0"."""
    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    found = [text.format(getattr(m, key)) for m in field.metadata for key, text in words.items() if hasattr(m, key)]
    return " ".join(found)


def _presentable(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return "***" if value.get_secret_value() else ""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return _URL_PASSWORD.sub(r"\1:***", value)
    if isinstance(value, Mapping):
        return {str(key): _presentable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_presentable(item) for item in value]
    return value


def _parse(kind: type[ServiceSettings], argv: Sequence[str]) -> dict[str, Any]:
    """--flag value, --flag=value, --switch and --no-switch; every mistake at once."""
    found: dict[str, Any] = {}
    wrong: list[FieldViolation] = []
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        negated = name.removeprefix("no_")
        if flag.startswith("--") and not equals and _is_switch(kind, name):
            found[name] = True
        elif flag.startswith("--no-") and not equals and _is_switch(kind, negated):
            found[negated] = False
        elif not flag.startswith("--") or (name != "config" and name not in kind.model_fields):
            wrong.append(FieldViolation(flag, _unknown("flag", flag, [*map(_flag, kind.model_fields), "--config"])))
            if flag.startswith("--") and not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # its value, which is not a second mistake
        elif equals or rest:
            found[name] = _from_text(kind, name, flag, value if equals else rest.pop(0))
        else:
            wrong.append(FieldViolation(flag, "needs a value"))
    if wrong:
        raise InvalidArgument(wrong)
    return found


def _from_environment(kind: type[ServiceSettings], environment: Mapping[str, str]) -> dict[str, Any]:
    """What variables say; an empty one says nothing."""
    variables = {name: PREFIX + name.upper() for name in kind.model_fields}
    return {
        name: _from_text(kind, name, variable, text)
        for name, variable in variables.items()
        if (text := environment.get(variable, ""))
    }


def _merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """The later wins; of objects, key by key."""
    found: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            earlier = found.get(name)
            found[name] = {**earlier, **value} if isinstance(earlier, dict) and isinstance(value, dict) else value
    return found


def _from_text(kind: type[ServiceSettings], name: str, source: str, text: str) -> Any:
    """Lists and objects are given as JSON; everything else is for pydantic to read. `source` is the flag or variable."""
    if name == "config" or not _takes_json(kind.model_fields[name].annotation) or not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(FieldViolation(source, f"is not JSON: {error}")) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError where a key is there twice: of two budgets by one name none is silently forgotten."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:80]!r} is there twice; say it once")
    return found


def _takes_json(annotation: Any) -> bool:
    """Whether it is a list or an object. A password that begins with a bracket is neither."""
    return get_origin(annotation) in (dict, list, tuple) or any(map(_takes_json, get_args(annotation)))


def _is_switch(kind: type[ServiceSettings], name: str) -> bool:
    return name in kind.model_fields and kind.model_fields[name].annotation is bool


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    meant = near(name, known, 3)
    return f"is not a known {what}" + (f"; did you mean {' or '.join(meant)}?" if meant else "; see --help")


def _read(kind: type[ServiceSettings], path: Path) -> dict[str, Any]:
    import yaml  # see `shown`

    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise InvalidArgument(FieldViolation("config", f"cannot read {path}: {error.strerror}")) from None
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgument(FieldViolation("config", f"{path}: {error}")) from None
    if not isinstance(content, dict | None):
        raise InvalidArgument(
            FieldViolation("config", f"{path} must hold keys and values, not a {type(content).__name__}")
        )
    keys = [str(key) for key in content or {}]
    if wrong := [
        FieldViolation(key, _unknown("key", key, kind.model_fields)) for key in keys if key not in kind.model_fields
    ]:
        raise InvalidArgument(wrong)
    return dict(content or {})


def _violation(kind: type[ServiceSettings], problem: Any) -> FieldViolation:
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        return FieldViolation(where, _unknown("key", where, kind.model_fields))
    return FieldViolation(where, f"{problem['msg']} (see --help for its meaning)")


def _warn_of_misspelt(kind: type[ServiceSettings], environment: Mapping[str, str]) -> None:
    """Only warns: other programs of the suite have variables of their own under the same prefix."""
    known = [PREFIX + name.upper() for name in kind.model_fields]
    for name in environment:
        meant = near(name, known) if name.startswith(PREFIX) else []
        if meant and name not in known:
            print(f"ignored: {name} is not a known variable; did you mean {meant[0]}?", file=sys.stderr)
