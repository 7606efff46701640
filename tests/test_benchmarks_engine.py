"""The benchmarks of the loop and the soak measure what they say: with tiny sizes, and with faults put in."""

import json
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine, soak
from data import digits
from data.index import load_shard
from data.order import Order, Supply
from data.source import SampleError, Source
from pretrain.checkpoint import Checkpoints
from pretrain.config import Config, load_config

TINY = ["model.width=16", "model.depth=1", "model.heads=1", "model.embed_dim=8", "train.batch_size=4"]
SETTINGS = [*TINY, "data.views.image.size=16", "data.workers=0", "train.threads=1", "train.precision=fp32"]


def config_of(folder: Path, shards: int = 1) -> Config:
    return load_config(engine.make_data(folder, shards), [f"out={folder / 'run'}", *SETTINGS])


def test_the_bare_loop_is_the_same_training(tmp_path: Path) -> None:
    overhead = engine.loop_overhead(config_of(tmp_path), rounds=1)
    assert overhead.same
    assert overhead.loop > 0
    assert overhead.bare > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40, 41]  # each counted round has a line in it


def test_what_the_loop_does_besides_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the line of each round, which a median over steps would leave out."""
    from pretrain import progress

    memory = progress.memory

    def slow() -> dict[str, float]:
        time.sleep(1)
        return memory()

    monkeypatch.setattr(progress, "memory", slow)
    overhead = engine.loop_overhead(config_of(tmp_path), rounds=1)
    assert overhead.loop - overhead.bare > 1000 / engine.LOG_EVERY / 2
    assert overhead.share > 0


def test_rounds_are_summed_and_the_first_is_left_out() -> None:
    assert engine.by_round({step: float(step > 20) for step in range(1, 61)}) == [20, 20]
    assert engine.by_round({20: 5.0, 40: 7.0, 60: 9.0}) == [7, 9]  # of steps that are timed together


def test_linked_shards_need_no_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an index nor a hash is made of them again, which would take longer than all that is measured."""
    engine.make_data(tmp_path, 300)  # some ticks of the file system's clock

    def refuse(*_: Any) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr("data.index.verify", refuse)
    monkeypatch.setattr("data.index.build_index", refuse)
    shards = [load_shard(path) for path in sorted(tmp_path.glob("train-*.tar"))]
    assert [shard.samples for shard in shards] == [engine.PER_SHARD] * 300


def test_a_run_is_resumed_where_it_was_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, since a fresh one takes seconds to import."""
    monkeypatch.setattr(engine, "in_fresh_process", engine.first_step_seconds)
    new, resumed = engine.resume_seconds(config_of(tmp_path, shards=3), position=10_000, repeats=2)
    assert 0 < new < 60
    assert 0 < resumed < 60
    state = json.loads((tmp_path / "run-1" / "checkpoints" / "last" / "stream.json").read_text())
    assert state["step"] == 10_000 // 4 + 1
    assert not (tmp_path / "run-2").exists()
    monkeypatch.setattr(engine, "advance", lambda *_: None)
    config = load_config(tmp_path / "recipe.yaml", [f"out={tmp_path / 'other'}", *SETTINGS])
    with pytest.raises(RuntimeError, match="the data stand at step 2"):
        engine.resume_seconds(config, position=10_000, repeats=1)


def test_a_save_that_holds_up_the_loop_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoints.save

    def slow(self: Checkpoints, *arguments: Any, **named: Any) -> bool:
        time.sleep(0.4)
        return save(self, *arguments, **named)

    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(engine, "ROOM", 0.3)
    stall = engine.checkpoint_stall(config_of(tmp_path), saves=1)
    assert stall.copying >= 0.4
    assert stall.waited > stall.copying
    assert 0.2 < stall.lost < 2
    assert stall.share == stall.lost / stall.waited


def test_steps_after_a_save_are_set_against_those_before() -> None:
    seconds = dict.fromkeys(range(1, 20), 1.0)
    seconds[8], seconds[9] = 3.0, 1.5  # the step that saves, and one beside which the thread writes
    seconds[7] = 1.25
    # Of the saves at 4, 8, 12 and 16, all with two steps on either side.
    assert engine.losses(seconds, 2) == [0, 2.25, 0, 0]
    del seconds[17]
    assert engine.losses(seconds, 2) == [0, 2.25, 0]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, set[str]]:
    folder = tmp_path_factory.mktemp("damaged")
    keys = soak.damage(digits.build(folder / "digits", pairings=1)["train"], folder)
    return Source([load_shard(path) for path in sorted(folder.glob("damaged-*.tar"))]), keys


def test_damaged_samples_are_those_that_cant_be_read(damaged: tuple[Source, set[str]], tmp_path: Path) -> None:
    source, keys = damaged
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(soak.RECIPE.format(folder=tmp_path))
    views = load_config(recipe).data.views.used
    bad, errors = set(), set()
    for shard, number in source.places():
        try:
            source.values(shard, number, views, training=True)
        except SampleError as error:
            bad.add(error.key)
            errors.add(error.error)
    assert bad == keys
    assert len(errors) == len(soak.MEMBERS)
    assert len(keys) == round(len(source) / soak.DAMAGED)


STEPS = 20
KEYS = [[f"{shard}-{number}" for number in range(10)] for shard in range(3)]
BAD = {"0-3", "1-7", "2-0"}


def sessions() -> tuple[list[soak.Session], Order]:
    """Of a run that was killed after step 12 and went on from step 8: 80 rows, of 30 samples."""
    order = Order([Supply("train", [10, 10, 10], 1.0)], 0, 4)

    def given(steps: range) -> dict[int, dict[str, list[str]]]:
        rows = {step: soak.rows_of(order, KEYS, BAD, step) for step in steps}
        return {step: {"keys": wanted, "skipped": skipped} for step, (wanted, skipped, _) in rows.items()}

    first = soak.Session(0, killed="training", steps=given(range(1, 13)))
    return [first, soak.Session(1, steps=given(range(9, STEPS + 1)))], order


def test_what_is_as_it_should_be_passes() -> None:
    ran, order = sessions()
    found = soak.check(ran, order, KEYS, BAD, STEPS)
    assert (found.wrong, found.missing, found.repeated, found.lost, found.epochs) == (0, 0, 0, 0, 2)
    assert found.skipped >= 2 * len(BAD)
    used = [key for session in ran for given in session.steps.values() for key in given["keys"]]
    assert not BAD & set(used)


def good_row(ran: list[soak.Session], order: Order, step: int) -> int:
    """A row of the step whose own sample is a good one."""
    return next(i for i, (_, bad) in enumerate(soak.rows_of(order, KEYS, BAD, step)[2]) if not bad)


def test_a_sample_that_is_seen_twice_is_found() -> None:
    ran, order = sessions()
    steps = ran[1].steps
    steps[10]["keys"][good_row(ran, order, 10)] = steps[9]["keys"][good_row(ran, order, 9)]
    found = soak.check(ran, order, KEYS, BAD, STEPS)
    assert (found.wrong, found.missing, found.repeated) == (1, 1, 1)


def test_a_session_that_goes_on_elsewhere_is_found() -> None:
    """As if the data had gone back by one step less than the weights."""
    ran, order = sessions()
    ran[1].steps = {step: ran[1].steps[min(step + 1, STEPS)] for step in range(9, STEPS + 1)}
    found = soak.check(ran, order, KEYS, BAD, STEPS)
    assert found.wrong > STEPS
    assert found.missing > 0


def test_steps_that_were_done_again_are_compared_too() -> None:
    """The last time counts, but the time before must have been the same."""
    ran, order = sessions()
    ran[0].steps[10]["keys"][0] = "elsewhere"
    found = soak.check(ran, order, KEYS, BAD, STEPS)
    assert (found.wrong, found.missing, found.repeated) == (1, 0, 0)


def test_a_skipped_sample_that_is_not_named_is_found() -> None:
    ran, order = sessions()
    step = next(step for step in range(13, STEPS + 1) if ran[1].steps[step]["skipped"])
    ran[1].steps[step]["skipped"].pop()
    found = soak.check(ran, order, KEYS, BAD, STEPS)
    assert found.wrong > 0


def test_a_step_that_is_not_there_is_found() -> None:
    ran, order = sessions()
    del ran[1].steps[15]
    assert soak.check(ran, order, KEYS, BAD, STEPS).lost == 1


def test_a_line_that_was_cut_off_is_left(tmp_path: Path) -> None:
    record, session = tmp_path / "record", soak.Session(0)
    whole = json.dumps({"step": 1, "keys": ["a"], "skipped": []}) + "\n"
    record.write_text(whole + '{"step": 2, "ke')
    with record.open() as lines:
        assert soak.take(session, lines)
        assert not soak.take(session, lines)
        record.write_text(whole + json.dumps({"step": 2, "keys": ["b"], "skipped": []}) + "\n")
        assert soak.take(session, lines)
    assert session.steps == {1: {"keys": ["a"], "skipped": []}, 2: {"keys": ["b"], "skipped": []}}


def test_memory_is_judged_after_the_first_fifth() -> None:
    grows = [(float(second), 1000 + max(0, second - 50)) for second in range(150)]
    steady = [(float(second), 1000 if second > 60 else second) for second in range(150)]
    session = soak.Session(0, began=50.0, memory={1: grows, 2: steady})
    assert session.seconds() == 99
    late = session.late()
    assert soak.spread(late[1]) == pytest.approx((1099 - 1020) / 1020)
    assert soak.drift(late[1]) == pytest.approx((1089.5 - 1029.5) / 1029.5)
    assert soak.drift(late[2]) == soak.spread(late[2]) == 0


def test_memory_that_is_used_for_a_moment_is_no_growth() -> None:
    assert soak.drift([1000] * 9 + [2000]) == 0
    assert soak.drift([1000, 2000] + [1000] * 9) == 0
    assert soak.drift([1000] * 5 + [900] * 5) == pytest.approx(-0.1)


def test_kills_are_spread_over_the_run_and_its_starts() -> None:
    planned = soak.plan(1000, 20, random.Random(0))
    later = [step for step in planned if step]
    assert len(planned) == 20
    assert planned.count(0) == 4
    assert later == sorted(later)
    assert max(later) < 800


FINE: dict[str, Any] = {
    "steps": 60,
    "kills": 2,
    "steps_lost": 0,
    "rows_wrong": 0,
    "samples_missing": 0,
    "samples_repeated": 0,
    "lines_wrong": 0,
    "memory_drift": None,
    "shared_memory_left": [],
    "processes_left": 0,
    "files_left": [],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 59),
        ("kills", 1),
        ("rows_wrong", 1),
        ("lines_wrong", 1),
        ("memory_drift", 0.06),
        ("memory_drift", -0.06),
        ("shared_memory_left", ["torch_1_2"]),
        ("processes_left", 1),
        ("files_left", ["step-00000001.partial"]),
    ],
)
def test_each_fault_is_named(name: str, value: Any) -> None:
    assert soak.wrong(FINE | {"memory_drift": 0.04}, 60, 2) == []
    (line,) = soak.wrong(FINE | {name: value}, 60, 2)
    assert line.startswith(f"{name}: ")


def test_names_of_other_processes_are_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SHARED", tmp_path)
    for name in ("torch_12_34_0", "torch_99_34_0", "sem.loky-99-abc", "psm_1"):
        (tmp_path / name).touch()
    assert soak.shared_names({12}) == {"torch_12_34_0", "psm_1"}
    assert len(soak.shared_names()) == 4


@pytest.mark.slow
def test_the_bare_loop_is_the_same_in_bf16(tmp_path: Path) -> None:
    """In a process of its own, since one has one precision."""
    config = config_of(tmp_path)
    config.train.precision = "bf16"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(engine.loop_overhead, config, 1).result().same


@pytest.mark.slow
def test_all_figures_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--rounds", "1", "--saves", "1", "--resumes", "1", "--shards", "30", "--position", "100000"]
    engine.main([*few, *SETTINGS])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(figures) == ["loop_overhead", "resume_first_step_s", "checkpoint_stall"]
    assert 0 < figures["resume_first_step_s"] < 60


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--steps", "60", "--kills", "2", "--every", "0.5", "--folder", str(tmp_path)]
    code = soak.main([*few, "train.threads=1", "train.save_every=10", "eval.monitor.every=20"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    figures = json.loads(shown.splitlines()[-1])
    assert (figures["steps"], figures["kills"], figures["rows_wrong"]) == (60, 2, 0)
    assert figures["rows_skipped"] > 0
