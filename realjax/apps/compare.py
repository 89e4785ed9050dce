"""`realjax compare DIR DIR ... [output=FILE]`: runs side by side, their curves in one chart and what differs."""

from pathlib import Path

from realjax.apps.report import find_runs
from realjax.apps.words import HELP_FLAGS, say
from realjax.core.faults import naming
from realjax.record.side_by_side import write_comparison

OUTPUT, DEFAULT = "output=", "compare.html"
USAGE = f"""Usage: realjax compare DIR DIR [DIR ...] [{OUTPUT}FILE.html]

Writes a page ({DEFAULT}) with the curves of runs in one chart each, their last numbers, and the options that differ.
DIR is the log directory of a run."""


def main(words: list[str]) -> int:
    """Runs the command line and returns its exit code. ValueError for whatever the user can mend."""
    if not words or any(word in HELP_FLAGS for word in words):
        say(USAGE)
        return 0 if words else 2
    output = next((word.removeprefix(OUTPUT) for word in words if word.startswith(OUTPUT)), DEFAULT)
    runs = find_runs([word for word in words if not word.startswith(OUTPUT)], "compare")
    if len(set(runs)) < 2:
        raise ValueError(f"compare: found {len(set(runs))} run; give the log directories of two or more")
    path = Path(output).expanduser()
    with naming(path):
        write_comparison(path, runs)
    print(f"written to {path}")
    return 0
