"""`make demo`: the main job of WhaleFlux, watched from outside like a user would."""
