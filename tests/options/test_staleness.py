"""What staleness asks of the options beside it: filled in where they are open, refused or said where they are not."""

import pytest

from realjax.apps.quickstart import EXPERIMENTS
from realjax.options.checks import list_notices
from realjax.options.parsing import parse_overrides
from realjax.options.rl import RLConfig
from tests.given.runs import GROUPS


def parse(experiment: str, *words: str) -> RLConfig:
    return parse_overrides(EXPERIMENTS[experiment].config_cls, words)


@pytest.mark.parametrize("experiment", GROUPS)
def test_older_answers_are_corrected_for_by_default_and_own_ones_are_not(experiment):
    group = GROUPS[experiment]
    for words, recomputes, kind in (
        ((), False, "none"),
        (("staleness=1",), True, "tis"),
        (("staleness=3", f"{group}.correction.kind=mis"), True, "mis"),
        (("staleness=1", f"{group}.correction.kind=none"), True, "none"),
        (("staleness=1", f"{group}.surrogate=clip", f"{group}.recompute_logprobs=False"), False, "none"),
        ((f"{group}.correction.kind=tis",), True, "tis"),
    ):
        config = parse(experiment, *words)
        own = config.algorithm.resolved(config.staleness)
        assert (own.recomputes, own.recompute_logprobs, own.correction.kind) == (recomputes, recomputes, kind), words
        assert own.correction.is_on == (kind != "none")


def test_a_gradient_without_any_ratio_is_refused_for_older_answers():
    with pytest.raises(ValueError, match="^staleness: found 1 with recompute_logprobs=False and surrogate=reinforce"):
        parse("grpo", "staleness=1", "ppo.recompute_logprobs=False", "ppo.surrogate=reinforce")
    with pytest.raises(ValueError, match="^ppo.correction.kind: found tis with recompute_logprobs=False"):
        parse("grpo", "ppo.recompute_logprobs=False", "ppo.correction.kind=tis")


def test_a_correction_that_was_switched_off_is_said():
    said = list_notices(parse("grpo", "staleness=1", "ppo.correction.kind=none"))
    assert any("correction.kind=none with staleness=1" in line for line in said)
    assert not any("staleness" in line for line in list_notices(parse("grpo", "ppo.correction.kind=none")))
    # Levels and bounds of weights mean something where there are any.
    assert not any(
        "level" in line for line in list_notices(parse("grpo", "staleness=1", "ppo.correction.level=sequence"))
    )
