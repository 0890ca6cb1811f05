"""Configurations: dataclasses, reading and checking them."""
