"""The report of a command, and the verdict: that a run fits, or what to change until it does."""

import dataclasses
import json
import re

import pytest

from realjax.aot.advise import choose, verdict
from realjax.aot.report import GIB, USABLE_SHARE, Memory, ProgramReport, RunReport, Traffic, describe
from realjax.core.layout import ParallelStrategy
from tests.given.checkpoints import write_llama
from tests.given.commands import kept_log_settings
from tests.given.runs import GROUPS, LAYOUTS, LONGEST, build_spec, make_options
from tools import aot

STATES = {"critic: masters": 10 * GIB, "critic: moments": 20 * GIB}


def make_program(**changes) -> ProgramReport:
    fields = {
        "call": "ref_inf",
        "name": "inference",
        "role": "ref",
        "options": "ref_inf",
        "strategy": ParallelStrategy(dp=4, tp=2),
        "devices": "0-7",
        "num_params": 2 * GIB,
        "shape": "64 rows x 512",
        "num_mbs": 1,
        "runs": 1,
        "is_evaluation": False,
        "memory": Memory(arguments=4 * GIB, outputs=0, temporaries=8 * GIB, held={}),
        "traffic": (),
        "matmul_flops": 10**12,
        "opaque_calls": {},
        "compile_seconds": 1.0,
    }
    return ProgramReport(**fields | changes)


def make_report(*programs: ProgramReport) -> RunReport:
    return RunReport(
        experiment="ppo", target="H100", memory_bytes=80 * GIB, num_hosts=1, per_host=8, programs=programs, layers={}
    )


@pytest.fixture(scope="module")
def spec(given, tmp_path_factory):
    return build_spec("ppo", make_options("ppo", given, tmp_path_factory.mktemp("ppo"), **LAYOUTS["one device"]))


def test_a_run_fits_with_the_margin_of_its_fullest_program(spec):
    small, large = (
        make_program(),
        make_program(memory=Memory(arguments=2 * GIB, outputs=GIB, temporaries=3, held=STATES)),
    )
    report = make_report(small, large)
    assert report.fullest == large
    assert report.margin_bytes == int(80 * GIB * USABLE_SHARE) - (33 * GIB + 3)
    assert verdict(report, spec).startswith("It fits: the fullest program, ref_inf, takes 33.0 GiB of the 72.0 GiB")


def test_what_does_not_fit_says_what_to_change(spec):
    over = make_program(memory=Memory(arguments=4 * GIB, outputs=0, temporaries=100 * GIB, held={}))
    text = verdict(make_report(make_program(), over), spec)
    assert text.startswith("It does not fit.\nref_inf takes 104.0 GiB of the 72.0 GiB")
    # 32 GiB have to go: with two micro-batches half of the activations do, which are all but the parameters' copy.
    assert re.search(r"^  ref_inf\.n_mbs=2 \(saves about 48\.0 GiB\)$", text, re.MULTILINE)


def test_advice_saves_what_is_too_much(spec):
    held = {"rew: parameters": 7 * GIB, **STATES}
    program = make_program(memory=Memory(arguments=4 * GIB, outputs=0, temporaries=40 * GIB, held=held))
    for excess in (GIB, 6 * GIB, 20 * GIB, 40 * GIB):
        advice = choose(program, spec, excess)
        assert sum(one.saves for one in advice) >= excess
    assert [one.text for one in choose(program, spec, GIB)] == ["rew.offload=True"]
    assert choose(program, spec, 20 * GIB)[-1].text == "ref_inf.n_mbs=2"
    # More than all options save: more devices.
    assert choose(program, spec, 500 * GIB)[-1].text.startswith("more devices")


def test_a_trained_role_is_told_to_split_its_state(spec):
    memory = Memory(arguments=90 * GIB, outputs=0, temporaries=GIB, held={})
    program = make_program(call="actor_train", name="train", role="actor", options="actor_train", memory=memory)
    texts = [one.text for one in choose(program, spec, 40 * GIB)]
    assert "actor.zero_stage=2" in texts
    whole = dataclasses.replace(program, strategy=ParallelStrategy(dp=4, tp=2, zero_stage=2))
    assert "actor.zero_stage=3" in [one.text for one in choose(whole, spec, 40 * GIB)]


def test_tables_hold_every_figure():
    traffic = Traffic(
        kind="all-gather", axes=("data", "tensor"), dtype="bf16", bytes=2 * 10**9, wire_bytes=1e9, times=7
    )
    program = make_program(memory=Memory(arguments=GIB, outputs=0, temporaries=GIB, held=STATES), traffic=(traffic,))
    report = dataclasses.replace(make_report(program), layers={"ref": (2, 32)})
    text = describe(report)
    assert re.search(r"ref_inf +d4p1m2 on 0-7 +64 rows x 512 +1 +1 +1\.00 +0\.00 +1\.00 +30\.00 +32\.00 +yes", text)
    assert re.search(r"ref_inf +all-gather +data\+tensor +bf16 +7 +2\.000", text)
    assert "critic: moments 20.00" in text and "Only 2 of 32 layers of ref" in text
    tree = json.loads(report.to_json())
    assert tree["programs"][0]["memory"]["total"] == 32 * GIB and tree["programs"][0]["fits"] is True
    assert tree["margin_bytes"] == report.margin_bytes


def run_tool(experiment, options, *flags) -> int:
    with kept_log_settings():
        return aot.main([experiment, *(f"{name}={value}" for name, value in options.items()), *flags])


def test_a_command_whose_models_have_no_weights(given, tmp_path, capsys):
    model = write_llama(tmp_path / "model")
    (model / "model.safetensors").unlink()
    options = make_options("ppo", given, tmp_path, **LAYOUTS["data and tensor"])
    options |= {f"{role}.path": model for role in ("actor", "critic", "ref", "rew")}
    file = tmp_path / "report.json"
    assert run_tool("ppo", options, "--target", "cpu", "--json", str(file)) == 0
    text, tree = capsys.readouterr().out, json.loads(file.read_text())
    calls = {"actor_gen", "rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train"}
    assert {program["call"] for program in tree["programs"]} == calls
    assert all(call in text for call in calls)
    assert "The fullest program is" in text
    train = next(program for program in tree["programs"] if program["call"] == "actor_train")
    assert train["matmul_flops"] > 0 and train["memory"]["total"] == sum(
        (
            *(train["memory"][part] for part in ("arguments", "outputs", "temporaries")),
            *train["memory"]["held"].values(),
        )
    )
    assert {axis for traffic in train["traffic"] for axis in traffic["axes"]} >= {"data", "tensor"}


def test_fewer_layers_are_compiled_when_asked_for(given, tmp_path, capsys):
    options = make_options("sft", given, tmp_path, **LAYOUTS["one device"])
    assert run_tool("sft", options, "--target", "cpu", "--layers", "1") == 0
    assert re.search(r"Only 1 of \d+ layers of default were compiled", capsys.readouterr().out)


def test_a_wrong_option_is_said_as_the_command_says_it(given, tmp_path, capsys):
    assert run_tool("sft", {"model.pathh": given.language_model}, "--target", "cpu") == 2
    assert "model.path" in capsys.readouterr().err


@pytest.mark.aot
@pytest.mark.parametrize("experiment", ["sft", "ppo"])
def test_a_command_compiles_for_gpus(experiment, given, tmp_path, capsys):
    options = make_options(experiment, given, tmp_path, **LAYOUTS["data and tensor"])
    file = tmp_path / "report.json"
    assert run_tool(experiment, options, "--target", "h100", "--json", str(file)) == 0
    assert "It fits" in capsys.readouterr().out
    tree = json.loads(file.read_text())
    assert tree["memory_bytes"] > 80e9 and tree["margin_bytes"] > 0.99 * tree["usable_bytes"]
    if experiment in GROUPS:
        decode = next(program for program in tree["programs"] if program["name"] == "decode")
        assert decode["runs"] == 1 and decode["shape"].endswith("128 tokens") and LONGEST < 128
