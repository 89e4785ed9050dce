"""Steps of reinforcement learning from published rows: PPO's six calls, or GRPO's four, on Llamas by size."""

import re
from dataclasses import replace

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.cluster_costs import ClusterCosts
from realjax.allocation.cost import Cost, call_cost, fetch_cost
from realjax.allocation.points.clusters import find_point_cluster
from realjax.allocation.points.known_models import find_model
from realjax.allocation.points.layouts import place, read_layout
from realjax.allocation.points.rows import Row, RowPrediction, SearchedStep, SearchFn
from realjax.allocation.search import search
from realjax.allocation.workload import CallWork, Kind, Lengths, ModelShape, RoleWork, Workload
from realjax.core.layout import number_ranges

PPO_UPDATES = 4  # ReaL's ppo_n_minibatches
ROLES = ("actor", "ref", "critic", "reward")
INFERENCES = {"rew_inf": "reward", "ref_inf": "ref", "critic_inf": "critic"}


def predict_rlhf(row: Row, search_fn: SearchFn | None) -> RowPrediction:
    """Returns the prediction of a step: its calls one after the other on all devices, in the row's layout; or as the
    search plans them."""
    if row.unit != "s/step":
        raise ValueError(f"unit '{row.unit}' of an rlhf row is not known; use s/step")
    work, cluster = describe_step(row), find_point_cluster(row.gpu, row.num_gpus)
    if row.layout.startswith("searched"):
        if search_fn is None:
            raise ValueError("layout 'searched' needs a search")
        found = search_fn(work, cluster)
        return RowPrediction(row=row, predicted=found.seconds, cost=Cost({"step": found.seconds}), plan=found.plan)
    choices = {call.name: choose(row, call) for call in work.calls}
    cost = step_cost(work, choices, cluster)
    return RowPrediction(row=row, predicted=cost.seconds, cost=cost)


def search_step(work: Workload, cluster: Cluster) -> SearchedStep:
    """Returns the best plan of a step that fits the cluster."""
    found = search(work, cluster, ClusterCosts(cluster=cluster))
    lines = [f"{name}: {choice} on {number_ranges(choice.devices)}" for name, choice in found.choices.items()]
    return SearchedStep(seconds=found.prediction.seconds, plan="\n".join(lines))


def step_cost(work: Workload, choices: dict[str, Choice], cluster: Cluster) -> Cost:
    """Returns what a step costs by call where all calls are on the same devices, and so follow one another. Models that
    are not trained come from host memory for their calls."""
    terms = {}
    for call in work.calls:
        role, choice = work.roles[call.role], choices[call.name]
        terms[call.name] = call_cost(call, choice, cluster).seconds
        if not role.is_trained:
            terms[call.name] += fetch_cost(role, choice, cluster).seconds
    return Cost(terms)


def choose(row: Row, call: CallWork) -> Choice:
    """Returns a call's choice in the row's layout: one for all calls, or `gen ...; train ...`."""
    parts = dict(re.findall(r"(gen|train) ([^;]+)", row.layout)) or {"gen": row.layout, "train": row.layout}
    text = parts["gen" if call.kind == "generate" else "train"].strip()
    layout = read_layout(text, row.num_gpus)
    choice = place(replace(layout, remat=call.kind == "train"), row.num_gpus)
    if call.kind == "generate":
        choice = replace(choice, num_slots=call.num_sequences)
    return choice


def describe_step(row: Row) -> Workload:
    """Returns the step of a row: `actor/ref/critic/reward` by size, `size x4` for all four, or `model GRPO`."""
    batch = row.batch
    if batch is None:
        raise ValueError("an rlhf row needs a batch, the answers of a step")
    is_grpo = "grpo" in row.model.lower()
    names = _read_models(row.model)
    wanted = ROLES[:2] if is_grpo else ROLES
    if len(names) != len(wanted):
        raise ValueError(f"models '{row.model}': {len(names)} of them, but the roles are {', '.join(wanted)}")
    models = dict(zip(wanted, names))
    shapes = {role: replace(find_model(name), is_critic=role in ("critic", "reward")) for role, name in models.items()}
    prompts, answers = _read_lengths(row.lengths)
    trained = [role for role in ("actor", "critic") if role in shapes]
    roles = {
        role: RoleWork(name=role, model=shape, dtype="bfloat16", is_trained=role in trained)
        for role, shape in shapes.items()
    }
    make = lambda *names: make_call(names, shapes[names[1]], (prompts, answers), batch, is_grpo)
    calls = [make("actor_gen", "actor", "generate")]
    calls += [make(call, role, "inference") for call, role in INFERENCES.items() if role in shapes]
    # Without a critic the policy's log-probabilities are computed anew, as NeMo-RL does.
    calls += [make("actor_inf", "actor", "inference")] if is_grpo else []
    scored = tuple(call.name for call in calls)
    calls += [replace(make(f"{role}_train", role, "train"), after=scored) for role in trained]
    return Workload(calls=tuple(calls), roles=roles)


def make_call(
    names: tuple[str, str, Kind], model: ModelShape, lengths: tuple[Lengths, Lengths], batch: int, is_grpo: bool
) -> CallWork:
    """Returns the work of a call, of names (call, role, kind), whose sequences each lie in a row of their own."""
    call, role, kind = names
    whole, is_generate = lengths[0] + lengths[1], kind == "generate"
    updates = PPO_UPDATES if kind == "train" and not is_grpo else 1
    # Packed into as few rows as devices and stages have parts: two micro-batches a stage in training, else one.
    per_part, tokens = (2 if kind == "train" else 1), batch // updates * whole.mean
    return CallWork(
        name=call,
        role=role,
        kind=kind,
        model=model,
        dtype="bfloat16",
        num_sequences=batch,
        prompts=lengths[0] if is_generate else whole,
        answers=lengths[1] if is_generate else None,
        num_updates=updates,
        pack_fn=lambda multiple: (per_part * multiple, round(tokens / (per_part * multiple))),
        scores_vocab=not model.is_critic,
        after=() if is_generate else ("actor_gen",),
    )


def _read_models(text: str) -> list[str]:
    words = re.sub(r"\b(GRPO|PPO)\b", "", text, flags=re.IGNORECASE).strip()
    if match := re.fullmatch(r"(\S+) *x *(\d+)", words):
        return [match[1]] * int(match[2])
    names = words.split("/")
    return names * 2 if len(names) == 1 else names


def _read_lengths(text: str) -> tuple[Lengths, Lengths]:
    """Returns lengths of prompts and answers of `prompt+gen`; or of `mean tokens`, whose longest is the next power of
    two and whose prompts are a sixteenth of it."""
    if match := re.fullmatch(r"(\d+)\+(\d+)", text):
        return Lengths.all(int(match[1])), Lengths.all(int(match[2]))
    if match := re.fullmatch(r"mean (\d+)", text):
        mean = int(match[1])
        longest = 1 << (mean - 1).bit_length()
        prompt = longest // 16
        answer = mean - prompt
        return Lengths.all(prompt), Lengths(mean=answer, mean_square=1.1 * answer**2, longest=longest - prompt)
    raise ValueError(f"lengths '{text}' are not known; use prompt+gen, as 128+384, or mean 3203")
