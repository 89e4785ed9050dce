"""The help that fits two screens: the options that matter, with an example; and a search among all of them."""

import dataclasses
import shutil
from fnmatch import fnmatchcase
from textwrap import fill, shorten

from realjax.options.common import CommonExperimentConfig
from realjax.options.describe import WIDEST, default_text, first_sentence
from realjax.options.fields import Option, find_instances, list_aliases, list_options
from realjax.options.model import ModelTrainEvalConfig

# Patterns of dotted names by what they are about; an experiment has some of each.
COMMON: dict[str, tuple[str, ...]] = {
    "Models": ("model.path", "actor.path", "critic.path", "ref.path", "rew.path", "teacher.path", "reward.fn"),
    "Data": (
        *("dataset.train_path", "dataset.path", "dataset.valid_path", "dataset.max_seqlen", "dataset.max_prompt_len"),
        *("dataset.train_bs_n_seqs", "dataset.truncate", "dataset.use_chat_template"),
    ),
    "Learning": (
        *("model.optimizer.lr", "actor.optimizer.lr", "critic.optimizer.lr", "beta", "group_size"),
        *("*.kl_ctl", "*.eps_clip", "*.ppo_n_minibatches", "distill.divergence", "distill.top_k", "distill.data_share"),
    ),
    "Answers": ("*gen.max_new_tokens", "*gen.temperature", "*gen.top_p", "num_samples", "output_file"),
    "How long": (
        *("exp_ctrl.total_train_epochs", "exp_ctrl.max_steps", "exp_ctrl.save_freq_steps", "exp_ctrl.eval_freq_steps"),
    ),
    "The run": (
        *("trial_name", "fileroot", "recover_mode", "seed"),
        *("n_gpus_per_node", "allocation_mode", "allocation.max_tokens_per_mb", "actor_train.max_tokens_per_mb"),
    ),
}
# Whose example takes a reward from a model; the others take it from a function.
WITH_REWARD_MODEL = ("ppo", "remax")
_NAME_WIDTH, _DEFAULT_WIDTH = 30, 11


def describe_common(cls: type[CommonExperimentConfig], experiment: str) -> str:
    """Returns the help of an experiment in two screens."""
    width = _find_width()
    options, aliases = list_options(cls), list_aliases(cls)
    lines = [
        fill(f"realjax {experiment}: {first_sentence(cls)}", width),
        "",
        "For example:",
        *_example(cls, experiment),
        "",
        fill(
            f"Option, default, meaning; --help all lists every option ({len(options)}), --help WORD those with the "
            "word, --config FILE.yaml reads them from a file, --print-config prints those in force.",
            width,
        ),
    ]
    for heading, patterns in COMMON.items():
        chosen = [one for pattern in patterns for one in options if fnmatchcase(one.path, pattern)]
        lines += ["", f"{heading}:", *(_line(one, aliases, width) for one in chosen)] if chosen else []
    return "\n".join(lines) + "\n"


def search_options(cls: type[CommonExperimentConfig], experiment: str, word: str) -> str:
    """Returns the options whose name or meaning has the word. ValueError where none has."""
    width, aliases = _find_width(), list_aliases(cls)
    found = [one for one in list_options(cls) if word.lower() in f"{one.path} {one.help}".lower()]
    if not found:
        raise ValueError(f"--help {word}: no option of {experiment} has it in its name or meaning; try another word")
    lines = [f"realjax {experiment}, options with {word!r}:"]
    for one in found:
        name = _shortest(one.path, aliases)
        lines += [
            f"  {name}={default_text(one.default)}",
            fill(one.help, width, initial_indent=_INDENT, subsequent_indent=_INDENT),
        ]
    return "\n".join(lines) + "\n"


_INDENT = " " * 6


def _find_width() -> int:
    return min(WIDEST, shutil.get_terminal_size().columns)


def _line(option: Option, aliases: dict[str, str], width: int) -> str:
    name, value = _shortest(option.path, aliases), default_text(option.default)
    start = f"  {name:{_NAME_WIDTH}} {value:{_DEFAULT_WIDTH}} "
    return (start + shorten(option.help, max(20, width - len(start)), placeholder=" ...")).rstrip()


def _shortest(path: str, aliases: dict[str, str]) -> str:
    return min(path, aliases.get(path, path), key=len)


def _example(cls: type[CommonExperimentConfig], experiment: str) -> list[str]:
    """Returns a command with what an experiment cannot do without."""
    config = cls()
    dataset = next(f.name for f in dataclasses.fields(cls) if f.name == "dataset")
    models = find_instances(config, ModelTrainEvalConfig)
    words = [
        f"{name}.path={'REWARD_MODEL' if model.is_critic and experiment != 'rw' else 'MODEL'}"
        for name, model in models.items()
        if (experiment in WITH_REWARD_MODEL if name == "rew" else name not in config.unused)
    ]
    words += (
        []
        if "rew" not in models or experiment in ("ppo", "remax")
        else ["reward.fn=realjax.rewards.verifiable:number_reward"]
    )
    data = "train_path=train.jsonl" if hasattr(getattr(config, dataset), "train_path") else "path=prompts.jsonl"
    words.append(f"{dataset}.{data}")
    return [f"  realjax {experiment} {words[0]} \\", *(f"    {word} \\" for word in words[1:-1]), f"    {words[-1]}"]
