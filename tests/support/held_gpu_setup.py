"""What jobs of `held_gpu` set up: one line for each time, in a file of this attempt and node, which its ranks read."""

# $0: FOLDER/setup
SCRIPT = 'mkdir -p "$0" && sleep 0.2 && echo >> "$0/${WHALEFLUX_JOB##*/}-$WHALEFLUX_EPOCH-${WHALEFLUX_NODE##*/}"'
