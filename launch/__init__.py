"""Launchers, run from a checkout."""
