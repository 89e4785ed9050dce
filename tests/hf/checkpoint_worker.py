"""One process of two: reads a checkpoint onto layouts over both or on the second alone, and writes it again.

Run by test_processes.py as `checkpoint_worker.py <port> <num_processes> <process_id> <source> <folder>`. Prints how
many elements it read of each.
"""

import jax

from realjax.core.axes import train_rules, tree_shardings
from realjax.core.layout import Layout, ParallelStrategy
from realjax.hf import files
from realjax.hf.load import load_config, load_params
from realjax.hf.save import save_hf
from realjax.models.build import build_model
from tests.given.processes import work


def main(source: str, folder: str) -> None:
    sizes, read = [], files.SafetensorsFile.read

    def counted(file, name, window):
        part = read(file, name, window)
        sizes.append(part.size)
        return part

    files.SafetensorsFile.read = counted
    model = build_model(load_config(source))
    # The second's parameters live wholly on process 1, and it must be the writer.
    for name, devices in {"all": jax.devices(), "one": [d for d in jax.devices() if d.process_index == 1]}.items():
        sizes.clear()
        strategy = ParallelStrategy(pp=2, tp=len(devices) // 2)
        shardings = tree_shardings(model.axes, model.abstract, train_rules(strategy), Layout.of(strategy, devices))
        params = load_params(source, model, shardings)
        print("read", name, sum(sizes), flush=True)
        save_hf(params, model.config, f"{folder}/{name}", source_dir=source, max_shard_bytes=20_000)


if __name__ == "__main__":
    work(main, num_devices=4)
