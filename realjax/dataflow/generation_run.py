"""The description of a run that only generates: no graph, no training, a file of answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from realjax.core.generation_config import GenerationConfig
from realjax.core.identity import Identity
from realjax.core.layout import Layout
from realjax.data.prompts import PromptDataset
from realjax.dataflow.run import RoleSpec, RunPaths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationSpec:
    """Everything the runtime needs to know to answer a file of prompts."""

    title: str
    config_json: str
    identity: Identity
    paths: RunPaths
    role: RoleSpec
    layout: Layout
    prompts: PromptDataset
    tokenizer: "PreTrainedTokenizerBase"
    config: GenerationConfig
    eos_ids: tuple[int, ...]
    num_samples: int  # answers to each prompt
    prompts_per_call: int  # handed to the generator at once, and written when all of them are answered
    num_slots: int | None  # answers decoded at once; None: chosen from those of a call
    stop: tuple[str, ...]  # an answer's text ends before the first of these
    output_file: str | None  # in the run's log directory; None writes nothing
    seed: int
    recover_mode: str = "disabled"
