import dataclasses

import pytest

from tests.builders import make_model


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "model config: vocab_size=0; it must be at least 1"),
        ({"num_layers": -1}, "model config: num_layers=-1"),
        ({"num_q_heads": 8, "num_kv_heads": 3}, "8 query heads do not divide over 3 key-value heads"),
        ({"num_empty_layers": -1}, "model config: num_empty_layers=-1; it must be at least 0"),
        ({"head_dim": 5}, "head_dim=5 is odd; rotary embedding needs an even head size"),
        ({"is_critic": True, "tied": True}, "a critic has its own scalar head"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_model().config, **change)


def test_a_critic_has_the_same_trunk_and_a_head_of_its_own():
    tied = make_model(tied=True).config
    critic = tied.as_critic()
    assert critic.is_critic and not critic.tied and critic.as_critic() == critic
    assert dataclasses.replace(critic, is_critic=False, tied=True) == tied
