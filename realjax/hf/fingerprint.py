"""A text that tells model directories apart by what they hold, wherever they lie."""

from pathlib import Path

from realjax.core.identity import digest
from realjax.hf.adapters import open_adapter
from realjax.hf.files import ADAPTER, CONFIG, EXTRAS, CheckpointFiles

NUM_SAMPLES, SAMPLE_BYTES = 64, 2**16


def fingerprint_model(directory: str | Path, *, has_weights: bool = True) -> str:
    """Returns the digest of the config, tokenizer and generation files, and of the weights where they count.

    Of the weights these are the names, shapes and types of the tensors and samples of each file's bytes: training
    changes all of them, and reading everything would take minutes.
    """
    directory = Path(directory)
    files = {path for pattern in (CONFIG, *EXTRAS) for path in directory.glob(pattern) if path.is_file()}
    parts: list[bytes | str] = [part for path in sorted(files) for part in (path.name, path.read_bytes())]
    if has_weights:
        tensors = CheckpointFiles.open(directory).tensors
        parts += [f"{name} {info.shape} {info.dtype}" for name, info in sorted(tensors.items())]
        parts += [_samples(path) for path in sorted({info.file for info in tensors.values()})]
    return digest(*parts)


def fingerprint_adapter(directory: str | Path) -> str:
    """Returns the digest of an adapter's configuration and tensors."""
    files = {info.file for info in open_adapter(directory).tensors.values()}
    return digest((Path(directory) / ADAPTER).read_bytes(), *(_samples(path) for path in sorted(files)))


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [str(size).encode()]
        for i in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)
