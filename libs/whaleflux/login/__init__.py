"""How people and programs get a client certificate of a fleet: codes, tokens, OpenID providers, and its renewal."""
