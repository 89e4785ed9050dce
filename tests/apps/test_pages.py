"""The commands of the README and of docs/ are carried out, on tiny models and as far as the table `WAYS` says."""

import argparse
import importlib
import io
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from realjax.apps import data_example, quickstart, recipe
from realjax.options.config_dict import EXPERIMENT_KEY
from realjax.options.parsing import locate, parse_overrides
from realjax.options.profile import ProfileConfig
from tests.given.checkpoints import write_family, write_llama, write_reward_model
from tests.given.commands import kept_log_settings
from tests.given.models import EXPERTS
from tests.given.pages import PageCommand, find_unmarked, list_commands, list_pages
from tests.given.processes import ROOT
from tests.given.runs import list_models
from tests.given.texts import write_jsonl

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
LEFT_OUT = ("...", "key=value")  # for whatever the reader's own command has
RUNS_ELSEWHERE = re.compile(r"n_nodes=\d+$")  # this process has eight devices
OPTION = re.compile(r"(?:--config\.)?([\w.]+)=(.*)", re.S)


class Place:
    """A folder in which commands are carried out: models, data, and what stands for the reader's own paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sizes = {"max_position_embeddings": 4096}
        self.models = {
            False: write_llama(folder / "model", **sizes),
            True: write_reward_model(folder / "head", **sizes),
        }
        self.experts = write_family(
            folder / "experts",
            "qwen3_moe",
            **{
                **EXPERTS,
                **sizes,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
            num_hidden_layers=2,
            intermediate_size=48,
        )
        for directory in (*self.models.values(), self.experts):
            path = directory / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
        data_example.write_example_files(folder / "data")
        row = {"prompt": "the film was", "answer": " good", "label": True}
        write_jsonl(folder / "labelled.jsonl", [row, {**row, "answer": " bad", "label": False}] * 300)
        pair = {"prompt": "the film was", "chosen": " good", "rejected": " bad"}
        write_jsonl(folder / "pairs.jsonl", [pair] * 300)
        # Prompts with what every verifier and environment of the pages asks for.
        ask = {"prompt": [{"role": "user", "content": "What is 20 + 22?"}], "answer": "42", "secret": 4}
        write_jsonl(folder / "prompts.jsonl", [ask] * 300)
        (folder / "rewards.py").write_text("def score(prompt, answer, row):\n    return 1.0\n")
        (folder / "sft.yaml").write_text("total_train_epochs: 2\n")

    def find_data(self, experiment: str) -> Path:
        """Returns a file of the kind of rows that an experiment reads."""
        pairs = dict.fromkeys(("rw", "dpo", "simpo", "orpo"), "pairs.jsonl")
        kinds = {"sft": "data/sft-train.jsonl", "kto": "labelled.jsonl", **pairs}
        return self.folder / kinds.get(experiment, "prompts.jsonl")

    def replace(self, experiment: str, words: Sequence[str]) -> list[str]:
        """Returns an experiment's words with the reader's paths replaced, and what the page leaves out filled in."""
        own = [word for word in words if word not in LEFT_OUT and not RUNS_ELSEWHERE.match(word)]
        given = {match[1] for word in own if (match := OPTION.match(word))}
        if len(own) < len(words):
            own += [f"{name}=" for name in self.list_paths(experiment, given) if name not in given]
        return [self.replace_path(experiment, word, given) for word in own]

    def list_paths(self, experiment: str, given: set[str]) -> list[str]:
        """Returns the options that name models and data, those of reward models only where no function is given."""
        models = [name for name in list_models(experiment) if name != "rew" or not {"reward.fn", "env.path"} & given]
        is_fed = "train_path" if experiment in ("sft", "rw", "dpo", "simpo", "orpo", "kto") else "path"
        return [*(f"{name}.path" for name in models), f"dataset.{is_fed}", "dataset.valid_path"]

    def replace_path(self, experiment: str, word: str, given: set[str]) -> str:
        """Returns an option with a path of this folder where it names a model or data."""
        if (match := OPTION.match(word)) is None:
            return word
        start, name, models = word[: match.start(2)], match[1], list_models(experiment)
        role, _, last = name.rpartition(".")
        if last == "path" and role in models:
            needs_head = models[role] and f"{role}.init_critic_from_actor" not in given
            return f"{start}{self.experts if 'A3B' in match[2] else self.models[needs_head]}"
        if name in ("dataset.path", "dataset.train_path", "dataset.valid_path"):
            return f"{start}{self.find_data(experiment)}"
        return f"{start}{self.folder / 'runs'}" if name == "fileroot" else word


Way = Callable[[Place, list[str]], object]


def plan(place: Place, words: list[str]) -> None:
    """All of an experiment before its first step: options, data, models' shapes, layouts."""
    experiment, *rest = words
    if experiment.startswith("--config"):
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
        experiment = str(recipe.read_config(["launch", words[0]])[EXPERIMENT_KEY])
        filled = [
            f"--config.{word}" if not word.startswith("--") else word for word in place.replace(experiment, words)
        ]
        assert recipe.main(["launch", *filled, "--plan"]) == 0
    elif any(word in ("--help", "--print-config") for word in rest):
        assert quickstart.main(words) == 0
    else:
        quick = ["planner.evaluations=1"] if "allocation_mode=search" in words else []
        assert quickstart.main([experiment, *place.replace(experiment, rest), *quick, "--plan"]) == 0


def plan_behind(place: Place, words: list[str]) -> None:
    """What is launched, behind the launcher's own words."""
    if "profile" in words:
        return measure(place, words[words.index("profile") + 1 :])
    names = [i for i, word in enumerate(words) if word in quickstart.EXPERIMENTS or word.startswith("--config=")]
    return plan(place, words[names[0] :])


def carry_out(place: Place, words: list[str]) -> None:
    """A command as it is, its models and files replaced."""
    name = words[0]
    paths = {
        "MODEL": "model",
        "SMALL": "model",
        "BEFORE": "model",
        "AFTER": "model",
        "train.jsonl": "data/sft-train.jsonl",
    }
    paths |= {"prompts.jsonl": "data/prompts-valid.jsonl", "num_prompts=20": "num_prompts=1"}
    for found, path in paths.items():
        words = [re.sub(rf"(^|=){re.escape(found)}$", rf"\g<1>{path}", word) for word in words]
    quick = ["gen.max_new_tokens=2"] if name in ("chat", "sample") else []
    assert quickstart.main([*words, *quick]) == 0


def search(place: Place, words: list[str]) -> None:
    """A plan of few candidates; the machine's file is one that is known."""
    experiment, *rest = words[1:]
    shutil.copy(ROOT / "realjax/allocation/clusters/h100.json", "cluster.json")
    filled = place.replace(experiment, rest)
    assert quickstart.main(["plan", experiment, *filled, "planner.evaluations=1"]) == 0


def measure(_: Place, words: list[str]) -> None:
    parse_overrides(ProfileConfig, words)


def submit(place: Place, words: list[str]) -> None:
    """A launcher that prints what it would submit."""
    assert quickstart.main([*words, "--dry-run"] if "--dry-run" not in words else words) == 0


def parse(_: Place, words: list[str]) -> None:
    """The flags of a tool, by its own parser."""

    class ParsedError(Exception):
        pass

    def stopping(parse_fn: Callable) -> Callable:
        def parse_and_stop(*args, **kwargs):
            parse_fn(*args, **kwargs)
            raise ParsedError

        return parse_and_stop

    module, rest = words[0], [word.strip("[]") for word in words[1:] if word not in LEFT_OUT]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParsedError):
        patch.setattr("sys.argv", [module, *rest])
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        importlib.import_module(module).main()


def look_up(_: Place, words: list[str]) -> None:
    """A target of the Makefile, or an extra of the package."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [name for group in re.findall(r"\[(.*?)\]", " ".join(words)) for name in group.split(",")]
        assert set(asked) <= {*extras}, asked


def leave(_: Place, words: list[str]) -> None:
    """A program that is not ours."""


# By how a command begins: how many words go before what is carried out, how that is done, and why no more.
WAYS: dict[tuple[str, ...], tuple[int, Way, str]] = {
    ("make",): (0, look_up, "runs for minutes, and is what CI does"),
    ("pip",): (0, look_up, "needs a network"),
    ("python3", "-m", "venv"): (0, look_up, "needs a network"),
    ("tensorboard",): (0, leave, "a server that is not ours"),
    ("python", "-m", "launch.main"): (3, plan, "runs of each experiment are tests/e2e"),
    ("python", "-m", "launch.local"): (3, plan_behind, "processes are started by tests/launch"),
    ("python", "-m"): (2, parse, "each tool has tests of its own"),
    ("srun",): (1, plan_behind, "a cluster"),
    ("realjax", "plan"): (1, search, ""),
    ("realjax", "profile"): (2, measure, "takes minutes; tests/apps/test_profile.py"),
    ("realjax", "launch"): (1, submit, "a cluster"),
    ("realjax", "chat"): (1, carry_out, ""),
    ("realjax", "sample"): (1, carry_out, ""),
    ("realjax", "data"): (1, carry_out, ""),
    ("realjax",): (1, plan, "runs of each experiment are tests/e2e"),
}
# Carried out from first to last, as one reader would: tests/e2e/test_guide.py.
IN_ORDER = ("guide.md",)


def find_way(words: Sequence[str]) -> tuple[Way, list[str]]:
    """Returns how a command is carried out, and the words of it that are."""
    plain = [words[0].rsplit("/", 1)[-1], *words[1:]]
    for begin, (num_words, way, _) in WAYS.items():
        if tuple(plain[: len(begin)]) == begin:
            return way, plain[num_words:]
    raise AssertionError(f"no line of WAYS begins as {words}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


# ml_collections 1.1 loads recipes by a method that Python is giving up.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("command", [one for one in list_commands() if one.page not in IN_ORDER], ids=str)
def test_a_command_of_a_page_works(command: PageCommand, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    monkeypatch.syspath_prepend(place.folder)
    monkeypatch.setenv("REALJAX_FILEROOT", str(place.folder / "runs"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    way, words = find_way(command.words)
    with kept_log_settings():
        way(place, words)


@pytest.mark.parametrize("page", list_pages(), ids=lambda page: page.name)
def test_commands_are_marked_as_shell(page):
    assert not find_unmarked(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["from_trl.md", "from_verl.md"])
def test_what_other_libraries_options_are_called_here_is_an_option(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    cells = [row.split("|")[-2] for row in text.splitlines() if row.startswith("| ")]
    named = [span for cell in cells for span in re.findall(r"`([a-z]\w*(?:\.\w+)*(?:=\S*)?)`", cell)]
    classes = [experiment.config_cls for experiment in quickstart.EXPERIMENTS.values()]
    others = {*quickstart.EXPERIMENTS, "sequence", "constant", "train_batch_size", "ppo_mini_batch_size"}
    assert len(named) > 40
    for name in {span.partition("=")[0] for span in named} - others:
        assert any(is_option(cls, name) for cls in classes), name


def is_option(cls: type, name: str) -> bool:
    try:
        return not locate(cls, name).no_effect
    except ValueError:
        return False
