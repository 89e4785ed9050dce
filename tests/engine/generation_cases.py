"""What tests of generation share: prompts, programs of a tiny model, and one run of both."""

from collections.abc import Sequence

import numpy as np

from realjax.core.axes import generate_rules
from realjax.core.compute import Compute
from realjax.core.generation_config import GenerationConfig
from realjax.core.layout import Layout
from realjax.core.trees import Tree
from realjax.engine.batching import Generation, Request, generate
from realjax.engine.compiled import CompileLog
from realjax.engine.sampling import Sampler
from realjax.engine.slots import SlotPrograms
from realjax.models.build import Model
from tests.given.models import make_layout, place_params

EOS = 5
PROMPT_LENGTHS = [3, 17, 8, 1, 30, 12, 5, 9, 21]


def make_requests(vocab_size: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[Request]:
    """Returns requests with random prompts of these lengths."""
    rng = np.random.default_rng(0)
    return [Request(tokens=rng.integers(6, vocab_size, n).astype(np.int32), row_id=i) for i, n in enumerate(lengths)]


def make_programs(
    model: Model,
    config: GenerationConfig,
    layout: Layout,
    *,
    num_slots: int | None = None,
    eos: Sequence[int] = (EOS,),
    log: CompileLog | None = None,
    records_routes: bool = False,
) -> SlotPrograms:
    """Returns the programs, with two slots for each row of the layout where `num_slots` is not given."""
    sampler = Sampler(config=config, eos_ids=tuple(eos), seed=3)
    num_slots = num_slots or layout.strategy.row_multiple * 2
    return SlotPrograms(model, layout, sampler, num_slots, Compute(), log, records_routes=records_routes)


def run(
    model: Model,
    params: Tree,
    config: GenerationConfig,
    layout: Layout | None = None,
    *,
    requests: Sequence[Request] = (),
    **options,
) -> list[Generation]:
    """Returns the continuations of `requests`, or of those of `make_requests`, under host parameters."""
    layout = layout or make_layout()
    placed = place_params(model, params, layout, generate_rules(layout.strategy))
    programs = make_programs(model, config, layout, **options)
    return generate(programs, placed, requests or make_requests(model.config.vocab_size))
