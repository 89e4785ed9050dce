"""The README's commands name only what is there or an earlier one wrote; that they work: tests/apps/test_pages.py."""

import re
import subprocess
from pathlib import Path

import pytest

from realjax.apps.demo import STAGES
from realjax.apps.demo_data import write_demo_files
from tests.given.processes import ROOT

BLOCK = re.compile(r"```sh\n(.*?)```", re.S)
# In place of the commands: says what it was called with, a word a line and an empty one at the end.
RECORD = 'record() { printf "%s\\n" "$@" ""; }\nrealjax() { record realjax "$@"; }\npython() { record python "$@"; }\n'
PATHS = re.compile(r"(?:^|\.|--)(?:path|train_path|valid_path|hf|orbax|config)$")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """What `make demo` leaves, and the commands of the README as its shell words where it was made."""
    folder = tmp_path_factory.mktemp("readme")
    write_demo_files(folder / "demo_run", num_train=8, num_valid=4)
    for stage in STAGES:
        (folder / "demo_run/checkpoints/me/demo" / stage.experiment / stage.result / "epoch1").mkdir(parents=True)
    blocks = [text for text in BLOCK.findall((ROOT / "README.md").read_text()) if not re.search(r"^(make|pip)", text)]
    script = RECORD + "\n".join(blocks)
    output = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=True).stdout
    return folder, [call.split("\n") for call in output.removesuffix("\n\n").split("\n\n")]


def test_every_path_is_there_or_was_written_by_an_earlier_line(calls):
    folder, written, num_paths = calls[0], set(), 0
    for words in calls[1]:
        # `--hf DIR` is `--hf=DIR`; a recipe's options begin with `--config.`.
        joined = re.sub(r"(--(?:hf|orbax)) ", r"\1=", " ".join(words)).split()
        named = {name: value for name, _, value in (word.partition("=") for word in joined) if PATHS.search(name)}
        if "tools.convert_hf" in words:
            written.add(named.pop("--orbax" if "to-orbax" in words else "--hf"))
        for name, value in named.items():
            root = ROOT if value.startswith("configs/") else folder
            assert value in written or (root / value).exists(), f"{name}={value}: {' '.join(words)}"
            num_paths += 1
    assert num_paths >= 15
