import io
import os
import socket
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import pretrain.doctor
from data.batch import Batch, Field
from data.index import index_path
from data.skips import Skips
from data.stream import SourceConfig
from pretrain import doctor
from pretrain.config import Config, TrainConfig
from pretrain.doctor import FAIL, OK, WARN, DoctorError, Line, examine
from pretrain.engine import go_backward
from pretrain.model.layers import attention
from pretrain.start import Run, set_up, start_accelerator
from tests.samples import free_port, members, write_source
from tests.tiny import COUNTS, tiny_config

BLOCKS = ["processes", "precision", "packages", "disk", "shards", "samples", "attention", "step", "reading", "memory"]


def levels(lines: list[Line]) -> list[str]:
    return [line.level for line in lines]


def tree(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for indices."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if not path.name.endswith(".index.jsonl")
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, "train.precision=auto", "data.workers=1")


def test_a_sound_run_is_reported_block_by_block_and_nothing_is_left_behind(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(config.out)
    (run / "checkpoints").mkdir(parents=True)  # what belongs to a run stays as it is
    (run / "metrics.jsonl").write_text('{"step": 2}\n')
    before = tree(tmp_path)
    accelerator = start_accelerator(config)
    report = examine(config, accelerator)
    assert [line for line in report.splitlines() if line and line[0] != " "][:-1] == BLOCKS
    assert report.endswith("0 failures: the run can start")
    assert f"data.train.train: 2 shards, 0.4 MB, {COUNTS['train']} samples" in report
    assert "48 with image, 48 with text, 48 with audio; 48 have all of them" in report
    assert f"{socket.gethostname()}: 1 x cpu" in report
    assert tree(tmp_path) == before
    assert capsys.readouterr().out == ""  # the caller prints the report


def test_trackers_get_no_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    accelerator = start_accelerator(config)
    accelerator.log_with = ["a tracker"]

    def init(*arguments: Any, **settings: Any) -> None:
        begun.extend(accelerator.log_with)

    monkeypatch.setattr(accelerator, "init_trackers", init)
    with doctor.silent(accelerator):
        accelerator.init_trackers("triptych")
        print("nothing of this is seen")
    assert begun == []
    assert accelerator.log_with == ["a tracker"]


def test_all_broken_shards_are_named_and_the_run_is_refused(config: Config, tmp_path: Path) -> None:
    for name in ("train-00000.tar", "test-00000.tar"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:5000])
        index_path(path).unlink(missing_ok=True)
    config.data.train["other"] = SourceConfig(["no-such-*.tar"])
    with pytest.raises(DoctorError) as caught:
        examine(config, start_accelerator(config))
    failures = [line for line in str(caught.value).splitlines() if line.startswith(f"  {FAIL}")]
    assert len(failures) == 6  # each shard, and how many they are
    for file, name in [
        ("train-00000.tar", "train.train"),
        ("test-00000.tar", "test"),
        ("no-such-*.tar", "train.other"),
    ]:
        assert any(f"data.{name}: {tmp_path / file}: " in line for line in failures), file
    assert "data.train.train: 1 shards" in str(caught.value)  # the other one is good
    assert str(caught.value).endswith("the run can't start: mend what says FAIL")
    assert not Path(config.out).exists()
    assert not list(tmp_path.glob(".doctor-*"))


def test_splits_that_nothing_reads_only_warn(config: Config) -> None:
    data = replace(config.data, val=["gone.tar"], test=["gone.tar"])
    for scored, monitored, expected in [
        (True, False, [OK, FAIL, FAIL, FAIL, FAIL]),
        (False, True, [OK, FAIL, FAIL, WARN, WARN]),
        (False, False, [OK, WARN, WARN, WARN, WARN]),
    ]:
        assert levels(doctor.shards(data, scored, monitored)) == expected


def test_only_so_many_broken_shards_are_named(config: Config, tmp_path: Path) -> None:
    for number in range(15):
        (tmp_path / f"bad-{number:02}.tar").write_bytes(b"no tar")
    lines = doctor.shards(replace(config.data, val=["bad-*.tar"], test=[]), True, False)
    assert levels(lines) == [OK] + [FAIL] * (doctor.SHOWN + 1)
    assert "15 of them can't be used" in lines[-1].text


def test_settings_that_these_data_cannot_meet_are_a_failure(config: Config, tmp_path: Path) -> None:
    config.data.train["train"].max_epochs = 1
    config.train.steps = 1000
    with pytest.raises(DoctorError, match=r"start\n  FAIL  train\.steps=1000, but max_epochs of all sources end at"):
        examine(config, start_accelerator(config))
    assert not list(tmp_path.glob(".doctor-*"))


def test_too_many_samples_that_cannot_be_used_are_a_failure(config: Config, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-00002.tar", "w") as tar:
        for number in range(100):
            member = tarfile.TarInfo(f"broken-{number:03}.png")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"empty"))
    with pytest.raises(DoctorError) as caught:
        examine(config, start_accelerator(config))
    assert "data.max_bad_fraction=0.05" in str(caught.value)
    assert "broken-0" in str(caught.value)


def test_a_step_that_does_not_fit_is_a_failure_with_advice(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(pretrain.doctor, "go_backward", full)
    with pytest.raises(DoctorError, match=r"memory\n  FAIL  a step does not fit: train\.accumulate.*2 GiB\.\)"):
        examine(config, start_accelerator(config))


def test_samples_are_counted_by_their_modalities(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(i, kinds) for i, kinds in enumerate(["ita", "it", "a", "ta", "t"])])
    (line,) = doctor.samples([source], ["image", "text", "audio"], pairs=True)
    assert line == Line(OK, "train: 5 samples: 2 with image, 4 with text, 3 with audio; 1 have all of them")
    counted, without = doctor.samples([source], ["image"], pairs=True)
    assert counted.text.endswith("2 with image")
    assert without == Line(WARN, "train: 3 have none of these, and are skipped")


def test_no_pairs_and_unread_members_are_warnings(tmp_path: Path) -> None:
    source = write_source(tmp_path, [members(0, "i"), members(1, "t") | {"pth": b"?"}])
    lines = doctor.samples([source], ["image", "text"], pairs=True)
    assert levels(lines) == [OK, WARN, WARN]
    assert ".pth" in lines[1].text
    assert "no pairs" in lines[2].text
    assert levels(doctor.samples([source], ["image", "text"], pairs=False)) == [OK, WARN]


def test_counting_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path, [members(i, "t") for i in range(7)])
    monkeypatch.setattr(doctor, "COUNTED", 4)
    assert "4 samples of 7: 4 with text" in doctor.samples([source], ["text"], pairs=False)[0].text


def test_where_processes_are() -> None:
    eight = [f"a\ncuda:{i % 4} H100\n4" for i in range(4)] + [f"b\ncuda:{i} H100\n4" for i in range(4)]
    lines = doctor.where(eight, 8)
    assert levels(lines) == [OK, OK, OK]
    assert lines[0].text.startswith("8 of 8")
    assert lines[2].text.startswith("b: ")
    assert lines[2].text.count("H100") == 4
    assert levels(doctor.where(eight, 7)) == [FAIL, OK, OK]
    shared = doctor.where(["a\ncuda:0\n2", "a\ncuda:0\n2"], 2)
    assert levels(shared) == [OK, OK, FAIL]
    idle = doctor.where(["a\ncuda:0\n8"], 1)
    assert levels(idle) == [OK, OK, WARN]
    assert "1 of 8" in idle[2].text
    assert levels(doctor.where(["a\ncpu\n0", "a\ncpu\n0"], 2)) == [OK, OK]


@pytest.mark.parametrize(
    ("asked", "mixed", "fast", "level"),
    [
        ("auto", "bf16", True, OK),
        ("auto", "no", False, OK),
        ("bf16", "bf16", False, WARN),
        ("fp32", "no", True, WARN),
        ("fp16", "fp16", True, OK),
    ],
)
def test_the_precision_is_judged(
    asked: str, mixed: str, fast: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.doctor, "fast_in_bf16", lambda _: fast)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision=mixed)
    (line,) = doctor.precision(TrainConfig(precision=asked), accelerator)
    assert line.level == level
    assert f"train.precision={asked}" in line.text


@pytest.mark.parametrize(("mixed", "kernel"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_the_kernels_named_for_the_cpu_are_those_that_run(
    mixed: str, kernel: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[bool] = []
    original = F.scaled_dot_product_attention

    def note(*arguments: Any, **settings: Any) -> Tensor:
        fused.append(True)
        return original(*arguments, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    ran = []
    for tokens in (3, 1024, 1025):
        fused.clear()
        q = torch.randn(1, 1, tokens, 4, dtype=kernel)
        attention(q, q, q, None)
        ran.append(bool(fused))
    (line,) = doctor.attention("cpu", mixed, [])
    assert ran == ([False, False, True] if "plain product up to 1,024 tokens" in line.text else [True] * 3)
    assert ("scaled_dot_product_attention" in line.text) == any(ran)


def test_what_keeps_flash_away_is_said() -> None:
    image = Field(torch.zeros(1, 3, 4, 4), torch.arange(1))
    text = Field(torch.zeros(1, 3), torch.arange(1), torch.ones(1, 3, dtype=torch.bool))
    batch = Batch({"image": image, "text": text}, 1, ["k"])
    sdp, padded = doctor.attention("cuda", "bf16", [batch])
    assert "flash, memory-efficient" in sdp.text
    assert padded.text.startswith("text is padded")
    assert levels(doctor.attention("cuda", "no", [batch._replace(fields={"image": image})])) == [OK, WARN]
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        (off,) = doctor.attention("cuda", "bf16", [])
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert off.level == WARN
    assert "flash" not in off.text


def test_packages_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "simplejpeg" else object())
    lines = doctor.packages()
    assert sorted(levels(lines)) == [OK, OK, WARN]
    assert lines[-1].text.startswith("simplejpeg is not: ")
    assert "pip install simplejpeg" in lines[-1].text


def test_the_disk_has_room_for_all_checkpoints(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.train.keep, config.train.keep_every, config.train.steps = 2, 100, 1000  # 2, one on its way, and 10
    free = SimpleNamespace(free=1300)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    assert levels(doctor.room(config, 99)) == [OK]
    assert levels(doctor.room(config, 100)) == [WARN]
    assert levels(doctor.room(config, 1301)) == [FAIL]
    config.train.keep_every = None
    assert levels(doctor.room(config, 400)) == [OK]


def test_where_nothing_can_be_written_the_run_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(DoctorError, match=r"out=.*can't be written to: Read-only file system"):
        examine(config, start_accelerator(config))


@pytest.mark.parametrize(
    ("needed", "one", "many", "workers", "cores", "level", "words"),
    [
        (100, 60, 120, 2, 4, OK, "2 would do"),
        (100, 50, 99, 2, 4, WARN, "set data.workers=3"),
        (100, 10, 20, 2, 4, WARN, "set data.workers=12; there are 4 cores"),
        (100, 200, 90, 2, 4, WARN, "faster storage"),
        (100, 1000, 1000, 0, 4, WARN, "set data.workers=1"),
    ],
)
def test_how_many_workers_are_needed(
    needed: float, one: float, many: float, workers: int, cores: int, level: str, words: str
) -> None:
    (line,) = doctor.keeps_up(needed, one, many, workers, cores)
    assert line.level == level
    assert words in line.text


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Run:
    return set_up(config, None, start_accelerator(config))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_is_timed_without_its_start_and_to_an_end(
    run: Run, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.stream.sources[0].max_epochs = 1  # 48 samples, fewer than are read
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(doctor, "SECONDS", 3.0)
    skips = Skips()
    # Batches of 32 samples, one a second.
    assert doctor.read_rate(run, workers, skips) == 32
    assert run.stream.sources[0].max_epochs == 1
    assert skips.rows == 5 * 32


def test_the_last_step_hides_nothing_and_the_median_leaves_out_the_first(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[bool, float]] = []
    durations = iter([100.0, 1.0, 5.0, 2.0, 50.0])
    clock = [0.0]
    original = go_backward

    def slow(*arguments: Any) -> Any:
        steps.append(arguments[-2:])
        clock[0] += next(durations)
        return original(*arguments)

    monkeypatch.setattr(doctor, "go_backward", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert doctor.time_steps(run, [run.stream.batch(0), run.stream.batch(1)]) == 2.0
    assert steps == [(False, 0.0)] * 4 + [(True, 1.0)]


def test_the_size_of_a_checkpoint_is_about_right(config: Config) -> None:
    config.train.ema, config.train.steps, config.train.save_every = 0.9, 1, 1
    accelerator = start_accelerator(config)
    expected = doctor.checkpoint_bytes(set_up(config, None, accelerator))
    checkpoint = pretrain.engine.pretrain(config, None, accelerator)
    files = checkpoint.glob("**/*.safetensors")  # their headers count for something only where the model is tiny
    size = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert expected == pytest.approx(size, rel=0.01)


def test_crowded_memory_is_a_warning() -> None:
    assert doctor.crowded(89, 100, "of it").level == OK
    full = doctor.crowded(91, 100, "of it")
    assert full.level == WARN
    assert "train.accumulate" in full.text


def on_a_rank(rank: int, port: int, config: Config, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    accelerator: Accelerator = start_accelerator(config)
    assert doctor.tell(f"I am {rank}, größer", accelerator) == ["I am 0, größer", "I am 1, größer"]
    Path(folder, f"sound-{rank}.txt").write_text(examine(config, accelerator))
    if rank == 1:  # it alone can't read them
        config.data.root = "/nowhere"
    with pytest.raises(DoctorError) as caught:
        examine(config, accelerator)
    Path(folder, f"broken-{rank}.txt").write_text(str(caught.value))
    accelerator.end_training()


def test_two_ranks_see_each_other_and_agree(config: Config, tmp_path: Path) -> None:
    aside = tmp_path / "told"
    aside.mkdir()
    spawn(on_a_rank, args=(free_port(), config, str(aside)), nprocs=2)  # type: ignore[no-untyped-call]
    assert not list(tmp_path.glob(".doctor-*"))
    sound = (aside / "sound-0.txt").read_text()
    assert "OK    2 of 2 processes take part" in sound
    assert f"{socket.gethostname()}: 2 x cpu" in sound
    assert "and all processes see it" in sound
    assert sound.endswith("0 failures: the run can start")
    first, second = ((aside / f"broken-{rank}.txt").read_text() for rank in (0, 1))
    assert "other processes\n  FAIL  process 1: data.train.train: /nowhere/train-*.tar: " in first
    assert first.endswith("the run can't start: mend what says FAIL")
    assert "data.val: /nowhere/val-*.tar: " in second
    assert "2 of 2 processes" not in second  # the report is the first one's to give
    assert "\nsamples" not in first  # nothing that needs all of them was begun
