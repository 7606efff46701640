"""Progress: means, rates, the lines of metrics.jsonl and what a terminal shows."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pretrain.progress
from data.errors import UserError
from data.skips import Skipped, Skips
from pretrain.progress import Progress, duration, means_of

NAN = float("nan")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pretrain.progress.time.perf_counter", clock)
    return clock


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Progress]:
    def make(**changes: Any) -> Progress:
        settings = {"steps": 10, "start": 0, "batch_size": 8, "every": [2], "skips": Skips()}
        return Progress(tmp_path / "metrics.jsonl", **{**settings, **changes})

    return make


class Terminal(io.StringIO):
    """Of 40 columns. ``new`` gives what was written since the last time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(sys, "stdout", self)
        monkeypatch.setenv("COLUMNS", "40")

    def isatty(self) -> bool:
        return True

    def new(self) -> str:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


def lines_of(progress: Progress) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = progress.metrics_file.read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_means_are_of_the_steps_since_the_last_line(make: Callable[..., Progress]) -> None:
    progress = make(steps=5, batch_size=4)
    steps: list[dict[str, Tensor | float]] = [
        {"loss": torch.tensor(1.0, requires_grad=True), "rate": 0.5},
        {"loss": torch.tensor(3.0), "rate": 1.0, "sometimes": 7.0},
        {"loss": 10.0},
        {"loss": 20.0},
        {"loss": 5.0},
    ]
    assert [progress.update(step) for step in steps] == [
        None,
        {"loss": 2.0, "rate": 0.75, "sometimes": 7.0},
        None,
        {"loss": 15.0},
        {"loss": 5.0},  # the last step has its line, though none is due
    ]
    assert [(line["step"], line["loss"]) for line in lines_of(progress)] == [(2, 2.0), (4, 15.0), (5, 5.0)]


def test_rates_waits_and_the_time_to_go(
    make: Callable[..., Progress], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow() -> Iterator[int]:
        for batch in range(4):
            clock.now += 1.0
            yield batch

    progress = make(start=6)  # resumed: what came before took none of this session's time
    for batch in progress.timed(slow()):
        clock.now += 3.0
        progress.update({"loss": 1.0}, {"image": 8, "text": torch.tensor(4)} if batch % 2 else {"image": 8})
    first, last = lines_of(progress)
    for line in (first, last):
        assert line["samples_per_second"] == 2.0
        assert line["samples_per_second/image"] == 2.0
        assert line["samples_per_second/text"] == 0.5  # 4 rows in two steps of 4 seconds
        assert line["data_wait"] == 0.25
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("step  8/10  ETA 0:08  loss 1  2 samples/s (image 2, text 0)  data wait 25%  memory ")
    assert shown[1].startswith("step 10/10  ETA 0:00  ")


def test_what_is_no_training_slows_no_rate_but_the_run(
    make: Callable[..., Progress], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make()
    for _ in range(4):
        clock.now += 1.0
        progress.update({})
        with progress.aside():
            clock.now += 9.0
    assert [line["samples_per_second"] for line in lines_of(progress)] == [8.0, 8.0]
    assert "ETA 0:44" in capsys.readouterr().out.splitlines()[0]  # 8 steps of (1 + 9 + 1) / 2 seconds


def test_numbers_that_are_not_finite_stay_json(
    make: Callable[..., Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make(steps=4)
    for step in ({"loss": NAN, "norm": 1.0}, {"loss": 3.0, "norm": 2.0}, {"loss": NAN}, {"loss": float("inf")}):
        progress.update(step)
    some, none = lines_of(progress)
    assert (some["loss"], some["norm"], some["non_finite"], some["non_finite_steps"]) == (3.0, 1.5, ["loss"], 1)
    assert (none["loss"], none["non_finite"], none["non_finite_steps"]) == (None, ["loss"], 2)
    assert "NOT FINITE in 1 steps" in capsys.readouterr().out
    progress.evaluated({"ridge/image": NAN, "ridge/text": 0.5})
    assert lines_of(progress)[-1] == {"step": 4, "ridge/image": None, "ridge/text": 0.5, "non_finite": ["ridge/image"]}


def test_a_step_with_two_such_numbers_counts_once() -> None:
    window: list[Mapping[str, Tensor | float]] = [{"a": NAN, "b": torch.tensor(NAN)}, {"a": 1.0, "b": NAN}, {"a": 3.0}]
    means, names, steps = means_of(window)
    assert (means["a"], names, steps) == (2.0, ["a", "b"], 2)
    assert means["b"] != means["b"]


def test_memory_is_that_of_this_process(make: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    megabytes = [b"x" * 10**6 for _ in range(100)]  # memory that was used, not only asked for
    progress = make(every=[1])
    progress.update({})
    del megabytes
    (line,) = lines_of(progress)
    assert 0.1 < line["resident_gb"] <= line["memory_gb"] * 1.01 < 100

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
    progress.update({})
    assert lines_of(progress)[-1]["memory_gb"] == 3.0


def test_an_evaluation_has_a_line_of_its_own_and_is_shown_from_then_on(
    make: Callable[..., Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make()
    for step in range(1, 5):
        progress.update({"loss": 1.0})
        if step == 2:
            progress.evaluated(
                {"rankme/image": 9.0, "retrieval/a_to_b/chance_r1": 0.1, "retrieval/a_to_b/r1": 0.4, "ridge/image": 0.7}
            )
    assert [line["step"] for line in lines_of(progress)] == [2, 2, 4]
    assert lines_of(progress)[1].keys() == {
        *("step", "rankme/image", "retrieval/a_to_b/chance_r1", "retrieval/a_to_b/r1", "ridge/image")
    }
    before, after = capsys.readouterr().out.splitlines()
    assert "probe" not in before
    assert after.endswith("probe ridge/image 0.7, retrieval/a_to_b/r1 0.4, rankme/image 9")


def test_other_ranks_count_but_neither_write_nor_print(
    make: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    logged: list[Any] = []
    progress = make(main=False, log=lambda values, step: logged.append(values))
    assert progress.update({"loss": 1.0}) is None
    assert progress.due
    assert progress.update({"loss": 2.0}) == {"loss": 1.5}
    progress.evaluated({"ridge/image": 0.5})
    with progress.aside():
        pass
    assert progress.probe == {"ridge/image": 0.5}
    assert not progress.metrics_file.exists()
    assert (terminal.new(), logged) == ("", [])


def test_numbers_are_logged_under_their_step(make: Callable[..., Progress]) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    progress = make(log=lambda values, step: logged.append((dict(values), step)))
    for _ in range(2):
        progress.update({"loss": 1.0}, {"image": 8})
    progress.evaluated({"ridge/image": 0.5})
    (values, step), evaluation = logged
    assert step == 2
    assert values.keys() == lines_of(progress)[0].keys() - {"step", "skipped_samples"}
    assert evaluation == ({"ridge/image": 0.5}, 2)


def test_skipped_samples_are_told_once_and_before_an_error(
    make: Callable[..., Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    skips = Skips()
    skips.add([Skipped("s", "a.tar", "0", "ImageError", "")], 8)  # before this session
    progress = make(skips=skips, every=[1])

    def batches() -> Iterator[int]:
        skips.add([Skipped("s", "a.tar", "1", "ImageError", "")] * 2, 8)
        yield 0
        yield 1
        skips.add([Skipped("s", "a.tar", "2", "ImageError", "")], 8)
        raise UserError("too many")

    with pytest.raises(UserError, match="too many"):
        for _ in progress.timed(batches()):
            progress.update({"loss": 1.0})
            progress.evaluated({"ridge/image": 0.5})
    trained = [line for line in lines_of(progress) if "ridge/image" not in line]
    assert [(line["step"], line["skipped"]) for line in trained] == [(1, 2), (2, 0), (3, 1)]
    assert trained[0]["skipped_samples"] == [["s", "a.tar", "1", "ImageError", 2]]
    assert [line.count("SKIPPED 2 samples") for line in capsys.readouterr().out.splitlines()] == [1, 0]


def test_a_terminal_has_one_line_that_is_rewritten(
    make: Callable[..., Progress], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    progress = make(every=[3])
    texts = []
    for loss in range(5):
        clock.now += 1.0
        progress.update({"loss": torch.tensor(float(loss))})
        texts.append(terminal.new())
    # "\r\x1b[K" goes back and clears; a line to be rewritten ends in "\r", in front of it, and does not wrap.
    assert [re.sub(r"\x1b\[K|\r", "", text)[:20] for text in texts[:2]] == [
        "step  1/10  ETA 0:09",
        "step  2/10  ETA 0:08",
    ]
    assert texts[2].startswith("\r\x1b[Kstep  3/10  ETA 0:07  loss 1  8 samples/s  data wait 0%  memory ")
    assert texts[2].endswith("\n")
    assert texts[3].startswith("\r\x1b[Kstep  4/10  ETA 0:06  loss 1  8 ")
    for text in (*texts[:2], *texts[3:]):
        assert text.endswith("\r")
        assert "\n" not in text
        assert len(text.removeprefix("\r\x1b[K").removesuffix("\r")) <= 39
    with progress.aside():
        assert terminal.new() == "\r\x1b[K"


def test_a_terminal_is_not_written_to_faster_than_one_reads(
    make: Callable[..., Progress], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    progress = make(steps=1000, every=[1000])
    for _ in range(100):
        clock.now += 0.01
        progress.update({})
    assert 4 <= terminal.new().count("step") <= 5


def test_no_value_is_read_from_the_device_before_a_line_is_due(
    make: Callable[..., Progress], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)

    def refuse(window: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(pretrain.progress, "means_of", refuse)
    monkeypatch.setattr(Tensor, "__float__", refuse)
    monkeypatch.setattr(Tensor, "item", refuse)
    progress = make(every=[3])
    for _ in range(2):
        clock.now += 1.0
        progress.update({"loss": torch.tensor(1.0)}, {"image": torch.tensor(8)})
    assert terminal.new().count("step") == 2
    with pytest.raises(AssertionError, match="read"):
        progress.update({"loss": torch.tensor(1.0)})


def test_a_file_gets_plain_lines(make: Callable[..., Progress], capsys: pytest.CaptureFixture[str]) -> None:
    progress = make()
    progress.update({"loss": 1.0, "learning_rate": 1.0, "cut_text": 0.0, "cut_audio": 0.5, "trunk_norm/loss": 1.0})
    progress.update({"loss": 1.0})
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    assert out.count("\n") == 1
    assert " cut_audio 0.5 " in out
    assert not any(name in out for name in ("learning_rate", "cut_text", "trunk_"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (42.4, "0:42"),
        (59.6, "1:00"),
        (187, "3:07"),
        (3599.7, "1:00:00"),
        (7384, "2:03:04"),
        (9e4, "25:00:00"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
