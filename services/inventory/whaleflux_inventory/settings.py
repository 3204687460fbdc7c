"""Settings of inventory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from whaleflux.config import ServiceSettings
from whaleflux.events.topology import ACCOUNTS, DAY_S, SAMPLES, TRAIL, StreamLimits


class Settings(ServiceSettings):
    """The inventory service: sites, nodes, datasets, and who may join."""

    ca_cert: Path | None = Field(
        None, description="CA certificate, PEM; without it joining is left to another certificate manager."
    )
    ca_key: Path | None = Field(None, description="The CA's private key, PEM; readable by inventory alone.")
    secrets_key_file: Path | None = Field(
        None,
        description="Keys that seal secrets: a file, or a folder of them, that nobody else may read; without it no secrets are kept.",
    )
    secrets_kms_command: str = Field(
        "",
        description="Command line that wraps and unwraps keys instead, asking a key management service; no shell. The file's keys still open what they wrapped.",
    )
    events_days: float = Field(14.0, gt=0, le=3650, description="Days for which NATS keeps what happened.")
    events_max_bytes: int = Field(
        512 << 20, ge=1 << 20, description="Most bytes of that; the oldest goes first. Within NATS' own max_file."
    )
    events_per_subject: int = Field(
        1_000, ge=0, description="Of what happens to one resource again and again, so many are kept; 0: no limit."
    )
    accounting_days: float = Field(400.0, gt=0, le=3650, description="Days for which NATS keeps what jobs cost.")
    accounting_max_bytes: int = Field(
        1 << 30, ge=1 << 20, description="Most bytes of that, about 700 for each attempt and each job."
    )
    first_admin: str = Field(
        "admin",
        description="User whose certificate was made beside the fleet (bootstrap); known as an admin from the first start on. Empty: none.",
    )
    certificate_hours: float = Field(
        12.0, gt=0, le=168, description="Life of a person's or program's certificate, hours."
    )
    login_days: float = Field(
        7.0, gt=0, le=90, description="Days for which a person's login can be renewed without a new one."
    )
    oidc_issuer: str = Field(
        "", description="Issuer of the OpenID provider, letter by letter as it calls itself; empty: none."
    )
    oidc_client_id: str = Field(
        "", description="The fleet's client id there; a public client with the device flow, or with PKCE."
    )
    oidc_client_secret_file: Path | None = Field(
        None,
        description="File with the client secret, of providers that want one from programs; whoever logs in gets to know it.",
    )
    oidc_scopes: str = Field("openid email profile", description="Scopes that are asked for, separated by spaces.")
    oidc_name_claim: Literal["email", "preferred_username", "sub"] = Field(
        "email", description="Of which claim a new user's name is made."
    )
    oidc_groups_claim: str = Field("groups", description="The claim that names groups.")
    oidc_domains: str = Field(
        "", description="Domains of e-mail addresses that are admitted, comma separated; empty: any."
    )
    oidc_roles: str = Field(
        "",
        description="Roles by the provider's groups, group=role with commas; then the provider decides roles at each login.",
    )
    oidc_default_role: Literal["user", "viewer", ""] = Field(
        "user",
        description="Role of who is in none of these groups; empty: they are not admitted unless an operator adds them first.",
    )
    oidc_ca_file: Path | None = Field(None, description="Authority of the provider, PEM, where it is a private one.")
    audit_days: float = Field(400.0, gt=0, le=3650, description="Days for which NATS keeps the audit trail.")
    audit_max_bytes: int = Field(
        1 << 30, ge=1 << 20, description="Most bytes of that, about 500 for each record; the oldest goes first."
    )
    usage_days: float = Field(
        3.0, gt=0, le=60, description="Days for which NATS keeps what GPUs did; hours can be closed anew for as long."
    )
    usage_max_bytes: int = Field(
        2 << 30,
        ge=1 << 20,
        description="Most bytes of that, about 1 kB for each node and ten seconds; the oldest goes first.",
    )
    rent_server: str = Field(
        "", description="The front door as rented machines dial it, host:port; without it nothing is rented."
    )
    rent_server_name: str = Field("", description="Name in its certificate; empty: the host that is dialled.")
    rent_commands: Path | None = Field(
        None, description="Folder with the executables that offers of the provider `command` may name."
    )
    rent_simulated: Path | None = Field(
        None, description="Folder for machines that are played, of offers of the provider `simulated`; empty: none are."
    )
    rent_checkpoint_root: Path | None = Field(
        None, description="Folder for checkpoints that the machines which are played share with other agents here."
    )
    rent_poll_s: float = Field(
        5.0, ge=0.2, le=60, description="Seconds between looks at providers while a machine comes or goes."
    )
    rent_silent_s: float = Field(
        1800.0,
        ge=60,
        le=86_400,
        description="A rented machine ends by itself when it has not reached the front door for so many seconds.",
    )
    leaf_sites: str = Field("", description="Sites with a NATS server of their own, comma separated; empty: none.")

    def kept(self) -> tuple[StreamLimits, StreamLimits, StreamLimits, StreamLimits]:
        """Bounds of the streams of events, of accounting, of the audit trail, and of usage."""
        events = StreamLimits(self.events_max_bytes, self.events_days * DAY_S, self.events_per_subject)
        accounts = replace(ACCOUNTS, max_bytes=self.accounting_max_bytes, max_age_s=self.accounting_days * DAY_S)
        trail = replace(TRAIL, max_bytes=self.audit_max_bytes, max_age_s=self.audit_days * DAY_S)
        samples = replace(SAMPLES, max_bytes=self.usage_max_bytes, max_age_s=self.usage_days * DAY_S)
        return events, accounts, trail, samples
