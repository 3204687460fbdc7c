"""What `deploy_models` plays: an engine."""
