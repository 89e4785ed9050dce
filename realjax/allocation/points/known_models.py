"""The sizes of models by their plain names, as publications and `--points` files spell them."""

import re
from collections.abc import Mapping
from dataclasses import replace

from realjax.allocation.workload import ModelShape


def _shape(sizes: tuple[int, int, int, int, int, int, int], **more: int | bool | tuple[int, ...]) -> ModelShape:
    """Returns the shape of (hidden size, layers, heads, key-value heads, head size, feed-forward size, vocabulary)."""
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab = sizes
    plain = ModelShape(
        hidden_size=hidden,
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        vocab_size=vocab,
    )
    return replace(plain, **more)


# Sizes are those of the models' published config.json, or of the named paper.
KNOWN: Mapping[str, ModelShape] = {
    # LLaMA, arXiv:2302.13971, and Llama 2, arXiv:2307.09288.
    "llama-7b": _shape((4096, 32, 32, 32, 128, 11008, 32000)),
    "llama-13b": _shape((5120, 40, 40, 40, 128, 13824, 32000)),
    "llama-30b": _shape((6656, 60, 52, 52, 128, 17920, 32000)),
    "llama-65b": _shape((8192, 80, 64, 64, 128, 22016, 32000)),
    "llama2-70b": _shape((8192, 80, 64, 8, 128, 28672, 32000)),
    # Code Llama, arXiv:2308.12950: what Llama's layout has at 34 billion.
    "codellama-34b": _shape((8192, 48, 64, 8, 128, 22016, 32000)),
    # Llama 3, arXiv:2407.21783; Llama 3.2's models of text.
    "llama3-1b": _shape((2048, 16, 32, 8, 64, 8192, 128256), is_tied=True),
    "llama3-3b": _shape((3072, 28, 24, 8, 128, 8192, 128256), is_tied=True),
    "llama3-8b": _shape((4096, 32, 32, 8, 128, 14336, 128256)),
    "llama3-70b": _shape((8192, 80, 64, 8, 128, 28672, 128256)),
    "llama3-405b": _shape((16384, 126, 128, 8, 128, 53248, 128256)),
    # Mistral, arXiv:2310.06825; Mixtral, arXiv:2401.04088.
    "mistral-7b": _shape((4096, 32, 32, 8, 128, 14336, 32000), windows=(4096,)),
    "mixtral-8x7b": _shape((4096, 32, 32, 8, 128, 14336, 32000), num_experts=8, experts_per_token=2),
    "mixtral-8x22b": _shape((6144, 56, 48, 8, 128, 16384, 32768), num_experts=8, experts_per_token=2),
    # MosaicML's MPT in llm-foundry's scripts/train/yamls: ungated, tied, learned nothing for positions.
    "mpt-125m": _shape((768, 12, 12, 12, 64, 3072, 50368), is_gated=False, is_tied=True),
    "mpt-350m": _shape((1024, 24, 16, 16, 64, 4096, 50368), is_gated=False, is_tied=True),
    "mpt-760m": _shape((1536, 24, 12, 12, 128, 6144, 50368), is_gated=False, is_tied=True),
    "mpt-1b": _shape((2048, 24, 16, 16, 128, 8192, 50368), is_gated=False, is_tied=True),
    "mpt-3b": _shape((2560, 32, 20, 20, 128, 10240, 50368), is_gated=False, is_tied=True),
    "mpt-7b": _shape((4096, 32, 32, 32, 128, 16384, 50432), is_gated=False, is_tied=True),
    "mpt-13b": _shape((5120, 40, 40, 40, 128, 20480, 50368), is_gated=False, is_tied=True),
    "mpt-30b": _shape((7168, 48, 64, 64, 112, 28672, 50432), is_gated=False, is_tied=True),
    "mpt-70b": _shape((8192, 80, 64, 64, 128, 32768, 50368), is_gated=False, is_tied=True),
    # GPT-3, arXiv:2005.14165 (175B, 6.7B, 13B); Megatron's sizes in arXiv:2205.05198, table 3.
    "gpt-6.7b": _shape((4096, 32, 32, 32, 128, 16384, 51200), is_gated=False, is_tied=True),
    "gpt-13b": _shape((5120, 40, 40, 40, 128, 20480, 51200), is_gated=False, is_tied=True),
    "gpt-22b": _shape((6144, 48, 64, 64, 96, 24576, 51200), is_gated=False, is_tied=True),
    "gpt-175b": _shape((12288, 96, 96, 96, 128, 49152, 51200), is_gated=False, is_tied=True),
    "gpt-530b": _shape((20480, 105, 128, 128, 160, 81920, 51200), is_gated=False, is_tied=True),
    "gpt-1t": _shape((25600, 128, 160, 160, 160, 102400, 51200), is_gated=False, is_tied=True),
    # GPT-J, Falcon: as their config.json says; two norms less than here.
    "gptj-6b": _shape((4096, 28, 16, 16, 256, 16384, 50400), is_gated=False),
    "falcon-180b": _shape((14848, 80, 232, 8, 64, 59392, 65024), is_gated=False, is_tied=True),
    # Qwen2.5, arXiv:2412.15115; Qwen3, arXiv:2505.09388.
    "qwen2.5-0.5b": _shape((896, 24, 14, 2, 64, 4864, 151936), is_tied=True),
    "qwen2.5-1.5b": _shape((1536, 28, 12, 2, 128, 8960, 151936), is_tied=True),
    "qwen2.5-3b": _shape((2048, 36, 16, 2, 128, 11008, 151936), is_tied=True),
    "qwen2.5-7b": _shape((3584, 28, 28, 4, 128, 18944, 152064)),
    "qwen2.5-14b": _shape((5120, 48, 40, 8, 128, 13824, 152064)),
    "qwen2.5-32b": _shape((5120, 64, 40, 8, 128, 27648, 152064)),
    "qwen2.5-72b": _shape((8192, 80, 64, 8, 128, 29568, 152064)),
    "qwen3-0.6b": _shape((1024, 28, 16, 8, 128, 3072, 151936), is_tied=True),
    "qwen3-1.7b": _shape((2048, 28, 16, 8, 128, 6144, 151936), is_tied=True),
    "qwen3-4b": _shape((2560, 36, 32, 8, 128, 9728, 151936), is_tied=True),
    "qwen3-8b": _shape((4096, 36, 32, 8, 128, 12288, 151936)),
    "qwen3-14b": _shape((5120, 40, 40, 8, 128, 17408, 151936)),
    "qwen3-32b": _shape((5120, 64, 64, 8, 128, 25600, 151936)),
    "qwen3-30b-a3b": _shape((2048, 48, 32, 4, 128, 768, 151936), num_experts=128, experts_per_token=8),
    "qwen3-235b-a22b": _shape((4096, 94, 64, 4, 128, 1536, 151936), num_experts=128, experts_per_token=8),
    # SmolLM2-135M's config.json.
    "smollm2-135m": _shape((576, 30, 9, 3, 64, 1536, 49152), is_tied=True),
}
# A size alone is ReaL's Llama: Llama 2, and Code Llama at 34 billion. A minor version changes no size.
PLAIN = {"7b": "llama-7b", "13b": "llama-13b", "30b": "llama-30b", "65b": "llama-65b"}
PLAIN |= {"34b": "codellama-34b", "70b": "llama2-70b", "8b": "llama3-8b", "405b": "llama3-405b"}
SAME = {"llama2-7b": "llama-7b", "llama2-13b": "llama-13b", "llama-34b": "codellama-34b", "llama2-34b": "codellama-34b"}
SAME |= {"llama-70b": "llama2-70b"}
SAME |= {"gpt-j-6b": "gptj-6b", "llama-33b": "llama-30b", "llama3-7b": "llama3-8b"}


def find_model(name: str) -> ModelShape:
    """Returns the sizes of a model by name, such as 7B, Llama3.1-70B or MPT 30B; words behind it are not read.

    Raises ValueError for a name that is not known.
    """
    words = name.strip().lower().replace("_", "-").split()
    for length in range(1, len(words) + 1):
        if (key := _normalize("-".join(words[:length]))) in KNOWN:
            return KNOWN[key]
    raise ValueError(f"model '{name}': not known; use a size such as 7B, or one of {', '.join(KNOWN)}")


def _normalize(name: str) -> str:
    """Returns a name as it is spelled in the table, where it is there."""
    key = re.sub(r"-(instruct|chat|base|hf|v\d.*)$", "", name)
    key = re.sub(r"^(meta-)?llama-?([23])(?:\.\d)?-", r"llama\2-", key)
    key = re.sub(r"^(mpt|gpt-?3|gpt|qwen3|qwen2\.5|mixtral|mistral|falcon)-?(?=\d+[bx])", r"\1-", key)
    key = re.sub(r"^gpt-?3-", "gpt-", key)
    return PLAIN.get(key, SAME.get(key, key))
