"""Compiled without the machine: a run's programs from shapes, with what they take, send and multiply."""
