import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.manifest import check
from objectives.pretraining import Pretraining
from pretrain.config import load_config
from pretrain.explain import commented_yaml
from pretrain.run import closing_screen, main
from tests.tiny import CAPTIONS, CLASSES, COUNTS, write_recipe

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as users start it, but for the launcher."""
    env = {**os.environ, **environment}
    command = [sys.executable, str(ROOT / "pretrain" / "run.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=env)


def test_a_misspelt_key_is_two_lines_and_exit_code_2(tmp_path: Path) -> None:
    done = run("train.lerning_rate=1", "eval.lable=x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: command line: unknown key 'train.lerning_rate'; did you mean 'train.learning_rate'?",
        "command line: unknown key 'eval.lable'; did you mean 'eval.label'?",
    ]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_shard_is_named_and_exit_code_2(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = run(str(recipe), "data.train=[train-00000.tar, train-00007.tar]", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "train-00007.tar") in done.stderr
    assert "Traceback" not in done.stderr


def test_help_fits_on_a_screen(tmp_path: Path) -> None:
    done = run("-h", cwd=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert "accelerate launch pretrain/run.py RECIPE.yaml" in done.stdout
    assert done.stderr == ""


def test_print_config_from_another_folder_is_a_recipe(tmp_path: Path) -> None:
    # A folder with names like ours must not come before the project's own.
    for name in ("data", "eval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    done = run("--print-config", "train.steps=77", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout)
    config = load_config(tmp_path / "printed.yaml")
    assert config.train.steps == 77
    assert done.stdout == commented_yaml(config)


@pytest.mark.parametrize(
    "order",
    [
        ["RECIPE", "--print-config", "seed=7"],
        ["RECIPE", "seed=7", "--print-config"],
        ["--print-config", "RECIPE", "seed=7"],
    ],
)
def test_options_may_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], order: list[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    assert main([recipe if word == "RECIPE" else word for word in order]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7


def test_explain_needs_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain"]) == 0
    sections = capsys.readouterr().out
    assert "objectives" in sections
    assert main(["--explain", "train.warmup"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("train.warmup")
    assert shown not in sections


def test_without_a_recipe_it_is_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config"]) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["data"]["embedded"] == "digits"
    assert main([str(ROOT / "pretrain" / "recipes" / "digits.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.steps=0"], "train.steps=0"),
        (["eval.templates=[a tone]"], "eval.templates: 'a tone'"),
        (["model.image_patch=5"], "model.image_patch=5: it must divide data.views.image.size=16"),
        (["model.audio_patch=5"], "model.audio_patch=5: it must divide data.views.audio.mels=32"),
        (["tokenizer.train=10"], "tokenizer.train=10"),
        (["tokenizer.train=null", "tokenizer.name=./no/such/folder"], "no/such/folder"),
        (["data.embedded=digits"], "not written by this builder"),
        (["data.train=['s3://bucket/train.tar']"], "s3://bucket/train.tar"),
    ],
)
def test_a_mistake_of_the_user_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    assert main([str(write_recipe(tmp_path)), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_a_run_whose_export_would_be_refused_does_not_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, export = write_recipe(tmp_path), tmp_path / "run" / "export"
    (export / "image").mkdir(parents=True)
    (export / "image" / "cat.jpg").write_text("a cat")
    assert main([str(recipe)]) == 2
    assert "export holds files that are no export (image)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["export"]


def test_a_run_from_shards_to_export_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    assert main([str(recipe)]) == 0
    shown = capsys.readouterr().out

    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "checkpoints", "export", "eval"} <= names
    assert (out / "checkpoints" / "last" / "encoder" / "model.safetensors").is_file()
    for modality in ("image", "text", "audio"):
        assert (out / "export" / modality / "model.safetensors").is_file()
    described = check(out / "export")
    assert described["verified"]["with"] == "4 samples of train"
    document = json.loads((out / "eval" / "results.json").read_text())
    score = f"{100 * document['results']['linear/image']['metrics']['top1']['value']:.1f}"
    assert score in (out / "export" / "image" / "README.md").read_text()  # evaluated before it was exported
    assert document["schema"] == 2
    assert document["about"]["encoder"]["name"].endswith("step-00000012")
    assert {name: split["samples"] for name, split in document["about"]["splits"].items()} == COUNTS
    assert {"linear/image", "zeroshot/audio", "retrieval/text_to_image"} <= document["results"].keys()
    assert not list(out.rglob("*partial*"))
    for path in ("metrics.jsonl", "checkpoints/step-00000012", "eval/results.json", "eval/report.html", "export"):
        assert str(out / path) in shown
    assert "step 12/12" in shown
    assert score in shown

    # Started again, it finds nothing left to train, and gives the same results.
    monkeypatch.setattr(Pretraining, "forward", lambda *_, **__: pytest.fail("trained again"))
    metrics = (out / "metrics.jsonl").read_text()
    assert main([str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "resumed from" in shown
    assert f"{out / 'export'} is whole and of this checkpoint: kept as it is" in shown
    assert "step 12/12" not in shown
    assert (out / "metrics.jsonl").read_text() == metrics
    assert json.loads((out / "eval" / "results.json").read_text()) == document


def test_without_a_label_it_is_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, eval={"label": None})
    assert main([str(recipe), "train.steps=1", "data.val=[]", "data.test=[]"]) == 0
    out = tmp_path / "run"
    assert not (out / "eval").exists()
    assert (out / "export" / "audio" / "model.safetensors").is_file()
    assert "results.json" not in capsys.readouterr().out


def test_a_run_without_audio_has_no_audio_anywhere(tmp_path: Path) -> None:
    assert main([str(write_recipe(tmp_path)), "data.views.audio=null", "train.steps=2"]) == 0
    out = tmp_path / "run"
    folders = {path.name for path in (out / "export").iterdir() if path.is_dir()}
    assert folders == {"image", "text", "embed_image", "embed_text", "image_text", "joint"}
    assert "audio" not in (out / "metrics.jsonl").read_text()
    assert not any("audio" in task for task in json.loads((out / "eval" / "results.json").read_text())["results"])


def test_the_commands_on_the_closing_screen_name_what_is_there(tmp_path: Path) -> None:
    screen = closing_screen(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001", ["text", "audio"])
    command = next(line for line in screen.splitlines() if line.startswith("  load"))
    python, flag, code = shlex.split(command)[1:]
    assert Path(python).exists()
    assert flag == "-c"
    assert f'from_pretrained("{tmp_path / "run" / "export" / "text"}")' in code
    assert "export/{text,audio}" in screen
    assert f"pretrain/export.py {tmp_path / 'run' / 'checkpoints' / 'step-00000001'}" in screen


def test_the_tiny_recipe_is_what_the_other_tests_say(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path))
    assert tuple(config.eval.classes) == CLASSES
    assert tuple(config.eval.templates) == CAPTIONS


@pytest.mark.slow
def test_the_digits_are_learnt(tmp_path: Path) -> None:
    """The demo as it is shipped, with the scores that its recipe promises."""
    done = run(f"out={tmp_path / 'run'}", f"data.root={tmp_path / 'shards'}", cwd=tmp_path, timeout=3600)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["results"]
    least = {"linear/image": 0.97, "zeroshot/image": 0.95, "linear/audio": 0.89, "zeroshot/audio": 0.84}
    scores = {task: results[task]["metrics"]["top1"]["value"] for task in least}
    assert {task: score for task, score in scores.items() if score < least[task]} == {}
    assert {
        task: score for task, score in scores.items() if score <= results[task]["baselines"]["random_init"]["top1"]
    } == {}

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = ("image_text", "image_audio", "text_audio", "masked_language", "masked_image", "masked_audio")
    assert {name: (lines[0][name], lines[-1][name]) for name in terms if lines[-1][name] >= lines[0][name]} == {}
