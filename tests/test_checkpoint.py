import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import pretrain.checkpoint
from data.batch import Batch, Field
from data.errors import UserError
from data.index import Shard
from data.source import Source
from data.stream import DataConfig, Stream
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import ObjectivesConfig, Pretraining
from pretrain.checkpoint import CheckpointError, Checkpoints, find_last, load_checkpoint, load_encoder, point_last
from pretrain.config import TrainConfig
from pretrain.model.encoder import Encoder
from pretrain.optimizer import make_optimizer
from tests.tiny import MODEL, VIEWS, tiny_encoder, tiny_tokenizer

DATA = {"seed": 3, "fingerprint": "abc", "batch_size": 8}


def stream() -> Stream:
    """Of a shard that need not be there: only its state is saved."""
    source = Source([Shard("train-0.tar", 10240, "0" * 64, 10, {"txt": 10})])
    return Stream([source], DataConfig(views=VIEWS), tiny_tokenizer(), seed=3, batch_size=8)


class Run(NamedTuple):
    model: Pretraining
    optimizer: torch.optim.AdamW

    def step(self, seed: int) -> None:
        """One step on random inputs, so that every part of the state moves."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(4)
        text = torch.randint(5, 200, (4, 12), generator=generator)
        batch = Batch(
            {
                "image": Field(torch.rand(4, 3, 16, 16, generator=generator), rows),
                "text": Field(text, rows, torch.ones_like(text, dtype=torch.bool)),
                "audio": Field(torch.rand(4, 32, 32, generator=generator), rows),
            },
            4,
            ["a", "b", "c", "d"],
        )
        self.model(batch, seed=seed).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(
        self,
        folder: Path,
        step: int,
        tokenizer: PreTrainedTokenizerBase,
        keep: int = 2,
        checkpoints: Checkpoints | None = None,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = checkpoints or Checkpoints(folder, keep, warn=pytest.fail)
        checkpoints.save(step, self.model, self.optimizer, tokenizer, stream().state_dict(), DATA, {"bad_steps": 1})
        saved = checkpoints.wait()
        assert saved is not None
        return saved

    def tensors(self) -> dict[str, Tensor]:
        """A copy of all that a checkpoint has to hold."""
        state = self.optimizer.state_dict()["state"]
        return {name: value.clone() for name, value in self.model.state_dict().items()} | {
            f"{i}.{name}": value.clone() for i, entry in state.items() for name, value in entry.items()
        }


def begin(seed: int, **changes: Any) -> Run:
    """A model and its optimiser; ``changes`` are of the model's shape."""
    config = ObjectivesConfig(masked_region=MaskedRegionConfig(decoder_width=8, decoder_heads=2))
    torch.manual_seed(seed)
    encoder = tiny_encoder(tiny_tokenizer(), seed)
    if changes:
        encoder = Encoder(type(MODEL)(**{**vars(MODEL), **changes}), VIEWS, encoder.vocabulary)
    model = Pretraining(encoder, config)
    return Run(model, make_optimizer(model, TrainConfig(weight_decay=0.1)))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def trained() -> Run:
    """Two steps in. Only read by tests."""
    run = begin(0)
    run.step(0)
    run.step(1)
    return run


def test_a_loaded_checkpoint_is_the_saved_one_to_the_bit(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase
) -> None:
    saved = trained.tensors()
    checkpoint = trained.save(tmp_path, 2, tokenizer)

    other = begin(1)
    assert not same(other.tensors(), saved)
    assert load_checkpoint(checkpoint, other.model, other.optimizer, dict(DATA)) == (2, {"bad_steps": 1})
    assert same(other.tensors(), saved)
    assert same(trained.tensors(), saved)
    names = {name.partition(".")[0] for name in saved}
    assert {"encoder", "objectives", "0"} <= names
    assert sum(name.endswith(".exp_avg_sq") for name in saved) == len(list(trained.model.parameters()))


def test_the_next_step_is_the_same_as_without_the_detour(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run = begin(0)
    run.step(0)
    checkpoint = run.save(tmp_path, 1, tokenizer)
    files = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    other = begin(1)
    load_checkpoint(checkpoint, other.model, other.optimizer, dict(DATA))
    run.step(1)
    other.step(1)
    assert same(run.tensors(), other.tensors())
    # Files are mapped into memory when they are read: training on must not write through.
    assert {path: path.read_bytes() for path in files} == files


def test_the_encoder_and_tokenizer_load_by_themselves(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained.save(tmp_path, 2, tokenizer)
    encoder, loaded = load_encoder(tmp_path / "last")
    assert same(dict(encoder.state_dict()), dict(trained.model.encoder.state_dict()))
    assert (encoder.config, encoder.views, encoder.vocabulary) == (
        trained.model.encoder.config,
        trained.model.encoder.views,
        trained.model.encoder.vocabulary,
    )
    assert not encoder.training
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("a high tone")["input_ids"] == tokenizer("a high tone")["input_ids"]


@pytest.mark.parametrize("broken", ["save_file", "_flush", "tokenizer"])
def test_a_crash_while_saving_leaves_the_checkpoints_before_it(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    first = trained.save(tmp_path, 1, tokenizer)
    before = sorted(path.relative_to(tmp_path) for path in first.rglob("*"))
    with monkeypatch.context() as patch:
        if broken == "tokenizer":
            patch.setattr(type(tokenizer), "save_pretrained", crash)
        else:
            patch.setattr(f"pretrain.checkpoint.{broken}", crash)
        with pytest.raises(CheckpointError, match=rf"step-00000002 could not .*no space.* newest one is {first}"):
            trained.save(tmp_path, 2, tokenizer, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", first.name]

    assert find_last(tmp_path) == first
    assert (tmp_path / "last").resolve() == first.resolve()
    assert sorted(path.relative_to(tmp_path) for path in first.rglob("*")) == before
    other = begin(1)
    assert load_checkpoint(tmp_path / "last", other.model, other.optimizer, dict(DATA)) == (1, {"bad_steps": 1})
    assert same(other.tensors(), trained.tensors())

    # The half-written one doesn't stand in the way of the next, nor stay.
    second = trained.save(tmp_path, 2, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", first.name, second.name]


def test_all_is_written_out_before_it_gets_its_name(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(pretrain.checkpoint, "_flush", flushed.append)
    checkpoint = trained.save(tmp_path, 1, tokenizer)
    written = {path.relative_to(checkpoint) for path in checkpoint.rglob("*")}
    partial = [path for path in flushed if path != tmp_path]
    assert written <= {path.relative_to(partial[0].parents[0]) for path in partial if path != partial[0].parents[0]}
    assert all(".partial" in str(path) for path in partial)
    assert flushed[-1] == tmp_path


def test_left_over_partial_folders_of_any_step_are_removed(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("step-00000001.partial", "step-00000007.partial"):
        (tmp_path / name / "encoder").mkdir(parents=True)
        (tmp_path / name / "encoder" / "config.json").write_text("{")
    assert find_last(tmp_path) is None
    save, there = Encoder.save, list[str]()

    def watched(self: Encoder, folder: Path, weights: dict[str, Tensor]) -> None:
        there.extend(path.name for path in tmp_path.iterdir() if path != folder.parent)
        save(self, folder, weights)

    monkeypatch.setattr(Encoder, "save", watched)
    trained.save(tmp_path, 7, tokenizer)
    assert there == []  # before anything is written, which may need the space
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000007"]


def test_leftovers_that_cannot_be_removed_stand_in_no_ones_way(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that someone reads stays in its folder under another name."""
    stuck = [tmp_path / name for name in ("step-00000002.partial", "step-00000002.old.partial")]
    for folder in stuck:
        folder.mkdir()
        (folder / ".nfs0001").touch()
    remove, numbers = shutil.rmtree, iter(range(100))

    def read_by_someone(path: Path, ignore_errors: bool = False) -> None:
        if list(path.glob(".nfs*")):
            raise OSError(errno.ENOTEMPTY, f"Directory not empty, {next(numbers)}", str(path))
        remove(path, ignore_errors)

    warned = list[str]()
    checkpoints = Checkpoints(tmp_path, 1, warn=warned.append)
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.shutil.rmtree", read_by_someone)
        for step in (2, 2, 4):  # the second time the first one has to make way
            checkpoint = trained.save(tmp_path, step, tokenizer, 1, checkpoints)
            assert set(tmp_path.iterdir()) == {tmp_path / "last", checkpoint, *stuck}
    assert len(warned) == len(stuck)  # once for each
    for folder in stuck:
        assert [message for message in warned if message.startswith(f"{folder} could not be removed ([Errno ")]
    # Another run, after they are no longer read.
    trained.save(tmp_path, 6, tokenizer, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000006"]


def test_an_old_checkpoint_that_cannot_be_removed_is_tried_again(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, rename = trained.save(tmp_path, 1, tokenizer), Path.rename

    def forbidden(self: Path, target: Path) -> Path:
        if self == old:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(old))
        return rename(self, target)

    warned = list[str]()
    checkpoints = Checkpoints(tmp_path, 1, warn=warned.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", forbidden)
        for step in (2, 3):
            assert trained.save(tmp_path, step, tokenizer, 1, checkpoints) == tmp_path / f"step-{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", old.name, "step-00000003"]
    assert len(warned) == 1
    assert warned[0].startswith(f"{old} could not be removed ([Errno 1] Operation not permitted")
    trained.save(tmp_path, 4, tokenizer, 1, checkpoints)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000004"]


@pytest.mark.parametrize("reason", ["no links", "a folder"])
def test_a_last_that_cannot_be_made_is_only_warned_of(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if reason == "a folder":  # as after a copy that follows links
        (tmp_path / "last").mkdir()
    else:
        monkeypatch.setattr(os, "symlink", no_links)
    warned = list[str]()
    checkpoints = Checkpoints(tmp_path, 1, warn=warned.append)
    for step in (1, 2):
        assert trained.save(tmp_path, step, tokenizer, 1, checkpoints) == find_last(tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]
    assert len(warned) == 1
    assert warned[0].startswith(f"{tmp_path}/last could not be made to lead to step-00000001 ([Errno ")
    assert (point_last(tmp_path / "step-00000002") or "").startswith(f"{tmp_path}/last could not")


def test_those_before_remain_until_the_new_name_is_on_disk(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, flush = trained.save(tmp_path, 1, tokenizer), pretrain.checkpoint._flush

    def broken(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        flush(path)

    warned = list[str]()
    monkeypatch.setattr(pretrain.checkpoint, "_flush", broken)
    second = trained.save(tmp_path, 2, tokenizer, 1, Checkpoints(tmp_path, 1, warn=warned.append))
    assert (first.exists(), find_last(tmp_path)) == (True, second)
    assert len(warned) == 1
    assert f"{second} is written, but those before it are kept" in warned[0]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, keep: int) -> None:
    for step in (9, 10, 99, 100, 1000):
        trained.save(tmp_path, step, tokenizer, keep)
    kept = [f"step-{step:08d}" for step in (9, 10, 99, 100, 1000)[-keep:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", *kept]
    assert find_last(tmp_path) == tmp_path / "step-00001000"
    assert (tmp_path / "last").readlink() == Path("step-00001000")


def test_a_step_saved_again_is_replaced(tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    begin(1).save(tmp_path, 2, tokenizer)
    trained.save(tmp_path, 2, tokenizer)
    encoder, _ = load_encoder(tmp_path / "last")
    assert same(dict(encoder.state_dict()), dict(trained.model.encoder.state_dict()))


def test_a_folder_that_moved_still_has_its_last(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained.save(tmp_path / "here", 2, tokenizer)
    (tmp_path / "here").rename(tmp_path / "there")
    assert (tmp_path / "there" / "last" / "state.json").is_file()


def test_nothing_but_json_and_safetensors_inside(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase
) -> None:
    checkpoint = trained.save(tmp_path, 2, tokenizer)
    files = {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    assert {
        "state.json",
        "stream.json",
        "objectives.safetensors",
        "optimizer.safetensors",
        "encoder/config.json",
        "encoder/model.safetensors",
        "encoder/tokenizer/tokenizer.json",
        "encoder/tokenizer/tokenizer_config.json",
    } <= set(files)
    for name, content in files.items():
        assert Path(name).suffix in (".json", ".safetensors"), name
        assert not content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), name
        if name.endswith(".json"):
            json.loads(content)


@pytest.mark.parametrize(
    ("change", "value"), [("seed", 4), ("fingerprint", "other"), ("batch_size", 16), ("world_size", 2)]
)
def test_other_data_are_refused_by_name(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, change: str, value: object
) -> None:
    checkpoint = trained.save(tmp_path, 2, tokenizer)
    other = begin(1)
    before = other.tensors()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(checkpoint, other.model, other.optimizer, {**DATA, change: value})
    assert f"{change}: {DATA.get(change)} then, {value} now" in str(error.value)
    assert str(checkpoint) in str(error.value)
    assert not any(f"{name}:" in str(error.value) for name in DATA if name != change)
    assert same(other.tensors(), before)


@pytest.mark.parametrize("changes", [{"width": 32}, {"depth": 1}, {"depth": 3}, {"embed_dim": 4}])
def test_another_shape_of_model_is_refused(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, changes: dict[str, int]
) -> None:
    checkpoint = trained.save(tmp_path, 2, tokenizer)
    other = begin(1, **changes)
    with pytest.raises(CheckpointError, match="does not fit this configuration") as error:
        load_checkpoint(checkpoint, other.model, other.optimizer, dict(DATA))
    assert str(checkpoint) in str(error.value)


def test_a_changed_decay_takes_effect_after_resuming(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase
) -> None:
    checkpoint = trained.save(tmp_path, 2, tokenizer)
    other = begin(1)
    changed = make_optimizer(other.model, TrainConfig(weight_decay=0.3, beta2=0.9))
    load_checkpoint(checkpoint, other.model, changed, dict(DATA))
    assert [group["weight_decay"] for group in changed.param_groups] == [0.3, 0.0]
    assert [tuple(group["betas"]) for group in changed.param_groups] == [(0.9, 0.9)] * 2


def test_another_schema_is_refused(tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    checkpoint = trained.save(tmp_path, 2, tokenizer)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99"):
        load_checkpoint(checkpoint, trained.model, trained.optimizer, dict(DATA))
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000002/state\.json: not JSON"):
        load_checkpoint(checkpoint, trained.model, trained.optimizer, dict(DATA))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "objectives.safetensors", "encoder/model.safetensors"])
def test_a_damaged_file_is_a_checkpoint_error(
    tmp_path: Path, trained: Run, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    checkpoint = trained.save(tmp_path, 2, tokenizer)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-10])
    other = begin(1)
    with pytest.raises(CheckpointError, match=checkpoint.name):
        load_checkpoint(checkpoint, other.model, other.optimizer, dict(DATA))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_last(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "last")
