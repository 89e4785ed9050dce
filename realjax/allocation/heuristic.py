"""Layouts by rule, for `allocation_mode=heuristic`: which devices each call gets, and how they share its work.

On machines of 8 devices these are ReaL's rules for PPO and GRPO; other machines are served in the same spirit:
generation mostly data-parallel over all devices, actor and critic trained side by side on halves of them. Where layers,
heads, ffn, vocabulary or (in training) the hidden size do not divide as a rule wants, the next smaller sizes that do
are taken, data parallelism takes the rest, and devices that then still cannot share the work stay idle. Where answers
are drawn beside training, each of the two has devices of its own: half of them, or as `balance` has found.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from realjax.core.layout import ParallelStrategy
from realjax.dataflow.run import RoleSpec, RunSpec
from realjax.models.config import ModelConfig, list_cuts

# Rows are a multiple of this many tokens long, so they split over its divisors.
ROW_UNIT = 32


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The strategy of a call (zero_stage is not the rules' to set) and its devices, by number in the run's list."""

    strategy: ParallelStrategy
    devices: tuple[int, ...]


@dataclass(frozen=True)
class _Wish:
    """What a rule wants for a call: on which devices, with which pp and tp."""

    role: str
    devices: Sequence[int]
    pp: int
    tp: int
    sequence_parallel: bool = True
    is_train: bool = False


def has_rules(calls: Container[str]) -> bool:
    """Returns whether there are rules for an experiment with these calls."""
    return "actor_gen" in calls and "actor_train" in calls


def place(
    models: Mapping[str, RoleSpec],
    *,
    n_nodes: int,
    n_gpus_per_node: int,
    is_apart: bool = False,
    cut: int | None = None,
) -> dict[str, Placement]:
    """Returns where each call of reinforcement learning runs, for models by role. Raises ValueError as the rules do.

    `is_apart`: the calls that work for the next step are on devices of their own, where there are two or more: on those
    from the one numbered `cut` on, which None has in the middle.
    """
    rules = place_ppo if "critic" in models else place_grpo
    if is_apart and n_nodes * n_gpus_per_node > 1:
        half = -(-n_nodes // 2) * n_gpus_per_node if n_nodes > 1 else -(-n_gpus_per_node // 2)
        return place_apart(models, cut=cut or half, num_devices=n_nodes * n_gpus_per_node)
    return rules(models, n_nodes=n_nodes, n_gpus_per_node=n_gpus_per_node)


def place_run(spec: RunSpec, cut: int | None = None) -> dict[str, Placement]:
    """Returns where each call of a run is by the rules; see `place`."""
    return place(
        {name: spec.roles[name] for name in spec.graph.roles},
        n_nodes=spec.allocation.n_nodes,
        n_gpus_per_node=spec.allocation.n_gpus_per_node,
        is_apart=bool(spec.graph.ahead),
        cut=cut,
    )


def place_ppo(models: Mapping[str, RoleSpec], *, n_nodes: int, n_gpus_per_node: int) -> dict[str, Placement]:
    """Returns where each call of PPO runs, for models by role: actor and critic, and ref and rew where there are any.

    Raises ValueError for models too large for one node.
    """
    n, g = n_nodes, n_gpus_per_node
    every = range(n * g)
    a, c = models["actor"].size, models["critic"].size
    if n == 1:
        _check_fits_one_node({"actor": a, "critic": c}, g)
        first, second = every[: -(-g // 2)], every[-(-g // 2) :] or every
        wishes = {
            "actor_gen": _Wish("actor", every, pp=2 if g >= 4 else 1, tp=1),
            "actor_train": _Wish("actor", first, pp=1, tp=2 if a <= 7 else 4, is_train=True),
            "ref_inf": _Wish("ref", every, pp=1, tp=min(4, g // 2)),
            "rew_inf": _Wish("rew", first, pp=1, tp=min(2, len(first) // 2)),
            "critic_inf": _Wish("critic", second, pp=1, tp=min(2, len(second) // 2)),
            "critic_train": _Wish("critic", second, pp=1, tp=2 if c <= 7 else 4, is_train=True),
        }
    else:
        # Whole nodes, shared in proportion to the sizes; without sizes, equally.
        a, c = (a, c) if a + c else (1, 1)
        train = min(max(1, -(-n * a // (a + c))), n - 1)
        score = -(-n // 2)
        tp = min(4, g // 2)
        wishes = {
            "actor_gen": _Wish("actor", every, pp=n, tp=1),
            "actor_train": _Wish("actor", every[: train * g], pp=train, tp=tp, is_train=True),
            "ref_inf": _Wish("ref", every, pp=n, tp=tp),
            "rew_inf": _Wish("rew", every[: score * g], pp=score, tp=tp),
            "critic_inf": _Wish("critic", every[score * g :], pp=n - score, tp=tp),
            "critic_train": _Wish("critic", every[train * g :], pp=n - train, tp=tp, is_train=True),
        }
    return _place(wishes, models)


def place_grpo(models: Mapping[str, RoleSpec], *, n_nodes: int, n_gpus_per_node: int) -> dict[str, Placement]:
    """Returns where each call of an algorithm without critic runs: all on every device, each split its own way.

    Models by role: actor, and ref, rew and teacher where there are any.
    """
    n, g = n_nodes, n_gpus_per_node
    every, tp = range(n * g), min(2, g // 2)
    wishes = {
        "actor_gen": _Wish("actor", every, pp=max(2, n), tp=1),
        "ref_inf": _Wish("ref", every, pp=max(2, n), tp=tp),
        "rew_inf": _Wish("rew", every, pp=max(2, n), tp=tp),
        "teacher_inf": _Wish("teacher", every, pp=max(2, n), tp=tp),
        "actor_train": _Wish("actor", every, pp=n, tp=min(4, g), sequence_parallel=False, is_train=True),
    }
    return _place(wishes, models)


def place_apart(models: Mapping[str, RoleSpec], *, cut: int, num_devices: int) -> dict[str, Placement]:
    """Returns where each call runs where answers are drawn beside training: models by role are trained, and asked about
    what training starts from, on the first `cut` devices, with actor and critic on halves of these; answers are drawn
    and judged by models that stay as they are on the others.
    """
    first, second = range(cut), range(cut, num_devices)
    actor, critic = first, first
    if "critic" in models and cut > 1:
        actor, critic = first[: -(-cut // 2)], first[-(-cut // 2) :]
    tp = {"actor": min(4, len(actor)), "critic": min(4, len(critic)), "judge": min(2, len(second))}
    wishes = {
        "actor_gen": _Wish("actor", second, pp=1, tp=1),
        "ref_inf": _Wish("ref", second, pp=1, tp=tp["judge"]),
        "rew_inf": _Wish("rew", second, pp=1, tp=tp["judge"]),
        "actor_train": _Wish("actor", actor, pp=1, tp=tp["actor"], is_train=True),
        "critic_inf": _Wish("critic", critic, pp=1, tp=tp["critic"]),
        "critic_train": _Wish("critic", critic, pp=1, tp=tp["critic"], is_train=True),
    }
    return _place(wishes, models)


def _check_fits_one_node(sizes: Mapping[str, int], n_gpus_per_node: int) -> None:
    largest = max(16, 2 * n_gpus_per_node)
    for role, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"allocation_mode: heuristic trains up to {largest}B parameters on half a node of {n_gpus_per_node} "
                f"devices, but {role}.type.size={size}; set n_nodes to 2 or more, or use manual"
            )


def _place(wishes: Mapping[str, _Wish], models: Mapping[str, RoleSpec]) -> dict[str, Placement]:
    placements = {}
    for call, wish in wishes.items():
        if wish.role in models:
            strategy = _fit(wish, models[wish.role].config)
            placements[call] = Placement(strategy=strategy, devices=tuple(wish.devices[: strategy.size]))
    return placements


def _fit(wish: _Wish, config: ModelConfig) -> ParallelStrategy:
    """Returns the strategy nearest to a wish that divides the model: most devices first, then most pp, then most tp."""
    for size in range(len(wish.devices), 1, -1):
        for pp in range(wish.pp, 0, -1):
            for tp in range(max(1, wish.tp), 0, -1):
                if size % (pp * tp) == 0 and _divides(config, size // (pp * tp), pp, tp, wish.is_train):
                    sequence_parallel = wish.sequence_parallel and tp > 1 and ROW_UNIT % tp == 0
                    return ParallelStrategy(dp=size // (pp * tp), pp=pp, tp=tp, sequence_parallel=sequence_parallel)
    return ParallelStrategy()


def _divides(config: ModelConfig, dp: int, pp: int, tp: int, is_train: bool) -> bool:
    """Returns whether a model splits this way. Key-value heads need not: they are copied where tp does not divide them.

    ZeRO splits the hidden size of a trained model over dp.
    """
    over_tp = (config.num_q_heads, config.ffn_size, config.vocab_size)
    return (
        pp in list_cuts(config.order)
        and all(dim % tp == 0 for dim in over_tp)
        and (not is_train or config.hidden_size % dp == 0)
    )
