"""The store on etcd 3.4 or later, by the stubs of aetcd; nothing else in the suite knows etcd.

`connection` reaches the members, `messages` converts, `watch` and `lease` survive them, `store` is what services use.
"""

from whaleflux.store.etcd.store import EtcdStore

__all__ = ["EtcdStore"]
