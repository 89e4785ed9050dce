"""Whatever happens to a file of a sealed directory is found before anything is read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from realjax.core.manifest import MANIFEST, find_damage, write_manifest

FILES = {"run/metadata": b'{"step": 3}', "role_a/d/0": bytes(range(256)) * 8, "role_a/empty": b"", "times": b"0"}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, left_out="times")
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_directory_is_as_it_was_written(sealed):
    (sealed / "times").write_bytes(b"later")
    assert find_damage(sealed) is None


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content and name != "times"])
@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (flip, "not as it was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not as it was written"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "not as it was written"),
        (lambda path: path.write_bytes(b""), "not as it was written"),
        (Path.unlink, "is missing"),
    ],
    ids=["a bit", "cut", "longer", "emptied", "gone"],
)
def test_damage_is_found_by_the_share_that_has_it(name: str, harm: Callable[[Path], object], found: str, sealed):
    harm(sealed / name)
    assert f"'{name}' {found}".replace("' not", "' is not") in str(find_damage(sealed))
    by_share = [find_damage(sealed, share=share, num_shares=2) for share in range(2)]
    assert sorted(map(str, by_share)) == sorted(["None", str(find_damage(sealed))])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', "{}"])
def test_a_damaged_manifest_is_damage(text, sealed):
    (sealed / MANIFEST).write_text(text)
    assert find_damage(sealed) == f"its {MANIFEST} is damaged"


def test_a_directory_without_a_manifest_is_not_whole(sealed, tmp_path_factory):
    (sealed / MANIFEST).unlink()
    for directory in (sealed, tmp_path_factory.mktemp("empty")):
        assert "was never completed" in str(find_damage(directory))
