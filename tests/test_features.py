"""One pass over a split: each sample once, by one process or several, and nothing computed twice."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from data.errors import UserError
from data.source import Chosen, Source
from data.transforms import AudioView, Views
from eval.encoders import Pretrained, Raw, load_scored
from eval.features import FeatureError, Features, extract_features, sweep
from eval.scored import EncoderError, Scored
from pretrain.model.encoder import Encoder
from tests.samples import MODEL, VIEWS, VOCABULARY, free_port, members, tokenizer, write_source

CPU = torch.device("cpu")
MEMBERS = ["ita", "t", "ia", "a", "ti", "", "a", "ita", "it", "i", "ta"]
BAD = 4  # its picture can't be decoded


def scored_of(seed: int = 0, views: Views = VIEWS) -> Pretrained:
    torch.manual_seed(seed)
    vocabulary = VOCABULARY._replace(size=len(tokenizer()))
    return Pretrained(f"seed {seed}", Encoder(MODEL, views, vocabulary), tokenizer())


def make_source(folder: Path) -> Source:
    samples = [members(i, has) for i, has in enumerate(MEMBERS)]
    samples[BAD]["png"] = b"no picture"
    return write_source(folder, samples)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(tmp_path_factory.mktemp("source"))


def features_of(
    scored: Scored, source: Source, cache: Path | None, labels: Sequence[int] | Tensor | None = None, **settings: Any
) -> dict[str, Features]:
    labels = range(len(source)) if labels is None else labels
    given: Any = {"batch_size": 3, "workers": 0, **settings}
    return extract_features(scored, source, list(labels) if isinstance(labels, range) else labels, cache, CPU, **given)


class Counted(Pretrained):
    """Counts what it is asked for."""

    def __init__(self, scored: Pretrained) -> None:
        super().__init__(scored.name, scored.encoder, scored.tokenizer)
        self.calls = 0

    def _encode(self, *given: Any) -> Any:
        self.calls += 1
        return super()._encode(*given)


def same(a: dict[str, Features], b: dict[str, Features]) -> bool:
    pairs = [pair for name in a for pair in zip(a[name], b[name], strict=True)]
    return list(a) == list(b) and all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)


def usable(letter: str) -> list[int]:
    return [i for i, has in enumerate(MEMBERS) if letter in has and i != BAD]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 1), (100, 0)])
def test_each_sample_comes_once_where_it_belongs(
    source: Source, tmp_path: Path, batch_size: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = scored_of()
    labels = torch.arange(len(MEMBERS)) * 10
    found = features_of(scored, source, tmp_path, labels, batch_size=batch_size, workers=workers)
    assert "1 of 11 samples can't be scored" in capsys.readouterr().out
    assert list(found) == ["image", "text", "audio"]
    for name, features in found.items():
        rows = usable(name[0])
        assert features.rows.tolist() == rows
        assert features.labels.tolist() == [10 * row for row in rows]
        assert features.features.shape == (len(rows), MODEL.width)
        assert features.embeddings is not None
        assert features.embeddings.shape == (len(rows), MODEL.embed_dim)
    again = features_of(scored, source, tmp_path / "other", labels, batch_size=5)
    for name, features in found.items():
        assert (features.features - again[name].features).abs().max() < 1e-5
        assert torch.equal(features.content, again[name].content)
    kept = features_of(scored, source, tmp_path, labels)
    assert "1 of 11 samples can't be scored" in capsys.readouterr().out  # told each time
    assert same(kept, found)


def test_what_is_kept_is_not_computed_again(source: Source, tmp_path: Path) -> None:
    counted = Counted(scored_of())
    first = features_of(counted, source, tmp_path)
    calls = counted.calls
    assert calls > 0
    assert same(features_of(counted, source, tmp_path), first)
    assert counted.calls == calls
    if (maps := Path("/proc/self/maps")).exists():
        assert f"{tmp_path}/" in maps.read_text()  # not read into memory


def test_labels_are_not_kept(source: Source, tmp_path: Path) -> None:
    counted = Counted(scored_of())
    features_of(counted, source, tmp_path)
    calls = counted.calls
    several = torch.rand(len(MEMBERS), 4) > 0.5
    found = features_of(counted, source, tmp_path, several)
    assert counted.calls == calls
    assert torch.equal(found["text"].labels, several[found["text"].rows])
    with pytest.raises(ValueError, match="train: 3 labels of 11 samples"):
        features_of(counted, source, tmp_path, [1, 2, 3])


@pytest.mark.parametrize("change", ["weights", "view", "split", "order", "tokenizer", "layer", "normalisation"])
def test_what_changed_never_hits_the_cache(change: str, source: Source, tmp_path: Path) -> None:
    counted = Counted(scored_of())
    features_of(counted, source, tmp_path)
    counted.calls = 0
    settings: dict[str, Any] = {}
    if change == "weights":
        with torch.no_grad():
            counted.encoder.get_parameter("blocks.1.feed_forward.all.fc2.bias")[0] += 1e-6
    elif change == "view":
        counted.views = dataclasses.replace(VIEWS, audio=AudioView(frames=32, mels=16, mean=-4.0))
    elif change == "split":
        # As many samples in as many shards.
        source = write_source(tmp_path / "other", [members(i + 50, has) for i, has in enumerate(MEMBERS)])
    elif change == "order":
        source = Source(source.shards[::-1])
    elif change == "tokenizer":
        counted.tokenizer = load_tokenizer_with_another_word()
    elif change == "layer":
        settings = {"layer": 1, "pooling": "mean"}
    else:
        counted.views = dataclasses.replace(VIEWS, audio=AudioView(frames=32, mels=16, std=2.0))
    features_of(counted, source, tmp_path, **settings)
    assert counted.calls > 0


def load_tokenizer_with_another_word() -> Any:
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["cat"])
    return other


def test_a_source_of_other_places_in_the_same_shards_is_another_split(source: Source, tmp_path: Path) -> None:
    features_of(scored_of(), source, tmp_path)
    half = Chosen(source, list(source.places())[::2])
    found = features_of(scored_of(), half, tmp_path, torch.arange(6))
    assert found["text"].rows.tolist() == [i // 2 for i in usable("t") if i % 2 == 0]


def test_a_damaged_entry_is_made_again(source: Source, tmp_path: Path) -> None:
    counted = Counted(scored_of())
    first = {name: Features(*(x.clone() for x in f if x is not None)) for name, f in all_of(counted, source, tmp_path)}
    (file,) = tmp_path.glob("*/image.embeddings.npy")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    calls, counted.calls = counted.calls, 0
    assert same(features_of(counted, source, tmp_path), first)
    assert counted.calls == calls


def all_of(scored: Scored, source: Source, cache: Path) -> Any:
    return features_of(scored, source, cache).items()


class Broken(Counted):
    """Fails at its third modality's batch."""

    def _encode(self, *given: Any) -> Any:
        if self.calls == 3:
            raise KeyboardInterrupt
        return super()._encode(*given)


def test_what_was_interrupted_is_not_there(source: Source, tmp_path: Path) -> None:
    scored = scored_of()
    with pytest.raises(KeyboardInterrupt):
        features_of(Broken(scored), source, tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    expected = features_of(scored, source, tmp_path / "other")
    assert same(features_of(scored, source, tmp_path), expected)
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_killed_process_left_is_removed(source: Source, tmp_path: Path) -> None:
    counted = Counted(scored_of())
    expected = features_of(counted, source, tmp_path)
    for entry in [path for path in tmp_path.iterdir() if len(path.name) == 64]:
        entry.rename(entry.with_name(f".{entry.name}.partial"))
        (entry.with_name(f".{entry.name}.partial") / "rank-0").mkdir()
    assert same(features_of(counted, source, tmp_path), expected)
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_an_error(number: float, source: Source, tmp_path: Path) -> None:
    scored = scored_of()
    with torch.no_grad():
        scored.encoder.get_parameter("heads.audio.projection.bias")[0] = number
    with pytest.raises(FeatureError, match="seed 0: embeddings of audio of sample k0 is not finite, and of 1 more"):
        features_of(scored, source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_one_sample_that_is_no_number_is_named(source: Source, tmp_path: Path) -> None:
    scored = scored_of()

    class Once(Counted):
        def _encode(self, modality: str, field: Any, *given: Any) -> Any:
            found = super()._encode(modality, field, *given)
            if modality == "text" and 2 in field.rows.tolist() and self.calls > 5:
                found.features[-1, "default"][-1] = float("nan")
            return found

    with pytest.raises(FeatureError, match=r"-1.default of text of sample k8 is not finite, and of 0 more"):
        features_of(Once(scored), source, tmp_path)


def test_several_encoders_layers_and_poolings_come_from_one_pass(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    values = Source.values

    def noted(self: Source, *given: Any, **more: Any) -> Any:
        read.append(given)
        return values(self, *given, **more)

    monkeypatch.setattr(Source, "values", noted)
    trained = Counted(scored_of())
    several = [trained, trained.random()]
    labels = list(range(len(MEMBERS)))
    found = sweep(several, source, labels, tmp_path, CPU, 3, 0, (0, 1, -1), ("cls", "mean"))
    assert len(read) == len(MEMBERS)
    assert trained.calls == sum(len({i // 3 for i in usable(letter)}) for letter in "ita")
    assert [list(each) for each in found] == [[(i, pooling) for i in (0, 1, -1) for pooling in ("cls", "mean")]] * 2
    for scored, each in zip(several, found, strict=True):
        for (layer, pooling), features in each.items():
            alone = features_of(scored, source, None, layer=layer, pooling=pooling)
            assert same(features, alone)
    raw = found[0][-1, "cls"]["audio"].raw
    assert torch.equal(raw, features_of(Raw.of(trained), source, tmp_path)["audio"].features)


def test_poolings_that_are_not_there_leave_nothing(source: Source, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="allowed are default, cls, mean"):
        features_of(scored_of(), source, tmp_path, pooling="max")
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_encoders_that_read_differently_are_refused(source: Source, tmp_path: Path) -> None:
    other = scored_of(1, dataclasses.replace(VIEWS, audio=None))
    with pytest.raises(ValueError, match="read differently can't share a pass: seed 0, seed 1"):
        sweep([scored_of(), other], source, list(range(11)), tmp_path, CPU, 3, 0)


def test_without_a_cache_it_is_the_same_in_memory(source: Source, tmp_path: Path) -> None:
    scored, labels = scored_of(), list(range(len(MEMBERS)))
    both = sweep([scored, scored_of(1)], source, labels, None, CPU, 3, 0)
    assert same(both[0][-1, "default"], features_of(scored, source, tmp_path))
    assert same(both[1][-1, "default"], features_of(scored_of(1), source, tmp_path))


def test_bfloat16_is_another_computation(source: Source, tmp_path: Path) -> None:
    counted, labels = Counted(scored_of()), list(range(len(MEMBERS)))
    exact = sweep([counted], source, labels, tmp_path, CPU, 3, 0)[0][-1, "default"]
    calls = counted.calls
    rough = sweep([counted], source, labels, tmp_path, CPU, 3, 0, dtype=torch.bfloat16)[0][-1, "default"]
    assert counted.calls == 2 * calls
    difference = (exact["image"].features - rough["image"].features).abs().max()
    assert 1e-5 < difference < 0.2
    assert rough["image"].features.dtype == torch.float32


def stock(folder: Path) -> str:
    """Image and text in one space."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer()), "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 0}
    torch.manual_seed(0)
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**small, **ids}, vision_config=vision, projection_dim=8)
    sides: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    for part in (CLIPModel(config), tokenizer(), CLIPImageProcessorPil(**sides)):
        part.save_pretrained(folder)
    return str(folder)


class Sick(Counted):
    """Not a number for one picture of the first of two ranks."""

    def _encode(self, modality: str, field: Any, *given: Any) -> Any:
        found = super()._encode(modality, field, *given)
        if dist.get_rank() == 0 and modality == "image" and self.calls > 3:
            found.features[-1, "default"][0] = float("nan")
        return found


def kinds(folder: Path) -> dict[str, Scored]:
    return {"ours": scored_of(), "clip": load_scored(str(folder / "model"))}


def run_on_a_rank(rank: int, world: int, port: int, folder: Path, source: Source) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for kind, scored in kinds(folder).items():
        for turn in range(2):  # the second time all is there
            found = features_of(scored, source, folder / kind, batch_size=2)
            torch.save({name: tuple(f) for name, f in found.items()}, folder / f"{kind}-{rank}-{turn}.pt")
    with pytest.raises(UserError) as caught:
        features_of(Sick(scored_of()), source, folder / "sick", batch_size=2)
    (folder / f"error-{rank}").write_text(str(caught.value))
    with pytest.raises(ValueError, match="several ranks need a cache"):
        features_of(scored_of(), source, None)
    dist.barrier()  # none is gone while another one still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, source: Source) -> Path:
    """The folder in which two ranks worked. Only read by tests."""
    folder = tmp_path_factory.mktemp("ranks")
    stock(folder / "model")
    arguments = (2, free_port(), folder, source)
    # Forked, they need not import everything again.
    start_processes(run_on_a_rank, arguments, nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    return folder


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_two_ranks_give_the_numbers_of_one(kind: str, ranks: Path, source: Source, tmp_path: Path) -> None:
    expected = features_of(kinds(ranks)[kind], source, tmp_path, batch_size=2)
    assert len(expected) == (2 if kind == "clip" else 3)
    for rank in range(2):
        for turn in range(2):
            loaded = torch.load(ranks / f"{kind}-{rank}-{turn}.pt", weights_only=True)
            found = {name: Features(*parts) for name, parts in loaded.items()}
            assert list(found) == list(expected)
            for name, features in found.items():
                assert features.rows.tolist() == usable(name[0])
            assert same(found, expected)
    entries = sorted(path.name for path in (ranks / kind).iterdir() if path.name != ".locks")
    assert len(entries) == 2  # of the encoder and of the inputs
    assert entries == sorted(path.name for path in tmp_path.iterdir() if path.name != ".locks")
    for entry in entries:
        for file in (tmp_path / entry).iterdir():
            assert file.read_bytes() == (ranks / kind / entry / file.name).read_bytes()


def test_ranks_fail_together(ranks: Path) -> None:
    errors = [(ranks / f"error-{rank}").read_text() for rank in range(2)]
    assert "-1.default of image of sample" in errors[0]
    assert errors[1] == "1 other processes could not compute their features; they say why"
    assert [path.name for path in (ranks / "sick").iterdir()] == [".locks"]


def test_waveforms_go_where_they_are_wanted(tmp_path: Path, source: Source) -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, conv_dim=(8,),
        conv_kernel=(10,), conv_stride=(40,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    for part in (Wav2Vec2Model(config), Wav2Vec2FeatureExtractor()):
        part.save_pretrained(tmp_path / "model")
    found = features_of(load_scored(str(tmp_path / "model")), source, tmp_path / "cache")
    assert list(found) == ["audio"]
    assert found["audio"].rows.tolist() == [i for i, has in enumerate(MEMBERS) if "a" in has]
    assert found["audio"].embeddings is None
    other = features_of(load_scored(str(tmp_path / "model")), source, None, batch_size=100)
    assert torch.equal(found["audio"].features, other["audio"].features)
