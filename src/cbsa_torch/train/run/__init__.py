"""A run on disk: its folder, its states, its lock, and the signals that stop it."""
