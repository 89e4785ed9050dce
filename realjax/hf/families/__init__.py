"""The supported architectures. Adding one is one small file here and one line in `FAMILIES`."""

from dataclasses import fields, is_dataclass, replace

from realjax.core.json_text import JsonObject
from realjax.hf.families import (
    gemma,
    gemma2,
    gemma3,
    glm4_moe,
    gpt2,
    gpt_oss,
    granite,
    granitemoe,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from realjax.hf.families.unread import ReadKeys, check_unread
from realjax.hf.families.values import check_values
from realjax.hf.rules import Family
from realjax.models.config import LayerKind, ModelConfig

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "granite": granite.FAMILY,
    "mistral": mistral.FAMILY,
    "ministral3": ministral3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "granitemoe": granitemoe.FAMILY,
}


def find_family(name: str) -> Family:
    """Returns the family called `name` (`ModelConfig.family`). Raises ValueError naming the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"model family '{name}' is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def config_from_hf(hf: JsonObject, subject: str) -> ModelConfig:
    """Returns the model that a config.json describes. Raises ValueError, naming `subject`, when it is not supported.

    A `*ForSequenceClassification` of one label is a critic (or reward model), a `*ForCausalLM` a language model. Of a
    model with a part for more than text it is the text model.
    """
    check_values(hf, subject)
    check_values(hf := take_text(hf), subject)
    found = _name_architecture(hf)
    for family in FAMILIES.values():
        if found in (family.causal_class, family.critic_class, family.name):
            break
    else:
        supported = ", ".join(f"{family.causal_class} (critic: {family.critic_class})" for family in FAMILIES.values())
        raise ValueError(f"{subject}: architecture '{found}' is not supported; supported: {supported}")
    if "quantization_config" in hf:
        raise ValueError(f"{subject}: the checkpoint is quantised; training needs the unquantised one")
    if (named := hf.get("transformers_weights")) is not None:
        raise ValueError(f"{subject}: transformers_weights names {named!r}; only model.safetensors is read: rename it")
    is_critic = found == family.critic_class
    labels = len(hf.get("id2label") or "ab")  # transformers leaves out its default of two labels
    if is_critic and hf.get("num_labels", labels) != 1:
        raise ValueError(f"{subject}: {found} with {hf.get('num_labels', labels)} labels; a critic has one")
    keys = ReadKeys({**family.defaults, **hf})
    try:
        config = family.config_from_hf(keys, is_critic)
        check_unread(keys)
    except KeyError as error:
        raise ValueError(f"{subject}: no key {error}; a {found} config needs it") from error
    except ValueError as error:
        raise ValueError(f"{subject}: {error}") from error
    return config


def take_text(hf: JsonObject) -> JsonObject:
    """Returns the config.json of the text model of one that `hf` describes with more parts, else `hf` itself."""
    if not isinstance(text := hf.get("text_config"), dict):
        return hf
    found = _name_architecture(hf)
    for family in FAMILIES.values():
        classes = dict(zip(family.outer_classes, (family.causal_class, family.critic_class)))
        if found in classes:
            whole = {**text, **hf, "architectures": [classes[found]], "model_type": family.name}
            return {key: value for key, value in whole.items() if key not in ("text_config", "vision_config")}
    return hf


def _name_architecture(hf: JsonObject) -> str | None:
    return (hf.get("architectures") or [None])[0] or hf.get("model_type")


def config_to_hf(config: ModelConfig) -> JsonObject:
    """Returns the config.json of a model, in spellings that transformers 4 and 5 both read.

    Raises ValueError when the family cannot say what `config` says (a sliding window in llama, a bias qwen2 has not).
    """
    family = find_family(config.family)
    hf: JsonObject = {"model_type": family.name, **family.config_to_hf(config)}
    if config.is_critic:
        hf |= {"architectures": [family.critic_class], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    else:
        hf |= {"architectures": [family.causal_class]}
    config, read_back = (_rename_only_kind(one) for one in (config, config_from_hf(hf, "config.json")))
    if read_back != config:
        asked = ", ".join(dict.fromkeys(_list_differences("config", config, read_back)))
        raise ValueError(f"model config: a HuggingFace {hf['architectures'][0]} cannot have {asked}")
    return hf


def _rename_only_kind(config: ModelConfig) -> ModelConfig:
    """Returns the config whose kind of layer, if it has one alone, has the usual name: nothing is called by it then."""
    names = {} if len(config.kinds) > 1 else {"name": LayerKind().name}
    return replace(config, pattern=tuple(replace(kind, **names) for kind in config.pattern))


def _list_differences(name: str, asked: object, other: object) -> list[str]:
    """Returns `name=value` of what is another in `other`, from as deep inside as types are the same."""
    if asked == other:
        return []
    if isinstance(asked, tuple) and isinstance(other, tuple) and len(asked) == len(other):
        return [found for a, b in zip(asked, other) for found in _list_differences(name, a, b)]
    if is_dataclass(asked) and type(asked) is type(other):
        names = [field.name for field in fields(asked)]
        return [found for n in names for found in _list_differences(n, getattr(asked, n), getattr(other, n))]
    return [f"{name}={asked!r}"]
