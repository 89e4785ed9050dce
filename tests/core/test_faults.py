"""What the operating system refused is found behind any error that it caused, with its file."""

import errno
import os

import pytest

from realjax.core.faults import RunFault, explain_faults, memory_reason, naming, system_reason

FULL = os.strerror(errno.ENOSPC)
TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "params/0" in database at local file "/disk/4/": Failed writing: '
    "\"/disk/4/d/bf\": Failed to write 308 bytes to file 22: No space left on device [os_error_code='28']"
)


def raised(*errors: BaseException) -> BaseException:
    """Returns the last of the errors, each raised while the one before was handled."""
    for before, error in zip(errors, errors[1:]):
        error.__context__ = before
    return errors[-1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, FULL, "/disk/metrics.jsonl"), f"/disk/metrics.jsonl: {FULL}"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        # A copy names both of its files.
        (
            OSError(errno.ENOSPC, FULL, "/model/tokenizer.json", None, "/disk/tokenizer.json"),
            f"/disk/tokenizer.json: {FULL}",
        ),
        (ValueError(TENSORSTORE), f"/disk/4/: {FULL}"),
        # The first one, which the others followed; but one that names its file before one that does not.
        (raised(OSError(errno.EIO, "bad", "/a"), OSError(errno.ENOSPC, FULL, "/b"), RuntimeError("close")), "/a: bad"),
        (raised(OSError(errno.ENOSPC, FULL), OSError(errno.ENOSPC, FULL, "/b")), f"/b: {FULL}"),
        (ValueError("dataset.path: 'x' is no such file"), None),
        (raised(OSError(errno.ENOENT, "missing", "/x"), ValueError("dataset.path: '/x' is no such file")), None),
        (raised(OSError(errno.ENOSPC, FULL, "/b"), ValueError("the save is not complete")), f"/b: {FULL}"),
        (KeyError("loss"), None),
    ],
)
def test_the_reason_is_found(error, reason):
    assert system_reason(error) == reason


def test_a_device_without_room_is_told_with_what_takes_less():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nBuffer assignment: ..."
    with (
        pytest.raises(
            RunFault, match=r"no room .*allocate 17179869184 bytes\); .*n_mbs.*gradient_checkpointing.*; rest"
        ),
        explain_faults(lambda: "rest"),
    ):
        raise RuntimeError(text)
    assert memory_reason(ValueError(text)) is None and memory_reason(RuntimeError(TENSORSTORE)) is None


def test_what_was_said_in_words_stays_as_it_is():
    words = ValueError("fileroot: cannot write to /disk (No space left on device); set fileroot=...")
    words.__cause__ = OSError(errno.ENOSPC, FULL, "/disk")
    assert system_reason(words) is None


def test_an_error_without_a_file_gets_one(tmp_path):
    with pytest.raises(OSError) as found, naming(tmp_path):
        raise OSError(errno.ENOSPC, FULL)
    assert found.value.filename == str(tmp_path)
    with pytest.raises(OSError) as found, naming(tmp_path):
        raise OSError(errno.ENOSPC, FULL, "/b")
    assert found.value.filename == "/b"


def test_faults_say_what_else_there_is_and_bugs_pass():
    with pytest.raises(RunFault, match=rf"^/b: {FULL}; step 3 is saved$"), explain_faults(lambda: "step 3 is saved"):
        raise OSError(errno.ENOSPC, FULL, "/b")
    with pytest.raises(ZeroDivisionError), explain_faults(lambda: "step 3 is saved"):
        _ = 1 / 0
