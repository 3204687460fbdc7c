"""Code that travels: a folder is packed where a job is submitted, stored by its content, and unpacked where it runs.

`ignore` says what belongs to a folder, `pack` makes the archive, `unpack` opens one that nobody is trusted to have made;
`api` is the store of archives, `memory` its model, `events/nats_code.py` the real one.
"""
