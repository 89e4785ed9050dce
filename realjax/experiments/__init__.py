"""From options to a run: one file per experiment, each with `build(config, devices) -> RunSpec`."""
