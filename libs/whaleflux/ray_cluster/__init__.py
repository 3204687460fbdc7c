"""Beside a Ray cluster: what runs in the cluster's own interpreter, and how it is run. Nothing here imports Ray but `reader`, when it runs."""
