"""Each option of each experiment is in one of three kinds, and the lists name nothing that does not exist."""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from realjax.apps.quickstart import EXPERIMENTS
from realjax.options.fields import list_options
from realjax.options.resume import HARMLESS, STEERING, sort_options

PATHS = {name: [option.path for option in list_options(e.config_cls)] for name, e in EXPERIMENTS.items()}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_option_of_a_run_is_of_one_kind(experiment):
    config = EXPERIMENTS[experiment].config_cls()
    kinds = sort_options(config)
    found = [*kinds.fixed, *kinds.steering, *kinds.harmless]
    assert sorted(found) == sorted(path for path in PATHS[experiment] if path.split(".")[0] not in config.unused)
    # What decides about the result, whatever the experiment.
    assert {"seed", "dataset.train_bs_n_seqs"} <= kinds.fixed.keys()


def test_no_pattern_is_stale():
    everything = {path for paths in PATHS.values() for path in paths}
    patterns = (*HARMLESS, *STEERING)
    assert not [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in everything)]


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != "gen"])
def test_learning_rates_and_epochs_steer(experiment):
    config = EXPERIMENTS[experiment].config_cls()
    changed = replace(config, exp_ctrl=replace(config.exp_ctrl, total_train_epochs=3))
    before, after = sort_options(config), sort_options(changed)
    assert before.steering != after.steering and before.fixed == after.fixed and before.harmless == after.harmless
    assert any(path.endswith("optimizer.lr") for path in before.steering)
