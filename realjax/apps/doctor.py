"""What could keep a run from working, looked at before it: `realjax doctor [<experiment>] key=value ...`.

Started as runs are, in one process or several. A line for each thing, `ok` or what is wrong and what helps; the exit
code is 1 when anything is wrong.
"""

import os
from collections.abc import Sequence

from realjax.apps.checkup import check_models, look, saved_bytes
from realjax.apps.devices import join_group, prepare_devices, prepare_environment
from realjax.apps.log import configure_logging
from realjax.apps.present import count_devices, count_present
from realjax.apps.quickstart import EXPERIMENTS, find_experiment
from realjax.apps.words import HELP_FLAGS, take_option_files
from realjax.core.processes import is_first
from realjax.launch.environment import end_with_launcher, find_process_group
from realjax.options.checks import resolve_names
from realjax.options.common import CommonExperimentConfig
from realjax.options.describe import describe_options
from realjax.options.doctor import DoctorConfig
from realjax.options.machine import resolve_machine
from realjax.options.parsing import parse_overrides
from realjax.options.paths import find_fileroot


def main(words: Sequence[str]) -> int:
    """Runs the command line and returns 0 where all is well, 1 otherwise. ValueError for what cannot be looked at."""
    if any(word in HELP_FLAGS for word in words):
        print(f"{__doc__}\n{describe_options(DoctorConfig, 'doctor')}", end="")
        return 0
    configure_logging()
    run: CommonExperimentConfig | None = None
    if words and words[0] in EXPERIMENTS:
        config_cls = find_experiment(words[0]).config_cls
        overrides, layers = take_option_files(words[1:], config_cls, words[0])
        run = resolve_names(parse_overrides(config_cls, overrides, *layers), words[0])
    group = find_process_group(os.environ)
    run = run and resolve_machine(run, count_present(group), os.environ)
    config = run or parse_overrides(DoctorConfig, list(words))
    end_with_launcher()
    prepare_environment(config, group)
    if group is not None:
        join_group(config, group)
    root = find_fileroot(config.fileroot)
    devices = prepare_devices(config.n_nodes, count_devices(config) // config.n_nodes, root / ".cache" / "jax")
    spec = None if run is None else find_experiment(words[0]).build(run)
    findings = look(root, devices, 0 if spec is None else saved_bytes(spec))
    findings += [] if spec is None else [check_models(spec)]
    for finding in findings if is_first() else ():
        print(finding, flush=True)
    return 0 if all(finding.is_well for finding in findings) else 1
