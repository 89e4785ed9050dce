"""A process that scores answers for another one: `python -m realjax.rewards.worker <descriptor> <parent>`.

It says None when its function is there, or why it is not; then it gives a reply to each question. It imports no JAX.
"""

import sys
from multiprocessing.connection import Connection

from realjax.core.lifetime import make_bond
from realjax.rewards.functions import find_reply, load_function


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
            connection.send(find_reply(fn, connection.recv()))
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
