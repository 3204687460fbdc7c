"""Who may do what to whom: owners and teams (pure), who is admitted (watched), what is written down of it."""
