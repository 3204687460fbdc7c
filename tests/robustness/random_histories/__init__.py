"""Random histories of a whole suite: real etcd, NATS, services, agents and ranks, broken at random, checked to the end."""
