"""What GPUs did and what steps were made of, on the way from the node to the ledger."""
