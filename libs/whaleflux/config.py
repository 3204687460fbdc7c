"""Settings of services: defaults, then a file, then WHALEFLUX_* variables, then flags; the later wins.

    class SchedulerSettings(ServiceSettings):
        plan_every_s: float = Field(0.5, description="Longest pause between two plans, seconds.")

    settings = load(SchedulerSettings, sys.argv[1:])

Each field is a flag (--plan-every-s 0.5), a variable (WHALEFLUX_PLAN_EVERY_S) and a key of the YAML or TOML file that
--config or WHALEFLUX_CONFIG names. Unknown flags and keys are refused with the nearest known name. For services only:
pydantic-settings takes a quarter of a second to import.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from whaleflux.errors import FieldViolation, Invalid

PREFIX = "WHALEFLUX_"
S = TypeVar("S", bound="ServiceSettings")
_URL_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]+(?=@)")


class ServiceSettings(BaseSettings):
    """What every service can be told. Paths are files; durations end in `_s` and are seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", env_ignore_empty=True)

    name: str = Field("1", description="This replica among those of its service; part of its identity in the store.")
    listen: str = Field("127.0.0.1:0", description="Where gRPC is served, host:port; port 0 picks a free one.")
    advertise: str = Field("", description="host:port under which others reach it; empty: the bound address.")
    metrics_listen: str = Field("127.0.0.1:0", description="Where /metrics, /healthz and /readyz are served over HTTP.")
    port_file: Path | None = Field(None, description="Written when serving: a JSON object of the bound ports.")

    store: str = Field("", description="etcd endpoints, comma separated (http://host:2379), or memory://.")
    nats: str = Field("", description="NATS servers, comma separated (nats://host:4222), or memory://.")
    nats_timeout_s: float = Field(30.0, gt=0, description="Seconds to wait for NATS when starting.")
    nats_location: str = Field("hub", description='"hub", or the site whose leaf server this is.')
    nats_user: str = Field("", description="User at NATS; empty for none.")
    nats_password: SecretStr = Field(SecretStr(""), description="Password at NATS.")

    tls_cert: Path = Field(Path("tls/service.crt"), description="Certificate chain of this service, PEM.")
    tls_key: Path = Field(Path("tls/service.key"), description="Its private key, PEM.")
    tls_ca: Path = Field(Path("tls/ca.crt"), description="The CA that everybody's certificate must come from, PEM.")
    trust_domain: str = Field("whaleflux", description="Trust domain of identities: spiffe://<trust domain>/...")

    inventory: str = Field("", description="Where the inventory service is, host:port.")
    scheduler: str = Field("", description="Where the scheduler is, host:port.")
    health_monitor: str = Field("", description="Where the health monitor is, host:port.")
    checkpoint: str = Field("", description="Where the checkpoint service is, host:port.")
    inference_router: str = Field("", description="Where the inference router is, host:port.")

    otlp_endpoint: str = Field("", description="OTLP/gRPC collector of traces (http://host:4317); empty: none.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line shown.")
    drain_grace_s: float = Field(10.0, ge=0, le=600, description="Seconds that stopping may take, all in all.")

    def model_post_init(self, _context: Any) -> None:
        """The standard variable of OpenTelemetry counts when ours is not set."""
        if not self.otlp_endpoint:
            self.otlp_endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic passes it by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come as arguments, the file's content as the class attribute that `load` sets on a subclass."""
        return init_settings, env_settings, _FileSource(settings_cls)


class _FileSource(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(getattr(self.settings_cls, "__file_content__", {}))


def load(kind: type[S], argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> S:
    """The effective settings. Raises Invalid naming each wrong flag, key or value, and what would be right.

    `--help` and `--print-config` print to stdout and raise SystemExit(0).
    """
    environment = os.environ if environ is None else environ
    if "--help" in argv or "-h" in argv:
        print(usage(kind))
        raise SystemExit(0)
    flags = _parse(kind, [arg for arg in argv if arg != "--print-config"])
    path = flags.pop("config", "") or environment.get(f"{PREFIX}CONFIG", "")
    content = _read(kind, Path(path)) if path else {}
    _warn_of_misspelt(kind, environment)
    with_file: type[S] = type(kind.__name__, (kind,), {"__file_content__": content, "__module__": kind.__module__})
    try:
        settings = with_file(**flags)
    except ValidationError as error:
        raise Invalid([_violation(kind, problem) for problem in error.errors()]) from None
    except SettingsError as error:  # a list or object in a variable that is not JSON
        raise Invalid(FieldViolation("environment", str(error))) from None
    if "--print-config" in argv:
        print(shown(settings), end="")
        raise SystemExit(0)
    return settings


def shown(settings: ServiceSettings) -> str:
    """The settings as YAML, without secrets, as a file that `--config` would take."""
    values = {key: _presentable(value) for key, value in settings.model_dump().items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def usage(kind: type[ServiceSettings]) -> str:
    """The flags with their meaning and default."""
    lines = [
        f"{kind.__doc__ or kind.__name__}".strip().splitlines()[0],
        "",
        "Flags (or variables, or keys of the file):",
    ]
    for name, field in kind.model_fields.items():
        default = _presentable(field.default)
        lines.append(f"  {_flag(name)}  ({PREFIX}{name.upper()})")
        lines.append(f"      {field.description or ''} [{'none' if default in (None, '') else default}]")
    lines += [
        "  --config FILE  (WHALEFLUX_CONFIG)",
        "      YAML or TOML with these keys.",
        "  --print-config",
        "      Print the result and exit.",
    ]
    return "\n".join(lines)


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
            found[name] = _from_text(kind, name, value if equals else rest.pop(0))
        else:
            wrong.append(FieldViolation(flag, "needs a value"))
    if wrong:
        raise Invalid(wrong)
    return found


def _from_text(kind: type[ServiceSettings], name: str, text: str) -> Any:
    """Lists and objects are given as JSON, as in variables; everything else is for pydantic to read."""
    if name == "config" or kind.model_fields[name].annotation is str or not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Invalid(FieldViolation(_flag(name), f"is not JSON: {error}")) from None


def _is_switch(kind: type[ServiceSettings], name: str) -> bool:
    return name in kind.model_fields and kind.model_fields[name].annotation is bool


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"is not a known {what}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help")


def _read(kind: type[ServiceSettings], path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise Invalid(FieldViolation("config", f"cannot read {path}: {error.strerror}")) from None
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid(FieldViolation("config", f"{path}: {error}")) from None
    if not isinstance(content, dict | None):
        raise Invalid(FieldViolation("config", f"{path} must hold keys and values, not a {type(content).__name__}"))
    keys = [str(key) for key in content or {}]
    if wrong := [
        FieldViolation(key, _unknown("key", key, kind.model_fields)) for key in keys if key not in kind.model_fields
    ]:
        raise Invalid(wrong)
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
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85) if name.startswith(PREFIX) else []
        if near and name not in known:
            print(f"ignored: {name} is not a known variable; did you mean {near[0]}?", file=sys.stderr)
