"""One process of two: reads tiny checkpoints of public architectures onto devices of both, and writes them again.

Run by test_published.py as `published_worker.py <port> <num_processes> <process_id> <folder> <names>`.
"""

from pathlib import Path

import jax

from realjax.hf.save import make_fetch, write_tensors
from tests.given.processes import work
from tests.hf.published import PUBLISHED
from tests.hf.published_files import find_all, list_outputs, load_published


def main(folder: str, *names: str) -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    for name in names:
        files, shapes, pieces = find_all(Path(folder) / name, PUBLISHED[name])
        fetch = make_fetch(load_published(files, shapes, pieces, mesh))
        out = list_outputs(files, pieces)
        if jax.process_index() == 0:
            back = Path(folder) / f"{name}-back"
            back.mkdir()
            write_tensors(back, out, fetch, max_shard_bytes=30_000)
        else:
            for piece in (piece for item in out for piece in item.tensor.pieces):
                fetch(piece)


if __name__ == "__main__":
    work(main, num_devices=4)
