"""A checkpoint that answers: loaded once, and asked as often as wanted."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from realjax.core.axes import inference_rules, tree_shardings
from realjax.core.compute import Compute
from realjax.core.layout import Layout, ParallelStrategy
from realjax.core.texts import INCOMPLETE, decode_answers
from realjax.data.chat import Messages, Template
from realjax.data.tokens import encode
from realjax.engine.batching import Batcher, Request
from realjax.engine.sampling import Sampler
from realjax.engine.slot_arrays import CHUNK_LEN
from realjax.engine.slots import SlotPrograms
from realjax.experiments.common import load_tokenizer
from realjax.hf.files import resolve_model_path
from realjax.hf.generation import load_eos_ids
from realjax.hf.load import correct_config, load_config, load_params
from realjax.models.build import build_model
from realjax.options.talk import TalkConfig

FEW_TOKENS = 8  # between two looks at an answer that somebody reads as it comes
# told_fn(number of the conversation, its answer so far): a text that only grows, until it is whole.
ToldFn = Callable[[int, str], None]


class Speaker:
    """A language model with its tokenizer on some devices."""

    def __init__(self, model: str, config: TalkConfig, devices: Sequence[jax.Device], num_slots: int = 1) -> None:
        """`model` is a Hugging Face directory or a hub identifier. Raises ValueError for one that cannot answer."""
        path = resolve_model_path(model)
        model_config = load_config(path)
        if model_config.is_critic:
            raise ValueError(
                f"model path '{path}' is a reward model or critic, it ends in a scalar head; give a language model"
            )
        self.tokenizer, self.config = load_tokenizer(path), config
        if config.system is not None and not self.tokenizer.chat_template:
            raise ValueError(f"system: the tokenizer of '{path}' has no chat template to write it with; leave it out")
        layout = Layout.of(ParallelStrategy(tp=len(devices)), devices)
        built = build_model(correct_config(model_config, path))
        compute = Compute(dtype=config.dtype or "auto").on(devices[0].platform)
        # Nothing is trained on these answers: what they were drawn from need not be kept.
        gen = replace(config.gen, force_no_logits_mask=True)
        sampler = Sampler(config=gen, eos_ids=load_eos_ids(path, self.tokenizer), seed=config.seed)
        self._programs = SlotPrograms(built, layout, sampler, num_slots, compute)
        shardings = tree_shardings(built.axes, built.abstract, inference_rules(layout.strategy), layout)
        self._params = self._programs.prepare(load_params(path, built, shardings, dtype=compute.array_dtype))
        self._num_asked = 0

    @property
    def has_template(self) -> bool:
        """Whether messages are written in a chat template; without one, they stand behind each other as they are."""
        return bool(self.tokenizer.chat_template)

    def answer(self, conversations: Sequence[Messages], told_fn: ToldFn | None = None) -> list[str]:
        """Returns the next message of each conversation. ValueError for one that is too long for the model, or that
        the chat template refuses; nothing is drawn then."""
        prompts = [self._tokenise(messages) for messages in conversations]
        batcher = Batcher(self._programs, self._params, chunk_len=FEW_TOKENS if told_fn else CHUNK_LEN)
        # Numbered anew, so that the same question asked again has another answer.
        first, self._num_asked = self._num_asked, self._num_asked + len(prompts)
        requests = [Request(tokens=tokens, row_id=first + i) for i, tokens in enumerate(prompts)]
        places = {number: i for i, number in enumerate(batcher.submit(requests))}
        found, is_left = dict[int, np.ndarray](), True
        while is_left:
            is_left = batcher.poll()
            ended = {number: generation.tokens for number, generation in batcher.results().items()}
            found |= ended
            if told_fn is not None:
                for number, tokens in {**batcher.drawn(), **ended}.items():
                    text = self._decode(prompts[places[number]], tokens)
                    told_fn(places[number], text if number in ended else text.rstrip(INCOMPLETE))
        return [self._decode(prompts[i], found[number]) for number, i in places.items()]

    def _tokenise(self, messages: Messages) -> np.ndarray:
        if not self.has_template:
            text = "".join(message["content"] for message in messages)
        else:
            system = [{"role": "system", "content": self.config.system}] if self.config.system is not None else []
            template = Template(tokenizer=self.tokenizer, subject="the conversation")
            text = template.render([*system, *messages], "asked")
        return np.array(encode([text], self.tokenizer, is_rendered=self.has_template)[0], np.int32)

    def _decode(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        return decode_answers(self.tokenizer, [prompt.tolist()], [tokens.tolist()])[1][0]
