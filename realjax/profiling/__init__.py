"""Measuring the machine at hand, for the planner."""
