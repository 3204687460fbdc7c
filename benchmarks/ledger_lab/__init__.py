"""Generated histories of fleets, and simulated work whose waste is known: what the ledger is measured against."""
