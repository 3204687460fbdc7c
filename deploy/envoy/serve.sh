#!/usr/bin/env bash
# Envoy that finishes its answers before it stops (`docker stop` sends SIGTERM, and Envoy alone would cut them at once).
#   serve.sh LONGEST_S ENVOY_ARGUMENTS...
set -u
longest_s=$1
shift
envoy "$@" &
child=$!
trap 'bash "$(dirname "$0")/drain.sh" 9901 "$longest_s" 1; kill -TERM "$child"' TERM INT
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` early; the trap has run by then
  wait "$child"
  code=$?
done
exit "${code:-1}"
