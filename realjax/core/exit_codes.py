"""What the exit code of a run says, for launchers that decide on it and for people."""

import signal

FINISHED, FAILED, USER_ERROR, STALLED = 0, 1, 2, 75
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
ABORTED, KILLED = 128 + signal.SIGABRT, 128 + signal.SIGKILL
STOPPED = (INTERRUPTED, TERMINATED)
# Starting the same command again would end in the same way, or is what somebody did not want.
FINAL = (FINISHED, USER_ERROR, *STOPPED)
# Of several codes seen at once any other one is the cause: a lost peer is an error, or aborts the process.
CONSEQUENCES = (FAILED, ABORTED, FINISHED)
MEANINGS = {
    FINISHED: "finished; also a run that was finished before",
    FAILED: "an error, a fault of the machine such as a full disk, or another process that is lost",
    USER_ERROR: "the command cannot work as it is: an option, a path, a row of data",
    STALLED: "no progress, or processes in different calls; the stacks of all are in the log directory",
    INTERRUPTED: "Ctrl-C, after a save",
    ABORTED: "ended by JAX, which had not heard of another process for a while",
    KILLED: "killed (kill -9, out of memory)",
    TERMINATED: "SIGTERM, after a save",
}
