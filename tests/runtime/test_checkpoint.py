"""A saved state comes back bit for bit, in any layout, and a save that is not whole is none."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.layout import Layout
from realjax.engine.state import TrainState
from realjax.models.build import Model
from realjax.models.config import LayerKind, MoEConfig
from realjax.runtime import checkpoint
from realjax.runtime.checkpoint import RunCheckpointer, RunState, clear_after, drop_oldest, find_save, saved_steps
from tests.given.models import make_layout, make_model, with_empty_layers
from tests.given.specs import make_role, make_state

MODEL = make_model()
MOE = MoEConfig(num_experts=4, experts_per_token=2, expert_size=24, shared_size=16)
EXPERTS = make_model(pattern=(LayerKind(feed_forward=MOE),))


def make_run_state(step: int, layout: Layout, counters: Mapping | None = None, model: Model = MODEL) -> RunState:
    """Returns a state of which every array is random and belongs to that step."""
    state = make_state(make_role(model, layout), seed=step)
    rng = np.random.default_rng(step)

    def draw(leaf: jax.Array) -> jax.Array:
        values = rng.integers(0, 99, leaf.shape) if leaf.dtype == jnp.int32 else rng.standard_normal(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    roles = {"default": jax.tree.map(draw, state)}
    return RunState(step=step, roles=roles, counters=counters or {"seed": 1}, empty_layers=empty_layers(model))


def empty_layers(model: Model) -> dict[str, int]:
    return {"default": model.config.num_empty_layers}


def with_stacks(state: TrainState, num_layers: int, num_empty: int) -> TrainState:
    """Returns a state on the host with the first `num_layers` of every stack, and empty ones behind them."""

    def one(path: tuple, leaf: jax.Array) -> np.ndarray:
        if jax.tree_util.DictKey("layers") not in path:
            return np.asarray(leaf)
        return np.pad(np.asarray(leaf)[:num_layers], [(0, num_empty)] + [(0, 0)] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(one, state)


def restore(directory: Path, layout: Layout, model: Model = MODEL) -> RunState:
    save = find_save(directory)
    assert save is not None
    abstract = {"default": make_role(model, layout).abstract_state()}
    return checkpoint.restore(directory, save, abstract, empty_layers(model))


def bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    ("model", "saved", "restored"),
    [
        (MODEL, make_layout(dp=2, tp=2, zero=2), make_layout(dp=2, tp=2, zero=2)),
        (MODEL, make_layout(dp=4, zero=3), make_layout(dp=1, tp=2)),
        (MODEL, make_layout(), make_layout(dp=2, tp=2, sp=True, zero=1)),
        (EXPERTS, make_layout(dp=2, ep=2, zero=2), make_layout(tp=2)),
        (EXPERTS, make_layout(dp=2, tp=2), make_layout(dp=4, ep=2, zero=3)),
    ],
    ids=lambda x: None if isinstance(x, Model) else str(x),
)
def test_any_layout_gets_the_bits_that_another_saved(model, saved, restored, tmp_path):
    counters = {"seed": 3, "kl": 0.1, "best": [1, None]}
    state = make_run_state(7, saved, counters, model)
    with RunCheckpointer(tmp_path, max_to_keep=2) as checkpointer:
        checkpointer.save(state)
    found = restore(tmp_path, restored, model)
    assert (found.step, found.counters) == (7, counters)
    assert bits(found.roles["default"]) == bits(state.roles["default"])
    wanted = make_role(model, restored).abstract_state()
    placed = jax.tree.map(
        lambda leaf, spec: leaf.sharding.is_equivalent_to(spec.sharding, leaf.ndim), found.roles["default"], wanted
    )
    assert all(jax.tree.leaves(placed))


@pytest.mark.parametrize(
    ("saved", "saved_empty", "restored", "restored_empty"),
    [
        (make_layout(pp=2, dp=2, zero=2), 1, make_layout(dp=2, tp=2), 0),
        (make_layout(tp=2), 0, make_layout(pp=2, dp=2, zero=3), 1),
        (make_layout(pp=2), 1, make_layout(pp=5), 2),
        (make_layout(pp=2), 1, make_layout(), 1),
    ],
    ids=str,
)
def test_a_layout_with_other_stages_gets_the_layers_of_the_model(
    saved, saved_empty, restored, restored_empty, tmp_path
):
    model = make_model(num_layers=3)
    of_save, of_restore = (with_empty_layers(model, n) for n in (saved_empty, restored_empty))
    drawn = make_run_state(4, saved, model=of_save)
    state = with_stacks(drawn.roles["default"], 3, saved_empty)
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), state, drawn.roles["default"])
    with RunCheckpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(replace(drawn, roles={"default": placed}))
    found = restore(tmp_path, restored, of_restore)
    with pytest.raises(ValueError, match=r"another model .*there \(3, .*, here \(4, "):
        restore(tmp_path, make_layout(), make_model(num_layers=4))
    assert bits(found.roles["default"]) == bits(with_stacks(state, 3, restored_empty))


def test_what_a_step_does_to_the_arrays_after_a_save_does_not_reach_it(tmp_path):
    state = make_run_state(1, make_layout(dp=2))
    expected = bits(state.roles["default"])
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with RunCheckpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(state)
        overwritten = overwrite(state.roles["default"])
        assert bits(overwritten) != expected
    assert bits(restore(tmp_path, make_layout(dp=2)).roles["default"]) == expected


def test_the_latest_are_kept_and_none_is_written_twice(tmp_path):
    layout = make_layout()
    with RunCheckpointer(tmp_path, max_to_keep=2) as checkpointer:
        assert checkpointer.latest_step is None
        for step in (2, 4, 6):
            checkpointer.save(make_run_state(step, layout))
        other = make_run_state(6, layout, {"seed": 99})
        checkpointer.save(other)
    found = restore(tmp_path, layout)
    assert (found.step, found.counters) == (6, {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]


def test_a_save_that_was_cut_off_does_not_count(tmp_path):
    layout = make_layout()
    with RunCheckpointer(tmp_path, max_to_keep=2) as checkpointer:
        checkpointer.save(make_run_state(2, layout))
    torn = tmp_path / "4.orbax-checkpoint-tmp"
    (tmp_path / "2").rename(torn)
    assert find_save(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ffn_size": 64},
            r"9 arrays differ, first '\S+/mlp/down/kernel' \(shape there \(2, 48, 32\), here \(2, 64",
        ),
        ({"tied": True}, r"3 arrays differ, first '\S+/head/kernel' \(shape there \(32, 96\), here None\)"),
    ],
)
def test_a_save_of_another_model_is_refused(changes, message, tmp_path):
    with RunCheckpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(make_run_state(2, make_layout()))
    with pytest.raises(ValueError, match=rf"^recover: the save in .* is of another model or optimizer: {message}"):
        restore(tmp_path, make_layout(), make_model(**changes))


def test_an_error_in_the_run_does_not_cut_off_a_save(tmp_path):
    layout = make_layout()
    with pytest.raises(KeyError), RunCheckpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(make_run_state(5, layout))
        raise KeyError
    assert restore(tmp_path, layout).step == 5


def change_bytes(step: Path) -> None:
    """Changes 64 bytes in the largest file of arrays."""
    file = max((step / "role_default").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    file.write_bytes(content)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "64 bytes": change_bytes,
    "no run": lambda step: shutil.rmtree(step / "run"),
    "no role": lambda step: shutil.rmtree(step / "role_default"),
    "empty metadata": lambda step: (step / "run" / "metadata").write_bytes(b""),
    "an empty directory": empty,
}


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saves")
    with RunCheckpointer(directory, max_to_keep=2) as checkpointer:
        for step in (2, 4):
            checkpointer.save(make_run_state(step, make_layout()))
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_save_gives_way_to_the_one_before(damage, two_saves, tmp_path, caplog):
    saves = shutil.copytree(two_saves, tmp_path / "saves")
    DAMAGES[damage](saves / "4")
    with caplog.at_level(logging.WARNING, "realjax"):
        found = restore(saves, make_layout())
    assert "the save" in caplog.text and "/4 is passed over: " in caplog.text
    assert found.step == 2
    assert bits(found.roles["default"]) == bits(make_run_state(2, make_layout()).roles["default"])
    # The one before stays until a newer one is whole: with room for one only, until that of step 6 is.
    clear_after(saves, 2)
    assert saved_steps(saves) == [2]
    with RunCheckpointer(saves, max_to_keep=1) as checkpointer:
        checkpointer.save(make_run_state(4, make_layout()))
        assert 2 in saved_steps(saves)
        checkpointer.save(make_run_state(6, make_layout()))
        assert 4 in saved_steps(saves)
    assert saved_steps(saves) == [6] and restore(saves, make_layout()).step == 6


def test_a_run_is_not_begun_anew_in_silence_where_every_save_is_damaged(two_saves, tmp_path):
    saves = shutil.copytree(two_saves, tmp_path / "saves")
    for step in ("2", "4"):
        change_bytes(saves / step)
    before = sorted(saves.rglob("*"))
    with pytest.raises(ValueError, match="holds 2 saves, of which none is whole; set recover_mode=disabled to start"):
        find_save(saves)
    assert sorted(saves.rglob("*")) == before


def test_what_waits_for_a_save_comes_after_it(tmp_path):
    seen = []
    with RunCheckpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(make_run_state(1, make_layout()), lambda: seen.append(saved_steps(tmp_path)))
        checkpointer.save(make_run_state(2, make_layout()), lambda: seen.append(saved_steps(tmp_path)))
        assert seen == [[1]]
    assert seen == [[1], [2]]


def test_saves_after_every_so_many_steps_stay(tmp_path):
    for step in range(1, 11):
        (tmp_path / str(step)).mkdir()
    drop_oldest(tmp_path, max_to_keep=2, keep_every=4)
    assert sorted(saved_steps(tmp_path)) == [4, 8, 9, 10]
    drop_oldest(tmp_path, max_to_keep=2)
    assert sorted(saved_steps(tmp_path)) == [9, 10]
