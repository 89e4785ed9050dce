"""Small runs to carry out: descriptions, roles and batches on a few devices."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from realjax.algorithms.sft import SFT_LOSS
from realjax.core.identity import Identity
from realjax.core.layout import Layout
from realjax.core.optimizer_config import OptimizerConfig
from realjax.data.datasets import PromptAnswerDataset
from realjax.data.loader import Loader
from realjax.dataflow.graph import MFC, DataflowGraph
from realjax.dataflow.run import Frequency, RoleSpec, RunPaths, RunSpec
from realjax.engine.optim import Optimizer
from realjax.engine.state import TrainState, init_train_state, train_state_shardings
from realjax.models.build import Model
from realjax.runtime.roles import Role
from tests.builders import make_examples, make_layout, place_params, random_tree

TRAIN = MFC(name="train", role="default", call="train_step", inputs=("tokens", "loss_mask"), loss=SFT_LOSS)
NO_IDENTITY = Identity(fixed={}, contents={}, steering={}, harmless={})
GRAPH = DataflowGraph((TRAIN,), frozenset({"tokens", "loss_mask"}))


def make_dataset(lengths: list[int], seed: int = 0) -> PromptAnswerDataset:
    """Returns examples of random tokens of these lengths, learned in their last part."""
    examples = make_examples(lengths, seed)
    spans = [(int(np.argmax(example["loss_mask"])), len(example["tokens"])) for example in examples]
    return PromptAnswerDataset(
        ids=tuple(range(len(lengths))),
        tokens=np.concatenate([example["tokens"] for example in examples]),
        offsets=np.cumsum([0, *lengths]),
        target_spans=np.array(spans, np.int32),
    )


def make_loader(**changes) -> Loader:
    """Returns 3 steps of 4 examples, in one epoch."""
    dataset = make_dataset([5, 9, 7, 12, 8, 6, 11, 10, 4, 13, 7, 9])
    return Loader(dataset, **{"batch_size": 4, "num_epochs": 1, "seed": 1, "num_shards": 1, **changes})


def make_paths(root: Path) -> RunPaths:
    folders = {kind: root / kind / "t" for kind in ("logs", "checkpoints", "recover")}
    return RunPaths(**folders, compilation_cache=root / "cache")


def make_spec(paths: RunPaths, **changes) -> RunSpec:
    """Returns an SFT run on one device of a model in `model`, a directory beside the outputs."""
    role = RoleSpec(
        name="default", path=paths.logs.parents[1] / "model", optimizer=OptimizerConfig(lr=0.01), remat=False
    )
    spec = RunSpec(
        experiment="sft",
        title="a test",
        config_json="{}",
        identity=NO_IDENTITY,
        paths=paths,
        graph=GRAPH,
        layouts={"train": make_layout()},
        roles={"default": role},
        loader=make_loader(),
        num_epochs=1,
        evaluation=None,
        save=Frequency(),
        evaluate=Frequency(),
        seed=1,
    )
    return replace(spec, **changes)


def make_role(model: Model, layout: Layout, name: str = "default", *, is_trained: bool = True) -> Role:
    """Returns a role without files behind it."""
    config = OptimizerConfig(lr=0.01) if is_trained else None
    spec = RoleSpec(name=name, path=Path("nowhere"), optimizer=config, remat=False)
    return Role(
        spec=spec, model=model, home=layout, optimizer=Optimizer(config=config, total_updates=10) if config else None
    )


def make_state(role: Role, seed: int = 0) -> TrainState:
    """Returns a trained role's state with random parameters, before its first update."""
    assert role.optimizer is not None
    shardings = train_state_shardings(role.model, role.optimizer, role.home)
    params = place_params(role.model, random_tree(role.model, seed), role.home)
    return init_train_state(params, role.optimizer, shardings)
