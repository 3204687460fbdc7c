"""Ideas of placement that are measured here and that no running scheduler uses yet; docs/not-yet.md says what they wait for."""
