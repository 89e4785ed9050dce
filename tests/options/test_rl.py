"""The quickstart's PPO command word for word, ReaL's example scripts, the recipes, and what no run can be."""

import dataclasses
import json
import shlex
from pathlib import Path

import jax
import pytest

from realjax.allocation.modes import choose_devices, choose_strategy
from realjax.apps.recipe import read_config
from realjax.core.layout import Layout, ParallelStrategy
from realjax.options.checks import list_notices, resolve_names, validate
from realjax.options.config_dict import from_config_dict, to_config_dict, to_json
from realjax.options.describe import describe_options
from realjax.options.distill import DistillConfig
from realjax.options.fields import list_options
from realjax.options.generation import GenConfig
from realjax.options.parallel import allocation_options
from realjax.options.parsing import build, parse_overrides
from realjax.options.rl import GRPOConfig, PPOConfig, ReinforcePPConfig, ReMaxConfig, RLOOConfig

QUICKSTART_PPO = shlex.split("""
    experiment_name=quickstart-ppo \
    trial_name=release \
    total_train_epochs=1 \
    allocation_mode=heuristic \
    save_freq_steps=null \
    actor.type._class=llama \
    actor.type.size=7 \
    actor.type.is_critic=False \
    actor.path=/saved/sft/model/path \
    actor.gradient_checkpointing=True \
    critic.type._class=llama \
    critic.type.size=7 \
    critic.type.is_critic=True \
    critic.path=/saved/rw/model/path \
    critic.gradient_checkpointing=True \
    ref.type._class=llama \
    ref.type.size=7 \
    ref.type.is_critic=False \
    ref.path=/saved/sft/model/path \
    rew.type._class=llama \
    rew.type.size=7 \
    rew.type.is_critic=True \
    rew.path=/saved/rw/model/path \
    dataset.path=/path/to/prompt/dataset.jsonl \
    dataset.max_prompt_len=256 \
    dataset.train_bs_n_seqs=128 \
    ppo.max_new_tokens=256 \
    ppo.min_new_tokens=256 \
    ppo.ppo_n_minibatches=4 \
    ppo.kl_ctl=0.1 \
    ppo.force_no_logits_mask=False \
    ppo.value_eps_clip=0.2 \
    ppo.reward_output_scaling=10.0 \
    ppo.adv_norm=True ppo.value_norm=True \
    ppo.top_p=0.9 ppo.top_k=1000
""")
GENERATION_ALIASES = {f"ppo.{name}": f"ppo.{path}" for name, path in PPOConfig().ppo.ALIASES.items()}

# ReaL's example scripts, as far as they differ from the quickstart.
SCRIPT = shlex.split(r"""
    mode=local exp_ctrl.total_train_epochs=1 exp_ctrl.save_freq_steps=null n_nodes=1 n_gpus_per_node=8
    dataset.max_prompt_len=128 dataset.train_bs_n_seqs=128 actor.optimizer.lr_scheduler_type=linear
    actor.enable_bf16=True actor.enable_fp16=False actor.backend=megatron actor.zero_stage=1
    ppo.gen.max_new_tokens=512 ppo.gen.min_new_tokens=512 ppo.gen.top_p=0.9 ppo.gen.top_k=1000
    ppo.gen.use_cuda_graph=True ppo.gen.force_cudagraph_recapture=True ppo.gen.force_no_logits_mask=False
""")
MANUAL = [
    *SCRIPT,
    *shlex.split(r"""
        allocation_mode=manual nodelist=NODE01
        actor_gen.parallel.data_parallel_size=4 actor_gen.parallel.pipeline_parallel_size=2
        critic_inf.device_mesh=\'NODE01:0,1\' critic_inf.parallel.data_parallel_size=2
        rew_inf.device_mesh=\'NODE01:2,3\' rew_inf.parallel.pipeline_parallel_size=2
        ref_inf.device_mesh=\'NODE01:4,5,6,7\' ref_inf.parallel.pipeline_parallel_size=4
        critic_train.device_mesh=\'NODE01:4,5,6,7\' critic_train.parallel.data_parallel_size=2
        critic_train.parallel.pipeline_parallel_size=2
        actor_train.device_mesh=\'NODE01:0,1,2,3\' actor_train.parallel.data_parallel_size=2
        actor_train.parallel.pipeline_parallel_size=2
    """),
]
MANUAL_LAYOUTS = {
    "actor_gen": "d4p2m1 on 0-7",
    "critic_inf": "d2p1m1 on 0-1",
    "rew_inf": "d1p2m1 on 2-3",
    "ref_inf": "d1p4m1 on 4-7",
    "critic_train": "d2p2m1+zero2 on 4-7",
    "actor_train": "d2p2m1+zero1 on 0-3",
}
SYMMETRIC = [*SCRIPT, "allocation_mode=m2d2p2", "actor_gen.n_mbs=2", "actor_train.n_mbs=4", "ref_inf.n_mbs=2"]

CONFIGS = {
    "distill": DistillConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "dapo": GRPOConfig,
    "rloo": RLOOConfig,
    "remax": ReMaxConfig,
    "reinforce_pp": ReinforcePPConfig,
    "gen": GenConfig,
}


@pytest.fixture
def sources(tmp_path):
    """Words that give every model and the data."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    return [f"dataset.path={path}", *(f"{role}.path=m" for role in ("actor", "critic", "ref", "rew"))]


def parse(words, config_cls=PPOConfig):
    return resolve_names(parse_overrides(config_cls, words), "ppo")


def get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_the_quickstart_command_sets_what_it_says():
    config = parse_overrides(PPOConfig, QUICKSTART_PPO)
    for word in QUICKSTART_PPO:
        path, _, text = word.partition("=")
        value = get(config, (PPOConfig.ALIASES | GENERATION_ALIASES).get(path, path))
        assert str(value) == ("None" if text == "null" else text), path


def test_both_places_of_the_options_of_generation_are_the_same_option():
    v03 = [f"{GENERATION_ALIASES.get(key, key)}={text}" for key, _, text in (w.partition("=") for w in QUICKSTART_PPO)]
    assert parse_overrides(PPOConfig, v03) == parse_overrides(PPOConfig, QUICKSTART_PPO)
    assert parse_overrides(PPOConfig, ["ref_ema_eta=0.001"]).ppo.ref_ema_eta == 0.001
    with pytest.raises(ValueError, match=r"ppo.gen.top_k=5 and ppo.top_k=4 are two spellings"):
        parse_overrides(PPOConfig, ["ppo.top_k=4", "ppo.gen.top_k=5"])


def lay_out(config):
    options, layouts = allocation_options(config), {}
    for name in MANUAL_LAYOUTS:
        role, _, kind = name.partition("_")
        strategy = choose_strategy(options, name, is_train=kind == "train")
        zero_stage = getattr(config, role).zero_stage_or_default if kind == "train" else 0
        devices = [jax.devices()[i] for i in choose_devices(options, name, strategy)]
        layouts[name] = Layout(dataclasses.replace(strategy, zero_stage=zero_stage), tuple(devices))
    return layouts


def test_the_manual_script_gives_each_call_its_mesh(sources):
    config = parse([*MANUAL, *sources])
    validate(config)
    assert {name: str(layout) for name, layout in lay_out(config).items()} == MANUAL_LAYOUTS


def test_the_symmetric_script_gives_all_calls_one_mesh(sources):
    config = parse([*SYMMETRIC, *sources])
    validate(config)
    for name, layout in lay_out(config).items():
        assert layout.device_names == "0-7"
        assert dataclasses.replace(layout.strategy, zero_stage=0) == ParallelStrategy(
            dp=2, pp=2, tp=2, sequence_parallel=name.endswith("_train")
        )
    assert (config.actor_gen.n_mbs, config.actor_train.n_mbs, config.ref_inf.n_mbs) == (2, 4, 2)


def test_a_script_of_the_reinforce_example_is_understood():
    words = [
        "gen.top_k=7",
        "discount=0.9",
        "adv_norm=True",
        "reward_output_scaling=2",
        "sample_gen.parallel.data_parallel_size=8",
        "greedy_gen.parallel.pipeline_parallel_size=8",
        "greedy_rew_inf.device_mesh=NODE01",
    ]
    config = parse_overrides(ReMaxConfig, words)
    remax = config.remax
    assert (remax.gen.top_k, remax.discount, remax.adv_norm, remax.reward_output_scaling) == (7, 0.9, True, 2)
    assert config.actor_gen.parallel.data_parallel_size == 8


@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_is_read_and_runs_once_it_has_paths(name, sources):
    config_cls = CONFIGS[name]
    recipe = Path(__file__).parents[2] / "configs" / f"{name}.py"
    fields = {field.name for field in dataclasses.fields(config_cls)}
    words = [word for word in [*sources, "model.path=m", "teacher.path=m"] if word.partition(".")[0] in fields]
    found = from_config_dict(
        config_cls, read_config(["launch", f"--config={recipe}", *(f"--config.{w}" for w in words)])
    )
    validate(resolve_names(found, name))


@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
def test_the_recipe_is_the_quickstart_command():
    recipe = Path(__file__).parents[2] / "configs" / "ppo.py"
    paths = [f"--config.{word}" for word in QUICKSTART_PPO if "path=" in word]
    found = from_config_dict(PPOConfig, read_config(["launch", f"--config={recipe}", *paths]))
    assert found == parse_overrides(PPOConfig, QUICKSTART_PPO)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_give_an_equal_config(name):
    config_cls = CONFIGS[name]
    config = parse_overrides(config_cls, QUICKSTART_PPO if name == "ppo" else [])
    assert from_config_dict(config_cls, to_config_dict(config, experiment=name)) == config
    assert build(config_cls, json.loads(to_json(config))) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_help_names_every_option_once(name):
    text = describe_options(CONFIGS[name], name)
    for option in list_options(CONFIGS[name]):
        assert option.help, option.path
        assert text.count(f"\n  {option.path} ") == 1
    if name == "ppo":
        assert all(f"(also: {name})" in " ".join(text.split()) for name in GENERATION_ALIASES)


def test_models_that_no_call_needs_need_no_path(sources):
    without = lambda *roles: [word for word in sources if word.partition(".")[0] not in roles]
    assert parse([*sources]).unused == frozenset()
    config = parse([*without("rew"), "reward.fn=realjax.rewards.verifiable:number_reward"])
    validate(config)
    assert config.unused == {"rew", "rew_inf"}
    config = parse([*without("ref", "critic"), "ppo.kl_ctl=0"], GRPOConfig)
    validate(config)
    assert config.unused == {"ref", "ref_inf"}
    # Nor do their calls count where sizes are compared with the machine.
    validate(parse([*without("ref"), "ppo.kl_ctl=0", *MANUAL, "ref_inf.device_mesh=null"]))
    with pytest.raises(ValueError, match="^ref.path: nothing given"):
        validate(parse(without("ref")))
    with pytest.raises(ValueError, match="^rew.path: nothing given, and no other source of rewards"):
        validate(parse(without("rew")))


def test_a_reward_function_that_is_not_there_is_found_out_at_once(sources):
    with pytest.raises(ValueError, match="^reward.fn: the module of 'no_such_module:f' cannot be found"):
        validate(parse([*sources, "reward.fn=no_such_module:f"]))


def test_a_time_limit_needs_something_that_can_stop_a_function(sources):
    limited = [*sources, "reward.timeout_s=2"]
    with pytest.raises(ValueError, match=r"^reward.timeout_s: found 2 with reward.workers=0, where nothing can stop "):
        validate(parse([*limited, "reward.fn=tests.given.rewards:shortness"]))
    validate(parse([*limited, "reward.fn=tests.given.rewards:shortness", "reward.workers=1"]))
    validate(parse([*limited, "reward.fn=tests.given.rewards:troubled_async"]))


def test_evaluations_need_held_out_prompts(sources):
    path = next(word for word in sources if word.startswith("dataset.path")).partition("=")[2]
    with pytest.raises(ValueError, match=r"^dataset.valid_path: nothing given, but eval_freq_\*"):
        validate(parse([*sources, "eval_freq_steps=2"]))
    validate(parse([*sources, "eval_freq_steps=2", f"dataset.valid_path={path}"]))


def test_notices_name_scores_that_nobody_gets_and_models_that_are_not_used(sources):
    (notice,) = list_notices(parse([*sources, "ppo.min_new_tokens=256"]))
    assert notice.startswith("gen.min_new_tokens equals max_new_tokens, so no answer can end by itself")
    assert list_notices(parse([*sources, "ppo.min_new_tokens=0"])) == []
    assert list_notices(parse([*sources, "ppo.min_new_tokens=256", "ppo.missing_eos_penalty=0"])) == []
    (notice,) = list_notices(parse([*sources, "ppo.min_new_tokens=0", "ppo.kl_ctl=0"]))
    assert notice == "ref.path has no effect: with kl_ctl=0 no reference is loaded."


def test_lengths_follow_the_generation():
    assert parse_overrides(PPOConfig, ["ppo.max_new_tokens=300"]).ppo.resolved().max_response_len == 300
    assert parse_overrides(PPOConfig, ["ppo.max_response_len=9"]).ppo.resolved().max_response_len == 9


@pytest.mark.parametrize(
    ("config_cls", "words", "message"),
    [
        (
            PPOConfig,
            ["ppo.ppo_n_minibatches=129", "dataset.train_bs_n_seqs=128"],
            "129 for the 128 sequences of a step",
        ),
        (GRPOConfig, ["ppo.ppo_n_minibatches=9", "dataset.train_bs_n_seqs=2"], "9 for the 8 sequences of a step"),
        (PPOConfig, ["ppo.ppo_epochs=0"], "^ppo.ppo_epochs: found 0; it must be at least 1"),
        (PPOConfig, ["ppo.top_p=2"], r"^ppo.gen.top_p: found 2.0; it must be in \(0, 1\]"),
        (PPOConfig, ["ppo.max_new_tokens=8", "ppo.min_new_tokens=9"], "^ppo.gen.min_new_tokens: found 9"),
        (PPOConfig, ["ppo.kl_ctl=-1"], "^ppo.kl_ctl: found -1.0; it must be at least 0"),
        (PPOConfig, ["ppo.gae_lambda=2"], "^ppo.gae_lambda: found 2.0"),
        (PPOConfig, ["ref_ema_eta=2"], "^ppo.ref_ema_eta: found 2.0"),
        (PPOConfig, ["ref_ema_eta=0.1", "ppo.kl_ctl=0"], "^ppo.ref_ema_eta: found 0.1 with kl_ctl=0.0"),
        (PPOConfig, ["ppo.num_slots=0"], "^ppo.gen.num_slots: found 0"),
        (PPOConfig, ["eval.num_prompts=0"], "^eval.num_prompts: found 0"),
        (PPOConfig, ["eval.greedy=False", "eval.sampled=False"], "^eval.greedy: found False, as is eval.sampled"),
        (PPOConfig, ["critic.type.is_critic=False"], "critic.type.is_critic: found False"),
        (PPOConfig, ["rew.type.is_critic=False"], "rew.type.is_critic: found False"),
        (PPOConfig, ["actor.type.is_critic=True"], "actor.type.is_critic: found True"),
        (PPOConfig, ["critic.optimizer.type=empty"], "critic.optimizer.type: found empty"),
        (PPOConfig, ["is_rew_lora=True"], "rew_lora_path: found null with is_rew_lora=True; give the directory"),
        (
            PPOConfig,
            ["rew_head_path=x"],
            "rew_head_path: found 'x'; the head of a reward model is part",
        ),
        (PPOConfig, ["ppo.topp=1"], "^unknown option ppo.topp: .*ppo.gen.top_p"),
        (GRPOConfig, ["group_size=1"], "^group_size: found 1; it must be at least 2"),
        (GRPOConfig, ["ppo.greedy=True"], "^group_size: found 4 with greedy=True"),
        (RLOOConfig, ["rloo.temperature=0"], "^group_size: found 4 with greedy=True"),
        (GRPOConfig, ["ppo.gen.greedy=True", "group_size=2", "eval.num_samples=2"], "found 2 with greedy=True"),
        (
            ReinforcePPConfig,
            ["eval.num_samples=2", "reinforce.temperature=0"],
            "^eval.num_samples: found 2 with",
        ),
        (ReinforcePPConfig, ["reinforce.use_baseline=True"], "^reinforce.use_baseline: found True with group_size=1"),
        (ReMaxConfig, ["gen.greedy=True"], "with greedy=True"),
    ],
)
def test_what_no_run_can_be_is_refused(config_cls, words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(config_cls, words)


def test_answers_of_a_fixed_length_get_their_score():
    """Where no answer can end by itself none is cut off either; a penalty that was asked for stays."""
    fixed = ["ppo.max_new_tokens=8", "ppo.min_new_tokens=8"]
    assert parse_overrides(PPOConfig, fixed).ppo.resolved().missing_eos_penalty == 0
    assert parse_overrides(PPOConfig, [*fixed, "ppo.missing_eos_penalty=2"]).ppo.resolved().missing_eos_penalty == 2
    assert parse_overrides(PPOConfig, fixed[:1]).ppo.resolved().missing_eos_penalty is None
