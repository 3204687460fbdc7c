"""What `authz_matrix` is made of: expected answers (pure), requests for every method, a fleet with somebody's things, a fuzzer."""
