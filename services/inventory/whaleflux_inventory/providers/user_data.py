"""What a rented machine runs at its first boot: its own end first, then the agent. Pure.

The image has WhaleFlux installed; the offer's option `whaleflux` says where (default: on the PATH).
"""

from __future__ import annotations

import shlex

from whaleflux import hostport
from whaleflux_inventory.providers.api import LaunchRequest

MAX_BYTES = 16_384  # what EC2 takes
_DIAL_EVERY_S = 30


def user_data(request: LaunchRequest) -> str:
    """A shell script; the same for the same request."""
    token = request.environment["WHALEFLUX_JOIN_TOKEN"]
    own = {key: value for key, value in request.environment.items() if key != "WHALEFLUX_JOIN_TOKEN"}
    own |= {"WHALEFLUX_CA_FILE": "/etc/whaleflux/ca.crt", "WHALEFLUX_JOIN_TOKEN_FILE": "/etc/whaleflux/join.token"}
    own |= {"WHALEFLUX_STATE_DIR": "/var/lib/whaleflux/agent"}
    door = hostport.parse(request.environment["WHALEFLUX_SERVER"], "rent_server")
    lines = [
        "#!/bin/bash",
        "set -u; umask 077",
        "# It ends by itself: at its hard end, and when no control plane was heard for long.",
        f"(while [ $(date +%s) -lt {int(request.hard_end_s)} ]; do sleep 20; done; shutdown -h now) &",
        _dead_mans_switch(door, max(2, round(request.silent_s / _DIAL_EVERY_S))),
        "disown -a",
        "mkdir -p /etc/whaleflux /var/lib/whaleflux/agent",
        f"cat > /etc/whaleflux/ca.crt <<'PEM'\n{request.authority_pem.strip()}\nPEM",
        f"printf %s {shlex.quote(token)} > /etc/whaleflux/join.token",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(own.items())),
        f"until {shlex.quote(request.offer.options.get('whaleflux', 'whaleflux'))} agent; do sleep 5; done  # one that died is paid for nothing",
    ]
    return "\n".join(lines) + "\n"


def _dead_mans_switch(door: hostport.HostPort, misses: int) -> str:
    dial = f"timeout 5 bash -c {shlex.quote(f'</dev/tcp/{door.host}/{door.port}')} 2>/dev/null"
    count = f"if {dial}; then missed=0; else missed=$((missed + 1)); fi"
    return f"(missed=0; while [ $missed -lt {misses} ]; do sleep {_DIAL_EVERY_S}; {count}; done; shutdown -h now) &"
