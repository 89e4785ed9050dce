"""Tokens that are made once: kept on the disk by what they were made of, shared by processes and by later runs."""

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from realjax.core.data_paths import find_fault, is_saved_dataset
from realjax.core.identity import digest
from realjax.core.json_text import JsonObject
from realjax.data.files import Source, choose_files, load_hub_dataset
from realjax.data.store import Store, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
# Counted up with every change of what rows become.
_VERSION = 1


def load_store(
    source: Source, tokenizer: "PreTrainedTokenizerBase", form: object, build: Callable[[Writer], JsonObject]
) -> Store:
    """Returns what `build` writes, from the source's cache where it lies there, whole; `form` is all else it goes by.

    One process builds it, others wait for that. What is damaged is made anew. A cache that cannot be written is done
    without, with a warning. The facts that `build` returns have `notes`, lines for the log, which are said each time.
    """
    store = _find_store(source, tokenizer, form, build)
    for note in store.facts.get("notes", ()):
        _log.warning("%s: %s", source.name, note)
    return store


def _find_store(
    source: Source, tokenizer: "PreTrainedTokenizerBase", form: object, build: Callable[[Writer], JsonObject]
) -> Store:
    if source.cache is None or find_fault(source.path) is not None:  # whose words are those of who reads it
        return _build_in_memory(build)
    try:
        key = digest(str(_VERSION), repr(form), digest_source(source), digest_tokenizer(tokenizer))
        entry = source.cache / key
        if (store := _open(entry, source)) is not None:
            return store
        source.cache.mkdir(parents=True, exist_ok=True)
        with _lock(entry.with_suffix(".lock")):
            return _open(entry, source) or _build_on_disk(entry, build)
    except OSError as error:
        _log.warning("%s: no cache of its tokens at %s (%s)", source.subject, source.cache, error.strerror or error)
        return _build_in_memory(build)


def _build_in_memory(build: Callable[[Writer], JsonObject]) -> Store:
    writer = Writer()
    return writer.finish(build(writer))


def _open(entry: Path, source: Source) -> Store | None:
    if not entry.is_dir():
        return None
    try:
        store = Store.open(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: the cache of its tokens is damaged (%s), and made anew", source.subject, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    _log.info("%s: %d rows, tokenised before (%s)", source.subject, store.facts["num_rows"], entry)
    return store


def _build_on_disk(entry: Path, build: Callable[[Writer], JsonObject]) -> Store:
    folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    writer = Writer(folder)
    try:
        writer.finish(build(writer))
        folder.rename(entry)
    except BaseException:
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Store.open(entry)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """While entered, no other process is; a disk without locks lets both in, and the last to finish is kept out."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest_source(source: Source) -> str:
    """Returns a text that changes with the content that a source names."""
    place = Path(source.path).expanduser()
    if place.is_file():
        files = [place]
    elif place.is_dir() and not is_saved_dataset(place):
        files = choose_files(source)
    else:
        return digest(load_hub_dataset(source)._fingerprint, str(source.max_rows))
    parts = [f"{file.suffix}:{_digest_file(file)}" for file in files]
    return digest(*parts, str(source.max_rows))


def _digest_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns a text that changes with the tokens that a tokenizer makes, or with its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    flags = str([getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")])
    return digest(type(tokenizer).__name__, core, special, flags, str(tokenizer.chat_template))
