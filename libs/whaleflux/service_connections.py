"""From a service's settings to its store and its event bus."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from whaleflux import hostport
from whaleflux.clock import Clock
from whaleflux.code.api import CodeStore
from whaleflux.config import ServiceSettings
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.events.api import Bus
from whaleflux.rpc.tls_files import TlsFiles, client_context
from whaleflux.store.api import Store


def open_store(settings: ServiceSettings, clock: Clock) -> Store:
    """The store that the settings name; raises InvalidArgument for an address that is none."""
    if settings.store == "memory://":
        from whaleflux.store.memory import MemoryStore

        return MemoryStore(clock)
    from whaleflux.store.etcd import EtcdStore
    from whaleflux.store.timed import TimedStore

    endpoints, secure = _endpoints("store", settings, plain="http", encrypted="https")
    return TimedStore(EtcdStore(endpoints, tls=_tls_files(settings) if secure else None), clock.monotonic)


async def open_bus(settings: ServiceSettings, clock: Clock, role: str) -> Bus:
    """The event bus that the settings name, connected; raises Unavailable when it does not answer in time."""
    if settings.nats == "memory://":
        from whaleflux.events.memory import MemoryBus

        return MemoryBus(clock)
    from whaleflux.events.nats import NatsBus, NatsOptions
    from whaleflux.events.permissions import inbox

    endpoints, secure = _endpoints("nats", settings, plain="nats", encrypted="tls")
    options = NatsOptions(
        servers=tuple(f"{'tls' if secure else 'nats'}://{endpoint}" for endpoint in endpoints),
        location=settings.nats_location,
        user=settings.nats_user,
        password=settings.nats_password.get_secret_value(),
        tls=client_context(_tls_files(settings)) if secure else None,
        name=f"{role}/{settings.name}",
        inbox=inbox(role),
    )
    return await NatsBus.connect(options, timeout_s=settings.nats_timeout_s)


def open_code_store(bus: Bus, clock: Clock, max_bytes: int) -> CodeStore:
    """The store of code beside an event bus."""
    from whaleflux.events.memory import MemoryBus

    if isinstance(bus, MemoryBus):
        from whaleflux.code.memory import MemoryCode

        return MemoryCode(clock, max_bytes)
    from whaleflux.events.nats import NatsBus
    from whaleflux.events.nats_code import NatsCode

    assert isinstance(bus, NatsBus)  # there is no third
    return NatsCode(bus, clock, max_bytes)


def _endpoints(field_name: str, settings: ServiceSettings, *, plain: str, encrypted: str) -> tuple[list[str], bool]:
    """scheme://host:port,... as host:port list, and whether it is the encrypted scheme, which all must share."""
    urls = [urlsplit(part.strip()) for part in str(getattr(settings, field_name)).split(",")]
    schemes = {url.scheme for url in urls}
    if schemes not in ({plain}, {encrypted}) or not all(url.netloc and url.port for url in urls):
        raise InvalidArgument(FieldViolation(field_name, f"use {encrypted}://host:port, comma separated"))
    if any("@" in url.netloc for url in urls):
        raise InvalidArgument(
            FieldViolation(field_name, f"give user and password as {field_name}_user and {field_name}_password")
        )
    if schemes == {plain}:
        _check_plain(field_name, [url.hostname or "" for url in urls], settings.plain_loopback, plain, encrypted)
    return [url.netloc for url in urls], schemes == {encrypted}


def _check_plain(field_name: str, hosts: Sequence[str], allowed: bool, plain: str, encrypted: str) -> None:
    """Whoever reads a wire without certificates reads and writes all that is stored: never beyond this machine."""
    if elsewhere := [host for host in hosts if not hostport.is_loopback(host)]:
        why = f"{plain}:// has no certificates, and {elsewhere[0]} is another machine; use {encrypted}://"
        raise InvalidArgument(FieldViolation(field_name, why))
    if not allowed:
        why = f"{plain}:// has no certificates; use {encrypted}://, or for evaluation set plain_loopback"
        raise InvalidArgument(FieldViolation(field_name, why))


def _tls_files(settings: ServiceSettings) -> TlsFiles:
    """What is shown to etcd and NATS; InvalidArgument names the setting of a file that is not there."""
    files = TlsFiles(
        settings.store_key or settings.tls_key,
        settings.store_cert or settings.tls_cert,
        settings.store_ca or settings.tls_ca,
    )
    try:
        files.load()
    except InvalidArgument as wrong:
        own = {f"tls_{part}": f"store_{part}" for part in ("key", "cert", "ca") if getattr(settings, f"store_{part}")}
        said = [FieldViolation(own.get(one.field, one.field), one.description) for one in wrong.violations]
        raise InvalidArgument(said) from None
    return files
