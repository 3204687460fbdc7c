"""What the benchmarks of the usage ledger share."""
