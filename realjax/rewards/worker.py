"""A process that scores answers for another one: `python -m realjax.rewards.worker <descriptor> <parent>`.

It says None when its function is there, or why it is not; then it gives a reply to each question. It imports no JAX.
"""

import asyncio
import sys
from multiprocessing.connection import Connection

from realjax.core.lifetime import make_bond
from realjax.rewards.functions import (
    Fault,
    Question,
    Reply,
    TextFn,
    ask,
    await_reply,
    describe_error,
    is_async,
    load_function,
    read_reply,
)


def main(descriptor: int, parent: int) -> None:
    """Answers questions until the other side, the process `parent`, is gone."""
    if (bind := make_bond(parent)) is not None:
        bind()
    connection = Connection(descriptor)
    try:
        path, name = connection.recv()
        try:
            fn = load_function(path, name)
        except ValueError as error:
            connection.send(str(error))
            return
        connection.send(None)
        while True:
            connection.send(_reply(fn, connection.recv()))
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more


def _reply(fn: TextFn, question: Question) -> Reply:
    num_answers = len(question.answers)
    try:
        found = ask(fn, question)
    except (Exception, SystemExit) as error:
        return Fault(describe_error(error))
    if is_async(fn):
        return asyncio.run(await_reply(fn, found, num_answers))
    return read_reply(fn, found, num_answers)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
