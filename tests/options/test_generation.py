"""Options of the `gen` experiment."""

from pathlib import Path

import pytest

from realjax.apps.recipe import read_config
from realjax.options.checks import list_notices, resolve_names, validate
from realjax.options.config_dict import from_config_dict
from realjax.options.generation import GenConfig
from realjax.options.parsing import parse_overrides


def test_stop_texts_are_kept_as_they_are_written():
    def stop(text):
        return parse_overrides(GenConfig, [f"stop={text}"]).stop

    assert stop("END") == ("END",)
    assert stop('["\n\n", Q:]') == ("\n\n", "Q:")
    assert stop("[]") == ()
    assert stop("[', and']") == (", and",)
    (notice,) = parse_overrides(GenConfig, [r"stop=[\n]"]).notices()
    assert notice.startswith(r"stop: \n is a backslash and an n here")
    assert parse_overrides(GenConfig, [r"stop=['\n']"]).notices() == []


# ml_collections 1.1 loads recipes by a method that Python is giving up.
@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
@pytest.mark.parametrize("text", ["[', and', '\\n']", "(', and', '\\n')", '[", and", "\\n"]'])
def test_a_recipes_command_line_reads_stop_texts_alike(text):
    recipe = Path(__file__).parents[2] / "configs" / "gen.py"
    config = read_config(["launch", f"--config={recipe}", f"--config.stop={text}"])
    assert from_config_dict(GenConfig, config).stop == (", and", "\n")


def test_samples_and_slots_have_short_names():
    config = parse_overrides(GenConfig, ["n=3", "gen.num_slots=16", "gen.use_cuda_graph=True"])
    assert (config.num_samples, config.gen.num_slots) == (3, 16)
    assert parse_overrides(GenConfig, ["output_file=null"]).output_file is None


def test_a_run_without_training_says_what_it_does_not_do(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    words = ["model.path=m", f"dataset.path={path}"]
    config = resolve_names(parse_overrides(GenConfig, words), "gen")
    validate(config)
    assert list_notices(config) == []
    (notice,) = list_notices(parse_overrides(GenConfig, [*words, "save_freq_steps=3"]))
    assert notice.startswith("exp_ctrl.save_freq_steps has no effect: gen answers each prompt once")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output_file=out.json"], "^output_file: found 'out.json'; it needs a name that ends in .jsonl"),
        (["output_file=a/out.jsonl"], "^output_file: found 'a/out.jsonl'"),
        (["n=0"], "^num_samples: found 0"),
        (["n=2", "gen.greedy=True"], "^num_samples: found 2 with greedy=True"),
        (['stop=[""]'], "^stop: found .* an empty text"),
        (["dataset.valid_path=x.jsonl"], "^dataset.valid_path: found 'x.jsonl'; gen answers dataset.path only"),
        (["model.type.is_critic=True"], "model.type.is_critic: found True"),
        (["gen.temperature=-1"], r"^gen.temperature: found -1.0; it must be 0 \(greedy\) or above"),
    ],
)
def test_what_no_run_can_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(GenConfig, words)
