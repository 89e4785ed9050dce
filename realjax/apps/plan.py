"""Plans a run without its machine: `realjax plan <experiment> key=value ... --cluster h100x128`.

All that it prints is predicted, not measured. See docs/planner.md.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from realjax.allocation.cluster import Cluster, find_cluster
from realjax.allocation.compare import SEARCH, PlanComparison, compare, name_layout
from realjax.allocation.cost import call_cost
from realjax.allocation.memory import call_memory
from realjax.allocation.modes import check_options
from realjax.allocation.points.judge import describe_points, predict_points
from realjax.allocation.prediction import GIB, HEAD, CallPrediction, Prediction
from realjax.apps import quickstart
from realjax.apps.errors import report_errors
from realjax.apps.weightless import without_weights
from realjax.apps.words import split_option_files
from realjax.core.layout import number_ranges
from realjax.dataflow.run import RunSpec
from realjax.options.checks import resolve_names, validate
from realjax.options.common import CommonExperimentConfig
from realjax.options.parallel import allocation_options
from realjax.record.timeline import Bar, draw_bars

WIDTH = 160  # of a table that is not on a terminal


def main(words: Sequence[str] | None = None) -> int:
    """Prints the plan that a search finds, and what other plans would take; returns the exit code."""
    with report_errors("realjax plan") as end:
        args = parse_words(make_parser(), words)
        if args.points:
            print(describe_points(predict_points(args.points)))
        elif run(args) is None:
            end.code = 2
    return end.code


def run(args: argparse.Namespace) -> PlanComparison | None:
    """Prints what was asked for and returns it, None for help. ValueError for what the user can mend."""
    # Nothing is run here: no accelerator is taken, and none is waited for.
    jax.config.update("jax_platforms", "cpu")
    if (command := quickstart.read_command(args.words)) is None:
        return None
    comparison = plan_run(*command, find_cluster(args.cluster))
    best = comparison.searched.prediction
    explained = find_call(best, args.explain) if args.explain else None
    console = make_console()
    show(console, comparison)
    if explained is not None:
        explain(console, comparison, explained)
    if args.picture:
        draw(args.picture, best)
    if args.json:
        args.json.write_text(json.dumps(comparison.to_json(), indent=1))
    return comparison


def make_console() -> Console:
    """Returns the console of tables, wide where it is a file."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def plan_run(name: str, config: CommonExperimentConfig, cluster: Cluster) -> PlanComparison:
    """Returns the search's plan of an experiment's options on a cluster, and others beside it.

    ValueError for what the user can mend, a run that does not fit among it.
    """
    machine = {"n_nodes": cluster.num_nodes, "n_gpus_per_node": cluster.devices_per_node}
    spec = build_spec(name, dataclasses.replace(config, allocation_mode="search", **machine))
    return compare(spec, cluster)


def build_spec(name: str, config: CommonExperimentConfig) -> RunSpec:
    """Returns the run of an experiment's options, of models that need no weights."""
    config = resolve_names(config, name)
    validate(config)
    check_options(allocation_options(config))
    return quickstart.find_experiment(name).build(without_weights(config))


def show(console: Console, comparison: PlanComparison) -> None:
    """Prints the plan's calls, and how long a step takes by this plan and by the others."""
    cluster, best = comparison.cluster, comparison.searched
    found = "the best of its candidates" if best.is_optimal else f"the best of {best.num_plans:,} plans"
    title = f"{comparison.spec.experiment} on {cluster.name}: {cluster.num_nodes} x {cluster.devices_per_node}; {found}"
    console.print(make_table(f"{title} (predicted)", HEAD, best.prediction.rows()))
    used = {device for call in best.prediction.calls for device in call.choice.devices}
    if idle := [device for device in range(cluster.num_devices) if device not in used]:
        console.print(f"idle devices: {number_ranges(idle)}")
    rows = [(SEARCH, f"{best.prediction.seconds:.3g}", "", _strategies(best.prediction))]
    for other in comparison.others:
        if other.result is None:
            rows.append((other.name, "", "", other.problem))
        else:
            seconds = other.result.prediction.seconds
            gain = f"{comparison.gains()[other.name]:.2f}"
            rows.append((other.name, f"{seconds:.3g}", gain, _strategies(other.result.prediction)))
    console.print(make_table("a step (predicted)", ("plan", "seconds", "search is x times as fast", "layouts"), rows))
    if len(comparison.single) > 1:
        rows = [
            (name_layout(one), f"{(seconds := one.prediction.seconds):.3g}", f"{seconds / best.prediction.seconds:.2f}")
            for one in comparison.single
        ]
        head = ("layout", "seconds", "search is x times as fast")
        console.print(make_table("all calls in one layout (predicted)", head, rows))


def explain(console: Console, comparison: PlanComparison, call: CallPrediction) -> None:
    """Prints what a call's seconds and bytes are made of."""
    work = next(one for one in comparison.workload.calls if one.name == call.name)
    cost = call_cost(work, call.choice, comparison.cluster)
    role = comparison.workload.roles[work.role]
    memory = call_memory(work, role, call.choice, at_home=call.source == "home")
    console.print(make_table(f"{call.name}: {call.choice} (predicted)", ("seconds of", ""), _terms(cost.terms, 1.0)))
    console.print(
        make_table(f"{call.name}: what it adds on a device (predicted)", ("GiB of", ""), _terms(memory.terms, GIB))
    )


def find_call(prediction: Prediction, name: str) -> CallPrediction:
    """Returns a call by name; ValueError with the names there are."""
    calls = {call.name: call for call in prediction.calls}
    if name not in calls:
        raise ValueError(f"--explain: found '{name}'; the calls are {', '.join(calls)}")
    return calls[name]


def draw(path: Path, prediction: Prediction) -> None:
    """Draws the predicted timeline of a step."""
    bars = [
        Bar(
            name=span.name if span.what == "call" else f"{span.what} for {span.name}",
            row=f"devices {number_ranges(span.devices)}",
            start=span.start,
            end=span.end,
        )
        for span in prediction.spans
    ]
    draw_bars(path, bars, label="seconds since the start of a step, predicted")


def _strategies(prediction: Prediction) -> str:
    return ", ".join(f"{call.name} {call.choice.strategy}" for call in prediction.calls)


def _terms(terms: Mapping[str, float], unit: float) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), f"{value / unit:.4g}") for name, value in terms.items() if value]
    return [*rows, ("sum", f"{sum(terms.values()) / unit:.4g}")]


def make_table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Returns a table of text."""
    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Returns what the words say; `--config FILE` and `--recipe NAME` are the command's that is planned."""
    rest, flags = split_option_files(sys.argv[1:] if words is None else words)
    args = parser.parse_intermixed_args(rest)
    args.words += flags
    return args


def make_parser() -> argparse.ArgumentParser:
    """Returns what reads the words of the command line."""
    parser = argparse.ArgumentParser(prog="realjax plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="experiment key=value ...", help="the command, as for realjax")
    parser.add_argument("--cluster", default="h100", help="such as h100x128 (devices in all), or a cluster.json")
    parser.add_argument("--explain", metavar="CALL", help="show what this call's seconds and bytes are made of")
    parser.add_argument("--json", type=Path, help="write all plans to this file too")
    parser.add_argument(
        "--points", type=Path, metavar="FILE", help="hold the cost model against measurements in a file"
    )
    parser.add_argument("--picture", type=Path, help="draw the predicted timeline to this file")
    return parser
