"""Arguments and mappings to options: the quickstart's command word for word, other spellings, and every error."""

import dataclasses
import logging
import shlex
from dataclasses import dataclass

import pytest

from realjax.core.option import check_ranges, nested, option
from realjax.options.fields import list_options
from realjax.options.parsing import build, nearest_names, parse_overrides
from realjax.options.supervised import SFTConfig

# The arguments of the quickstart's command, as a shell reads them.
QUICKSTART_SFT = shlex.split("""
    experiment_name=quickstart-sft \
    trial_name=release \
    allocation_mode=manual \
    mode=local \
    n_nodes=1 \
    total_train_epochs=8 \
    save_freq_steps=50 eval_freq_epochs=1 \
    model.type._class=llama \
    model.type.size=7 \
    model.type.is_critic=False \
    model.path=/path/or/HF-identifier/of/llama-7b \
    model.gradient_checkpointing=True \
    model.optimizer.type=adam \
    dataset.train_path=/path/to/train/dataset.jsonl \
    dataset.valid_path=/path/to/valid/dataset.jsonl \
    dataset.max_seqlen=1024 \
    allocation.parallel.pipeline_parallel_size=1 \
    allocation.parallel.model_parallel_size=2 \
    allocation.parallel.data_parallel_size=4 \
    allocation.parallel.use_sequence_parallel=True \
    dataset.train_bs_n_seqs=512 \
    dataset.valid_bs_n_seqs=512
""")

# v0.3's names, each with a value other than realjax's default where another one is allowed.
V03_SFT = shlex.split("""
exp_ctrl.total_train_epochs=3 exp_ctrl.save_freq_epochs=2 exp_ctrl.save_freq_steps=20 exp_ctrl.save_freq_secs=600
exp_ctrl.eval_freq_epochs=2 exp_ctrl.eval_freq_steps=7 exp_ctrl.eval_freq_secs=60 exp_ctrl.benchmark_steps=9
experiment_name=e trial_name=t mode=ray recover_mode=auto allocation_mode=m2d2p2 n_nodes=2 n_gpus_per_node=4 seed=5
nodelist=NODE[01-02] partition=dev image_name=image recover_retries=3
wandb_mode=offline
model.type._class=qwen2 model.type.size=13 model.type.is_critic=False model.path=m model.gradient_checkpointing=False
model.enable_fp16=False model.enable_bf16=True model.offload=True model.zero_stage=1 model.init_from_scratch=True
model.init_critic_from_actor=False model.lora=null
model.optimizer.type=adam model.optimizer.lr=2e-5 model.optimizer.weight_decay=0.1 model.optimizer.beta1=0.8
model.optimizer.beta2=0.99 model.optimizer.eps=1e-8 model.optimizer.min_lr_ratio=0.1
model.optimizer.lr_scheduler_type=linear model.optimizer.warmup_steps_proportion=0.1 model.optimizer.offload=True
allocation.parallel.model_parallel_size=2 allocation.parallel.pipeline_parallel_size=2
allocation.parallel.data_parallel_size=2 allocation.parallel.use_sequence_parallel=True allocation.n_mbs=4
allocation.device_mesh=NODE01 allocation_use_cache=True
dataset.train_path=a.jsonl dataset.valid_path=b.jsonl dataset.max_seqlen=128 dataset.train_bs_n_seqs=16
dataset.valid_bs_n_seqs=8 dataset.pad_to_max_length=True
""")
V03_WITHOUT_EFFECT = [
    "debug=False",
    "ignore_worker_error=True",
    "cache_clear_freq=10",
    "model.backend=deepspeed",
]


def test_quickstart_command_word_for_word():
    config = parse_overrides(SFTConfig, QUICKSTART_SFT)
    assert (config.experiment_name, config.trial_name, config.mode) == ("quickstart-sft", "release", "local")
    assert (config.allocation_mode, config.n_nodes, config.n_gpus_per_node) == ("manual", 1, None)
    ctrl = config.exp_ctrl
    assert (ctrl.total_train_epochs, ctrl.save_freq_steps, ctrl.eval_freq_epochs) == (8, 50, 1)
    assert (ctrl.save_freq_epochs, ctrl.eval_freq_steps, ctrl.benchmark_steps) == (None, None, None)
    assert dataclasses.astuple(config.model.type) == ("llama", 7, False)
    assert config.model.path == "/path/or/HF-identifier/of/llama-7b"
    assert config.model.gradient_checkpointing is True
    assert config.model.optimizer.type == "adam"
    strategy = config.allocation.parallel.strategy()
    assert (strategy.pp, strategy.tp, strategy.dp, strategy.sequence_parallel) == (1, 2, 4, True)
    assert config.dataset.train_path == "/path/to/train/dataset.jsonl"
    assert config.dataset.valid_path == ("/path/to/valid/dataset.jsonl",)
    assert (config.dataset.max_seqlen, config.dataset.train_bs_n_seqs, config.dataset.valid_bs_n_seqs) == (
        1024,
        512,
        512,
    )


@pytest.mark.parametrize("override", V03_SFT)
def test_every_v03_option_is_read_and_changes_what_it_names(override):
    key, _, text = override.partition("=")
    value, default = parse_overrides(SFTConfig, [override]), SFTConfig()
    if override == "model.lora=null":  # a group of options, whose defaults are no adapters
        assert parse_overrides(SFTConfig, [override]) == SFTConfig()
        return
    for name in key.split("."):
        value, default = getattr(value, name), getattr(default, name)
    value = ",".join(value) if isinstance(value, tuple) else value
    assert str(value) == {"null": "None", "2e-5": "2e-05", "1e-8": "1e-08"}.get(text, text)
    assert value != default or override in (
        "model.optimizer.type=adam",
        "model.type.is_critic=False",
        "model.init_critic_from_actor=False",
    )


@pytest.mark.parametrize("override", V03_WITHOUT_EFFECT)
def test_v03_options_without_effect_are_accepted_and_say_so(override, caplog):
    with caplog.at_level(logging.INFO, logger="realjax"):
        assert parse_overrides(SFTConfig, [override]) == SFTConfig()
    assert [record.getMessage().split(" has no effect here: ")[0] for record in caplog.records] == [
        override.split("=")[0]
    ]


def test_nothing_is_said_about_options_that_were_not_given(caplog):
    with caplog.at_level(logging.INFO, logger="realjax"):
        parse_overrides(SFTConfig, QUICKSTART_SFT)
    assert not caplog.records


@pytest.mark.parametrize("alias", list(SFTConfig.ALIASES))
def test_aliases_equal_the_names_they_stand_for(alias):
    assert parse_overrides(SFTConfig, [f"{alias}=3"]) == parse_overrides(SFTConfig, [f"{SFTConfig.ALIASES[alias]}=3"])


def test_two_spellings_may_agree_but_not_differ():
    agreed = parse_overrides(SFTConfig, ["save_freq_steps=3", "exp_ctrl.save_freq_steps=3"])
    assert agreed.exp_ctrl.save_freq_steps == 3
    with pytest.raises(ValueError, match="save_freq_steps=3 are two spellings of one option"):
        parse_overrides(SFTConfig, ["save_freq_steps=3", "exp_ctrl.save_freq_steps=4"])


def test_the_last_of_two_equal_keys_wins():
    assert parse_overrides(SFTConfig, ["seed=2", "seed=3"]).seed == 3


def test_null_turns_a_trigger_off():
    assert parse_overrides(SFTConfig, ["save_freq_steps=5", "save_freq_steps=null"]).exp_ctrl.save_freq_steps is None


@pytest.mark.parametrize("plus", ["+", "++"])
def test_hydra_plus_is_ignored(plus):
    assert parse_overrides(SFTConfig, [f"{plus}model.optimizer.lr=1e-4"]).model.optimizer.lr == 1e-4


def test_model_type_in_one_word_and_in_parts():
    assert parse_overrides(SFTConfig, ["model.type=qwen2-13"]).model.type.size == 13
    later = parse_overrides(SFTConfig, ["model.type=qwen2-13", "model.type.size=1"]).model.type
    assert (later._class, later.size) == ("qwen2", 1)
    for text in ("7", "llama", "llama-7-actor", "nosuch-7"):
        with pytest.raises(ValueError, match="^model.type: found .*llama-7-critic"):
            parse_overrides(SFTConfig, [f"model.type={text}"])


def test_values_may_hold_equal_signs():
    assert parse_overrides(SFTConfig, ["model.path=/runs/lr=1e-5/x"]).model.path == "/runs/lr=1e-5/x"


@pytest.mark.parametrize(
    ("key", "where", "near"),
    [
        ("model.optimzer.lr", "'model' has no option 'optimzer'", "model.optimizer.lr"),
        ("modle.path", "at the top level", "model.path"),
        ("lr", "at the top level", "model.optimizer.lr"),
        ("total_train_epoch", "at the top level", "total_train_epochs"),
        ("dataset.train_bs_n_seq", "'dataset' has no option 'train_bs_n_seq'", "dataset.train_bs_n_seqs"),
        ("parallel.data_parallel_size", "at the top level", "allocation.parallel.data_parallel_size"),
    ],
)
def test_unknown_keys_say_where_and_what_is_near(key, where, near):
    with pytest.raises(ValueError, match=f"^unknown option {key}: ") as caught:
        parse_overrides(SFTConfig, [f"{key}=1"])
    message = str(caught.value)
    assert where in message
    assert near in message.split("did you mean ")[1]


def test_a_key_like_no_other_points_to_help():
    with pytest.raises(ValueError, match="--help"):
        parse_overrides(SFTConfig, ["xyzzy=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n_nodes=1.5", "^n_nodes: found '1.5'; it needs int"),
        ("mode=pbs", "^mode: found 'pbs'; it needs one of slurm, local, ray"),
        ("model.optimizer=adam", r"^model.optimizer: found 'adam'; it needs model.optimizer.<name>=value"),
        ("model.path.x=1", r"^model.path.x: model.path is one value \(str\), it has no 'x'"),
        ("model.optimizer.lr=-1", "^model.optimizer.lr: found -1.0; it must be at least 0"),
        ("dataset.train_bs_n_seqs=0", "^dataset.train_bs_n_seqs: found 0; it must be at least 1"),
        ("save_freq_steps=0", "^exp_ctrl.save_freq_steps: found 0; it must be at least 1"),
        ("model.lora=x", "^model.lora: found 'x'; it needs a rank, such as model.lora=16"),
        ("model.type.is_critic=True", "^model.type.is_critic: found True; this model needs a language model's head"),
        ("model.optimizer.type=empty", "^model.optimizer.type: found empty; this model is trained"),
        ("model.path", "^argument 'model.path': expected key=value"),
        ("--multirun", "^argument '--multirun': expected key=value"),
        ("=3", "^argument '=3': expected key=value"),
    ],
)
def test_errors_have_full_names(override, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(SFTConfig, [override])


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    size: int = option(help="has no default", at_least=1)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A root."""

    inner: Inner = dataclasses.field()
    second: Inner = nested(Inner, size=2)
    flags: tuple[bool, ...] = option((), "a list")


def test_missing_options_are_named():
    with pytest.raises(ValueError, match=r"^inner.size \(int\): required, but not given; add inner.size=..."):
        parse_overrides(Outer, ["second.size=3"])
    assert parse_overrides(Outer, ["inner.size=1"]) == Outer(inner=Inner(size=1))
    assert parse_overrides(Outer, ["inner.size=1", "flags=[1,0]"]).flags == (True, False)


def test_build_reads_typed_values_and_text_alike():
    typed = build(
        SFTConfig, {"model": {"optimizer": {"lr": 1e-4}, "type": "qwen2-7"}, "seed": 2, "save_freq_steps": None}
    )
    assert typed == build(SFTConfig, {"model": {"optimizer": {"lr": "1e-4"}, "type": {"_class": "qwen2"}}, "seed": "2"})
    with pytest.raises(ValueError, match="unknown option model.optimizer.rl"):
        build(SFTConfig, {"model": {"optimizer": {"rl": 1e-4}}})
    assert build(SFTConfig, {"model": {}}) == SFTConfig()


def test_asdict_is_an_inverse_of_build():
    config = parse_overrides(SFTConfig, V03_SFT)
    assert build(SFTConfig, dataclasses.asdict(config)) == config


def test_every_option_can_be_set_to_its_own_default():
    for item in list_options(SFTConfig):
        text = "null" if item.default is None else str(item.default)
        assert parse_overrides(SFTConfig, [f"{item.path}={text}"]) == SFTConfig(), item.path


def test_nearest_names_are_few_and_real():
    names = [item.path for item in list_options(SFTConfig)]
    near = nearest_names("dataset.bs_n_seqs", names)
    assert set(near) == {"dataset.train_bs_n_seqs", "dataset.valid_bs_n_seqs"}
    assert nearest_names("qqqq", names) == []


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SFTConfig().seed = 3


def test_no_option_lacks_a_meaning():
    assert [item.path for item in list_options(SFTConfig) if not item.help] == []
