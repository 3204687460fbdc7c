"""What things cost and what was wasted, as pure arithmetic: whole micro-dollars, whole milliseconds, no I/O."""
