"""What would be paid less for, of a window of the ledger alone: one module per kind, and what they are worth together. Pure."""
