"""How tasks run: as processes of the host (`process`) or in containers (`docker`), behind one interface (`api`)."""
