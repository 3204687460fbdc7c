"""What the files of deploy/ say of each service, from the one table of services."""

from __future__ import annotations

from whaleflux.ports import PORTS, Party, of
from whaleflux.rpc.pki import server_name
from whaleflux.services import FRONTDOOR_HTTP_PORT, GRPC_PORT, METRICS_PORT, POLICY_HOST, SERVICES, Service

_AUTHORITY = {
    "ca_cert": "/authority/ca.crt",
    "ca_key": "/authority/ca.key",
    "secrets_key_file": "/authority/secrets.keys",
}
_LEDGER = (
    "/var/lib/whaleflux/ledger"  # in the service's state: a volume of its own in Kubernetes, where state is the Pod's
)


def _own_settings(service: Service, host: str = "0.0.0.0") -> dict[str, str]:
    """What a deployment tells this service alone; `host` is what it binds what the front door alone dials to."""
    listens = {setting: f"{host}:{port}" for setting, port in service.http.items()}
    kept = (_AUTHORITY if service.signs else {}) | ({"ledger_folder": _LEDGER} if service.keeps_ledger else {})
    return {_variable(name): value for name, value in (kept | listens).items()}


def _variable(setting: str) -> str:
    return f"WHALEFLUX_{setting.upper()}"


def _memory(mib: int, gib: str, mebi: str) -> str:
    return f"{mib // 1024}{gib}" if mib % 1024 == 0 else f"{mib}{mebi}"


def addresses(indent: str) -> str:
    """Settings that name each service's address."""
    return "".join(f"{indent}{_variable(s.role)}: {s.host}:{GRPC_PORT}\n" for s in SERVICES)


def compose_identities() -> str:
    return "".join(f"    - id-{s.host}:/bootstrap/{s.role}\n" for s in SERVICES)


def compose_volumes() -> str:
    return "".join(f"  id-{s.host}:\n  state-{s.host}:\n" for s in SERVICES)


def compose_services() -> str:
    return "\n".join(_compose_service(service) for service in SERVICES)


def _compose_service(s: Service) -> str:
    networks = ["control", "store", "bus", *(["fleet"] if s.reaches_nodes else [])]
    listed = f"[{', '.join(networks)}]{' # it dials nodes' if s.reaches_nodes else ''}"
    if s.http:  # bound to the network of its own, where the front door alone is beside it
        listed = "{" + ", ".join([*(f"{n}: " for n in networks), f"policy: {{aliases: [{POLICY_HOST}]}}"]) + "}"
    volumes = [
        f"id-{s.host}:/identity:ro",
        f"state-{s.host}:/var/lib/whaleflux",
        *(["authority:/authority:ro"] if s.signs else []),
    ]
    settings = {_variable("advertise"): f"{s.host}:{GRPC_PORT}"} | _own_settings(s, POLICY_HOST)
    if s.signs:
        settings[_variable("leaf_sites")] = "site-a"
    lines = [
        f"  {s.host}: # {s.about[0].lower()}{s.about[1:].rstrip('.')}",
        "    <<: *service",
        f"    image: whaleflux/{s.host}:${{WHALEFLUX_VERSION}}",
        f"    build: {{context: ../.., dockerfile: deploy/docker/Dockerfile, args: {{ROLE: {s.role}}}}}",
        f"    networks: {listed}",
        "    environment:",
        "      <<: *settings",
        *(f"      {name}: {value}" for name, value in settings.items()),
        "    volumes: [" + ", ".join(f'"{volume}"' for volume in volumes) + "]",
        f"    mem_limit: {_memory(s.memory_mib, 'g', 'm')}",
    ]
    return "\n".join(lines) + "\n"


def compose_etcd3() -> str:
    return "".join(f"  {s.host}: {{environment: *settings}}\n" for s in SERVICES)


def docker_folders() -> str:
    """Folders that volumes take their owner from, in a line of a shell command."""
    parts = [
        "authority",
        "store-authority",
        "admin",
        "frontdoor",
        *(s.role for s in SERVICES),
        "etcd",
        "nats",
        "site-site-a",
        "scraper",
        "backup",
        "tokens",
    ]
    return f"RUN for part in {' '.join(parts)}; do \\\n"


def prometheus_targets() -> str:
    """A job for each, since a job expects one name in the certificate that it is shown."""
    services = [(s.role, f"{s.host}:{METRICS_PORT}", server_name(s.role)) for s in SERVICES]
    agents = [
        ("agent", f"{node}:{METRICS_PORT}", server_name("agent", f"site-a/{node}")) for node in ("agent-1", "agent-2")
    ]
    return "".join(
        _SCRAPED.format(label=label, target=target, name=name) for label, target, name in [*services, *agents]
    )


_SCRAPED = """\
  - job_name: {target}
    scheme: https
    tls_config: {{ca_file: /identity/ca.crt, cert_file: /identity/service.crt, key_file: /identity/service.key, server_name: {name}}}
    static_configs: [{{targets: ["{target}"], labels: {{service: {label}}}}}]
"""


def kustomize_resources() -> str:
    return "".join(f"  - {s.host}.yaml\n" for s in SERVICES)


def kustomize_images() -> str:
    return "".join(f"  - {{name: whaleflux/{s.host}, newTag: dev}}\n" for s in SERVICES)


def towards_nodes() -> str:
    hosts = ", ".join([*(s.host for s in SERVICES if s.reaches_nodes), "frontdoor"])
    return f"      - {{key: app.kubernetes.io/name, operator: In, values: [{hosts}]}}\n"


def agent_dialers() -> str:
    hosts = ", ".join(s.host for s in SERVICES if s.reaches_nodes)
    return f"              - {{key: app.kubernetes.io/name, operator: In, values: [{hosts}]}}\n"


def node_ports() -> str:
    """Ranges of ports that hold every port but those that parts of the control plane listen at; agents' own is one of them."""
    closed = sorted(
        {port.number for port in PORTS if port.listener != Party.AGENT} - {port.number for port in of(Party.AGENT)[:1]}
    )
    closed = [
        number for number in closed if number != FRONTDOOR_HTTP_PORT
    ]  # where many engines listen, and open to all anyway
    starts, ends = [1, *(number + 1 for number in closed)], [*(number - 1 for number in closed), 65535]
    ranges = [(start, end) for start, end in zip(starts, ends, strict=True) if start <= end]
    return "".join(f"        - {{port: {start}, endPort: {end}}}\n" for start, end in ranges)


def kubernetes(s: Service) -> str:
    """The objects of one service."""
    own = _own_settings(s)
    env = ["          env:", *(f'            - {{name: {name}, value: "{value}"}}' for name, value in own.items())]
    names = {setting.removesuffix("_listen"): port for setting, port in s.http.items()}
    ports = [
        "          ports:",
        *(f"            - {{name: {name}, containerPort: {port}}}" for name, port in names.items()),
    ]
    return _KUBERNETES.format(
        host=s.host,
        about=s.about,
        env="\n".join(env) + "\n" if own else "",
        ports="\n".join(ports) + "\n" if names else "",
        cpu=s.asked_cpu_millicores,
        asked=_memory(s.asked_memory_mib, "Gi", "Mi"),
        memory=_memory(s.memory_mib, "Gi", "Mi"),
        mounts=(_AUTHORITY_MOUNT if s.signs else "") + (_LEDGER_MOUNT if s.keeps_ledger else ""),
        volumes=(_AUTHORITY_VOLUME if s.signs else "") + (_LEDGER_VOLUME.format(host=s.host) if s.keeps_ledger else ""),
        grpc=GRPC_PORT,
        also="".join(_HTTP_SERVICE.format(host=s.host, name=n, port=p, dns=POLICY_HOST) for n, p in names.items())
        + (_LEDGER_CLAIM.format(host=s.host) if s.keeps_ledger else ""),
    )


_AUTHORITY_MOUNT = "            - {name: authority, mountPath: /authority, readOnly: true}\n"
_AUTHORITY_VOLUME = """\
        - name: authority # to sign certificates of agents; leave it away where another manager does that
          secret: {secretName: whaleflux-authority, defaultMode: 0440}
"""
_LEDGER_MOUNT = f"            - {{name: ledger, mountPath: {_LEDGER}}}\n"
_LEDGER_VOLUME = """\
        - name: ledger
          persistentVolumeClaim: {{claimName: {host}-ledger}}
"""
_LEDGER_CLAIM = """\
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {host}-ledger # what was used and what it cost: bills are made of it, so keep a copy
  labels: {{app.kubernetes.io/name: {host}}}
spec:
  accessModes: [ReadWriteOnce] # of one node; replicas on several need ReadWriteMany, as production has it, or an object store
  resources: {{requests: {{storage: 20Gi}}}}
"""
_HTTP_SERVICE = """\
---
apiVersion: v1
kind: Service
metadata:
  name: {dns} # the front door's name for it
  labels: {{app.kubernetes.io/name: {host}}}
spec:
  clusterIP: None
  selector: {{app.kubernetes.io/name: {host}}}
  ports:
    - {{name: {name}, port: {port}, targetPort: {name}}}
"""
_KUBERNETES = """\
# {about} What all services have in common is in service-patch.yaml.
# Made from libs/whaleflux/services.py: change that, then `make generate`.
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {host}
  labels: &labels {{app.kubernetes.io/name: {host}, app.kubernetes.io/component: service}}
spec:
  replicas: 1
  selector: {{matchLabels: {{app.kubernetes.io/name: {host}}}}}
  template:
    metadata:
      labels: *labels
    spec:
      serviceAccountName: {host}
      containers:
        - name: service
          image: whaleflux/{host}
{env}{ports}\
          resources:
            requests: {{cpu: {cpu}m, memory: {asked}}}
            limits: {{memory: {memory}}}
          volumeMounts:
            - {{name: identity, mountPath: /identity, readOnly: true}}
{mounts}\
      volumes:
        - name: identity
          secret: {{secretName: whaleflux-{host}, defaultMode: 0440}}
{volumes}\
---
apiVersion: v1
kind: Service
metadata:
  name: {host}
  labels: {{app.kubernetes.io/name: {host}}}
spec:
  clusterIP: None # callers see every replica, and go to the leader by its own address
  selector: {{app.kubernetes.io/name: {host}}}
  ports:
    - {{name: grpc, port: {grpc}, targetPort: grpc}}
{also}\
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {host}
automountServiceAccountToken: false
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {host}
spec:
  maxUnavailable: 1
  selector: {{matchLabels: {{app.kubernetes.io/name: {host}}}}}
"""
