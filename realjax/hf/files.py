"""Checkpoint files on disk: where they are, what tensors they hold, and slices of them."""

import importlib.util
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from realjax.hf.rules import ReadFn, Shape

CONFIG = "config.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
# Everything a tokenizer or generation may need beside config and weights.
EXTRAS = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor is and what it is; `dtype` is safetensors' name of it ("BF16")."""

    file: Path
    shape: Shape
    dtype: str


class TensorFile(Protocol):
    """One open file of tensors."""

    def __init__(self, path: Path) -> None: ...
    def infos(self) -> dict[str, tuple[Shape, str]]: ...
    def read(self, name: str, window: tuple[slice, ...]) -> np.ndarray: ...
    def close(self) -> None: ...


class SafetensorsFile:
    """A .safetensors file, mapped into memory: only the pages of what is read are touched."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="np")
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint: '{path}' is not a whole safetensors file ({error}); download or copy it again"
            ) from error

    def infos(self) -> dict[str, tuple[Shape, str]]:
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - not a dict
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

    def read(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
        return self._file.get_slice(name)[window]

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class TorchFile:
    """A pytorch_model*.bin file, mapped into memory where its format allows. Raises ValueError without torch."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("torch") is None:
            raise ValueError(
                f"checkpoint: reading '{path}' needs PyTorch, which is not installed; "
                "run `pip install realjax[torch]` or give a checkpoint in safetensors"
            )
        import torch  # an extra, and slow to import: only those who read .bin files pay for it

        self._torch = torch
        self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))

    def infos(self) -> dict[str, tuple[Shape, str]]:
        """Returns shape and dtype (by safetensors' name) of every tensor."""
        t = self._torch
        names = {t.float64: "F64", t.float32: "F32", t.float16: "F16", t.bfloat16: "BF16"}
        return {n: (tuple(x.shape), names.get(x.dtype, str(x.dtype))) for n, x in self._tensors.items()}

    def read(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
        """Returns a copy of that window of the tensor."""
        part = self._tensors[name][window].contiguous()
        if part.dtype == self._torch.bfloat16:  # numpy does not know it: pass the bits
            return part.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return part.numpy().copy()

    def close(self) -> None:
        self._tensors = {}


FORMATS: dict[str, type[TensorFile]] = {".safetensors": SafetensorsFile, ".bin": TorchFile}


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The weights of one model directory. Holds no open file."""

    directory: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: str | Path) -> "CheckpointFiles":
        """Returns the index of a directory's weights, safetensors preferred; reads headers only.

        Raises ValueError when there are none, or a shard is missing or broken.
        """
        directory = Path(directory)
        tensors: dict[str, TensorInfo] = {}
        for path in _weight_files(directory):
            file = FORMATS[path.suffix](path)
            for name, (shape, dtype) in file.infos().items():
                tensors[name] = TensorInfo(file=path, shape=shape, dtype=dtype)
            file.close()
        return cls(directory=directory, tensors=tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds every floating tensor exactly."""
        return np.result_type(*(DTYPES[info.dtype] for info in self.tensors.values() if info.dtype in DTYPES))

    @contextmanager
    def reader(self) -> Iterator[ReadFn]:
        """Yields `read(name, window)`, which reads slices; files are opened on first use and closed on leaving.

        Mapped pages count as memory of the process while a file is open: keep a reader for one leaf, not for a load.
        """
        with ExitStack() as stack:
            opened: dict[Path, TensorFile] = {}

            def read(name: str, window: tuple[slice, ...]) -> np.ndarray:
                info = self.tensors[name]
                if info.file not in opened:
                    opened[info.file] = FORMATS[info.file.suffix](info.file)
                    stack.callback(opened[info.file].close)
                return opened[info.file].read(name, window)

            yield read


def read_json(path: Path, subject: str) -> dict[str, Any]:
    """Returns the object in a json file. Raises ValueError, naming `subject`, when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{subject}: '{path}' does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{subject}: '{path}' is not valid json ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{subject}: '{path}' holds a json {type(value).__name__}; needed an object")
    return value


def resolve_model_path(path: str | Path, *, need_weights: bool = True) -> Path:
    """Returns the local directory of a model given by directory or by hub identifier (cached, else downloaded).

    Raises ValueError when it is neither, or when config.json or (if needed) the weights are missing.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        _check_directory(local, need_weights)
        return local
    if local.exists():
        raise ValueError(f"model path '{path}' is a file; needed the directory that holds it and config.json")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(path)):
        raise ValueError(f"model path '{path}' does not exist; give a model directory or a hub identifier (owner/name)")
    return _download(str(path), need_weights)


def _weight_files(directory: Path) -> list[Path]:
    """Returns the weight files of a directory, complete. Raises ValueError naming what is missing."""
    for index, single in zip(INDEXES, SINGLES):
        if (directory / index).is_file():
            weight_map = read_json(directory / index, "checkpoint index").get("weight_map", {})
            files = [directory / name for name in sorted(set(weight_map.values()))]
            if absent := [file.name for file in files if not file.is_file()]:
                raise ValueError(f"checkpoint '{directory}': {index} names {', '.join(absent)}, not in the directory")
            return files
        if (directory / single).is_file():
            return [directory / single]
    raise ValueError(
        f"model path '{directory}' holds no weights; needed model.safetensors or pytorch_model.bin, "
        "or their .index.json and shards"
    )


def _check_directory(directory: Path, need_weights: bool) -> None:
    if not (directory / CONFIG).is_file():
        raise ValueError(f"model path '{directory}' is not a HuggingFace model: it has no config.json")
    if need_weights:
        _weight_files(directory)


def _download(repo: str, need_weights: bool) -> Path:
    """Returns the snapshot of a hub repository: from the cache when it is whole there, else from the hub."""
    from huggingface_hub import snapshot_download

    small = [CONFIG, *EXTRAS]
    attempts = [(True, small), (False, [*small, "model*.safetensors", INDEXES[0]] if need_weights else small)]
    if need_weights:  # a repository may hold both formats: the second is fetched only when the first is not there
        attempts.append((False, [*small, "pytorch_model*.bin", INDEXES[1]]))
    tried: list[str] = []
    for cached, patterns in attempts:
        try:
            found = Path(snapshot_download(repo, local_files_only=cached, allow_patterns=patterns))
            _check_directory(found, need_weights)
            return found
        except (OSError, ValueError) as error:  # huggingface_hub raises OSError for all: absent, offline, forbidden
            reason = str(error).splitlines()[0].split(". ")[0]
            tried += [text] if (text := f"{'cache' if cached else 'hub'}: {reason}") not in tried else []
    raise ValueError(
        f"model path '{repo}' is neither a local directory nor a hub model that could be had ({'; '.join(tried)}); "
        "give an existing directory, or run `hf download` where there is a network"
    )
