"""A run's directories are made, continued or set aside; nothing in them is overwritten."""

import logging
from pathlib import Path

import pytest

from realjax.dataflow.run import RunPaths
from realjax.runtime.rundir import LOG_FILE, open_run_directory, set_aside, write_log
from tests.runtime.specs import make_paths, make_spec


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


@pytest.mark.parametrize("mode", ["disabled", "save", "auto"])
def test_a_first_run_makes_them(mode, paths):
    assert not open_run_directory(make_spec(paths, recover_mode=mode, config_json='{"a": 1}'))
    assert (paths.logs / "config.json").read_text() == '{"a": 1}'
    assert paths.checkpoints.is_dir() and paths.recover.is_dir()


@pytest.mark.parametrize("mode", ["auto", "resume"])
def test_a_run_with_a_save_is_continued_in_place(mode, paths):
    fill(paths, "12")
    assert open_run_directory(make_spec(paths, recover_mode=mode))
    assert (paths.logs / "metrics.jsonl").exists() and (paths.recover / "12").exists()
    assert [path.name for path in paths.recover.parent.iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("mode", "save"), [("disabled", "12"), ("save", "12"), ("auto", "12.orbax-checkpoint-tmp"), ("auto", None)]
)
def test_a_run_that_starts_anew_sets_the_earlier_one_aside(mode, save, paths, caplog):
    fill(paths, save)
    with caplog.at_level(logging.WARNING, "realjax"):
        assert not open_run_directory(make_spec(paths, recover_mode=mode))
    assert ("recover_mode=auto would continue it" in caplog.text) == (save == "12")
    assert (paths.logs.with_name("t.1") / "metrics.jsonl").exists()
    assert (paths.checkpoints.with_name("t.1") / "default").exists()
    assert not list(paths.recover.iterdir()) and not list(paths.checkpoints.iterdir())
    if save is not None:
        assert (paths.recover.with_name("t.1") / save).exists()


@pytest.mark.parametrize("save", [None, "12.orbax-checkpoint-tmp"])
def test_resume_without_a_whole_save_is_refused_and_touches_nothing(save, paths):
    fill(paths, save)
    before = sorted(paths.logs.parents[1].rglob("*"))
    with pytest.raises(ValueError, match="^recover_mode: resume, but .* holds no saved state; use recover_mode=auto"):
        open_run_directory(make_spec(paths, recover_mode="resume"))
    assert sorted(paths.logs.parents[1].rglob("*")) == before


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
