"""Chat templates in the manner of four families, each with a tokenizer that has its special tokens."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.given.texts import make_tokenizer


@dataclass(frozen=True)
class Family:
    """A template, what ends texts, what the template's own tokens are; `marked` is the same with marked turns."""

    template: str
    eos: str
    special: tuple[str, ...]
    marked: str | None = None

    def tokenizer(self, *, is_marked: bool = False, adds: str = "") -> PreTrainedTokenizerFast:
        """Returns the family's tokenizer; `adds` is what it puts around texts by itself."""
        template = self.marked if is_marked else self.template
        tokenizer = make_tokenizer(adds, eos_token=self.eos, chat_template=template)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        return tokenizer


_TURN = "<|start|>{{ m.role }}<|head|>\n\n"
LLAMA = Family(
    template="{{ bos_token }}{% for m in messages %}" + _TURN + "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}",
    marked="{{ bos_token }}{% for m in messages %}" + _TURN + "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}<|eot|>{% endgeneration %}{% else %}{{ m.content | trim }}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}",
    eos="<|eot|>",
    special=("<|start|>", "<|head|>", "<|eot|>"),
)
_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nbe warm<|im_end|>\n{% endif %}"
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN = Family(
    template=_SYSTEM
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _OPEN,
    marked=_SYSTEM + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}" + _OPEN,
    eos="<|im_end|>",
    special=("<|im_start|>", "<|im_end|>"),
)
MISTRAL = Family(
    template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index == 2 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    eos="</s>",
    special=("[INST]", "[/INST]"),
)
GEMMA = Family(
    template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}",
    eos="<eos>",
    special=("<turn>", "<end>", "<eos>"),
)
FAMILIES = {"llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL, "gemma": GEMMA}
