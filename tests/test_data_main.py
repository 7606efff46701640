"""The command line `python -m data`: what is dispatched where, exit codes, and the commands that it has itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import COMMANDS, main
from data.index import index_path
from data.stream import Stream, open_train
from tests.tiny import tiny_config, tiny_tokenizer, write_recipe, write_split


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_order_prints_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    stream = Stream(open_train(config.data), config.data, tiny_tokenizer(), seed=config.seed, batch_size=8)
    expected = [f"step {step}: {' '.join(stream.batch(step).keys)}" for step in range(9)]
    assert main(["order", str(tmp_path / "recipe.yaml"), "--start", "5", "--steps", "4"]) == 0
    assert lines(capsys) == expected[5:]
    assert main(["order", str(tmp_path / "recipe.yaml")]) == 0
    assert lines(capsys) == expected[:1]


def test_order_shows_who_reads_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    main(["order", recipe, "--start", "3"])
    (whole,) = lines(capsys)
    assert main(["order", recipe, "--start", "3", "--world", "2", "--workers", "2"]) == 0
    first, second = lines(capsys)
    assert first.startswith("step 3 rank 0 worker 1: ")
    assert second.startswith("step 3 rank 1 worker 1: ")
    assert [*first.split(": ")[1].split(), *second.split(": ")[1].split()] == whole.split(": ")[1].split()


def test_order_takes_settings_and_names_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    settings = ["data.train={other: {shards: [val-00000.tar]}}", "train.batch_size=16"]  # beside the recipe's own
    assert main(["order", recipe, settings[0], "--start", "2", settings[1]]) == 0
    (line,) = lines(capsys)
    keys = line.split(": ", 1)[1].split()
    assert len(keys) == 16
    assert {key.split("-")[0] for key in keys} == {"train:train", "other:val"}


def test_order_follows_the_run_into_its_next_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    config = tiny_config(tmp_path)
    before = Stream(open_train(config.data), config.data, tiny_tokenizer(), seed=config.seed, batch_size=8)
    before.step = 5
    config.data.train["train"].shards = ["train-00000.tar"]
    config.data.allow_changed = True
    stream = Stream(open_train(config.data), config.data, tiny_tokenizer(), seed=config.seed, batch_size=8)
    stream.load_state_dict(before.state_dict())
    stream.step = 7
    (checkpoint := Path(config.out) / "checkpoints" / "step-00000007").mkdir(parents=True)
    stream.save(checkpoint)

    settings = ["data.train=[train-00000.tar]", f"out={config.out}"]
    assert main(["order", recipe, *settings, "--start", "7"]) == 0
    assert lines(capsys) == [f"step 7: {' '.join(stream.batch(7).keys)}"]
    assert main(["order", recipe, *settings, "--start", "4"]) == 2
    assert "other data since step 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--start", "-1"], "--start and --workers must be 0 or more"),
        (["--steps", "0"], "--steps and --world 1 or more"),
        (["--world", "3"], "--world 3: must divide the 8 lanes"),
        (["train.batchsize=3"], "did you mean 'train.batch_size'"),
        (["data.train.train.max_epochs=1", "--start", "6"], "step 6: max_epochs of all sources end at step 6"),
    ],
)
def test_mistakes_are_named_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["order", str(write_recipe(tmp_path)), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_unknown_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    for arguments in (["order", recipe, "--stps", "3"], ["index", "x.tar", "--forse"], ["train"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "--stps" in capsys.readouterr().err


def test_index_makes_what_is_missing_and_names_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = write_split(tmp_path, "train")
    for shard in (good, broken):
        index_path(shard).unlink()
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    assert main(["index", f"{tmp_path}/*.tar"]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{good}: 30 samples: 30 .flac, 30 .json, 30 .png, 30 .txt\n"
    assert f"error: {broken}: truncated or damaged at byte" in captured.err
    assert index_path(good).exists()
    assert not index_path(broken).exists()


def test_index_anew_takes_another_content_for_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_split(tmp_path, "train")
    second.replace(first)
    assert main(["index", str(first)]) == 1
    assert "changed since it was indexed" in capsys.readouterr().err
    assert main(["index", str(first), "--force"]) == 0
    assert main(["index", str(first)]) == 0
    assert "18 samples" in capsys.readouterr().out


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            main([name, "--help"])
        assert exit_.value.code == 0
        assert name in capsys.readouterr().out


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "data", "order", str(recipe), "--steps", "50"],
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=100,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
