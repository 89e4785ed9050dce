import pytest

from tests.given.checkpoints import make_checkpoint, read_tensors
from tools import check_hf
from tools.convert_hf import main


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_orbax_and_back_is_bitwise_and_says_what_it_did(dtype, tmp_path, capsys):
    source = make_checkpoint(tmp_path / "hf", "llama-tied", dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    assert main(["to-orbax", "--hf", str(source), "--orbax", str(tmp_path / "orbax")]) == 0
    assert main(["to-hf", "--orbax", str(tmp_path / "orbax"), "--hf", str(tmp_path / "back")]) == 0
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    num_tensors, num_bytes = len(read_tensors(source)), sum(len(raw) for _, _, raw in read_tensors(source).values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert f"llama, {num_tensors} tensors" in line and f"{num_bytes:,} bytes as {dtype}" in line
        assert "peak memory" in line


def test_like_gives_the_tokenizer_and_dtype_the_precision(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "qwen2")
    assert main(["to-orbax", "--hf", str(source), "--orbax", str(tmp_path / "orbax"), "--dtype", "bfloat16"]) == 0
    (source / "tokenizer.json").write_text("{}")
    assert main(["to-hf", "--orbax", str(tmp_path / "orbax"), "--hf", str(tmp_path / "a"), "--like", str(source)]) == 0
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert {dtype for dtype, _, _ in read_tensors(tmp_path / "a").values()} == {"BF16"}


def test_wrong_input_ends_in_one_line_and_a_status(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "hf", "llama")
    assert main(["to-orbax", "--hf", str(source), "--orbax", str(source)]) == 2
    assert main(["to-orbax", "--hf", str(tmp_path / "nowhere"), "--orbax", str(tmp_path / "a")]) == 2
    assert main(["to-hf", "--orbax", str(source), "--hf", str(tmp_path / "b")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert_hf: error: ")]
    expected = ["exists; name another directory", "does not exist", "no directory 'params'"]
    assert len(errors) == 3 and all(text in line for text, line in zip(expected, errors))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize(("kind", "task"), [("qwen3", "CausalLM"), ("llama", "SequenceClassification")])
def test_both_ways_are_checked_against_transformers(kind, task, tmp_path, capsys):
    pytest.importorskip("torch")
    config = {"max_position_embeddings": 96} if task == "CausalLM" else {"num_labels": 1}
    source = make_checkpoint(tmp_path / "hf", kind, task=task, config=config)
    assert main(["to-orbax", "--hf", str(source), "--orbax", str(tmp_path / "orbax"), "--check"]) == 0
    back = ["to-hf", "--orbax", str(tmp_path / "orbax"), "--hf", str(tmp_path / "back"), "--dtype", "bfloat16"]
    assert main([*back, "--check", "--shard-gb", "1e-5"]) == 0
    checks = [line for line in capsys.readouterr().out.splitlines() if "differ from transformers'" in line]
    assert len(checks) == 2 and all(float(line.split(" by ")[1].split()[0]) < 1e-4 for line in checks)
    assert all(("perplexity" in line) == (task == "CausalLM") for line in checks)
    same = "of 32 greedy tokens after it the first 32 are the same"
    assert all((same in line) == (task == "CausalLM") for line in checks)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1


def test_weights_that_give_other_logits_fail_the_check(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    source = make_checkpoint(tmp_path / "hf", "llama")
    right = check_hf.compute_outputs
    monkeypatch.setattr(check_hf, "compute_outputs", lambda *given: right(*given) * 1.01)
    assert main(["to-orbax", "--hf", str(source), "--orbax", str(tmp_path / "orbax"), "--check"]) == 2
    assert "is rounding" in capsys.readouterr().err
