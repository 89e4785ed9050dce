"""A run's directories are made, continued or set aside; nothing in them is overwritten."""

import logging
from pathlib import Path

import pytest

from realjax.dataflow.run import RunPaths
from realjax.record.rundir import LOG_FILE, set_aside, write_log
from realjax.runtime.resume import open_run_directory
from tests.given.specs import make_paths, make_spec


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_paths(tmp_path)


def fill(paths: RunPaths, save: str | None) -> None:
    """Leaves what an earlier run might have."""
    for path in (paths.logs, paths.checkpoints, paths.recover):
        path.mkdir(parents=True)
    (paths.logs / "metrics.jsonl").write_text("{}\n")
    (paths.checkpoints / "default").mkdir()
    if save is not None:
        (paths.recover / save).mkdir()


def test_a_first_run_makes_them(paths):
    open_run_directory(make_spec(paths, config_json='{"a": 1}'), continues_after=None)
    assert (paths.logs / "config.json").read_text() == '{"a": 1}'
    assert paths.checkpoints.is_dir() and paths.recover.is_dir()


def test_a_run_with_a_save_is_continued_in_place(paths):
    """What lies there under later steps is not whole, or would not have been passed over: it makes room."""
    fill(paths, "12")
    (paths.recover / "14").mkdir()
    (paths.recover / "16.orbax-checkpoint-tmp").mkdir()
    open_run_directory(make_spec(paths), continues_after=12)
    assert (paths.logs / "metrics.jsonl").exists()
    assert sorted(path.name for path in paths.recover.iterdir()) == ["12", "14.damaged"]
    assert [path.name for path in paths.recover.parent.iterdir()] == ["t"]


@pytest.mark.parametrize("save", ["12", "12.orbax-checkpoint-tmp", None])
def test_a_run_that_starts_anew_sets_the_earlier_one_aside(save, paths):
    fill(paths, save)
    open_run_directory(make_spec(paths), continues_after=None)
    assert (paths.logs.with_name("t.1") / "metrics.jsonl").exists()
    assert (paths.checkpoints.with_name("t.1") / "default").exists()
    assert not list(paths.recover.iterdir()) and not list(paths.checkpoints.iterdir())
    if save is not None:
        assert (paths.recover.with_name("t.1") / save).exists()


def test_directories_set_aside_together_get_one_free_number(tmp_path):
    full, empty, absent = tmp_path / "full", tmp_path / "empty", tmp_path / "absent"
    for n in range(1, 4):
        full.mkdir()
        (full / "file").write_text(str(n))
        empty.mkdir(exist_ok=True)
        if n == 2:
            # Another directory's number is taken: the pair stays together.
            (tmp_path / "absent.2").mkdir()
        set_aside([full, empty, absent])
    kept = {path.name: (path / "file").read_text() for path in tmp_path.glob("full.*")}
    assert kept == {"full.1": "1", "full.3": "2", "full.4": "3"}
    assert empty.is_dir() and not list(tmp_path.glob("empty.*"))


def test_the_log_goes_to_a_file_while_a_run_lasts(tmp_path):
    log, before = logging.getLogger("realjax.somewhere"), list(logging.getLogger("realjax").handlers)
    for text in ("first", "second"):
        with write_log(tmp_path):
            log.warning(text)
        log.warning("between")
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["first", "second"]
    assert logging.getLogger("realjax").handlers == before
