"""What XLA's own libraries print among a process's lines: kept out unless it tells of an error."""

import re
from dataclasses import dataclass

# Severity, time, thread and place, as in "E1125 04:57:43.994110    9885 coordination_service.cc:1549] ".
HEAD = re.compile(r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+:\d+\] ")
# Said as an error that is none, or of one that a line of ours, or the process's end, tells too.
NO_ERRORS = re.compile(r"Involuntary full rematerialization|slow_operation_alarm|coordination_service(_agent)?\.cc")
GLOO = re.compile(r"\[Gloo\] Rank \d+ is connected to ")
LOST = "Terminating process because the JAX distributed service detected fatal errors"
NUMBER = re.compile(r"\d+\n?")


@dataclass
class NativeLines:
    """Tells the lines to show from those of the libraries, whose messages may go on over several lines."""

    is_hidden: bool = False  # the message that the last line belonged to
    is_lost: bool = False  # the process is ending, since others do not answer
    lost: tuple[str, ...] = ()  # the numbers of these, where they are known

    def shows(self, line: str) -> bool:
        """Returns whether the next line is to be shown."""
        if head := HEAD.match(line):
            self.is_lost = self.is_lost or LOST in line
            self.is_hidden = self.is_lost or head["level"] in "IW" or NO_ERRORS.search(line) is not None
        elif GLOO.match(line):
            return False
        elif self.is_hidden:
            if NUMBER.fullmatch(line) and line.strip() not in self.lost:
                self.lost += (line.strip(),)
            self.is_hidden = self.is_lost or not _is_ours(line)
        return not self.is_hidden

    def last_words(self) -> str | None:
        """Returns a line about the end of a process that lost the others, None where it did not."""
        if not self.is_lost:
            return None
        which = f"process {', '.join(self.lost)}" if self.lost else "another process"
        return (
            f"realjax: error: {which} of the run has not answered for a while (stopped, cut off or ended), so this one "
            "ends; the same command with recover_mode=auto continues from the last save"
        )


def _is_ours(line: str) -> bool:
    """Returns whether a line begins a message of Python's: a log line, an error or a traceback."""
    return re.match(r"\d{8}-\d\d:|realjax: |Traceback |[\w.]+(Error|Exception|Warning):", line) is not None
