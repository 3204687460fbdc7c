#!/usr/bin/env bash
# Returns when this front door answers nobody any more: new requests go elsewhere, those under way finish.
#   drain.sh [ADMIN_PORT] [LONGEST_S] [SETTLE_S]
# Settling: so long balancers may still send here. Streams of agents and of the command line are not waited for: they resume
# elsewhere. The image has no curl; bash can speak TCP.
set -u
port=${1:-9901} longest_s=${2:-570} settle_s=${3:-10}

ask() { # METHOD PATH: the admin port's answer; nothing when it does not answer
  { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null || return 0
  printf '%s %s HTTP/1.1\r\nhost: admin\r\nconnection: close\r\ncontent-length: 0\r\n\r\n' "$1" "$2" >&3
  timeout 5 cat <&3
  exec 3>&-
}

active() { # inference requests under way; nothing when Envoy is gone
  ask GET '/stats?filter=^http\.http\.downstream_rq_active$' | sed -n 's/^http\.http\.downstream_rq_active: \([0-9]*\).*/\1/p'
}

ask POST '/drain_listeners?graceful' >/dev/null
sleep "$settle_s"
silent=0 # answers in a row that did not come: a busy admin port is not yet a front door that is gone
while [ "$SECONDS" -lt "$longest_s" ] && [ "$silent" -lt 10 ]; do
  case "$(active)" in
    0) exit 0 ;;
    '') silent=$((silent + 1)) ;;
    *) silent=0 ;;
  esac
  sleep 0.2
done
