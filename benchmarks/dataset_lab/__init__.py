"""What benchmarks of datasets play: an agent with a fault."""
