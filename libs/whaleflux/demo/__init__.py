"""`make demo`: the main job of WhaleFlux, and `make demo-elastic`: one pool that breathes; watched from outside like a user would."""
