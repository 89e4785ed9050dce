"""Merged output: equal lines once, with the numbers of who said them, and each process's lines in their order."""

import io

from realjax.core.processes import format_numbers
from realjax.launch.output import MergedOutput

FIRST = "20261125-04:50:14.805 loop INFO: begins"
LATER = "20261125-04:50:14.911 loop INFO: begins"


def merge(num_processes: int, *lines: tuple[int, str]) -> list[str]:
    """Returns what is printed of the lines `(process, line)`."""
    file = io.StringIO()
    with MergedOutput(num_processes, file, hold_seconds=60.0) as output:
        for process, line in lines:
            output.write(process, line)
    return file.getvalue().splitlines()


def test_equal_lines_of_sixteen_processes_are_one():
    lines = [(i, LATER if i else FIRST) for i in range(16)]
    assert merge(16, *lines) == [f"[0-15] {FIRST}"]


def test_who_said_it_is_told():
    lines = [(i, "a\n") for i in (0, 1, 3, 7, 6)] + [(2, "b\n")]
    assert merge(8, *lines) == ["[0-1,3,6-7] a", "[2] b"]


def test_a_process_that_says_it_twice_has_said_it_twice():
    assert merge(2, (0, "a"), (0, "a"), (1, "a")) == ["[0-1] a", "[0] a"]


def test_no_processes_lines_change_places():
    # 1's `a` follows its `b`, so it is not the `a` that 0 said before.
    assert merge(2, (0, "a"), (1, "b"), (1, "a")) == ["[0] a", "[1] b", "[1] a"]


def test_one_process_waits_for_nobody():
    file = io.StringIO()
    with MergedOutput(1, file) as output:
        output.write(0, "a\n")
        assert file.getvalue() == "[0] a\n"


def test_numbers_in_a_row_are_a_range():
    assert [format_numbers(numbers) for numbers in ([], [3], [1, 0], [9, 2, 3, 4])] == ["", "3", "0-1", "2-4,9"]
