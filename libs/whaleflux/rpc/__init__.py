"""gRPC, wrapped once: servers (`server`, `boundary`, `auth`), clients (`channel`, `sync`) and certificates (`pki`).

Importing this package imports nothing else, so that the command line pays only for what it uses.
"""
