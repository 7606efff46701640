"""Arrays on disk: what was written comes back, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.cache import Cache, RowWriter, interleave


def write(cache: Cache, key: str = "key", rows: int = 5) -> None:
    with RowWriter(cache.partial(key)) as writer:
        for row in range(rows):
            writer.add("x", np.full((1, 3), row, np.float32))
            writer.add("y", np.array([row, -row]))
    cache.seal(key, cache.partial(key), {"note": "kept"})


@pytest.mark.parametrize("sizes", [[1], [3, 0, 2], [9, 1], [60, 50], [1] * 101])
def test_rows_come_back_in_order(sizes: list[int], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blocks = [random.random((n, 2, 3)).astype(np.float32) for n in sizes]
    with RowWriter(tmp_path / "rows") as writer:
        for block in blocks:
            writer.add("x", block)
            writer.add("n", np.arange(len(block)))
            writer.add("t", block.transpose(0, 2, 1))  # not in this order in memory
    expected = np.concatenate(blocks)
    assert np.array_equal(np.load(tmp_path / "rows" / "x.npy"), expected)
    assert np.array_equal(np.load(tmp_path / "rows" / "t.npy"), expected.transpose(0, 2, 1))
    assert np.load(tmp_path / "rows" / "n.npy").tolist() == [i for n in sizes for i in range(n)]


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "rows") as writer:
        writer.add("x", np.zeros((2, 3), np.float32))
        with pytest.raises(ValueError, match=r"x: rows of float32 \(4,\), those before were float32 \(3,\)"):
            writer.add("x", np.zeros((2, 4), np.float32))
        with pytest.raises(ValueError, match="rows of float64"):
            writer.add("x", np.zeros((2, 3)))


def test_an_entry_is_mapped_and_writing_to_it_changes_no_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.open("key") is None
    write(cache)
    entry = cache.open("key")
    assert entry is not None
    assert entry.about == {"note": "kept"}
    assert entry.arrays["x"].tolist() == [[i] * 3 for i in range(5)]
    assert entry.arrays["y"].tolist() == [x for i in range(5) for x in (i, -i)]
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path / "key" / "x.npy") in maps.read_text()
    entry.arrays["x"].fill_(7)
    assert cache.open("key") is not None
    assert not cache.partial("key").exists()


def test_what_was_not_sealed_is_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt), RowWriter(cache.partial("key")) as writer:
        writer.add("x", np.zeros((2, 3)))
        raise KeyboardInterrupt
    assert cache.open("key") is None


@pytest.mark.parametrize(
    "damage",
    ["a bit", "shorter", "longer", "gone", "head gone", "head empty", "another schema", "no about", "fewer", "a file"],
)
def test_a_damaged_entry_is_found_and_removed(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path)
    write(cache)
    write(cache, "other")
    file, head = tmp_path / "key" / "x.npy", tmp_path / "key" / "head.json"
    content = file.read_bytes()
    if damage == "a bit":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "shorter":
        file.write_bytes(content[:-4])
    elif damage == "longer":
        file.write_bytes(content + b"\0" * 12)
    elif damage == "gone":
        file.unlink()
    elif damage == "head gone":
        head.unlink()
    elif damage == "head empty":
        head.write_text("")
    elif damage == "a file":
        shutil.rmtree(head.parent)
        head.parent.write_text("")
    else:
        changes: dict[str, dict[str, Any]] = {
            "another schema": {"schema": 0},
            "no about": {"about": {}},
            "fewer": {"files": {}},
        }
        changed = changes[damage]
        head.write_text(json.dumps({**json.loads(head.read_text()), **changed}))
    assert cache.open("key") is None
    assert f"{tmp_path / 'key'}: damaged, made again" in capsys.readouterr().out
    assert not (tmp_path / "key").exists()
    assert cache.open("other") is not None
    write(cache)
    assert cache.open("key") is not None


def test_parts_are_brought_together_in_the_order_of_their_places(tmp_path: Path) -> None:
    """Two writers took blocks in turn, of some names only one has any."""
    sizes = [3, 2, 4, 1, 2]
    first = np.concatenate([[0], np.cumsum(sizes)])
    parts = []
    for rank in range(2):
        blocks = []
        with RowWriter(tmp_path / f"{rank}") as writer:
            for place in range(rank, len(sizes), 2):
                rows = np.arange(first[place], first[place + 1])
                writer.add("x", rows)
                blocks.append((place, "x", len(rows)))
                if rank == 1:
                    writer.add("only", rows * 10)
                    blocks.append((place, "only", len(rows)))
        parts.append((tmp_path / f"{rank}", blocks))
    interleave(parts, tmp_path / "whole")
    assert np.load(tmp_path / "whole" / "x.npy").tolist() == list(range(12))
    assert np.load(tmp_path / "whole" / "only.npy").tolist() == [30, 40, 90]


def test_no_pickle_is_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.partial("key").mkdir()
    np.save(cache.partial("key") / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    cache.seal("key", cache.partial("key"), {})
    assert cache.open("key") is None


def test_numbers_keep_their_bits(tmp_path: Path) -> None:
    values = torch.randn(7, 5)
    with RowWriter(tmp_path / "a") as writer:
        writer.add("x", values.numpy())
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "a" / "x.npy")), values)
