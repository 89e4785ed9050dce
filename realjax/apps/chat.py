"""`realjax chat MODEL key=value ...`: talks to a checkpoint in the terminal.

A line is a message; its answer appears as it is drawn. `/again` draws another answer to the last message, `/new` begins
a new conversation, `/quit` or the end of the input ends. Lines may also come from a file or a pipe.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from realjax.apps.speaker import Speaker
from realjax.apps.talk import read_words, take_devices
from realjax.data.chat import Messages
from realjax.options.talk import ChatConfig

PROMPT = "> "
HELP = "A line is a message. /again: another answer to the last one. /new: a new conversation. /quit: end."


def main(words: list[str]) -> int:
    """Runs the command line and returns its exit code. ValueError for whatever the user can mend."""
    if (command := read_words(words, ChatConfig, "chat")) is None:
        return 0
    models, config = command
    if len(models) > 1:
        raise ValueError(f"chat: found {len(models)} models; talk to one, or compare them with realjax sample")
    speaker = Speaker(models[0], config, take_devices(config))
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP)
        if not speaker.has_template:
            print("The tokenizer has no chat template: the model goes on from your text as it is.")
    talk(speaker, read_lines(PROMPT if is_terminal else ""), sys.stdout.write)
    return 0


def read_lines(prompt: str) -> Iterator[str]:
    """Yields lines of the input until it ends; with `prompt` in front, where somebody writes them."""
    if prompt:
        with contextlib.suppress(ImportError):  # lines can be edited where it is there
            __import__("readline")
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def talk(speaker: Speaker, lines: Iterator[str], write_fn: Callable[[str], object]) -> None:
    """Answers messages until `/quit` or the end of the lines; one that cannot be answered is told, and dropped."""
    messages: Messages = []
    for line in lines:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/new":
            messages = []
        elif word == "/again":
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            messages = say(speaker, messages, write_fn) if messages else messages
        elif word.startswith("/"):
            write_fn(f"{word} is no command. {HELP}\n")
        elif word:
            messages = say(speaker, [*messages, {"role": "user", "content": line}], write_fn)


def say(speaker: Speaker, messages: Messages, write_fn: Callable[[str], object]) -> Messages:
    """Writes the answer as it comes, and returns the conversation with it; where there can be none, without the last
    message."""
    shown = ""

    def tell(_: int, text: str) -> None:
        nonlocal shown
        # Text behind which another letter may still change is not there yet.
        if text.startswith(shown):
            write_fn(text[len(shown) :])
            shown = text
            sys.stdout.flush()

    try:
        (answer,) = speaker.answer([messages], tell)
    except ValueError as error:
        write_fn(f"{error}\n/new begins a new conversation.\n")
        return messages[:-1]
    write_fn("\n")
    return [*messages, {"role": "assistant", "content": answer}]
