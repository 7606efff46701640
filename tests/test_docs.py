"""What README and docs say holds: the programs know each command, Python runs, settings exist, links lead somewhere."""

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from mkdocs.commands.build import build
from mkdocs.config import load_config as load_mkdocs
from omegaconf import OmegaConf

import data.__main__
import eval.__main__
import pretrain.export
import pretrain.run
from docs.hooks import escaped, reference
from pretrain.config import Config, all_keys, load_config
from pretrain.explain import explain
from pretrain.exports.folders import FOLDERS
from tests.exported import subject
from tests.tiny import picture, tone, write_split

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
NETWORK = "needs: network"
GPU = "needs: gpu"
SHELL = "needs: a shell of one's own"
HERE = "test_docs.py::test_the_programs_know_every_command"
# What a command begins with -> the test that runs it, or why none does. The first that fits counts; the mark in a
# comment above a block, <!-- needs: ... --> or <!-- run by: tests/FILE::NAME -->, comes before all.
RUN_BY = {
    r"make demo": "test_run.py::test_the_digits_are_learnt",
    r"make test|\.venv/bin/pytest": "needs: the tests themselves",
    r"make docs": "test_docs.py::test_the_site_is_built",
    r"pip install|python3 -m venv": NETWORK,
    r"\. \.venv/bin/activate|source ": SHELL,
    r"sbatch docs/launch/slurm.sh": "test_launch_files.py::test_out_of_time_all_tasks_save_and_the_job_is_requeued",
    r"accelerate launch --config_file docs/launch/(gpu|nodes|fsdp)": GPU,
    r"ACCELERATE_USE_CPU=true torchrun": "test_processes.py::test_two_processes_are_one_and_can_be_resumed_as_one",
    r"ACCELERATE_USE_CPU=true ACCELERATE_USE_FSDP=true": (
        "test_fsdp.py::test_a_run_goes_on_as_one_process_would_which_can_take_over"
    ),
    r"accelerate launch .*doctor=true": (
        "test_doctor.py::test_a_sound_run_is_reported_block_by_block_and_nothing_is_left_behind"
    ),
    r"accelerate launch .*dry_run=true": "test_trainer.py::test_a_rehearsal_does_not_stand_in_the_way_of_the_run",
    r"accelerate launch .*pretrain/run.py": "test_run.py::test_a_run_from_shards_to_export_and_again",
    r"python pretrain/run.py .*--": HERE,
    r"python pretrain/export.py": (
        "test_export_command.py::test_the_command_exports_the_newest_checkpoint_of_a_run_and_says_how"
    ),
    r"python -m data (build|validate|stats|order)": "test_docs.py::test_your_own_data_goes_through_as_the_page_says",
    r"python -m eval (run|compare|report)": (
        "test_evaluate.py::test_the_command_line_gives_the_same_results_and_a_report"
    ),
    r"python examples/finetune_": "test_examples_downstream.py::test_the_score_is_that_of_the_saved_model",
    r"python examples/lora.py": "test_examples_downstream.py::test_lora_learns_little_and_leaves_the_export_as_it_is",
    r"python examples/fill_mask.py": "test_examples_downstream.py::test_a_hidden_word_is_guessed_as_by_the_pipeline",
    r"python examples/zero_shot_pairs.py": "test_examples_downstream.py::test_zero_shot_is_that_of_the_pair_s_logits",
    r"python examples/pipelines.py": (
        "test_examples_downstream.py::test_pipelines_score_an_export_beside_random_weights"
    ),
    r"python examples/zero_shot.py": "test_examples_probing.py::test_zero_shot_on_classes_of_ones_own",
    r"python examples/search.py": "test_examples_probing.py::test_search_by_text_and_by_picture",
    r"python examples/linear_probe.py": "test_examples_probing.py::test_a_linear_probe_of_a_stock_model",
}
# Stands for the recipe of whoever reads: three splits, and a label for what needs one.
RECIPE = {
    "extends": "trimodal_vit_s16",
    "data": {"train": {"photos": {"shards": ["train-*.tar"]}}, "val": ["val-*.tar"], "test": ["test-*.tar"]},
}


class Block(NamedTuple):
    """A fenced block; ``mark`` is the comment above it, without its brackets."""

    page: Path
    line: int
    kind: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines, mark, number = page.read_text().splitlines(), "", 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith("```"))
            yield Block(page, number + 1, line[3:], "\n".join(lines[number + 1 : end]) + "\n", mark)
            number = end
        if line.strip():
            found = re.fullmatch(r"<!-- (.+) -->", line)
            mark = found[1] if found else ""
        number += 1


BLOCKS = [block for page in (README, *DOCS) for block in blocks_of(page)]


def commands_of(block: Block) -> list[str]:
    """Its commands, without comments and joined where they are continued."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [re.sub(r"\s+#\s.*", "", line).strip() for line in joined.splitlines()]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split(" && ")]


COMMANDS = [(block, command) for block in BLOCKS if block.kind == "sh" for command in commands_of(block)]
LAUNCHED = re.compile(r"`((?:accelerate launch|sbatch|[A-Z_]+=\S+ torchrun) [^`]*RECIPE\.yaml[^`]*)`")
COMMANDS += [
    (Block(page, number, "sh", command, ""), command)
    for page in DOCS
    for number, line in enumerate(page.read_text().splitlines(), 1)
    for command in LAUNCHED.findall(line)
]


@cache
def code_names(file: str) -> set[str]:
    """Functions of a test file."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def exists(test: str) -> bool:
    file, _, name = test.removeprefix("tests/").partition("::")
    return (ROOT / "tests" / file).is_file() and name in code_names(file)


def held_by(block: Block, command: str) -> str:
    """A test, or why there is none; empty where nobody said."""
    if block.mark:
        return block.mark
    return next((how for pattern, how in RUN_BY.items() if re.match(pattern, command)), "")


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: the project's folder, with recipes of his own in it."""
    for name in ("pretrain", "docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("my.yaml", "RECIPE.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Blocks


def test_blocks_are_of_known_kinds_and_output_hides_no_commands() -> None:
    assert {block.kind for block in BLOCKS} <= {"sh", "python", "yaml", ""}
    starts = re.compile(r"^(python|accelerate|torchrun|pip|make|sbatch)\b", re.MULTILINE)
    assert [block.name for block in BLOCKS if not block.kind and starts.search(block.text)] == []
    assert len(COMMANDS) > 40


def test_marks_are_reasons_or_tests() -> None:
    for block in BLOCKS:
        what, _, how = block.mark.partition(": ")
        assert not block.mark or (what == "needs" and how) or (what == "run by" and exists(how)), block.name


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    assert [f"{block.name}: {command}" for block, command in COMMANDS if not held_by(block, command)] == []
    for how in RUN_BY.values():
        assert how.startswith("needs: ") or exists(how), how
    for pattern in RUN_BY:
        assert any(re.match(pattern, command) for _, command in COMMANDS) or "examples" in pattern, pattern


@pytest.mark.parametrize("at", range(len(COMMANDS)), ids=lambda at: COMMANDS[at][0].name)
def test_the_programs_know_every_command(at: int, readers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Config] = []
    monkeypatch.setattr(pretrain.run, "run", lambda config, given=None: read.append(config))
    words = [word for word in shlex.split(COMMANDS[at][1]) if word not in ("key=value", "...")]
    words = ["missing.csv" if word.startswith("hf:") else word for word in words]  # the hub is not asked
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    check(words)
    assert all(isinstance(config, Config) for config in read)


def check(words: list[str]) -> None:
    """Fail if a program would not take these words."""
    match words:
        case ["accelerate", "launch", *rest]:
            given = launch_command_parser().parse_args(rest)
            assert given.config_file is None or (ROOT / given.config_file).is_file(), given.config_file
            check(["python", given.training_script, *given.training_script_args])
        case ["torchrun", *rest]:
            ours = torch.distributed.run.get_args_parser().parse_args(rest)
            check(["python", ours.training_script, *ours.training_script_args])
        case ["sbatch", script, *rest]:
            assert (ROOT / script).is_file(), script
            check(["python", "pretrain/run.py", *rest])
        case ["python", "pretrain/run.py", *rest]:
            assert pretrain.run.main(rest) == 0  # reads the recipe; training itself is replaced
        case ["python", "pretrain/export.py", *rest]:
            assert pretrain.export.main(rest) == 2  # nothing there to export; a wrong option would have been the end
        case ["python", "-m", "data", *rest]:
            assert data.__main__.main(rest) == 2
        case ["python", "-m", "eval", *rest]:
            assert eval.__main__.main(rest) == 2
        case ["python", script, *rest] if script.startswith("examples/"):
            text = (ROOT / script).read_text() + (ROOT / "examples" / "few_labels.py").read_text()
            for word in rest:
                assert not word.startswith("--") or f'"{word}"' in text, f"{script} has no {word}"
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", *rest]:
            project = (ROOT / "pyproject.toml").read_text()
            for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
                for name in extra.split(","):
                    assert re.search(rf"^{name} = \[", project, re.MULTILINE), f"no extra {name}"
        case _:
            assert words[0] in (".", ".venv/bin/pytest", "python3"), words


def test_an_option_or_a_setting_that_is_not_there_is_found(
    readers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.run, "run", lambda config, given=None: None)
    for command in (
        "accelerate launch --config_fil x pretrain/run.py my.yaml",
        "accelerate launch --config_file docs/launch/gpu_7.yaml pretrain/run.py my.yaml",
        "accelerate launch pretrain/run.py my.yaml train.stepps=1",
        "python -m data build --form x --out y",
        "python -m eval run x --train a --test b --lable c",
        "python pretrain/export.py a b --onxx",
        "python examples/lora.py a --trian b",
        "make cofee",
        "pip install -e '.[plott]'",
        "rm -rf /",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check(shlex.split(command))


YAML = [block for block in BLOCKS if block.kind == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=lambda block: str(block.name))
def test_recipes_in_the_docs_can_be_read(block: Block, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(block.text)
    trains = "train" in (yaml.safe_load(block.text).get("data") or {})
    lacking = [] if trains else ["data.train=[train-*.tar]"]
    load_config(tmp_path / "shown.yaml", [*lacking, "tokenizer.train=1000"])


PYTHON = [block for block in BLOCKS if block.kind == "python" and not block.mark]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: str(block.name))
def test_python_in_the_docs_runs(block: Block, readers_folder: Path) -> None:
    tree = ast.parse(block.text)
    if any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree)):
        return  # a sketch, with three dots for what the reader is to write
    made = subject()
    for name in ("image", "text"):
        folder = readers_folder / "runs" / "digits" / "export" / name
        folder.mkdir(parents=True)
        FOLDERS[name].write(made, folder)
    digits = readers_folder / "shards" / "digits"
    digits.mkdir(parents=True)
    write_split(digits, "train")
    for name in ("healthy", "fast", "shuffled"):
        run = readers_folder / "runs" / name
        run.mkdir(parents=True)
        names = ("image_text", "masked_image", "rankme/image", "knn/image")
        run.joinpath("metrics.jsonl").write_text(json.dumps({"step": 1} | dict.fromkeys(names, 2.0)) + "\n")
    exec(compile(tree, block.name, "exec"), {"__name__": "__main__"})  # noqa: S102 (our own docs)


def test_marked_python_is_python_too() -> None:
    for block in BLOCKS:
        if block.kind == "python":
            ast.parse(block.text)


# --- Your own data


def test_your_own_data_goes_through_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    import soundfile

    blocks = list(blocks_of(ROOT / "docs" / "own_data.md"))
    listing, table = (block.text for block in blocks if not block.kind)
    (recipe,) = (block.text for block in blocks if block.kind == "yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(recipe)
    (tmp_path / "pets.csv").write_text(table)
    pictures = [f"photos/{name}" for name in re.findall(r"\d+\.\w+", listing)] + re.findall(r"img/\d+\.jpg", table)
    for i, name in enumerate(pictures):
        path, random = tmp_path / name, np.random.default_rng(i)
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".wav":
            soundfile.write(path, tone(0, random), 8000)
        elif path.suffix in (".txt", ".json"):
            path.write_text('{"label": "cat", "site": 3}' if path.suffix == ".json" else "a cat")
        else:
            picture(0, random).save(path)
    ran = []
    for block in blocks:
        for command in commands_of(block) if block.kind == "sh" and not block.mark else ():
            if command.startswith("python -m data "):
                assert data.__main__.main(shlex.split(command)[3:]) == 0, capsys.readouterr()
                ran.append(shlex.split(command)[3])
    assert ran == ["build", "build", "validate", "stats", "order"]
    printed = capsys.readouterr().out
    assert "step 0: " in printed
    assert sorted(path.name for path in tmp_path.glob("shards/*/*.tar")) == ["train-00000.tar"] * 2


# --- What pages say of the code


def test_tests_that_pages_name_are_there() -> None:
    named = {test for page in (README, *DOCS) for test in re.findall(r"test_\w+\.py::\w+", page.read_text())}
    assert len(named) > 40
    assert [test for test in sorted(named) if not exists(test)] == []


def texts_in_the_code() -> Iterator[str]:
    """All string literals, with … for what is filled in."""
    for folder in ("data", "pretrain", "objectives", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\*\*`(.+)`\*\*<br>$", page, re.MULTILINE)
    assert len(messages) == page.count("**<br>") > 40
    texts = list(texts_in_the_code())
    gone = []
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        # Where a message shows no …, none may be hidden in it.
        if not any(found and (found[0].count("…") <= message.count("…")) for found in map(pattern.search, texts)):
            gone.append(message)
    assert gone == []


def test_settings_in_backticks_exist() -> None:
    # A key alone, or with a value.
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    named = re.compile(rf"`((?:{sections})\.[\w.]+)(?:=[^`]*)?`")
    keys = {key for page in (README, *DOCS) for key in named.findall(page.read_text())}
    keys = {key for key in keys if not key.endswith((".py", ".json", ".yaml"))}
    keys.discard("objectives.uniformity.weight")  # of the objective that the docs add
    assert len(keys) > 30
    for key in sorted(keys):
        explain(key)  # raises, and names another one


def test_paths_in_backticks_are_there() -> None:
    known = re.compile(r"`((?:data|pretrain|objectives|eval|tests|examples|benchmarks|docs)/[\w./-]+\.\w+)`")
    for page in (README, *DOCS):
        for name in known.findall(page.read_text()):
            assert (ROOT / name).exists() or name == "objectives/uniformity.py", f"{page.name}: {name}"


# --- The site


def leaves() -> list[str]:
    """All settings that are no sections."""
    keys = list(all_keys(OmegaConf.structured(Config)))
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def test_the_reference_has_every_setting_once_with_its_words() -> None:
    page = reference()
    for key in leaves():
        assert page.count(f"- **`{key}`**") == 1, key
    assert "- **`train.steps`** (int, default `10000`)<br>Optimiser steps in all.\n" in page
    assert "- **`data.train.NAME.weight`** (float or null, default `null`)<br>" in page
    assert "- **`objectives.keep.image`** (float, default `0.5`)<br>" in page  # not its class's, which is 1
    assert "\n### data.views\n" in page
    assert "\n#### data.views.audio\n" in page


def test_plain_text_stays_plain() -> None:
    assert escaped("train-*.tar, a_b <c> [d] `e*_`") == r"train-\*.tar, a\_b \<c> \[d] `e*_`"


def test_the_site_is_built(tmp_path: Path) -> None:
    config = load_mkdocs(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))  # strict: a broken link is an end
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)
    pages = {path.relative_to(tmp_path / "site"): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    made = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in DOCS} | {
        Path("benchmarks.html"), Path("configuration.html"), Path("404.html"),
    }  # fmt: skip
    assert set(pages) == {path.with_name("index.html") if path.name == "README.html" else path for path in made}
    for path, text in pages.items():
        asked = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\"\s>]+)", text)
        assert asked == [], f"{path} asks other hosts"


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (README, ROOT / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_are_small() -> None:
    for path in (ROOT / "docs").rglob("*.png"):
        assert path.stat().st_size < 100_000, path.name
