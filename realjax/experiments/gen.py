"""Generation: one model answers a file of prompts."""

from collections.abc import Sequence

import jax

from realjax.data.prompts import load_prompts
from realjax.dataflow.generation_run import GenerationSpec
from realjax.experiments import common
from realjax.hf.generation import load_eos_ids
from realjax.options.config_dict import to_json
from realjax.options.generation import GenConfig
from realjax.options.paths import run_paths


def build(config: GenConfig, devices: Sequence[jax.Device]) -> GenerationSpec:
    """Returns the run. Raises ValueError for data, model or layout that cannot work, before anything is allocated."""
    role = common.role_spec("default", config.model, devices, is_trained=False)
    layout = common.call_layout("allocation", config, config.allocation, config.model, devices, is_train=False)
    role = common.with_equal_stages(role, {"allocation": layout})
    common.check_slots(config.gen.num_slots, layout, "gen.num_slots")
    tokenizer = common.load_tokenizer(role.path)
    data = config.dataset
    prompts = load_prompts(
        data.path, tokenizer, max_prompt_len=data.max_prompt_len, use_chat_template=data.use_chat_template
    )
    return GenerationSpec(
        title=f"{config.experiment_name} / {config.trial_name}",
        config_json=to_json(config),
        # The answers themselves say which prompts they belong to.
        identity=common.make_identity(config, "gen", {role.name: role}, {}),
        paths=run_paths(config),
        role=role,
        layout=layout,
        prompts=prompts,
        tokenizer=tokenizer,
        config=config.gen,
        eos_ids=load_eos_ids(role.path, tokenizer),
        num_samples=config.num_samples,
        prompts_per_call=data.train_bs_n_seqs,
        num_slots=config.gen.num_slots,
        stop=config.stop,
        output_file=config.output_file,
        seed=config.seed,
        recover_mode=config.recover_mode,
    )
