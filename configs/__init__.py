"""Recipes: each `get_config()` returns an experiment's options as a ConfigDict."""
