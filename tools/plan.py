"""Plans a run without its machine, as `realjax plan`; with --verify the plan is compiled, and its memory compared.

    python -m tools.plan ppo key=value ... --cluster h100x8 --verify

What compiles for GPUs is the extra `aot`, see docs/aot.md.
"""

import os

# Before jax is imported: no accelerator is looked for, also where a plugin for one is installed.
os.environ["JAX_PLATFORMS"] = "cpu"

import sys
from collections.abc import Sequence

from realjax.allocation.compare import PlanComparison
from realjax.allocation.settle import apply_choices
from realjax.aot.targets import find_target, list_targets
from realjax.apps import plan
from realjax.apps.errors import report_errors
from tools.aot import compile_spec

HEAD = ("call", "predicted GiB", "compiled GiB", "difference")


def main(words: Sequence[str] | None = None) -> int:
    """Prints the plan, and with --verify how far its memory is from the compiler's; returns the exit code."""
    parser = plan.make_parser()
    parser.prog = "python -m tools.plan"
    parser.add_argument("--verify", choices=list_targets(), nargs="?", const="h100", help="compile it for these")
    with report_errors(parser.prog) as end:
        args = plan.parse_words(parser, words)
        comparison = plan.run(args)
        if comparison is None:
            end.code = 2
        elif args.verify:
            plan.make_console().print(plan.make_table("memory of a device", HEAD, verify(comparison, args.verify)))
    return end.code


def verify(comparison: PlanComparison, target: str) -> list[tuple[str, ...]]:
    """Returns the cells of a table: what each call's fullest device holds, as predicted and as compiled."""
    report, _ = compile_spec(apply_choices(comparison.spec, comparison.searched.choices), find_target(target))
    rows = []
    for call in comparison.searched.prediction.calls:
        compiled = max(program.memory.total for program in report.programs if program.call == call.name)
        sizes = (f"{size / plan.GIB:.2f}" for size in (call.peak_bytes, compiled))
        rows.append((call.name, *sizes, f"{call.peak_bytes / compiled - 1:+.1%}"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
