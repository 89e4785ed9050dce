import io
import logging
import math
import os
import re
from contextlib import contextmanager, suppress

import pytest
from rich.console import Console

from realjax.core.once import ONCE
from realjax.record.console import (
    ConsoleHandler,
    ProgressDisplay,
    StepLine,
    format_seconds,
    format_value,
    make_console,
)


def step_line(step, seconds=1.0, **metrics):
    return StepLine(
        epoch=1, num_epochs=8, epoch_step=step, steps_per_epoch=16, global_step=step, seconds=seconds, metrics=metrics
    )


@contextmanager
def log_on(console):
    logger, handler = logging.getLogger("realjax.loop"), ConsoleHandler(console)
    previous = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_step_line_reads_as_documented():
    line = step_line(3, 0.83, loss=2.34561, ppl=10.44, lr=9.8e-6, grad_norm=1.2341, tokens_per_second=12345.4)
    assert line.text(100.2) == (
        "Epoch 1/8 step 3/16 (global step 3): loss 2.3456, ppl 10.44, lr 9.8e-06, grad_norm 1.234, "
        "12,345 tokens/s (all), 0.83 s, ETA 0:01:40"
    )
    assert "ETA" not in line.text()


@pytest.mark.parametrize("name", ["loss", "actor/loss", "ppl", "lr", "grad_norm", "kl", "tokens_per_second"])
@pytest.mark.parametrize("value", [0.0, 1.5e-12, -3.2e-5, 0.017, 1.0, 123.456, 9.9e6, 1e7, 1e30])
def test_formatted_numbers_keep_their_size_and_stay_short(name, value):
    text = format_value(name, value)
    assert len(text) <= 13
    # Half a unit for rates of tokens, which have no decimals; else an error that a reader would not mind.
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=0.06, abs_tol=0.5 if "tokens" in name else 0)


def test_other_values_are_shown_as_they_are():
    assert format_value("attention", "[bold]") == "[bold]"
    assert format_value("num_tokens", 1234567) == "1,234,567"
    assert format_value("loss", math.nan) == "nan"
    assert format_seconds(3 * 3600 + 59.6) == "3:01:00"


def test_a_file_gets_plain_lines_even_when_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    console = make_console(file)
    with log_on(console), ProgressDisplay(2, console) as display:
        logging.getLogger("realjax.loop").info("Running [bold]sft[/bold] :smile:")
        for step in (1, 2):
            display.finish_step(step_line(step, loss=1.0, note="x" * 300))
    lines = file.getvalue().splitlines()
    assert len(lines) == 3  # nothing is wrapped, and no bar or blank line is added
    assert all(re.match(r"\d{8}-\d\d:\d\d:\d\d\.\d{3} realjax.loop INFO: ", line) for line in lines)
    assert lines[0].endswith("Running [bold]sft[/bold] :smile:")
    assert all(character.isprintable() for line in lines for character in line)


def test_a_terminal_gets_the_lines_and_a_bar_and_its_cursor_back():
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    bar = ProgressDisplay(4, console, done_steps=1)
    with pytest.raises(KeyboardInterrupt), log_on(console), bar as display:
        display.finish_step(step_line(2, loss=1.5))
        raise KeyboardInterrupt
    output = file.getvalue()
    assert "global step 2): loss 1.5000" in output
    assert "2/4" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # cursor hidden, then shown


def test_a_terminal_gets_folded_lines_and_a_path_in_one_piece():
    file, path = Terminal(), "/somewhere/" + "x" * 120
    with log_on(Console(file=file, force_terminal=True, width=200, _environ={"TERM": "xterm"})):
        logging.getLogger("realjax.loop").warning(f"{'a word ' * 30}\n  {path} is\nthe end")
    lines = [re.sub(r"\x1b\S*?m", "", line) for line in file.getvalue().splitlines()]
    assert re.match(r"\d\d:\d\d:\d\d WARNING: a word", lines[0])
    assert any(line.strip() == path for line in lines)
    assert all(len(line) <= 100 for line in lines if path not in line)
    assert lines[-1] == "         the end"


def test_a_fact_of_the_run_is_said_once():
    file = io.StringIO()
    logger = logging.getLogger("realjax.loop")
    with log_on(make_console(file)):
        for text in ("this", "this", "that"):
            logger.info(text, extra=ONCE)
            logger.info("each time")
    assert [line.partition("INFO: ")[2] for line in file.getvalue().splitlines()] == [
        "this", "each time", "each time", "that", "each time"
    ]  # fmt: skip


def test_eta_leaves_the_first_two_steps_out():
    display = ProgressDisplay(12, make_console(io.StringIO()), done_steps=2)
    for seconds in (100.0, 50.0):
        display.finish_step(step_line(1, seconds))
        assert display.eta_seconds() is None
    for seconds, eta in ((2.0, 7 * 2.0), (4.0, 6 * 3.0)):
        display.finish_step(step_line(1, seconds))
        assert display.eta_seconds() == pytest.approx(eta)
    for _ in range(6):
        display.finish_step(step_line(1))
    assert display.eta_seconds() == 0


def test_handler_prints_log_records_with_their_logger(caplog):
    file = io.StringIO()
    logger = logging.getLogger("realjax.test_console")
    handler = ConsoleHandler(make_console(file))
    logger.addHandler(handler)
    try:
        logger.warning("compiled [%d, %d]", 8, 256)
    finally:
        logger.removeHandler(handler)
    assert file.getvalue().endswith(" realjax.test_console WARNING: compiled [8, 256]\n")


def test_a_console_that_is_gone_ends_nothing_and_the_log_goes_on_elsewhere(caplog):
    reader, writer = os.pipe()
    os.close(reader)
    handler = ConsoleHandler(make_console(os.fdopen(writer, "w", buffering=1)))
    root = logging.getLogger("realjax")
    root.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "realjax"):
            for text in ("first", "second"):
                logging.getLogger("realjax.somewhere").info(text)
    finally:
        root.removeHandler(handler)
        with suppress(OSError):
            handler.console.file.close()
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "the console cannot be written",
        "first",
        "second",
    ]
