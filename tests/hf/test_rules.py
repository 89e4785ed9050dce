import pytest

from realjax.hf.rules import Rule


@pytest.mark.parametrize(
    ("path", "name", "dims", "message"),
    [
        ("layers/mlp/up/kernel", "up_proj.weight", "F D -> D F", "needs {layer} where"),
        ("head/kernel", "layers.{layer}.weight", "F D -> D F", "needs {layer} where"),
        ("layers/mlp/up/kernel", "{layer}.{expert}.weight", "F D -> D F", "the same letters once on both sides"),
        ("head/kernel", "head.weight", "V D -> V", "the same letters once on both sides"),
    ],
)
def test_a_rule_that_does_not_hold_together_is_refused(path, name, dims, message):
    with pytest.raises(ValueError, match=message):
        Rule(path, name, dims)
