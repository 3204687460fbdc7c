"""The ledger's files: immutable Parquet, manifests whose head lies in the store, and DuckDB as an engine over them that may be thrown away."""
