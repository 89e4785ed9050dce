"""The installed command `realjax`."""

import signal


def main() -> int:
    """Runs the command line and returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, has nothing to tell
    from realjax.apps import quickstart

    return quickstart.main()
