"""Of what XLA prints in a process of several, errors are shown, and nothing else."""

from realjax.launch.native_lines import NativeLines

OURS = "20261125-04:50:14.805 loop INFO: Epoch 1/2 step 3/11 (global step 3): loss 5.1759\n"
REMATERIALIZATION = (
    "E1125 04:57:43.994110    9885 spmd_partitioner.cc:613] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {devices=[1,2]} to {devices=[2,1]} efficiently for HLO operation\n"
)
LOST = [
    "E1125 04:57:43.994110    9885 coordination_service.cc:1549] [1677] Use error polling to propagate the following "
    "error to all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n",
    "1\n",
    "The tasks have crashed. Check the task logs for an earlier error\n",
    "F1125 04:57:43.995166    9896 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. This most likely indicates that another task died. absl::Status: UNAVAILABLE: The following tasks\n",
    "1\n",
    "*** Check failure stack trace: ***\n",
    "    @     0x7fe725040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n",
]


def shown(*lines: str) -> list[str]:
    native = NativeLines()
    return [line for line in lines if native.shows(line)]


def test_what_is_no_error_is_kept_out():
    gloo = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
    warning = "W1125 04:57:43.994110    9885 slow.cc:7] Compiling takes long\n"
    lines = (gloo, OURS, REMATERIALIZATION, "a second line of it\n", OURS, warning, "realjax: error: x\n", gloo)
    assert shown(*lines) == [OURS, OURS, "realjax: error: x\n"]


def test_real_errors_and_whatever_is_not_known_are_shown():
    error = "E1125 04:57:43.994110    9885 cuda_executor.cc:7] CUDA_ERROR_ILLEGAL_ADDRESS\n"
    fatal = "F1125 04:57:43.994110    9885 array.cc:7] Check failed: a == b\n"
    trace = "Traceback (most recent call last):\n"
    lines = (
        error,
        "its second line\n",
        OURS,
        REMATERIALIZATION,
        trace,
        '  File "x.py", line 1\n',
        "a word\n",
        fatal,
        "@ 0x7\n",
    )
    assert shown(*lines) == [line for line in lines if line != REMATERIALIZATION]


def test_a_process_that_lost_the_others_says_it_in_a_line():
    native = NativeLines()
    assert native.last_words() is None
    assert not [line for line in LOST if native.shows(line)]
    words = native.last_words()
    assert words is not None and words.startswith("realjax: error: process 1 of the run has not answered")
    assert "recover_mode=auto" in words and "\n" not in words
