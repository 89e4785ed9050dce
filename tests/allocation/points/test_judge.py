"""Published measurements: how files of them are read, and how far predictions are from them."""

from statistics import mean, median

import pytest

from realjax.allocation.points.clusters import find_point_cluster
from realjax.allocation.points.judge import count_flops, describe_points, find_gains, find_group, predict_points
from realjax.allocation.points.known_models import KNOWN, find_model
from realjax.allocation.points.layouts import place, read_layout
from realjax.allocation.points.rows import SearchedStep

HEAD = "kind,model,gpus,gpu,layout,batch,seq_or_prompt+gen,measured,unit,source\n"
# Published: the bar heights of ReaL's README figure, JAX-Toolbox and MaxText's pages, NVIDIA's Llama 3.1 recipes,
# llm-foundry's and torchtitan's benchmarks, arXiv:2205.05198 (table 5), TensorRT-LLM's performance overview.
RLHF = """
rlhf,7B/7B/7B/7B,8,H100?,heuristic tp8,256,128+384,42.3,s/step,ReaL figure
rlhf,13B/13B/7B/7B,16,H100?,heuristic tp8 pp2,256,128+384,42.6,s/step,ReaL figure
rlhf,34B/34B/7B/7B,32,H100?,heuristic tp8 pp4,256,128+384,50.5,s/step,ReaL figure
rlhf,70B/70B/7B/7B,64,H100?,heuristic tp8 pp8,256,128+384,71.6,s/step,ReaL figure
rlhf,7B/7B/13B/13B,16,H100?,heuristic tp8 pp2,256,128+384,37.9,s/step,ReaL figure
rlhf,7B/7B/34B/34B,32,H100?,heuristic tp8 pp4,256,128+384,41.9,s/step,ReaL figure
rlhf,7B/7B/70B/70B,64,H100?,heuristic tp8 pp8,256,128+384,49.8,s/step,ReaL figure
rlhf,7B/7B/7B/7B,16,H100?,heuristic tp8 pp2,256,128+384,35.3,s/step,ReaL figure
rlhf,13B x4,32,H100?,heuristic tp8 pp4,256,128+384,38.5,s/step,ReaL figure
rlhf,34B x4,64,H100?,heuristic tp8 pp8,256,128+384,60.0,s/step,ReaL figure
rlhf,70B x4,128,H100?,heuristic tp8 pp16,256,128+384,78.9,s/step,ReaL figure
"""
TRAIN = """
train,Llama2-7B (JAX),8,H100,fsdp8,16,4096,0.721,s/step,JAX-Toolbox
train,Llama2-7B (JAX),16,H100,fsdp,64,4096,422,TFLOP/s/GPU,MaxText
train,Llama3.1-8B,8,H100,cp2 mbs1,128,8192,12.27,s/step,NVIDIA
train,Llama3.1-8B,128,H100,cp2 mbs1,2048,8192,12.33,s/step,NVIDIA
train,Llama3.1-70B,64,H100,tp4 pp4 cp2 vp5,128,8192,14.66,s/step,NVIDIA
train,Llama3.1-405B,512,H100,tp8 pp8 cp2 vp8,256,8192,19.78,s/step,NVIDIA
train,MPT-7B,8,H100,fsdp mbs6 no recompute,,2048,10643,tok/s/GPU,llm-foundry
train,MPT-30B,8,H100,fsdp mbs3 recompute,,2048,2002,tok/s/GPU,llm-foundry
train,MPT-13B,8,A100,fsdp mbs2 no recompute,,2048,2262,tok/s/GPU,llm-foundry
train,Llama3.1-8B,64,H100-96GB-500W,fsdp8 tp8 local batch 12,,8192,4378,tok/s/GPU,torchtitan
train,GPT-22B,8,A100,tp8 full recompute,4,2048,1.42,s/step,arXiv 2205.05198
train,GPT-22B,8,A100,tp8 sp selective recompute,4,2048,1.10,s/step,arXiv 2205.05198
train,GPT-175B,64,A100,tp8 pp8 vp3 full recompute,64,2048,18.13,s/step,arXiv 2205.05198
"""
DECODE = """
decode,LLaMA-7B FP16,1,A100,tp1 batch 384,384,128+128,5586,tok/s,TensorRT-LLM
decode,Llama3.1-8B FP8,1,H100,tp1,,128+2048,22714,tok/s,TensorRT-LLM
decode,Llama3.1-70B FP8,1,H200,tp1,,128+2048,4336,tok/s,TensorRT-LLM
"""


@pytest.fixture
def predict(tmp_path):
    """Returns the predictions for rows in text."""

    def predict(rows: str, **more):
        path = tmp_path / "points.csv"
        path.write_text(f"# a note\n{HEAD}{rows.strip()}\n")
        return predict_points(path, **more)

    return predict


@pytest.mark.parametrize(
    ("rows", "most_median", "most"), [(TRAIN, 0.10, 0.25), (DECODE, 0.15, 0.25), (RLHF, 0.15, 0.35)]
)
def test_predictions_are_near_what_was_measured(predict, rows, most_median, most):
    errors = [abs(each.error) for each in predict(rows)]
    assert len(errors) == rows.count("\n") - 1
    assert median(errors) <= most_median and max(errors) <= most


# Seconds that ReaL's figure has for its searched plans, in the order of the rows above.
SEARCHED = (28.0, 31.3, 46.7, 65.9, 24.6, 29.4, 37.8, 23.2, 27.3, 48.8, 71.9)


@pytest.mark.slow
def test_searched_plans_gain_what_was_published(predict):
    """In the same direction on every row, and on average within ten points."""
    rows = []
    for rule, seconds in zip(RLHF.strip().splitlines(), SEARCHED, strict=True):
        words = rule.split(",")
        rows += [rule, ",".join([*words[:4], "searched", *words[5:7], str(seconds), *words[8:]])]
    gains = find_gains(predict("\n".join(rows)))
    assert len(gains) == 11 and all((gain.measured > 1) == (gain.predicted > 1) for gain in gains)
    assert abs(mean(gain.measured for gain in gains) - mean(gain.predicted for gain in gains)) <= 0.1


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("7B", 6.74), ("13B", 13.02), ("34B", 33.7), ("70B", 68.98), ("Llama2-7B (JAX)", 6.74), ("LLaMA-7B FP16", 6.74),
        ("Llama3.1-8B", 8.03), ("Llama3.1-70B FP8", 70.55), ("Llama3.1-405B", 405.85), ("Llama-3.1-8B", 8.03),
        ("MPT-7B", 6.65), ("MPT-13B", 12.85), ("MPT-30B", 29.95), ("GPT-22B", 22.1), ("GPT-175B", 174.6),
        ("Qwen3-30B-A3B GRPO", 30.53), ("Mixtral-8x7B", 46.7), ("Qwen2.5-7B", 7.61), ("Llama 3.1 8B", 8.03),
        ("GPT-J 6B", 6.05), ("GPT3-175B", 174.6), ("Meta-Llama-3-70B-Instruct", 70.55), ("Mistral-7B", 7.24),
    ],
)  # fmt: skip
def test_known_models_have_their_published_sizes(name, billions):
    """Biases and tables of positions, which no product reads, are left out."""
    assert find_model(name).num_params / 1e9 == pytest.approx(billions, rel=0.005)


def test_mixtures_count_what_is_active():
    assert find_model("Qwen3-30B-A3B").active_params / 1e9 == pytest.approx(3.35 - 0.31, rel=0.02)
    assert find_model("Mixtral-8x7B").active_params / 1e9 == pytest.approx(12.9 - 0.13, rel=0.02)


def test_every_known_model_is_found_by_its_name():
    assert all(find_model(name) is shape for name, shape in KNOWN.items())


@pytest.mark.parametrize(
    ("gpu", "rate"), [("H100", 989.4e12), ("H100 SXM", 989.4e12), ("NVIDIA A100-80GB", 312e12), ("A100-40GB", 312e12)]
)
def test_kinds_as_they_are_spelled(gpu, rate):
    cluster = find_point_cluster(gpu, 16)
    assert cluster.matmul_flops["bfloat16"] == rate and (cluster.num_nodes, cluster.devices_per_node) == (2, 8)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="model 'Gnu-7B': not known; use a size such as 7B"):
        find_model("Gnu-7B")


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("tp8 pp4 dp2", 64, {"tp": 8, "pp": 4, "dp": 2, "zero_stage": 1, "sequence_parallel": True, "remat": None}),
        ("fsdp8", 8, {"dp": 8, "zero_stage": 3}),
        ("fsdp tp8", 64, {"dp": 8, "tp": 8, "zero_stage": 3}),
        ("cp2 mbs1", 8, {"cp": 2, "dp": 4, "micro_batch": 1, "zero_stage": 1}),
        ("tp4 pp4 cp2 vp5", 64, {"dp": 2, "vp": 5, "micro_batch": 1}),
        ("tp8 full recompute", 8, {"remat": True, "sequence_parallel": False, "zero_stage": 0}),
        ("tp8 sp selective recompute", 8, {"remat": False, "sequence_parallel": True}),
        ("fsdp mbs6 no recompute", 8, {"remat": False, "micro_batch": 6}),
        ("fsdp8 tp8 local batch 12", 64, {"micro_batch": None, "batch": 12, "is_local": True}),
        ("heuristic tp8 pp16", 128, {"pp": 16, "dp": 1}),
        ("train ep8".removeprefix("train "), 32, {"ep": 8, "dp": 32}),
        ("fsdp8 dp2 mbs3", 16, {"dp": 16, "zero_stage": 3, "micro_batch": 3}),
        ("TP=2, PP=2", 4, {"tp": 2, "pp": 2}),
    ],
)
def test_layouts_as_they_are_spelled(text, gpus, expected):
    layout = read_layout(text, gpus)
    assert {name: getattr(layout, name) for name in expected} == expected
    assert place(layout, gpus).strategy.size * layout.cp == gpus


def test_batches_that_are_not_said():
    assert read_layout("fsdp8 tp8 local batch 12", 64).count_sequences(None) == 96
    assert read_layout("fsdp8 mbs6", 8).count_sequences(None) == 6 * 8 * 8
    assert read_layout("tp8 pp4 mbs2", 64).count_sequences(None) == 2 * 2 * 16
    assert read_layout("tp8 pp4 mbs2", 64).count_sequences(128) == 128


@pytest.mark.parametrize(
    ("text", "message"), [("tp8 qq3", "'qq3' is not known"), ("tp8 dp3", "tp8 x pp1 x cp1 x dp3 are not the 16 GPUs")]
)
def test_layouts_that_say_something_else_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_layout(text, 16)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("train,7B,8,H100,fsdp8,16,4096,x,s/step,", "line 3: could not convert"),
        ("train,7B,8,Z80,fsdp8,16,4096,1,s/step,", "line 3: gpu 'Z80' is not known; use a100"),
        ("train,7B,8,H100,fsdp8,16,4096,1,m/s,", "unit 'm/s'"),
        ("sleep,7B,8,H100,fsdp8,16,4096,1,s/step,", "kind 'sleep'"),
        ("train,7B,8,H100,fsdp8,16,128+1,1,s/step,", "length '128\\+1'"),
        ("decode,405B,1,H100,tp1,,128+128,1,tok/s,", "no room for a cache"),
        ("rlhf,7B/7B,8,H100,tp8,256,128+384,1,s/step,", "2 of them, but the roles are actor, ref, critic, reward"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(predict, row, message):
    with pytest.raises(ValueError, match=f"points.csv.*{message}"):
        predict(row)


def test_searched_rows_are_left_to_the_search(predict):
    row = RLHF.strip().splitlines()[0].replace("heuristic tp8", "searched")
    assert predict(row, search_fn=None) == []
    seen, step = [], SearchedStep(seconds=28.0, plan="a plan")
    (found,) = predict(row, search_fn=lambda work, cluster: seen.append((work, cluster)) or step)
    assert found.predicted == 28.0 and find_group(found.row) == "searched"
    work, cluster = seen[0]
    assert [call.name for call in work.calls][0] == "actor_gen" and len(work.calls) == 6
    assert cluster.num_devices == 8 and work.home_call("critic").name == "critic_train"


def test_gains_are_over_the_rule_of_the_same_step(predict):
    rule = RLHF.strip().splitlines()[0]
    rows = f"{rule}\n{rule.replace('heuristic tp8', 'searched').replace('42.3', '28.0')}"
    found = predict(rows, search_fn=lambda work, cluster: SearchedStep(seconds=20.0, plan="a plan"))
    (gain,) = find_gains(found)
    assert gain.measured == pytest.approx(42.3 / 28.0) and gain.predicted == pytest.approx(found[0].predicted / 20.0)
    assert "mean: x1.51" in describe_points(found) and "  a plan" in describe_points(found)


def test_units_say_the_same(predict):
    """16 sequences of 4,096 tokens on 8 GPUs: seconds, tokens and operations a second."""
    row = "train,Llama2-7B,8,H100,fsdp8,16,4096,1,{},"
    seconds, rate, flops = (predict(row.format(unit))[0].predicted for unit in ("s/step", "tok/s/GPU", "TFLOP/s/GPU"))
    assert rate == pytest.approx(8192 / seconds)
    assert flops == pytest.approx(rate * count_flops(find_model("Llama2-7B"), 4096) / 1e12)


def test_the_table_has_every_row_and_the_medians(predict):
    text = describe_points(predict(TRAIN + RLHF.strip()))
    assert len(text.splitlines()) == 1 + 13 + 11 + 2
    assert "train rows: median error" in text and "rlhf heuristic: median error" in text
