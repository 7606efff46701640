import json
import math
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import DistributedType
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import pretrain.engine
import pretrain.start
from data.index import index_path, load_index
from data.shards import write_shards
from data.skips import StreamError
from data.stream import SourceConfig
from objectives.pretraining import Loss, Pretraining
from pretrain.checkpoint import CheckpointError, find_last, load_encoder
from pretrain.config import Config, ConfigError, TrainConfig, load_config, to_yaml
from pretrain.engine import TrainingError, step_seed
from pretrain.export import export
from pretrain.optimizer import learning_rate, make_optimizer
from pretrain.progress import Progress
from pretrain.run import skipped_samples
from pretrain.start import drop_later_metrics, start_accelerator
from tests.tiny import BATCH_SIZE, COUNTS, STEPS, tiny_config, tiny_encoder, tiny_tokenizer, tiny_trained_state


class PowerCutError(Exception):
    """Ends a run where no code expects it."""


class Run(NamedTuple):
    config: Config
    checkpoint: Path

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]


def cut_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let training end in the middle of a step."""
    update = Progress.update

    def maybe(self: Progress, *arguments: Any, **named: Any) -> dict[str, float] | None:
        if self.step + 1 == step:
            raise PowerCutError
        return update(self, *arguments, **named)

    patch.setattr(Progress, "update", maybe)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without an interruption. Only read by tests."""
    config = tiny_config(tmp_path_factory.mktemp("whole"))
    return Run(config, pretrain.engine.pretrain(config))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, cut in step 8, three steps and a line of metrics after its checkpoint, then started again."""
    config = tiny_config(tmp_path_factory.mktemp("resumed"))
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(PowerCutError):
            pretrain.engine.pretrain(config)
    assert find_last(Path(config.out) / "checkpoints") == Path(config.out) / "checkpoints" / "step-00000004"
    metrics = Path(config.out) / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [2, 4, 6]
    with metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    config.data.workers = 1
    return Run(config, pretrain.engine.pretrain(config))


def test_warm_up_rises_to_the_peak_and_the_cosine_falls_to_0() -> None:
    config = TrainConfig(steps=100, warmup=0.1, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.002
    assert learning_rate(config, 100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (10, 0.0), (10, 1.0), (10, 0.01), (3, 0.5)])
def test_the_schedule_has_no_hole_at_its_ends(steps: int, warmup: float) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert max(rates) == 2.0


def test_only_the_matrices_of_linear_layers_decay(whole: Run) -> None:
    model = Pretraining(tiny_encoder(tiny_tokenizer()), whole.config.objectives)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3, learning_rate=0.1, beta2=0.9))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)

    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.9, 0.9) for group in optimizer.param_groups)
    assert decayed | free == set(names.values())
    assert not decayed & free
    parts = ("attention.all.qkv", "attention.all.out", "feed_forward.all.fc1", "feed_forward.all.fc2")
    trunk = [f"encoder.blocks.{i}.{part}" for i in (0, 1) for part in parts]
    decoder = [f"blocks.0.{part}" for part in parts]
    regions = [
        f"objectives.masked_region.decoders.{name}.{part}"
        for name in ("image", "audio")
        for part in ("embed", *decoder, "predict")
    ]
    others = [
        "encoder.tokenizers.image.embed",
        "encoder.tokenizers.audio.embed",
        "encoder.heads.image.projection",
        "encoder.heads.text.dense",
        "encoder.heads.text.projection",
        "encoder.heads.audio.projection",
        "objectives.masked_language.dense",
    ]
    assert decayed == {f"{name}.weight" for name in (*trunk, *regions, *others)}
    for word in ("norm", "bias", "positions", "prefix", "log_scale", "mask", "text.embed"):
        assert any(word in name.removeprefix("objectives.masked_") for name in free), word


def test_what_needs_no_gradient_is_not_optimised() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig())
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(1, 3), (1,)]


def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(whole: Run, resumed: Run) -> None:
    assert whole.checkpoint.name == resumed.checkpoint.name == f"step-{STEPS:08d}"
    a, b = tiny_trained_state(whole.checkpoint), tiny_trained_state(resumed.checkpoint)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    for name in ("objectives.safetensors", "optimizer.safetensors"):
        assert (whole.checkpoint / name).read_bytes() == (resumed.checkpoint / name).read_bytes(), name


def test_training_changes_every_part_of_the_model(whole: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: None)
        config = tiny_config(tmp_path, "train.steps=1")
        before = tiny_trained_state(pretrain.engine.pretrain(config))
    after = tiny_trained_state(whole.checkpoint)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    ends: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        settings = [f"seed={seed}", "train.steps=1", f"out={tmp_path / str(len(ends))}"]
        ends.append(tiny_trained_state(pretrain.engine.pretrain(tiny_config(tmp_path, *settings))))
    weights = [end["blocks.0.feed_forward.all.fc1.weight"] for end in ends]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_line_of_metrics_is_there_once_and_the_same(whole: Run, resumed: Run) -> None:
    rates = {"samples_per_second", *(f"samples_per_second/{name}" for name in ("image", "text", "audio"))}
    timing = {*rates, "data_wait", "memory_gb", "resident_gb"}
    a, b = ([{k: v for k, v in line.items() if k not in timing} for line in run.metrics()] for run in (whole, resumed))
    assert [line["step"] for line in a] == [2, 4, 6, 8, 10, 12]
    assert a == b
    losses = {"image_text", "image_audio", "text_audio", "masked_language", "masked_image", "masked_audio"}
    for line in whole.metrics():
        assert (line.pop("skipped"), line.pop("skipped_samples")) == (0, [])
        assert 0 <= line.pop("cut_text") <= 1
        assert line.pop("cut_audio") == 0
        assert line.keys() == {"step", "loss", "gradient_norm", "learning_rate"} | losses | timing
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["data_wait"] <= 1
        pairs = sum(line[name] for name in losses if "masked" not in name)
        total = pairs + 0.5 * line["masked_language"] + line["masked_image"] + line["masked_audio"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_learning_rate_in_the_metrics_is_the_schedule(whole: Run) -> None:
    rates = [learning_rate(whole.config.train, step) for step in range(STEPS)]
    means = [(rates[i] + rates[i + 1]) / 2 for i in range(0, STEPS, 2)]
    assert [line["learning_rate"] for line in whole.metrics()] == pytest.approx(means)


def test_a_step_sees_its_place_in_the_order_its_seed_and_at_the_end_whole_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], int, bool]] = []
    forward = Pretraining.forward

    def watch(
        self: Pretraining, batch: Any, seed: int, whole: bool = False, progress: float = 0.0, together: Any = None
    ) -> Loss:
        seen.append((batch.keys, seed, whole))
        return forward(self, batch, seed, whole, progress)

    monkeypatch.setattr(Pretraining, "forward", watch)
    pretrain.engine.pretrain(tiny_config(tmp_path))
    keys = [key for batch, _, _ in seen for key in batch]
    assert all(len(batch) == BATCH_SIZE for batch, _, _ in seen)
    # Two epochs, each with every sample once, in another order.
    epochs = [keys[: COUNTS["train"]], keys[COUNTS["train"] :]]
    assert [len(set(epoch)) for epoch in epochs] == [COUNTS["train"]] * 2
    assert epochs[0] != epochs[1]
    assert [seed for _, seed, _ in seen] == [step_seed(0, step) for step in range(STEPS)]
    assert [whole for _, _, whole in seen] == [False] * 9 + [True] * 3


def test_a_finished_run_started_again_trains_no_step(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretraining, "forward", lambda *_, **__: pytest.fail("trained again"))
    lines = whole.metrics()
    assert pretrain.engine.pretrain(whole.config) == whole.checkpoint
    assert whole.metrics() == lines


def test_config_yaml_is_the_run(whole: Run) -> None:
    assert load_config(whole.out / "config.yaml") == whole.config


def test_env_json_says_when_where_and_with_what(whole: Run) -> None:
    environment = json.loads((whole.out / "env.json").read_text())
    machine = {"cpus", "gpu", "processes", "precision"}
    assert environment.keys() == {"time", "command", "python", "platform", "packages"} | machine
    assert datetime.fromisoformat(environment["time"]).tzinfo is not None
    assert isinstance(environment["command"], list)
    assert environment["cpus"] >= 1
    assert environment["processes"] == 1
    assert environment["packages"]["torch"] == version("torch")
    assert {"transformers", "accelerate", "webdataset", "numpy", "safetensors"} <= environment["packages"].keys()


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_env_json_has_the_precision_that_auto_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    monkeypatch.setattr("pretrain.start.fast_in_bf16", lambda device: fast)
    pretrain.engine.pretrain(tiny_config(tmp_path, "train.precision=auto", "train.steps=1"))
    assert json.loads((tmp_path / "run" / "env.json").read_text())["precision"] == precision


def test_resume_none_refuses_a_folder_with_a_checkpoint(whole: Run) -> None:
    config = load_config(whole.out / "config.yaml", ["resume=none"])
    before = (whole.out / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="resume=none") as error:
        pretrain.engine.pretrain(config)
    assert str(whole.out / "checkpoints") in str(error.value)
    assert (whole.out / "config.yaml").read_text() == before


def test_resume_none_is_content_with_a_new_folder(tmp_path: Path) -> None:
    assert pretrain.engine.pretrain(tiny_config(tmp_path, "resume=none", "train.steps=1")).name == "step-00000001"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1", "seed: 0 then, 1 now"),
        ("train.batch_size=4", "train.batch_size: 8 then, 4 now"),
        ("data.train=[train-00000.tar]", r"data\.train\.train\.samples: 48 in 2 shards, sha256 \w+ then, 30 in 1 "),
        ("data.window=3", "data.window: 64 then, 3 now"),
        ("model.depth=1", "model.depth: 2 then, 1 now"),
        ("model.heads=4", "model.heads: 2 then, 4 now"),  # the tensors would fit
        ("objectives.masked_region.weight=2.0", "objectives.masked_region.weight: 1.0 then, 2.0 now"),
        ("data.views.image.flip=true", "data.views.image.flip: False then, True now"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(whole: Run, override: str, words: str) -> None:
    files = {name: (whole.out / name).read_bytes() for name in ("config.yaml", "env.json", "metrics.jsonl")}
    config = load_config(whole.out / "config.yaml", [override])
    try:
        with pytest.raises((CheckpointError, StreamError), match=words):
            pretrain.engine.pretrain(config)
        assert [name for name in files if (whole.out / name).read_bytes() != files[name]] == []
    finally:
        for name, content in files.items():
            (whole.out / name).write_bytes(content)


def test_skipped_samples_stand_in_the_metrics_and_in_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, "train.steps=8")
    shard = tmp_path / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    sample = load_index(shard).samples[4]
    offset, _ = sample.members["png"]
    content[offset : offset + 8] = bytes(8)
    shard.write_bytes(content)
    index_path(shard).unlink()

    checkpoint = pretrain.engine.pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [len(line["skipped_samples"]) for line in lines]
    # 8 steps of 8 are an epoch of 48 and a third of the next.
    entries = [entry for line in lines for entry in line["skipped_samples"]]
    assert entries[0] == ["train", str(shard), sample.key, "ImageError", 1]
    state = json.loads((checkpoint / "stream.json").read_text())
    assert state["skipped"] == {
        "rows": 64,
        "samples": [["train", str(shard), sample.key, "ImageError", len(entries)]],
    }
    assert "SKIPPED 1 samples" in capsys.readouterr().out
    assert "ImageError" in skipped_samples(checkpoint)
    assert sample.key in skipped_samples(checkpoint)


def test_nothing_skipped_is_missing_from_the_metrics(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=6", "train.save_every=2", "train.log_every=100")
    shard = tmp_path / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    bad = load_index(shard).samples[::4]
    for sample in bad:
        offset, _ = sample.members["png"]
        content[offset : offset + 8] = bytes(8)
    shard.write_bytes(content)
    index_path(shard).unlink()

    def told(run: str) -> int:
        return sum(json.loads(line)["skipped"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines())

    # At each checkpoint a line is due, whatever log_every is: what stands before it, no resumed run would see again.
    state = json.loads((pretrain.engine.pretrain(config) / "stream.json").read_text())
    assert told("run") == sum(count for *_, count in state["skipped"]["samples"]) >= len(bad)
    # The samples that end a run stand there, too.
    config.out, config.data.max_bad_fraction = str(tmp_path / "ended"), 0.0
    with pytest.raises(StreamError, match="max_bad_fraction=0"):
        pretrain.engine.pretrain(config)
    assert told("ended") >= 1


def test_pulls_at_the_trunk_and_pictures_are_kept_and_change_nothing(tmp_path: Path, whole: Run) -> None:
    config = tiny_config(tmp_path, "train.gradients_every=3")
    checkpoint = pretrain.engine.pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("trunk_norm/image_text", 0) > 0 for line in lines)
    assert all(abs(line.get("trunk_cosine/image_text/masked_image", 0)) <= 1 for line in lines)
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures[-1] == f"step-{config.train.steps:08}.png"
    with Image.open(tmp_path / "run" / "pictures" / pictures[-1]) as picture:
        assert min(picture.size) > 100
    one, other = (load_encoder(each)[0].state_dict() for each in (checkpoint, whole.checkpoint))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_look_at_the_pulls_leaves_the_centres_of_prototypes_alone(tmp_path: Path) -> None:
    settings = [
        "train.steps=4",
        "train.accumulate=2",
        "objectives.masked_region.target=kl",
        "objectives.masked_region.teacher.layers=1",
    ]
    states = []
    for number, more in enumerate(([], ["train.gradients_every=1"])):
        (folder := tmp_path / str(number)).mkdir()
        checkpoint = pretrain.engine.pretrain(tiny_config(folder, *settings, *more))
        states.append(load_file(checkpoint / "objectives.safetensors"))
    one, other = states
    assert any("centres" in name for name in one)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_may_begin_with_an_export_and_a_resumed_one_goes_on(
    tmp_path: Path, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = export(*load_encoder(whole.checkpoint), tmp_path / "export", fresh=False)["image"]
    settings = [f"init_from.image={exported}", "train.learning_rate=1e-9", "train.save_every=1"]
    checkpoint = pretrain.engine.pretrain(tiny_config(tmp_path, *settings, "train.steps=1"))
    assert f"initial   image from {exported}: loaded " in capsys.readouterr().out
    given, got = load_encoder(whole.checkpoint)[0].state_dict(), load_encoder(checkpoint)[0].state_dict()
    for name in ("blocks.1.feed_forward.all.fc1.weight", "tokenizers.image.positions"):
        torch.testing.assert_close(got[name], given[name], rtol=0, atol=1e-6)
    pretrain.engine.pretrain(tiny_config(tmp_path, *settings, "train.steps=2"))
    assert "initial" not in capsys.readouterr().out


def test_other_data_may_begin_a_new_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.engine.pretrain(tiny_config(tmp_path, "train.steps=4"))
    changes = ["data.train=[train-00000.tar]", "train.batch_size=6", "train.steps=6"]
    with pytest.raises(StreamError, match=r"data\.allow_changed=true"):
        pretrain.engine.pretrain(tiny_config(tmp_path, *changes))
    checkpoint = pretrain.engine.pretrain(tiny_config(tmp_path, *changes, "data.allow_changed=true"))
    shown = capsys.readouterr().out
    assert "the data have changed, a new pass over them begins:" in shown
    assert "train.batch_size: 8 then, 6 now" in shown
    state = json.loads((checkpoint / "stream.json").read_text())
    assert (state["step"], state["pass"], state["pass_began"]) == (6, 1, 4)


def test_steps_beyond_the_last_epoch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=12, but max_epochs of all sources end at step 6"):
        pretrain.engine.pretrain(tiny_config(tmp_path, "data.train.train.max_epochs=1"))
    pretrain.engine.pretrain(tiny_config(tmp_path, "data.train.train.max_epochs=1", "train.steps=6"))


def test_fewer_steps_than_are_done_are_refused(whole: Run) -> None:
    before = (whole.out / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"train\.steps=4, but .*step-00000012 has done 12 already"):
        pretrain.engine.pretrain(load_config(whole.out / "config.yaml", ["train.steps=4"]))
    assert (whole.out / "config.yaml").read_bytes() == before


def test_a_modality_that_no_sample_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    shards: list[dict[str, bytes | str]] = [
        {"__key__": f"{i}", "txt": b"words", "mp3": b"no decoder reads it", "cls": b"1"} for i in range(4)
    ]
    (shard,) = write_shards(shards, tmp_path / "other" / "train", max_samples=10)
    config.data.train = {"other": SourceConfig([str(shard)])}
    with pytest.raises(ConfigError, match=r"data\.views\.image is in use, but no .*; not read are \.cls, \.mp3"):
        pretrain.engine.pretrain(config)
    config.data.views.image = config.data.views.audio = None
    config.train.steps = 1
    pretrain.engine.pretrain(config)
    shown = capsys.readouterr().out
    assert "4 with text" in shown
    assert "nothing reads: .cls, .mp3" in shown


def test_the_threads_are_those_asked_for_or_shared_by_the_processes_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(pretrain.start, "available_cpus", lambda: 7)
    start_accelerator(tiny_config(tmp_path, "train.threads=3"))
    start_accelerator(tiny_config(tmp_path, "train.threads=null"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    start_accelerator(tiny_config(tmp_path, "train.threads=null"))
    assert chosen == [3, 7, 3]


@pytest.mark.parametrize(("fast", "mixed"), [(True, "bf16"), (False, "no")])
def test_auto_takes_bf16_where_it_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, mixed: str
) -> None:
    asked: list[str] = []

    class Recorded:
        num_processes = 1
        distributed_type = DistributedType.NO

        def __init__(self, mixed_precision: str, **_: object) -> None:
            asked.append(mixed_precision)
            self.device = torch.device("cpu")

    monkeypatch.setattr(pretrain.start, "Accelerator", Recorded)
    monkeypatch.setattr(pretrain.start, "fast_in_bf16", lambda device: fast)
    for precision in ("auto", "fp32", "bf16"):
        start_accelerator(tiny_config(tmp_path, f"train.precision={precision}", "train.threads=1"))
    assert asked == [mixed, "no", "bf16"]


def test_a_launcher_that_shares_the_work_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match=r"launched with DEEPSPEED: .* by plain data parallelism or FSDP2"):
        start_accelerator(tiny_config(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision=fp16 needs a GPU, and this is cpu"):
        start_accelerator(tiny_config(tmp_path, "train.precision=fp16"))


def spoil(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps, counted from 1, not finite."""
    forward, calls = Pretraining.forward, list[int]()

    def spoilt(self: Pretraining, batch: Any, seed: int, *arguments: Any, **named: Any) -> Loss:
        calls.append(seed)
        loss = forward(self, batch, seed, *arguments, **named)
        if len(calls) not in steps:
            return loss
        return Loss(loss.total * math.nan, {**loss.terms, "image_text": loss.terms["image_text"] * math.nan})

    patch.setattr(Pretraining, "forward", spoilt)


def test_a_step_that_is_not_finite_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: list[Tensor] = []

    def watch(self: Pretraining, progress: float) -> None:
        weights.append(torch.cat([p.detach().flatten() for p in self.parameters()]).clone())

    monkeypatch.setattr(Pretraining, "after_step", watch)
    spoil(monkeypatch, 3, 6)
    checkpoint = pretrain.engine.pretrain(tiny_config(tmp_path))
    same = [number for number, (one, other) in enumerate(pairwise(weights), 2) if torch.equal(one, other)]
    assert same == [3, 6]
    assert weights[-1].isfinite().all()
    out = tmp_path / "run"
    noted = [json.loads(line) for line in (out / "bad_steps" / "rank-0.jsonl").read_text().splitlines()]
    assert [(each["step"], each["not_finite"]) for each in noted] == [(3, ["image_text"]), (6, ["image_text"])]
    assert all(len(each["keys"]) == BATCH_SIZE for each in noted)
    shown = capsys.readouterr().out
    assert "WARNING step 3: the gradient is not finite, nor image_text. 1 step left out so far" in shown
    assert json.loads((checkpoint / "state.json").read_text())["counters"]["bad_steps"] == 2
    # Adam counts only steps that were made.
    steps = {
        key: each for key, each in load_file(checkpoint / "optimizer.safetensors").items() if key.endswith("/step")
    }
    assert {each.item() for each in steps.values()} == {STEPS - 2}


def test_too_many_steps_that_are_not_finite_stop_the_run_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, 4)
    config = tiny_config(tmp_path, "train.max_bad_steps=1")
    with pytest.raises(TrainingError, match=r"step 4: .*image_text. 2 steps .* train\.max_bad_steps=1.*learning_rate"):
        pretrain.engine.pretrain(config)
    assert find_last(Path(config.out) / "checkpoints") is None


def test_step_seeds_are_distinct_and_fit_a_generator() -> None:
    seeds = [step_seed(seed, step) for seed in (0, 1, 11, 2**32 - 1) for step in (*range(200), 10**9)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    assert step_seed(0, 0) == step_seed(0, 0)


def test_later_and_half_written_lines_of_metrics_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    drop_later_metrics(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (2, 4, 6, 8)]
    path.write_text("".join(lines) + '{"step": 10, "lo')
    drop_later_metrics(path, 6)
    assert path.read_text() == "".join(lines[:3])
    drop_later_metrics(path, 5)
    assert path.read_text() == "".join(lines[:2])
    path.write_text("".join(lines) + '{"step": 2, "loss": 1}')
    drop_later_metrics(path, 100)
    assert path.read_text() == "".join(lines)
    drop_later_metrics(path, 0)
    assert path.read_text() == ""


def test_the_configuration_is_not_changed_by_training(whole: Run) -> None:
    assert to_yaml(whole.config) == to_yaml(tiny_config(whole.out.parent))
