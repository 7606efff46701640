"""JSON documents: what is nested in them, and errors that name the file."""

from pathlib import Path

import pytest

from data.documents import leaves, read_document
from data.errors import UserError


def test_leaves_are_what_is_no_mapping() -> None:
    assert dict(leaves({"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": None, "g": {}})) == {
        "a.b.c": 1,
        "a.d": [{"e": 2}],
        "f": None,
    }


@pytest.mark.parametrize(
    ("content", "what"), [(b'{"a": 1', "not JSON: .*column"), (b'{"a": "\xff"}', "not JSON"), (b"[1]", "holds a list")]
)
def test_what_is_no_object_is_refused_by_name(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/state\.json: {what}"):
        read_document(tmp_path / "state.json")


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"a": {"b": 1}}')
    assert read_document(tmp_path / "state.json") == {"a": {"b": 1}}
