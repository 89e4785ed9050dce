import dataclasses

import pytest

from realjax.models.config import AttentionConfig, LayerKind, NormConfig, RopeConfig, cut_order
from tests.given.models import make_model

KINDS = (LayerKind(name="near", mixer=AttentionConfig(window=4)), LayerKind(name="far"))
turned = lambda rope: (LayerKind(mixer=AttentionConfig(rope=rope)),)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "model config: vocab_size=0; it must be at least 1"),
        ({"num_layers": -1}, "model config: num_layers=-1"),
        ({"num_q_heads": 8, "num_kv_heads": 3}, "8 query heads do not divide over 3 key-value heads"),
        ({"num_empty_layers": -1}, "model config: num_empty_layers=-1; it must be at least 0"),
        ({"head_dim": 5}, "head_dim=5 is odd; rotary embedding needs an even head size"),
        (
            {"pattern": turned(RopeConfig(fraction=0.75))},
            r"3 of head_dim=4 dims turn \(0.75 of them\); rotary embedding",
        ),
        ({"pattern": turned(RopeConfig(scaling="longrope", short_factors=(1, 2)))}, "has 0 long factors; it needs 2"),
        ({"is_critic": True, "tied": True}, "a critic has its own scalar head"),
        ({"pattern": ()}, "a pattern of 0 layers for 2"),
        ({"pattern": KINDS * 2}, "a pattern of 4 layers for 2"),
        ({"pattern": (KINDS[0], dataclasses.replace(KINDS[1], name="near"))}, "kinds of layer are called 'near'"),
        ({"pattern": (LayerKind(name="a/b"),)}, "layers are called .'a/b'.; use letters, digits and _"),
        ({"pattern": KINDS, "num_empty_layers": 2}, r"num_empty_layers=2 with layers of several kinds \(near, far\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_model().config, **change)


def test_a_layer_norm_that_adds_1_is_refused_and_odd_heads_are_where_they_are_turned():
    with pytest.raises(ValueError, match="one_plus with kind='layer'"):
        NormConfig(kind="layer", one_plus=True)
    assert make_model(rope=None, head_dim=5).config.head_dim == 5


def test_a_critic_has_the_same_trunk_and_a_head_of_its_own():
    tied = make_model(tied=True).config
    critic = tied.as_critic()
    assert critic.is_critic and not critic.tied and critic.as_critic() == critic
    assert dataclasses.replace(critic, is_critic=False, tied=True) == tied


def test_stages_that_would_differ_are_refused():
    assert cut_order(tuple("abab"), 2) == ("a", "b")
    with pytest.raises(ValueError, match=r"2 pipeline stages of 4 layers \(a, b\) .*_size among \[1\]"):
        cut_order(tuple("aabb"), 2)
    assert make_model(num_layers=5).config.count_empty_layers(4) == 3
    several = make_model(num_layers=4, pattern=KINDS).config
    assert several.count_empty_layers(2) == 0
    with pytest.raises(ValueError, match=r"among \[1, 2\]"):
        several.count_empty_layers(4)
