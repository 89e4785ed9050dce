"""What the option with the path of data may hold: files, directories of them, names of the hub, several of these."""

import re
from pathlib import Path

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
NEEDED = "a .jsonl, .json, .csv or .parquet file, a directory of them, or the name of a dataset of the hub"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def split_paths(text: str) -> list[str]:
    """Returns the parts of a mixture, `a.jsonl,b.parquet`; what exists as it is written is one."""
    if "," not in text or Path(text).expanduser().exists():
        return [text]
    return [part.strip() for part in text.split(",")]


def is_hub_name(text: str) -> bool:
    """Returns whether the text names a dataset of the hub, `owner/name` or `owner/name:subset`, and no file."""
    return _HUB_NAME.fullmatch(text) is not None and Path(text).suffix not in FILE_KINDS


def find_fault(path: str) -> str | None:
    """Returns what is wrong with one path, without reading what lies there; None where it can be data."""
    place = Path(path).expanduser()
    if place.is_file():
        return None if place.suffix in FILE_KINDS else f"has extension {place.suffix!r}"
    if place.is_dir():
        return None if list_data_files(place) or is_saved_dataset(place) else "is a directory without data files"
    return None if is_hub_name(path) else "does not exist"


def list_data_files(folder: Path) -> list[Path]:
    """Returns the data files of a directory and of the folders in it, sorted by path."""
    found = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))
    return sorted(path for path in found if path.suffix in FILE_KINDS and path.is_file())


def is_saved_dataset(folder: Path) -> bool:
    """Returns whether `save_to_disk` of the library `datasets` wrote the directory."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
