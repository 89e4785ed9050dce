import pytest

from tests.given.checkpoints import make_checkpoint, read_tensors
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
