"""The evaluation inside the training loop: its numbers, that it disturbs nothing, and that ranks agree."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerBase

from data.batch import Field
from data.cache import Cache
from data.errors import UserError
from data.index import Shard, load_shards
from data.shards import write_shards
from data.source import Source
from eval.features import Features
from eval.knn import knn
from eval.labelfree import alignment, modality_gap, rankme, uniformity
from eval.linear import Split
from eval.monitor import FEWEST, Monitor, MonitorConfig, measure
from eval.panel import Panel, Seen, choose, instances
from eval.ridge import ridge_probe
from pretrain.model.encoder import Encoder
from tests.server import Server, run_server
from tests.tiny import COUNTS, embeddings_of, extract, open_shards, samples, tiny_encoder, tiny_tokenizer, write_split

CPU = torch.device("cpu")
CONFIG = MonitorConfig(every=5)
server = pytest.fixture(run_server)


class Tiny(NamedTuple):
    folder: Path
    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Source]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Shards and a random encoder. Only read by tests."""
    folder = tmp_path_factory.mktemp("monitor")
    tokenizer = tiny_tokenizer()
    splits = {split: open_shards(write_split(folder, split)) for split in COUNTS}
    return Tiny(folder, make_encoder(tokenizer), tokenizer, splits)


def make_encoder(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Encoder:
    """Always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return tiny_encoder(tokenizer, seed)


def monitor(tiny: Tiny, config: MonitorConfig = CONFIG, **changes: Any) -> Monitor:
    given: dict[str, Any] = {"held_out": tiny.splits["test"], "train": tiny.splits["train"], "label": "label"}
    given |= {"tokenizer": tiny.tokenizer, "device": CPU, "batch_size": 4} | changes
    return Monitor(config, **given)


def lacking(folder: Path, members: Sequence[str], name: str = "lacking") -> Source:
    """Test samples with only the members whose initials are named: i, t, a, and j, the metadata."""
    names = {"i": "png", "t": "txt", "a": "flac", "j": "json"}
    kept = [
        {"__key__": sample["__key__"], **{names[initial]: sample[names[initial]] for initial in initials}}
        for sample, initials in zip(samples("test", len(members)), members, strict=True)
    ]
    return open_shards(write_shards(kept, folder / name, max_samples=7))


def everything(tiny: Tiny, split: str) -> dict[str, Features]:
    labels = [number % 3 for number in range(COUNTS[split])]
    return extract([tiny.encoder], tiny.tokenizer, tiny.splits[split], labels, CPU, 5, 0)[0]


def rank_of_match(queries: Tensor, gallery: Tensor, same: Callable[[int, int], bool]) -> list[int]:
    """For each query, how many items lie nearer than the nearest of its own."""
    cosines = nn.functional.normalize(queries.double()) @ nn.functional.normalize(gallery.double()).T
    ranks = []
    for i, row in enumerate(cosines.tolist()):
        best = max(value for j, value in enumerate(row) if same(i, j))
        ranks.append(sum(value > best + 1e-12 for value in row))
    return ranks


def test_the_numbers_are_those_of_the_functions_they_are_named_after(tiny: Tiny) -> None:
    values = monitor(tiny).look(tiny.encoder)
    held_out, train = everything(tiny, "test"), everything(tiny, "train")
    expected: dict[str, float] = {}
    for name, found in held_out.items():
        fitted, scored = (Split(part.features, part.labels) for part in (train[name], found))
        expected[f"rankme/{name}"] = rankme(found.features)
        expected[f"uniformity/{name}"] = uniformity(embeddings_of(found))
        expected[f"ridge/{name}"] = ridge_probe(fitted, scored).top1
        expected[f"knn/{name}"] = knn(fitted, scored).top1
    for a, b in (("image", "text"), ("image", "audio"), ("text", "audio")):
        x, y = embeddings_of(held_out[a]), embeddings_of(held_out[b])
        expected[f"alignment/{a}_{b}"], expected[f"gap/{a}_{b}"] = alignment(x, y), modality_gap(x, y)
        content = [held_out[name].content.tolist() for name in (a, b)]

        def same(i: int, j: int, content: list[list[int]] = content) -> bool:
            return any(side[i] == side[j] for side in content)

        for queries, gallery, name in ((x, y, f"{a}_to_{b}"), (y, x, f"{b}_to_{a}")):
            ranks = rank_of_match(queries, gallery, same)
            for k in (1, 5, 10):
                expected[f"retrieval/{name}/r{k}"] = sum(rank < k for rank in ranks) / len(ranks)
            shares = [sum(same(i, j) for j in range(len(y))) / len(y) for i in range(len(x))]
            expected[f"retrieval/{name}/chance_r1"] = sum(shares) / len(shares)
    assert values == pytest.approx(expected, abs=1e-5)
    assert all(type(value) is float for value in values.values())
    # Of the 15 test samples some have the caption of another, none its picture or sound.
    assert values["retrieval/image_to_audio/chance_r1"] == pytest.approx(1 / 15)
    assert values["retrieval/text_to_audio/chance_r1"] > 1.3 / 15


def test_probes_find_what_is_there(tiny: Tiny) -> None:
    values = monitor(tiny, label="name", batch_size=100).look(tiny.encoder)
    assert values["ridge/text"] == 1.0  # the caption names the class
    assert values == pytest.approx(monitor(tiny).look(tiny.encoder), abs=1e-5)  # names are as good as numbers


@pytest.mark.parametrize("changes", [{"label": None}, {"train": None}, {"label": None, "train": None}])
def test_without_label_or_training_samples_there_are_no_probes(tiny: Tiny, changes: dict[str, Any]) -> None:
    values, whole = monitor(tiny, **changes).look(tiny.encoder), monitor(tiny).look(tiny.encoder)
    assert values == {name: value for name, value in whole.items() if not name.startswith(("ridge", "knn"))}


def test_missing_modalities(tiny: Tiny, tmp_path: Path) -> None:
    # 24 with an image, 12 with text, 9 with audio; image and text together in 12, with audio never enough.
    source = lacking(tmp_path, ["itj", "iaj", "itj", "ij", "tj"] * 3 + ["itj", "iaj"] * 6)
    assert [source.count(name) for name in ("image", "text", "audio")] == [24, 15, 9]
    for train in (tiny.splits["train"], source):
        values = monitor(tiny, held_out=source, train=train).look(tiny.encoder)
        parts = {part for name in values for part in name.split("/")[1].replace("_to_", "_").split("_")}
        assert parts == {"image", "text"}
        assert {name.split("/")[0] for name in values} == {
            *("rankme", "uniformity", "ridge", "knn", "retrieval", "alignment", "gap")
        }
    found = extract([tiny.encoder], tiny.tokenizer, source, list(range(27)), CPU, 5, 0)[0]
    both = sorted(set(found["image"].labels.tolist()) & set(found["text"].labels.tolist()))
    wanted = torch.tensor(both)
    sides = [embeddings_of(part)[torch.isin(part.labels, wanted)] for part in (found["image"], found["text"])]
    assert values["alignment/image_text"] == pytest.approx(alignment(*sides), abs=1e-5)
    assert len(both) == 12

    # Training samples that lack a modality, too: its probe is left out, the rest is not.
    values = monitor(tiny, train=source).look(tiny.encoder)
    assert "rankme/audio" in values
    assert "ridge/audio" not in values
    assert "ridge/text" in values


def test_training_samples_of_one_class_leave_nothing_to_probe(tiny: Tiny) -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    seen = {"image": Seen(torch.arange(20), x, x, torch.arange(20), labels)}
    assert measure(seen, seen).keys() == {"rankme/image", "uniformity/image"}


def test_samples_that_cannot_be_used_are_left_out_and_named(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [dict(sample) for sample in samples("test", 15)]
    given[4]["png"] = b"no picture"
    broken = open_shards(write_shards(given, tmp_path / "broken", max_samples=7))
    panel = Panel(broken, 100, tiny.encoder.views, tiny.tokenizer, None, CPU, 4, 0, 0, 1)
    assert panel.encode(tiny.encoder)["image"].rows.tolist() == [*range(4), *range(5, 15)]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "test-004" in printed
    assert monitor(tiny, held_out=broken).look(tiny.encoder).keys() == monitor(tiny).look(tiny.encoder).keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_outputs_without_direction_are_counted_and_the_other_modalities_scored(tiny: Tiny, bad: float) -> None:
    encoder = make_encoder(tiny.tokenizer)
    for parameter in encoder.heads["image"].parameters():
        nn.init.constant_(parameter, bad)
    values, whole = monitor(tiny).look(encoder), monitor(tiny).look(tiny.encoder)
    assert values["broken/image"] == COUNTS["test"] + COUNTS["train"]
    assert values == {"broken/image": 63} | {name: value for name, value in whole.items() if "image" not in name}


def test_a_label_that_samples_lack_is_named(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"test-000, no 'species'.*label, name"):
        monitor(tiny, label="species").look(tiny.encoder)


def test_samples_are_read_once(tiny: Tiny, tmp_path: Path) -> None:
    for split in COUNTS:
        write_split(tmp_path, split)
    splits = {split: open_shards(sorted(tmp_path.glob(f"{split}-*.tar"))) for split in COUNTS}
    look = monitor(tiny._replace(splits=splits)).look
    first, encoder = look(tiny.encoder), make_encoder(tiny.tokenizer, seed=1)
    shutil.rmtree(tmp_path)
    assert look(tiny.encoder) == first
    second = look(encoder)
    assert second == monitor(tiny).look(encoder)
    assert second != first


# Disturbs nothing


def states() -> list[Any]:
    """All random states of the process, but for GPUs'."""
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), kind, np.asarray(words).tolist(), rest]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def draw(*_: Any) -> None:
    """As a hook: an encoder that takes random numbers."""
    torch.rand(1)
    random.random()
    np.random.random()  # noqa: NPY002


def train_step(encoder: Encoder, x: Tensor) -> None:
    """A step that depends on every random state."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    noise = torch.rand_like(x) + random.random() + np.random.random()  # noqa: NPY002
    encoder("image", Field(x + noise, torch.arange(len(x))))[1].square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_step_after_a_look_is_the_same_as_without(tiny: Tiny, workers: int) -> None:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    encoders = []
    for looks in (0, 2):
        encoder = make_encoder(tiny.tokenizer).train()
        seed_all(3)
        before = states()
        watching = monitor(tiny, workers=workers)
        for _ in range(looks):
            drawing = encoder.register_forward_hook(draw)
            watching.look(encoder)
            drawing.remove()
            assert states() == before
        train_step(encoder, x)
        encoders.append(encoder)
    for a, b in zip(encoders[0].state_dict().values(), encoders[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("label", ["label", "species"])
def test_modes_gradients_and_random_states_are_left_alone_even_by_a_failure(tiny: Tiny, label: str) -> None:
    encoder = make_encoder(tiny.tokenizer).train()
    encoder.heads.eval()
    encoder.blocks[0].requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = {name: module.training for name, module in encoder.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    before = states()
    seen = []
    hook = encoder.tokenizers["image"].register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    try:
        monitor(tiny, label=label).look(encoder)
    except UserError:
        assert label == "species"
    hook.remove()
    assert set(seen) == ({(False, False)} if label == "label" else set())
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in encoder.named_parameters()} == needs
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(gradient is not None and bool((gradient == 1).all()) for gradient in gradients)
    assert states() == before
    assert torch.is_grad_enabled()


def test_compiled_blocks_are_not_compiled_for_a_look(tiny: Tiny) -> None:
    compiled: list[object] = []

    def backend(graph: nn.Module, inputs: object) -> Any:
        compiled.append(graph)
        return graph.forward

    encoder = make_encoder(tiny.tokenizer)
    for block in encoder.blocks:
        block.compile(backend=backend)
    assert monitor(tiny).look(encoder) == monitor(tiny).look(tiny.encoder)
    assert not compiled
    encoder("image", Field(torch.zeros(2, 3, 16, 16), torch.arange(2)))
    assert compiled


# Which samples


def stored(*counts: int) -> Source:
    return Source([Shard(f"{i}.tar", 1, "", count, {}) for i, count in enumerate(counts)])


def test_one_sample_of_each_stretch_is_chosen_and_always_the_same() -> None:
    source, places = stored(3, 500, 1, 496), list(stored(3, 500, 1, 496).places())
    chosen = choose(source, 100)
    assert chosen == choose(stored(3, 500, 1, 496), 100)
    assert [places.index(place) // 10 for place in chosen] == list(range(100))
    # Where classes take turns, equal steps would meet one of them only.
    assert {places.index(place) % 10 for place in chosen} == set(range(10))


@pytest.mark.parametrize("counts", [(7,), (1, 1, 1, 4), (10, 30)])
def test_a_small_source_is_chosen_whole(counts: tuple[int, ...]) -> None:
    assert choose(stored(*counts), 40) == list(stored(*counts).places())


def test_labels_and_rows_belong_to_the_chosen_samples(tiny: Tiny) -> None:
    source = tiny.splits["train"]
    panel = Panel(source, 20, tiny.encoder.views, tiny.tokenizer, "label", CPU, 3, 0, 0, 1)
    numbers = [list(source.places()).index(place) for place in choose(source, 20)]
    whole = everything(tiny, "train")
    for name, seen in panel.encode(tiny.encoder).items():
        assert seen.rows.tolist() == list(range(20))
        torch.testing.assert_close(seen.features, whole[name].features[numbers], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.embeddings, embeddings_of(whole[name])[numbers], rtol=1e-5, atol=1e-5)
        assert torch.equal(seen.content, whole[name].content[numbers])
        labels = [number % 3 for number in numbers]
        assert len(set(zip(labels, seen.labels.tolist(), strict=True))) == 3 == len(set(seen.labels.tolist()))


def test_what_workers_read_is_not_kept_in_shared_memory(tiny: Tiny) -> None:
    panel = Panel(tiny.splits["test"], 20, tiny.encoder.views, tiny.tokenizer, None, CPU, 4, 1, 0, 1)
    fields = [field for _, batch in panel.batches for field in batch.fields.values()]
    assert len(fields) == 4 * 3
    assert not any(part.is_shared() for field in fields for part in field if isinstance(part, Tensor))  # type: ignore[no-untyped-call]


def test_remote_shards_are_not_fetched_for_a_few_samples(tiny: Tiny, tmp_path: Path, server: Server) -> None:
    for path in [*tiny.folder.glob("test-*"), *tiny.folder.glob("train-*")]:
        server.files[f"/{path.name}"] = path.read_bytes()
    cache = Cache(tmp_path / "cache", 10**9)
    splits = {}
    for split in ("train", "test"):
        names = sorted(name for name in server.files if name.startswith(f"/{split}") and name.endswith(".tar"))
        splits[split] = Source(load_shards([server.url + name for name in names], cache), cache=cache)
    config = MonitorConfig(samples=12)
    values = monitor(tiny._replace(splits=splits), config).look(tiny.encoder)
    assert values == monitor(tiny, config).look(tiny.encoder)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_pairs_that_share_an_input_are_one_instance() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, kinds in ((1, 1), (30, 40), (30, 15), (60, 80)):
        a, b = (torch.randint(kinds, (n,), generator=generator) * 10**15 for _ in range(2))
        linked = [{i} for i in range(n)]
        for i in range(n):
            for j in range(n):
                if a[i] == a[j] or b[i] == b[j]:
                    union = linked[i] | linked[j]
                    for member in union:
                        linked[member] = union
        found = instances(a, b).tolist()
        assert all((found[i] == found[j]) == (j in linked[i]) for i in range(n) for j in range(n))


# When


def test_looks_come_every_so_many_steps_if_at_all(tiny: Tiny) -> None:
    assert [step for step in range(16) if monitor(tiny).due(step, 1e9)] == [0, 5, 10, 15]
    assert not any(monitor(tiny, MonitorConfig()).due(step, 1e9) for step in range(16))


def test_a_look_beyond_its_share_of_the_time_is_put_off_and_counted(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading takes 40 seconds and looking 10: the first look 50, those after it 10.
    clock = iter([0, 40, 50, 100, 100, 110, 200, 200, 210])
    monkeypatch.setattr("eval.monitor.perf_counter", lambda: next(clock))
    watching = monitor(tiny, MonitorConfig(every=5, max_share=0.1))
    assert watching.due(0, 0.0)
    watching.look(tiny.encoder)
    assert watching.seconds == 50
    # 50 + 10 seconds are a tenth of 590 + 10.
    assert [watching.due(5, 100.0), watching.due(7, 589.0), watching.due(10, 589.0), watching.due(15, 591.0)] == [
        *(False, False, False, True)
    ]
    assert watching.postponed == 2
    watching.look(tiny.encoder)
    assert watching.seconds == 60
    assert not watching.due(20, 689.0)
    assert watching.due(25, 691.0)
    assert watching.postponed == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, r"^eval\.monitor\.every=0: allowed is 1 or more, or null$"),
        ({"samples": FEWEST - 1}, r"^eval\.monitor\.samples=9: allowed is 10 or more$"),
        ({"max_share": 0.0}, r"^eval\.monitor\.max_share=0\.0: allowed is above 0 and at most 1$"),
        ({"max_share": 1.1}, r"^eval\.monitor\.max_share=1\.1: "),
        ({"max_share": float("nan")}, r"^eval\.monitor\.max_share=nan: "),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonitorConfig(**settings)


# On several ranks


def on_rank(rank: int, world: int, folder: Path) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    splits = {
        name: open_shards(sorted(folder.glob(f"{name}-*.tar"))) for name in ("train", "test", "lacking", "unlabelled")
    }
    tiny = Tiny(folder, make_encoder(tokenizer), tokenizer, splits)
    make = partial(monitor, tiny, rank=rank, world=world)
    found: dict[str, Any] = {}
    for batch_size in (4, 15, 100):  # with 100 the second rank has nothing to do
        found[f"batches of {batch_size}"] = make(batch_size=batch_size).look(tiny.encoder)
    found["lacking"] = make(held_out=splits["lacking"]).look(tiny.encoder)
    found["some"] = make(MonitorConfig(samples=11), label="name").look(tiny.encoder)

    watching = make(MonitorConfig(every=2, max_share=0.5))
    watching.look(tiny.encoder)
    watching.seconds, watching._cost = 1.0, 0.0
    # Each rank by its own clock would say otherwise.
    found["due"] = [watching.due(2, 3.0 if rank == 0 else 1.0), watching.due(4, 1.0 if rank == 0 else 3.0)]
    found["postponed"] = watching.postponed
    try:
        make(held_out=splits["unlabelled"], batch_size=9).look(tiny.encoder)
    except UserError as error:
        found["error"] = str(error)
    return found


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    Path(f"{folder}/{rank}.json").write_text(json.dumps(on_rank(rank, world, Path(folder))))
    dist.barrier()  # none is gone while another one still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What a single process finds, then what each of two does."""
    folder = tmp_path_factory.mktemp("ranks")
    for split in ("train", "test"):
        write_split(folder, split)
    lacking(folder, ["ij", "tj", "aj", "itj"] + ["itaj"] * 12)
    # Of batches of 9, the second one has the sample without metadata.
    lacking(folder, ["itaj"] * 9 + ["ita"] + ["itaj"] * 5, "unlabelled")
    spawn(run_rank, args=(2, str(folder)), nprocs=2)  # type: ignore[no-untyped-call]
    yield [on_rank(0, 1, folder), *(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))]


@pytest.mark.parametrize("case", ["batches of 4", "batches of 15", "batches of 100", "lacking", "some"])
def test_ranks_find_what_one_process_finds(ranks: list[dict[str, Any]], case: str) -> None:
    alone, *several = ranks
    for found in several:
        assert found[case] == pytest.approx(alone[case], abs=1e-6)
    assert len(alone[case]) > 15


def test_all_ranks_do_what_the_first_one_says(ranks: list[dict[str, Any]]) -> None:
    for found in ranks[1:]:
        assert found["due"] == [True, False]
        assert found["postponed"] == 1


def test_what_one_rank_cannot_read_stops_them_all(ranks: list[dict[str, Any]]) -> None:
    alone, first, second = (found["error"] for found in ranks)
    assert "test-009, no 'label' in its .json" in alone
    assert "1 other processes could not read" in first
    assert second == alone
