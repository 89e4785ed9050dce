"""What a run leaves: log, metrics, curves, timeline, samples and report."""
