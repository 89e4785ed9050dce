"""A rollout of known texts, packed, for what reads or scores sequences on the host."""

from collections.abc import Sequence

import numpy as np

from tests.given.sequences import pack_in_order
from tests.given.texts import make_tokenizer

TOKENIZER = make_tokenizer()
# Prompt's number in the data, prompt, answer, and whether the answer has its end-of-text token.
SAMPLES = (
    (2, "the film was", " good", True),
    (0, "a film", " that was so long", False),
    (2, "the film was", "", True),
    (1, "so", " so é 日本", True),
)


def pack_samples(samples: Sequence[tuple[int, str, str, bool]] = SAMPLES, row_len: int = 48) -> dict[str, np.ndarray]:
    """Returns the arrays of a rollout, prompts starting with BOS; the last rows are empty."""
    examples = []
    for prompt_id, prompt, answer, ends in samples:
        start = [TOKENIZER.bos_token_id, *TOKENIZER.encode(prompt)]
        response = TOKENIZER.encode(answer) + [TOKENIZER.eos_token_id] * ends
        tokens = np.array(start + response, np.int32)
        example = {"tokens": tokens, "loss_mask": np.arange(len(tokens)) >= len(start)}
        examples.append(example | {"prompt_id": np.array(prompt_id), "has_eos": np.array(ends)})
    batch, _ = pack_in_order(examples, row_len, num_rows=len(samples))
    return {key: np.asarray(batch[key]) for key in batch}


def places(segment_ids: np.ndarray) -> list[tuple[int, int]]:
    """Returns (row, segment from 0) of the sequences in the order in which they were packed."""
    return [(row, s) for row, segments in enumerate(segment_ids) for s in range(segments.max())]
