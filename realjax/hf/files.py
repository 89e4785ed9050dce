"""Checkpoint files on disk: where they are, what tensors they hold, and slices of them."""

import importlib.util
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from realjax.core.json_text import JsonObject, parse_json
from realjax.hf.dims import Shape, Window
from realjax.hf.families import config_from_hf
from realjax.hf.pieces import ReadFn
from realjax.hf.rules import Family

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
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
CHECKPOINT_NAME = re.compile(r"epoch\d+epochstep\d+globalstep(\d+)")  # of a run, in its role's directory
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor is and what it is; `dtype` is safetensors' name of it ("BF16")."""

    file: Path
    name: str  # in the file
    shape: Shape
    dtype: str


class TensorFile(Protocol):
    """One open file of tensors."""

    def __init__(self, path: Path) -> None: ...
    def infos(self) -> dict[str, tuple[Shape, str]]: ...
    def read(self, name: str, window: Window) -> np.ndarray: ...
    def close(self) -> None: ...


class SafetensorsFile:
    """A .safetensors file, mapped into memory: only the pages of what is read are touched."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint: '{path}' is not a whole safetensors file ({error}); download or copy it again"
            ) from error

    def infos(self) -> dict[str, tuple[Shape, str]]:
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - not a dict
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

    def read(self, name: str, window: Window) -> np.ndarray:
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
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch has no class of its own for a bad file: what it meets first decides
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"checkpoint: '{path}' is not a whole PyTorch file of tensors ({reason}); download or copy it again"
            ) from error
        self._tensors = self._only_tensors(found, path)

    def _only_tensors(self, found: object, path: Path) -> dict[str, "torch.Tensor"]:
        """Returns the tensors by name; like transformers it passes over what else stands beside them."""
        entries = found if isinstance(found, dict) else {}
        tensors = {str(name): x for name, x in entries.items() if isinstance(x, self._torch.Tensor)}
        if not tensors:
            kinds = ", ".join(f"{name!r} ({type(x).__name__})" for name, x in list(entries.items())[:6])
            raise ValueError(
                f"checkpoint: '{path}' holds {kinds or f'a {type(found).__name__}'}, and no tensors by name; save the "
                "model's own state_dict there"
            )
        return tensors

    def infos(self) -> dict[str, tuple[Shape, str]]:
        """Returns shape and dtype (by safetensors' name) of every tensor."""
        t = self._torch
        names = {t.float64: "F64", t.float32: "F32", t.float16: "F16", t.bfloat16: "BF16"}
        return {n: (tuple(x.shape), names.get(x.dtype, str(x.dtype))) for n, x in self._tensors.items()}

    def read(self, name: str, window: Window) -> np.ndarray:
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
        for path in find_weights(directory):
            file = FORMATS[path.suffix](path)
            for name, (shape, dtype) in file.infos().items():
                tensors[name] = TensorInfo(file=path, name=name, shape=shape, dtype=dtype)
            file.close()
        return cls(directory=directory, tensors=tensors)

    def respelled(self, family: Family, num_layers: int) -> "CheckpointFiles":
        """Returns the tensors of the family's decoder of so many layers, by the names that its rules give them."""
        names = {name: family.respell(name, num_layers) for name in self.tensors}
        return replace(self, tensors={ours: self.tensors[name] for name, ours in names.items() if ours is not None})

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

            def read(name: str, window: Window) -> np.ndarray:
                info = self.tensors[name]
                if info.file not in opened:
                    opened[info.file] = FORMATS[info.file.suffix](info.file)
                    stack.callback(opened[info.file].close)
                return opened[info.file].read(info.name, window)

            yield read


def read_json(path: Path, subject: str) -> JsonObject:
    """Returns the object in a json file. Raises ValueError, naming `subject`, when it is missing or malformed."""
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{subject}: '{path}' does not exist") from error
    except OSError as error:
        raise ValueError(f"{subject}: '{path}' cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ValueError(f"{subject}: '{path}' is not valid json: {error}; download or copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{subject}: '{path}' holds a json {type(value).__name__}; needed an object")
    return value


def resolve_model_path(path: str | Path, *, need_weights: bool = True, or_else: str = "") -> Path:
    """Returns the local directory of a model, of which `path` is that directory or a hub identifier.

    Of a directory of a run's checkpoints it is the last one, of a hub identifier the cached snapshot, else one that is
    downloaded. Raises ValueError when there is none, when it has no config.json, and with `need_weights` when the
    architecture is not supported or it has no weights. The message about weights ends in `or_else`: what the user can
    do instead.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        local = _last_checkpoint(local)
        _check_directory(local, need_weights, or_else)
        return local
    if local.exists():
        raise ValueError(f"model path '{path}' is a file; needed the directory that holds it and config.json")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(path)):
        raise ValueError(f"model path '{path}' does not exist; give a model directory or a hub identifier (owner/name)")
    return _download(str(path), need_weights)


def find_weights(directory: Path, or_else: str = "") -> list[Path]:
    """Returns the files of a directory's weights; of several sets the one that transformers takes.

    Raises ValueError when a file is missing, see `resolve_model_path`.
    """
    _refuse_adapter(directory)
    for single, index in zip(SINGLES, INDEXES):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _list_shards(directory, index)
    raise ValueError(
        f"model path '{directory}' holds no weights; needed model.safetensors or pytorch_model.bin, "
        f"or their .index.json and shards{or_else}"
    )


def _refuse_adapter(directory: Path) -> None:
    if (directory / ADAPTER).is_file():
        raise ValueError(
            f"model path '{directory}' holds an adapter ({ADAPTER}), which belongs on top of other weights; merge them "
            "(peft's merge_and_unload), save the whole model and give its directory"
        )


def _list_shards(directory: Path, index: str) -> list[Path]:
    weight_map = read_json(directory / index, "checkpoint index").get("weight_map")
    names: set[str] = set()
    for name in weight_map.values() if isinstance(weight_map, dict) else [None]:
        if not isinstance(name, str) or Path(name).name != name:  # with a folder it could be a file from anywhere
            raise ValueError(
                f"checkpoint '{directory}': {index} gives {name!r} as a file of weights; its weight_map needs a name "
                "in the same directory for each tensor"
            )
        names.add(name)
    suffix = Path(index.removesuffix(".index.json")).suffix
    files = [directory / name for name in sorted(names)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"checkpoint '{directory}': {index} names {', '.join(absent)}, not in the directory")
    if other := [file.name for file in files if file.suffix != suffix]:
        raise ValueError(f"checkpoint '{directory}': {index} names {', '.join(other)}; its files end in {suffix}")
    return files


def _last_checkpoint(directory: Path) -> Path:
    """Returns the newest of the checkpoints that a run left in a directory, or the directory where there are none."""
    if (directory / CONFIG).is_file():
        return directory
    steps = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in directory.iterdir() if (path / CONFIG).is_file()}
    found = {path: int(match[1]) for path, match in steps.items() if match}
    return max(found, key=lambda path: found[path]) if found else directory


def _check_directory(directory: Path, need_weights: bool, or_else: str = "") -> None:
    if need_weights:
        _refuse_adapter(directory)
    if not (directory / CONFIG).is_file():
        raise ValueError(f"model path '{directory}' is not a HuggingFace model: it has no config.json")
    if need_weights:
        # The config first: nobody should download the weights of a model that is not supported.
        config_from_hf(read_json(directory / CONFIG, "model path"), str(directory / CONFIG))
        find_weights(directory, or_else)


def _download(repo: str, need_weights: bool) -> Path:
    """Returns the snapshot of a hub repository: the cached one when it is complete, else the hub's."""
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
