"""The command, its options, the manifest, the cards, and what is refused when a run begins."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedTokenizerFast

import pretrain.export
import pretrain.exports.folders
from data.batch import Field
from data.errors import UserError
from data.manifest import ManifestError, check, check_folder
from data.text import train_tokenizer
from data.transforms import AudioView, ImageView
from eval.encoders import load_scored
from eval.report import write_results
from objectives.contrastive import ContrastiveConfig
from objectives.pretraining import ObjectivesConfig
from pretrain.cards import About, read_about, versions
from pretrain.config import load_config
from pretrain.export import Exportable, check_exportable, export, find_whole, main, push, read_exportable, sample_of
from pretrain.exports import graphs
from pretrain.exports.folders import FOLDERS, folders_of
from pretrain.exports.place import check_replaceable
from pretrain.exports.subject import ExportError, Subject, resized
from pretrain.exports.verify import make_inputs, random_samples, verify
from pretrain.initial import resize_grid
from pretrain.model.tokenizers import PRESETS, ModelConfig
from pretrain.run import main as run_main
from tests.exported import ALL, learned, samples, subject, write_checkpoint
from tests.tiny import MODEL, VIEWS, open_shards, tiny_encoder, write_recipe, write_split

ROOT = Path(__file__).parents[1]
STREAMS = {name: FOLDERS[name] for name in ("image", "text", "audio")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject]:
    """A run's folder with a checkpoint whose encoder is an average, with results, and with data beside it."""
    folder = tmp_path_factory.mktemp("run")
    write_split(folder, "val")
    made = subject()
    trained = tiny_encoder(made.tokenizer, seed=1)
    checkpoint = write_checkpoint(folder / "run", made.encoder, made.tokenizer, dict(made.objectives), trained)
    out = folder / "run"
    settings = "tokenizer: {train: 300}\neval: {label: null}\n"
    (out / "config.yaml").write_text(f"data: {{root: {folder}, train: [no.tar], val: [val-*.tar]}}\n{settings}")
    (out / "given.yaml").write_text("train: {steps: 7} # given\n")
    digest = sha256(checkpoint / "encoder" / "model.safetensors")
    metrics = {"top1": {"value": 0.625, "interval": [0.5, 0.75]}}
    scores = {"linear/image": {"metrics": metrics, "baselines": {"chance": {"top1": 0.25}}}}
    write_results(out / "eval" / "results.json", scores, {"encoder": {"sha256": digest}})
    return out, made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def exported(run: tuple[Path, Subject], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command as users start it, in a process of its own that starts another one."""
    out = tmp_path_factory.mktemp("out") / "exported"
    command = [sys.executable, str(ROOT / "pretrain" / "export.py"), str(run[0]), str(out), "--licence", "cc-by-4.0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ALL
    assert all(str(out / name) in done.stdout for name in ALL)
    return out


def test_the_command_exports_the_newest_checkpoint_of_a_run_and_says_how(exported: Path) -> None:
    found = check(exported)
    assert found["step"] == 7
    assert found["averaged"]
    assert found["dtype"] == "float32"
    assert found["versions"]["torch"] == torch.__version__
    assert found["verified"]["with"].startswith("4 samples of ")  # real ones
    assert found["verified"]["differences"].keys() == set(ALL)
    assert max(found["verified"]["differences"].values()) < 1e-6
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]


def test_every_card_says_what_where_from_and_how_good(exported: Path, run: tuple[Path, Subject]) -> None:
    for name in ("", *ALL):
        card = (exported / name / "README.md").read_text()
        assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: transformers\n")
        for words in (
            "Steps: 7, an average of the weights",
            "48 in 2 shards, sha256 0123456789abcdef",
            "train: {steps: 7} # given",
            "50.0 .. 75.0",
            "Intended use and limits",
            f"transformers {versions()['transformers']}",
            "checkpoint schema",
        ):
            assert words in card
        assert str(run[0]) not in card  # whose machine it was is nobody's business


@pytest.mark.parametrize("name", ALL)
def test_the_lines_of_a_card_load_it(
    exported: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = re.findall(r"```python\n(.*?)```", (exported / name / "README.md").read_text(), re.DOTALL)
    assert len(lines) == 1
    assert len([line for line in lines[0].splitlines() if line]) <= 8
    (tmp_path / "work").symlink_to(exported)
    for folder in exported.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "picture.jpg")
    soundfile.write(tmp_path / "clip.wav", np.zeros(9000), 16000)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    exec(lines[0], {})  # noqa: S102 (written by ourselves)
    assert capsys.readouterr().out.startswith(("torch.Size([1, ", "tensor([["))


def test_options_make_other_weights_sizes_and_types(run: tuple[Path, Subject], tmp_path: Path) -> None:
    # In this process, which loads faster.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.export, "export", lambda *a, **k: export(*a, **{**k, "fresh": False}))
        patch.setattr(pretrain.exports.folders, "FOLDERS", STREAMS)
        options = ["--image-size", "24", "--audio-seconds", "0.2", "--dtype", "bfloat16", "--no-ema"]
        assert main([str(run[0] / "checkpoints" / "step-00000007"), str(tmp_path / "out"), *options]) == 0
    config, sound = (json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in ("image", "audio"))
    assert (config["image_size"], sound["max_length"]) == (24, 32)
    assert json.loads((tmp_path / "out" / "audio" / "preprocessor_config.json").read_text())["max_length"] == 32
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (manifest["dtype"], manifest["averaged"]) == ("bfloat16", False)
    stored = load_file(tmp_path / "out" / "image" / "model.safetensors")["layernorm.weight"]
    trained = load_file(run[0] / "checkpoints" / "step-00000007" / "trained.safetensors")["norm.all.weight"]
    assert torch.equal(stored, trained.bfloat16())
    assert "Not evaluated." in (tmp_path / "out" / "README.md").read_text()


def test_the_average_is_exported_if_there_is_one_and_must_be_there_if_asked_for(
    run: tuple[Path, Subject], tmp_path: Path
) -> None:
    checkpoint = run[0] / "checkpoints" / "step-00000007"
    name = "norm.all.weight"
    average = read_exportable(checkpoint)
    assert torch.equal(average.encoder.get_parameter(name), run[1].encoder.get_parameter(name))
    assert average.about.averaged
    assert average.about.results is not None
    trained = read_exportable(checkpoint, ema=False)
    assert not torch.equal(trained.encoder.get_parameter(name), run[1].encoder.get_parameter(name))
    assert trained.about.results is None  # they are the average's
    plain = write_checkpoint(tmp_path, run[1].encoder, run[1].tokenizer, dict(run[1].objectives))
    assert not read_exportable(plain).about.averaged
    with pytest.raises(ExportError, match=r"--ema: .*step-00000007 has no average"):
        read_exportable(plain, ema=True)


def test_results_of_other_weights_are_not_on_the_card(run: tuple[Path, Subject], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tiny_encoder(run[1].tokenizer, seed=2), run[1].tokenizer, {})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_bytes((run[0] / "eval" / "results.json").read_bytes())
    assert read_about(checkpoint).results is None
    assert read_about(run[0] / "checkpoints" / "step-00000007").results is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "OUT", "--image-size", "20"], "--image-size 20: allowed are multiples of model.image_patch=8"),
        (["RUN", "OUT", "--audio-seconds", "0"], "--audio-seconds 0.0: allowed is above 0"),
        (["RUN/nowhere", "OUT"], "nowhere: neither a checkpoint"),
        (["RUN", "RUN"], "holds files that are no export (checkpoints, config.yaml, eval): choose another folder"),
        (["RUN", "RUN/config.yaml"], "is no folder"),
        (["--check", "RUN"], "no whole export: there is no export.json"),
        (["RUN", "OUT", "--folders", "imge"], "--folders: 'imge' is unknown; allowed are image, text, "),
        (["RUN", "OUT", "--folders", "image", "embed_txt"], "joint; did you mean embed_text?"),
        (["RUN", "/proc"], "/proc is where a disk is mounted, and can't be replaced: choose a folder in it"),
    ],
)
def test_mistakes_are_one_clear_error(
    run: tuple[Path, Subject],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    words = [word.replace("RUN", str(run[0])).replace("OUT", str(tmp_path / "out")) for word in arguments]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_either_a_source_and_a_folder_or_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["runs/digits"], [], ["a", "b", "--check", "c"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert "give RUN_OR_CHECKPOINT and OUT, or --check EXPORT" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(run: tuple[Path, Subject], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, run[1].encoder, run[1].tokenizer, dict(run[1].objectives))
    for name in ("encoder/config.json", "encoder/tokenizer/tokenizer.json", "objectives.safetensors"):
        path = checkpoint / name
        whole = path.read_bytes()
        for damaged in (
            whole[:-9],
            b"\xff" + whole[1:],
            whole.replace(b'"width"', b'"wedth"').replace(b"lstrip", b"lstriq"),
        ):
            path.write_bytes(damaged)
            if damaged != whole:
                with pytest.raises(UserError, match=r"config\.json|is damaged|can't be loaded"):
                    read_exportable(checkpoint)
        path.write_bytes(whole)
    read_exportable(checkpoint)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_exportable(checkpoint)


def damage(out: Path, kind: str) -> str:
    """Do something to an export; returns what the error should say."""
    weights = out / "embed_text" / "model.safetensors"
    if kind == "a byte":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
        return "embed_text/model.safetensors: damaged"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
        return "embed_text/model.safetensors: damaged"
    if kind == "missing":
        (out / "image" / "preprocessor_config.json").unlink()
        return "image/preprocessor_config.json: missing"
    if kind == "more":
        (out / "joint" / "pytorch_model.bin").write_bytes(b"pickle")
        return "joint/pytorch_model.bin: not of this export"
    manifest = out / "export.json"
    if kind == "half a manifest":
        manifest.write_text(manifest.read_text()[:-20])
        return "export.json is damaged"
    if kind == "a word of the manifest":
        manifest.write_text(manifest.read_text().replace('"bytes"', '"bxtes"', 1))
        return "README.md: damaged"
    if kind == "another schema":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
        return "schema 1"
    manifest.unlink()
    return "no whole export"


@pytest.mark.parametrize(
    "kind",
    ["a byte", "cut", "missing", "more", "half a manifest", "a word of the manifest", "another schema", "no manifest"],
)
def test_an_export_that_is_damaged_or_not_whole_is_known(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(exported, out)
    assert main(["--check", str(out)]) == 0
    assert "files as they were written" in capsys.readouterr().out
    words = damage(out, kind)
    assert main(["--check", str(out)]) == 2
    assert words in capsys.readouterr().err


def test_an_export_replaces_the_earlier_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pretrain.exports.folders, "FOLDERS", {name: FOLDERS[name] for name in ("image", "text", "audio")}
    )
    made, out = subject(), tmp_path / "out"
    for modality in ("image", "text", "audio"):  # as an earlier version left it
        (out / modality).mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "stale.txt"):
            (out / modality / name).write_text("of an earlier export")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "config.json").write_text("of an export that was killed")
    for seed in (0, 1):
        export(tiny_encoder(made.tokenizer, seed), made.tokenizer, out, fresh=False)
        assert not list(out.rglob("stale.txt"))
        check(out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"files that are no export \(notes\.txt\)"):
        export(made.encoder, made.tokenizer, out, fresh=False)
    assert (out / "notes.txt").read_text() == "mine"


def test_what_was_put_into_an_export_is_not_lost(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(exported, out)
    check_replaceable(out)
    (out / "image" / "tuned").mkdir()
    (out / "image" / "tuned" / "model.safetensors").write_text("days of work")
    with pytest.raises(ExportError, match=r"no export \(image/tuned/model\.safetensors\): choose another folder"):
        check_replaceable(out)
    (out / "export.json").write_text("{")  # then nothing is known of what was there
    check_replaceable(out)


def test_hidden_files_that_downloads_come_with_are_no_matter(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(exported, out)
    (out / ".cache" / "huggingface").mkdir(parents=True)
    for path in (out / ".gitattributes", out / ".cache" / "huggingface" / "image.lock"):
        path.write_text("")
    assert check(out) == check(exported)


def test_an_export_goes_where_a_link_leads(tmp_path: Path) -> None:
    made, disk = subject(), tmp_path / "a disk"
    (disk / "large").mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk / "large")
    for _ in range(2):
        export(made.encoder, made.tokenizer, tmp_path / "link", made.objectives, names=["image"], fresh=False)
        assert (tmp_path / "link").is_symlink()
        assert check(disk / "large")["verified"]["differences"].keys() == {"image"}
        assert [path.name for path in disk.iterdir()] == ["large"]


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=r"^\. is the folder that this was started in, .*: choose a folder in it"):
        check_replaceable(Path())


def test_what_would_only_be_made_again_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.exports.folders, "FOLDERS", STREAMS)
    made, out = subject(), tmp_path / "out"
    given = Exportable(made.encoder, made.tokenizer, dict(made.objectives), About("run/step-7", 7))
    assert find_whole(given, out) is None
    written = export(given.encoder, given.tokenizer, out, given.objectives, given.about, fresh=False)
    given.tokenizer(["a", "a low tone"], padding=True, truncation=True, max_length=3)  # which it remembers
    assert find_whole(given, out) == written
    assert find_whole(given, out, ["image"]) is None
    encoder = tiny_encoder(made.tokenizer, seed=1)
    others = [
        given._replace(encoder=encoder),
        given._replace(encoder=resized(given.encoder, audio_seconds=0.1)),
        given._replace(objectives=learned(encoder, seed=1)),
        given._replace(tokenizer=train_tokenizer([], 261)),
        given._replace(about=given.about._replace(results={"linear/image": {}})),
    ]
    assert [find_whole(other, out) for other in others] == [None] * len(others)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.export, "versions", lambda: {"torch": "0"})
        assert find_whole(given, out) is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: b"other code")
        assert find_whole(given, out) is None
    assert find_whole(given, out) == written
    weights = out / "audio" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert find_whole(given, out) is None


def test_a_run_chooses_the_folders_of_its_export(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert load_config(recipe, ["export.folders=[image, joint]"]).export.folders == ["image", "joint"]
    for names, message in (
        ("[]", r"export\.folders: name one at least of image, text"),
        ("[embed_imge]", r"export\.folders: 'embed_imge' is unknown; .*; did you mean embed_image\?"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(recipe, [f"export.folders={names}"])


def test_folders_that_there_will_not_be_are_refused_when_a_run_begins(tmp_path: Path) -> None:
    losses = ObjectivesConfig(contrastive=ContrastiveConfig(weight=0))
    for whole_words in (False, True):
        losses.masked_language.whole_words = whole_words
        check_exportable(MODEL, VIEWS, tmp_path, None, losses, ["text/masked_lm", "joint"])
    for names, message in (
        (["image", "embed_image"], "no embed_image, since the run had no contrastive loss"),
        (["image_text"], "no image_text, since the run had no contrastive loss"),
    ):
        with pytest.raises(ExportError, match=message):
            check_exportable(MODEL, VIEWS, tmp_path, None, losses, names)
    with pytest.raises(ExportError, match="no embed_audio, since the encoder has no audio"):
        check_exportable(MODEL, dataclasses.replace(VIEWS, audio=None), tmp_path, names=["embed_audio"])


def test_a_folder_of_an_export_is_known_as_damaged(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(exported, out)
    (out / "image" / "README.md").touch()
    for name in ("image", "embed_text", "text/masked_lm"):
        check_folder(out / name)
    words = damage(out, "a byte")
    with pytest.raises(ManifestError, match=words):
        check_folder(out / "embed_text")
    with pytest.raises(ManifestError, match=words):
        load_scored(str(out))
    (out / "text" / "masked_lm" / "config.json").unlink()
    with pytest.raises(ManifestError, match=r"text/masked_lm/config\.json: missing"):
        check_folder(out / "text" / "masked_lm")
    check_folder(out / "text")
    (out / "image" / "more.txt").write_text("mine")
    (out / "image" / "README.md").write_text("A better card.")
    check_folder(out / "image")
    check_folder(tmp_path)
    check_folder(Path("google/vit-base"))


def test_a_checkpoint_may_lie_at_the_top_of_all_folders() -> None:
    assert read_about(Path("/no_such_checkpoint")).step is None


def test_other_sizes_of_images_are_interpolated_and_sounds_are_cut(tmp_path: Path) -> None:
    made = subject()
    larger = resized(made.encoder, image_size=32, audio_seconds=0.1)
    assert (larger.views.image, larger.views.audio) == (
        dataclasses.replace(VIEWS.image or ImageView(), size=32),
        dataclasses.replace(VIEWS.audio or AudioView(), frames=16),
    )
    export(made.encoder, made.tokenizer, tmp_path / "same", made.objectives, fresh=False)
    export(larger, made.tokenizer, tmp_path / "other", made.objectives, fresh=False)  # compared with `larger`
    same, other = (AutoModel.from_pretrained(tmp_path / name / "image") for name in ("same", "other"))
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = same(x, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(other(x).last_hidden_state, expected, rtol=0, atol=1e-4)
    positions = made.encoder.get_parameter("tokenizers.audio.positions")
    grid = positions[2:].view(2, 2, -1)  # mels by frames
    cut = larger.get_parameter("tokenizers.audio.positions")
    assert torch.equal(cut, torch.cat([positions[:2], grid[:, :1].flatten(0, 1)]))
    longer = resized(made.encoder, audio_seconds=0.33)  # 33 frames, in whole patches 48
    got = longer.get_parameter("tokenizers.audio.positions")[2:].view(2, 3, -1)
    torch.testing.assert_close(got, resize_grid(grid, (2, 3)))
    assert resized(made.encoder, audio_seconds=1e-9).get_parameter("tokenizers.audio.positions").shape == (2 + 2, 16)
    assert resized(made.encoder) is made.encoder
    assert resized(made.encoder, audio_seconds=0.32).views == made.encoder.views


def test_what_is_at_hand_is_what_an_export_is_compared_with(tmp_path: Path) -> None:
    write_split(tmp_path, "val")
    found = sample_of([open_shards([tmp_path / "val-*.tar"])], VIEWS)
    assert found is not None
    assert {name: len(values) for name, values in found.values.items()} == {"image": 4, "text": 4, "audio": 4}
    assert "low" in found.values["text"][0]
    for shard in tmp_path.glob("val-*.tar"):
        shard.write_bytes(b"")
    assert sample_of([], VIEWS) is None


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("sharing", ["all", "ffn", "none"])
def test_whatever_training_allows_can_be_exported(tmp_path: Path, preset: str | None, sharing: str) -> None:
    shape = PRESETS[preset] if preset else {"width": 30, "depth": 1, "heads": 5, "embed_dim": 1, "mlp_ratio": 0.1}
    config: Any = ModelConfig(sharing=sharing, **shape)
    check_exportable(config, type(VIEWS)(), tmp_path / "export")


def test_a_tokenizer_that_changes_when_it_is_saved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = subject()
    made.tokenizer.save_pretrained(tmp_path / "good")
    check_exportable(MODEL, VIEWS, tmp_path / "export", str(tmp_path / "good"))
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / "good")
    other.backend_tokenizer.post_processor = None
    saved = type("Saved", (), {"from_pretrained": staticmethod(lambda _: other)})
    monkeypatch.setattr(pretrain.export, "PreTrainedTokenizerFast", saved)
    with pytest.raises(ExportError, match=r"tokenizer\.name=.*good can't be exported: for 'a' it makes \[0, "):
        check_exportable(MODEL, VIEWS, tmp_path / "export", str(tmp_path / "good"))


def test_what_no_stock_model_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(_: Subject) -> Any:
        raise ValueError("heads must be a prime")

    monkeypatch.setattr(
        pretrain.export, "FOLDERS", {**FOLDERS, "embed_audio": FOLDERS["embed_audio"]._replace(build=no)}
    )
    with pytest.raises(ExportError, match=r"embed_audio: no stock model takes .* heads must be a prime"):
        check_exportable(MODEL, VIEWS, tmp_path)
    monkeypatch.setattr(pretrain.export, "FOLDERS", {"text": FOLDERS["text"]})
    with pytest.raises(ExportError, match=r"data\.views\.image: no stock model reads it; allowed are image, text"):
        check_exportable(MODEL, VIEWS, tmp_path)


class FakeHub:
    """Remembers what it is asked to do."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self) -> None:
        FakeHub.calls = []

    def create_repo(self, repo: str, **settings: Any) -> str:
        if "/" not in repo:
            raise HFValidationError("a name needs an owner")
        self.calls.append(("create_repo", settings))
        return f"https://hub/{repo}"

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload_folder", settings))


def test_a_whole_export_is_pushed_to_a_private_repository(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.export, "HfApi", FakeHub)
    assert push(exported, "me/encoder") == "https://hub/me/encoder"
    (_, made), (_, sent) = FakeHub.calls
    assert made == {"private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/encoder", exported)
    assert {"image/*", "text/*", "onnx/*"} < set(sent["delete_patterns"])  # nothing of an earlier one is left over
    with pytest.raises(ExportError, match=r"--push-to-hub encoder: a name needs an owner; the export is in"):
        push(exported, "encoder")
    with pytest.raises(ManifestError, match="no whole export"):
        push(tmp_path, "me/encoder")
    assert FakeHub.calls == []
    monkeypatch.setattr(pretrain.export, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with pytest.raises(ExportError, match=r"--push-to-hub me/encoder: .*refused"):
        push(exported, "me/encoder")


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(pretrain.export, "write_manifest", full)
    monkeypatch.setattr(pretrain.exports.folders, "FOLDERS", STREAMS)
    made = subject()
    with pytest.raises(ExportError, match=r"out could not be written: .*No space left"):
        export(made.encoder, made.tokenizer, tmp_path / "out", fresh=False)
    assert list(tmp_path.iterdir()) == []


def test_onnx_graphs_give_the_same_for_any_number_of_samples_and_tokens(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = subject()
    inputs = make_inputs(VIEWS, made.tokenizer, samples())
    found = graphs.write_onnx(made, tmp_path, inputs)
    assert found.keys() == {"image", "text", "audio"}
    assert max(found.values()) < 1e-4
    for name in found:
        (opset,) = (each.version for each in onnx.load(tmp_path / f"{name}.onnx").opset_import if not each.domain)
        assert opset == graphs.OPSET
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx")
    for ids in (torch.tensor([[0, 9, 8, 2]]), torch.tensor([[0, 7, 2, 1, 1]] * 6)):
        got = session.run(None, {"input_ids": ids.numpy(), "attention_mask": (ids != 1).long().numpy()})
        with torch.inference_mode():
            features, embeddings = made.encoder("text", Field(ids, torch.arange(len(ids)), ids != 1))
            expected = (made.encoder.encode("text", Field(ids, torch.arange(len(ids)), ids != 1)), features, embeddings)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=1e-4)


def test_onnx_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxscript" else name)
    made = subject()
    with pytest.raises(ExportError, match=r"--onnx needs onnxscript: pip install -e '\.\[onnx\]'"):
        export(made.encoder, made.tokenizer, tmp_path / "out", onnx=True, fresh=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_older_release_loads_every_folder_and_gives_the_same(exported: Path, run: tuple[Path, Subject]) -> None:
    """transformers 4.57.1, the last but one of 4.x, from a folder of its own; torch and the rest are this one's."""
    old = exported.parent / "old"
    packages = ["transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub==0.36.0", "requests==2.32.5"]
    packages += ["urllib3==2.5.0", "charset_normalizer==3.4.4", "certifi"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(old), *packages]
    if subprocess.run(install, check=False, capture_output=True, timeout=600).returncode != 0:
        pytest.skip("the older release can't be installed here")
    made = run[1]
    for sample in (samples(), random_samples(VIEWS)):
        environment = {"PYTHONPATH": str(old), "PATH": os.environ["PATH"]}
        found = verify(made, exported, folders_of(made), sample, environment=environment)
        assert found.keys() == set(ALL)
        assert max(found.values()) < 1e-6


def test_a_checkpoint_learned_with_the_sigmoid_loss_is_read_whole(tmp_path: Path) -> None:
    made = subject()
    objectives = learned(made.encoder, sigmoid=True)
    read = read_exportable(write_checkpoint(tmp_path, made.encoder, made.tokenizer, objectives))
    given = Subject(read.encoder, read.tokenizer, read.objectives)
    bias = given.bias("image_text")
    assert bias is not None
    assert bias.shape == ()
    assert bias.item() == objectives["contrastive.bias.image_text"].item()
    assert given.pairs == ["image_text", "image_audio", "text_audio"]


def test_a_run_does_not_begin_with_a_damaged_export(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(exported, out)
    weights = out / "image" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # it would load, without a word
    weights.write_bytes(content)
    assert run_main([str(write_recipe(tmp_path)), f"init_from.image={out / 'image'}"]) == 2
    assert "copy: not the export that was written:\n  image/model.safetensors: damaged" in capsys.readouterr().err
