"""The samples of an evaluation show a person the text that the model wrote, spaces and all."""

from functools import partial

import numpy as np

from realjax.core.texts import decode_answers
from realjax.record.samples import Sample
from realjax.runtime.evaluation import read_samples
from tests.given.sequences import pack_in_order
from tests.given.texts import make_words_tokenizer


def test_samples_are_read_where_they_stand_in_the_order_of_their_prompts():
    examples = [
        {
            "tokens": np.array(tokens, np.int32),
            "loss_mask": np.arange(len(tokens)) >= 2,
            "prompt_id": np.array(prompt, np.int32),
            "sample_id": np.array(0, np.int32),
        }
        for prompt, tokens in ((1, [0, 1, 3, 4]), (0, [0, 1, 2, 3, 4]))
    ]
    batch, _ = pack_in_order(examples, 16, num_rows=1)
    batch = batch.with_arrays(rewards=np.array([[0.5, 2.0]], np.float32))
    assert read_samples(batch, partial(decode_answers, make_words_tokenizer()), "greedy") == [
        Sample(variant="greedy", prompt="the film", answer=" was good", reward=2.0),
        Sample(variant="greedy", prompt="the film", answer=" good", reward=0.5),
    ]
