"""`realjax report DIR ...`: makes the report of a run again, also of one that goes on or broke off."""

from pathlib import Path

from realjax.apps.words import HELP_FLAGS, say
from realjax.core.faults import naming
from realjax.dataflow.run import METRICS_FILE
from realjax.record.report import ReportParts, read_parts, write_report

USAGE = """Usage: realjax report DIR [DIR ...]

Writes report.html anew in the log directories of runs, from what is there: metrics.jsonl, report.json, pictures.
The first lines of a run's log say where its directory is."""


def main(words: list[str]) -> int:
    """Runs the command line and returns its exit code. ValueError for whatever the user can mend."""
    if not words or any(word in HELP_FLAGS for word in words):
        say(USAGE)
        return 0 if words else 2
    for directory in find_runs(words, "report"):
        parts = read_parts(directory) or ReportParts(title=directory.name, summary={})
        with naming(directory):
            print(write_report(directory, parts))
    return 0


def find_runs(words: list[str], command: str) -> list[Path]:
    """Returns the log directories that words name. ValueError for one that holds no record of a run."""
    directories = [Path(word).expanduser() for word in words]
    for directory in directories:
        if not (directory / METRICS_FILE).is_file():
            raise ValueError(
                f"{command}: '{directory}' holds no {METRICS_FILE}; give the log directory of a run, which the first "
                "lines of its log name"
            )
    return directories
