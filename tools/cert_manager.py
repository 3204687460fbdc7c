"""Certificates for cert-manager (https://cert-manager.io), from the tables that services check them against.

One Certificate per process and authority. Its Secret is named as `whaleflux.bootstrap secrets` names it, and mounted under the same file
names: the rest of the deployment does not know which of the two issued it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from whaleflux.rpc import roles
from whaleflux.rpc.auth import DEFAULT_TRUST_DOMAIN, Identity
from whaleflux.rpc.pki import CA_LIFETIME, RENEW_BELOW, STORE_TRUST_DOMAIN, Purpose, server_name
from whaleflux.rpc.store_authority import NATS_LIFETIME
from whaleflux.services import SERVICES

NAMESPACE = "whaleflux"
FLEET, STORE = "whaleflux-fleet", "whaleflux-store"  # issuers, and with -ca their Secrets
DOMAINS = {FLEET: DEFAULT_TRUST_DOMAIN, STORE: STORE_TRUST_DOMAIN}
LIFE = timedelta(days=7)
_USAGES = {
    Purpose.BOTH: ("server auth", "client auth"),
    Purpose.SERVER: ("server auth",),
    Purpose.CLIENT: ("client auth",),
}


@dataclass(frozen=True, slots=True)
class Certified:
    """Whom a certificate is for; `hosts` are names by which it is dialled, beside the one made of its role."""

    name: str  # of the Certificate and its Secret
    issuer: str
    role: str
    hosts: tuple[str, ...] = ()
    purpose: Purpose = Purpose.BOTH
    life: timedelta = LIFE

    @property
    def identity(self) -> Identity:
        return Identity(self.role, "1", DOMAINS[self.issuer])


def everybody() -> Iterator[Certified]:
    """All parts of the control plane. People and agents are not among them: their keys have no business in the cluster."""
    for service in SERVICES:
        yield Certified(f"whaleflux-{service.host}", FLEET, service.role)
        yield Certified(f"whaleflux-{service.host}-store", STORE, service.role, purpose=Purpose.CLIENT)
    yield Certified("whaleflux-frontdoor", FLEET, roles.FRONTDOOR, names_of("frontdoor"))
    yield Certified("whaleflux-scraper", FLEET, roles.SCRAPER)
    yield Certified("whaleflux-etcd", STORE, roles.ETCD, (*names_of("etcd"), *members(3)))
    yield Certified("whaleflux-nats", STORE, roles.NATS, names_of("nats"), Purpose.SERVER, NATS_LIFETIME)


def names_of(service: str) -> tuple[str, ...]:
    """Under which a Service of Kubernetes is dialled."""
    return (service, f"{service}.{NAMESPACE}", f"{service}.{NAMESPACE}.svc", f"{service}.{NAMESPACE}.svc.cluster.local")


def members(count: int) -> tuple[str, ...]:
    """Names of etcd's members. They look one another's up, so that none may be a pattern."""
    return tuple(name for i in range(count) for name in names_of(f"etcd-{i}.etcd-members")[:3:2])


def certificates() -> str:
    """Certificates of everybody, as YAML."""
    return "".join(f"---\n{_certificate(one)}" for one in everybody())


def _certificate(one: Certified) -> str:
    own = server_name(one.role, "1", DOMAINS[one.issuer])
    dns = "".join(f"    - {name}\n" for name in dict.fromkeys([own, *one.hosts]))
    return f"""\
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {{name: {one.name}, namespace: {NAMESPACE}}}
spec:
  secretName: {one.name}
  issuerRef: {{group: cert-manager.io, kind: Issuer, name: {one.issuer}}}
  duration: {_hours(one.life)}
  renewBefore: {_hours(one.life * RENEW_BELOW)}
  privateKey: {{algorithm: ECDSA, size: 256, encoding: PKCS8, rotationPolicy: Always}}
  usages: [{", ".join(("digital signature", *_USAGES[one.purpose]))}]
  uris: ["{one.identity.uri}"]
  dnsNames:
{dns}"""


def issuers() -> str:
    """The two authorities, each with a root of its own, as YAML."""
    return _ROOTS + "".join(_authority(issuer, domain) for issuer, domain in DOMAINS.items())


def _authority(issuer: str, domain: str) -> str:
    return f"""\
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {{name: {issuer}-ca, namespace: {NAMESPACE}}}
spec:
  secretName: {issuer}-ca
  issuerRef: {{group: cert-manager.io, kind: Issuer, name: whaleflux-roots}}
  isCA: true
  commonName: {domain} root
  duration: {_hours(CA_LIFETIME)}
  privateKey: {{algorithm: ECDSA, size: 256, encoding: PKCS8, rotationPolicy: Never}}
  usages: [cert sign, crl sign]
  uris: ["spiffe://{domain}"]
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {{name: {issuer}, namespace: {NAMESPACE}}}
spec:
  ca: {{secretName: {issuer}-ca}}
"""


def _hours(life: timedelta) -> str:
    return f"{life // timedelta(hours=1)}h"


_ROOTS = f"""\
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {{name: whaleflux-roots, namespace: {NAMESPACE}}}
spec:
  selfSigned: {{}}
"""


def identities() -> str:
    """Patches that give each process the files that it reads, of the Secrets that cert-manager writes, as YAML."""
    made = [
        _patch("Deployment", s.host, _volume("identity", _fleet(s.host), _store(f"whaleflux-{s.host}-store")))
        for s in SERVICES
    ]
    etcd = _volume("identity", _source("whaleflux-etcd", _OWN))
    nats = _volume("identity", _source("whaleflux-nats", _OWN), _source(f"{FLEET}-ca", {"tls.crt": "fleet-ca.crt"}))
    front = _volume("identity", _fleet("frontdoor")) + _volume("public", _fleet("frontdoor"))
    made += [
        _patch("StatefulSet", "etcd", etcd),
        _patch("StatefulSet", "nats", nats),
        _patch("Deployment", "frontdoor", front),
    ]
    return "".join(made)


_OWN = {"tls.crt": "service.crt", "tls.key": "service.key", "ca.crt": "ca.crt"}


def _fleet(host: str) -> str:
    return _source(f"whaleflux-{host}", _OWN)


def _store(secret: str) -> str:
    return _source(secret, {"tls.crt": "store.crt", "tls.key": "store.key", "ca.crt": "store-ca.crt"})


def _source(secret: str, files: dict[str, str]) -> str:
    items = ", ".join(f"{{key: {key}, path: {path}}}" for key, path in files.items())
    return f"              - secret: {{name: {secret}, items: [{items}]}}\n"


def _volume(name: str, *sources: str) -> str:
    return f"""\
        - name: {name}
          secret: null
          projected:
            defaultMode: 0440
            sources:
{"".join(sources)}"""


def _patch(kind: str, name: str, volumes: str) -> str:
    return f"""\
---
apiVersion: apps/v1
kind: {kind}
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  template:
    spec:
      volumes:
{volumes}"""
