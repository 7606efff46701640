"""Outsiders' interfaces give the encoder's own numbers; their packages drive them where they are installed."""

import importlib.util
import pickle
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from data.decode import Waveform
from data.errors import UserError
from data.transforms import make_field
from eval.adapters import clip, hear
from eval.adapters.inputs import Inputs, embed_pictures
from eval.adapters.mteb import MtebEncoder
from eval.encoders import Pretrained, load_scored
from eval.retrieval import pair_positives, retrieve
from eval.scored import EncoderError, Scored
from eval.zeroshot import class_embeddings, unit_rows
from pretrain.export import export
from tests.exported import learned
from tests.tiny import picture, tiny_encoder, tiny_tokenizer, tone

WINDOW = 400 + 31 * 160  # samples under the 32 frames of the tiny encoder
HOP = 32 * 160  # from one window to the next: patches of 16 frames don't overlap
TEXTS = ["high", "one middle tone, played on an organ", "", "a low tone"]


@pytest.fixture(scope="module")
def run() -> Pretrained:
    """As of a run's checkpoint."""
    tokenizer = tiny_tokenizer()
    return Pretrained("run", tiny_encoder(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def exported(run: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of that encoder. Only read by tests."""
    out = tmp_path_factory.mktemp("adapters") / "exported"
    assert run.tokenizer is not None
    export(run.encoder, run.tokenizer, out, learned(run.encoder), fresh=False)
    return out


@pytest.fixture(scope="module")
def scored(exported: Path) -> Scored:
    return load_scored(str(exported))


@pytest.fixture(scope="module")
def heard(exported: Path) -> hear.HearModel:
    return hear.load_model(str(exported))


def sounds(samples: int, count: int = 3) -> Tensor:
    """(count, samples) float32 of whole 1/32768ths."""
    made = [tone(i % 3, np.random.default_rng(i), 16000, samples / 16000 + 0.01)[:samples] for i in range(count)]
    return torch.from_numpy(np.stack(made).astype(np.float32) / 32768)


def pooled(scored: Scored, audio: Tensor) -> Tensor:
    """As evaluation reads files of int16."""
    view = scored.views.audio
    assert view is not None
    waveforms = [Waveform(np.asarray(sound * 32768).astype(np.int16), 16000) for sound in audio]
    tokenizer: Any = None
    field = view.on_device()(make_field(view, waveforms, tokenizer))
    return scored.encode("audio", field).features[-1, "default"]


@pytest.mark.parametrize("samples", [800, 4000, WINDOW])
def test_a_scene_is_the_pooled_feature(samples: int, heard: hear.HearModel, scored: Scored) -> None:
    audio = sounds(samples)
    found = hear.get_scene_embeddings(audio, heard)
    assert found.dtype == torch.float32
    assert found.shape == (3, heard.scene_embedding_size)
    assert torch.equal(found, pooled(scored, audio))


def test_a_longer_scene_is_the_mean_of_windows_by_what_they_hear(heard: hear.HearModel, scored: Scored) -> None:
    audio = sounds(2 * HOP + 2000)  # of the third window the first patch alone has its centre, at 1400, in the sound
    first, second, third = (pooled(scored, audio[:, i * HOP : i * HOP + WINDOW]) for i in range(3))
    expected = (2 * first + 2 * second + third) / 5
    assert (hear.get_scene_embeddings(audio, heard) - expected).abs().max() < 1e-6
    assert (expected - first).abs().max() > 1e-2
    rest = audio[:, : 2 * HOP + 1400]
    assert (hear.get_scene_embeddings(rest, heard) - (first + second) / 2).abs().max() < 1e-6


def test_timestamps_are_centres_of_patches_in_milliseconds(heard: hear.HearModel) -> None:
    for samples, count in ((100, 1), (2560 + 1400, 1), (2560 + 1401, 2), (WINDOW, 2), (16000, 6)):
        embeddings, times = hear.get_timestamp_embeddings(sounds(samples), heard)
        assert embeddings.shape == (3, count, heard.timestamp_embedding_size)
        assert embeddings.dtype == times.dtype == torch.float32
        assert times.tolist() == [[87.5 + 160 * i for i in range(count)]] * 3
        assert count == 1 or times.max() <= samples / 16


def test_timestamp_embeddings_are_states_of_the_stock_model(heard: hear.HearModel, exported: Path) -> None:
    audio = sounds(3 * HOP)
    found, _ = hear.get_timestamp_embeddings(audio, heard)
    model = AutoModel.from_pretrained(exported / "audio").eval()
    extractor = AutoFeatureExtractor.from_pretrained(exported / "audio")
    for window in range(3):
        part = audio[:, window * HOP : window * HOP + WINDOW].numpy()
        inputs = extractor(list(part), sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state[:, 2:]
        low, high = states[:, :2], states[:, 2:]  # of either band two patches in time
        for place in range(2):
            expected = (low[:, place] + high[:, place]) / 2
            assert (found[:, 2 * window + place] - expected).abs().max() < 1e-3  # its log-mel is in float32


def test_patches_that_overlap_go_on_in_the_next_window(tmp_path: Path) -> None:
    config = ASTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_length=40,
        num_mel_bins=32, patch_size=8, time_stride=6, frequency_stride=6,
    )  # fmt: skip
    torch.manual_seed(0)
    ASTModel(config).save_pretrained(tmp_path)
    ASTFeatureExtractor(num_mel_bins=32, max_length=40).save_pretrained(tmp_path)
    model = hear.load_model(str(tmp_path))
    audio = sounds(16000)
    found, times = hear.get_timestamp_embeddings(audio, model)
    assert times[0].tolist() == [47.5 + 60 * i for i in range(16)]
    second, _ = hear.get_timestamp_embeddings(audio[:, 36 * 160 :], model)  # a window has 6 patches of 6 frames each
    assert (found[:, 6:] - second).abs().max() < 1e-6
    assert (found[:, 6:12] - found[:, :6]).abs().max() > 1e-3


def test_hear_takes_any_batch_size_and_runs_too(heard: hear.HearModel, run: Pretrained) -> None:
    audio = sounds(HOP + 3000, count=5)
    same = hear.HearModel(run)
    for function in (hear.get_scene_embeddings, lambda *given: hear.get_timestamp_embeddings(*given)[0]):
        together = function(audio, heard)
        alone = torch.cat([function(audio[i : i + 1], heard) for i in range(5)])
        assert (together - alone).abs().max() < 1e-5
        assert (together - function(audio, same)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (torch.zeros(16000), r"\(n_sounds, n_samples\) float, got \(16000,\)"),
        (torch.zeros(2, 16000, dtype=torch.int16), "got .* torch.int16"),
        (torch.zeros(2, 0), r"got \(2, 0\)"),
        (torch.full((1, 800), torch.nan), "must be finite"),
    ],
)
def test_sound_that_hear_would_not_give(audio: Tensor, words: str, heard: hear.HearModel) -> None:
    for function in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        with pytest.raises(ValueError, match=words):
            function(audio, heard)


def test_models_that_are_none_for_hear(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="give --model"):
        hear.load_model()
    with pytest.raises(EncoderError, match="reads no audio; allowed are text"):
        hear.load_model(str(exported / "text"))
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_kernel=(10,), conv_stride=(5,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="sees no spectrogram in patches"):
        hear.load_model(str(tmp_path))


def test_hears_own_validator(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorflow") is None:  # the validator asks it only whether the model is one of its own
        stub: Any = types.ModuleType("tensorflow")
        stub.Module, stub.__spec__ = type("Module", (), {}), ModuleSpec("tensorflow", None)
        monkeypatch.setitem(sys.modules, "tensorflow", stub)
    validate = pytest.importorskip("hearvalidator.validate")
    with pytest.warns(UserWarning, match="less than or equal to 50ms"):
        validate.ValidateModel("eval.adapters.hear", str(exported), device="cpu")()


def loader(texts: list[str], batch_size: int = 2) -> Any:
    """As mteb makes them: each batch a dict of columns."""
    return [{"text": texts[i : i + batch_size]} for i in range(0, len(texts), batch_size)]


def test_mteb_gets_embeddings_of_an_export_and_features_of_a_stream(exported: Path, scored: Scored) -> None:
    field = Inputs(scored).field("text", TEXTS)
    both = scored.encode("text", field)
    settings: dict[str, Any] = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "prompt_type": None}
    for name, expected in ((exported, both.embeddings), (exported / "text", both.features[-1, "default"])):
        encoder = MtebEncoder(str(name), None, device="cpu")
        assert expected is not None
        found = encoder.encode(loader(TEXTS, 4), **settings, batch_size=32, show_progress_bar=False)
        assert found.dtype == np.float32
        assert found.shape == (4, encoder.embed_dim)
        assert np.array_equal(found, expected.numpy())
        for batch_size in (1, 3):  # they are padded to other lengths
            assert np.abs(encoder.encode(loader(TEXTS, batch_size), **settings) - found).max() < 1e-5
        assert encoder.encode([], **settings).shape == (0, encoder.embed_dim)


def test_mteb_compares_by_cosine(exported: Path) -> None:
    encoder = MtebEncoder(str(exported))
    a, b = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [-5.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[1, -1, 0.5**0.5], [0, 0, 0.5**0.5]])
    assert (encoder.similarity(a, b) - expected).abs().max() < 1e-6
    assert (encoder.similarity(a[0], b) - expected[:1]).abs().max() < 1e-6
    assert (encoder.similarity_pairwise(a, b[:2]) - torch.tensor([1.0, 0.0])).abs().max() < 1e-6


def test_what_mteb_can_not_have(exported: Path) -> None:
    encoder = MtebEncoder(str(exported))
    with pytest.raises(EncoderError, match="inputs of image, label; allowed is text"):
        encoder.encode([{"image": [], "label": []}])
    with pytest.raises(EncoderError, match="precision=int8: allowed is float32"):
        encoder.encode(loader(TEXTS), precision="int8")
    with pytest.raises(EncoderError, match="reads no text; allowed are image"):
        MtebEncoder(str(exported / "image"))


def test_mteb_keeps_results_of_other_weights_apart(exported: Path) -> None:
    trained, untrained = MtebEncoder(str(exported)), MtebEncoder(f"random:{exported}")
    assert trained.revision == MtebEncoder(str(exported)).revision != untrained.revision
    assert MtebEncoder(str(exported), "mine").revision == "mine"


def test_mtebs_own_tasks(exported: Path, tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb")
    tasks = importlib.import_module("mteb.mocks").ALL_MOCK_TASK_TEST_GRID
    names = {"MockSTSTask", "MockRetrievalTask", "MockClassificationTask", "MockPairClassificationTask"}
    encoder = MtebEncoder(str(exported))
    assert isinstance(encoder, mteb.EncoderProtocol)
    cache = mteb.ResultCache(tmp_path)
    found = mteb.evaluate(encoder, [task for task in tasks if task.metadata.name in names], cache=cache)
    assert {result.task_name for result in found.task_results} == names
    assert found.model_revision == encoder.revision
    assert found.model_name.startswith("triptych/")
    assert list(tmp_path.rglob(f"{encoder.revision}/MockSTSTask.json"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(label % 3, np.random.default_rng(label)) for label in range(6)]


def test_clip_gives_the_encoders_embeddings(exported: Path, scored: Scored, pictures: list[Image.Image]) -> None:
    model, transform, tokenizer = clip.load(model_name="mine", pretrained=str(exported), cache_dir=None, device="cpu")
    inputs = Inputs(scored)
    batch = next(iter(DataLoader([transform(each) for each in pictures], batch_size=6)))  # type: ignore[arg-type]
    assert batch.shape == (6, 3, 16, 16)
    assert batch.dtype == torch.float32
    expected = {
        "image": inputs.embeddings("image", [np.asarray(each) for each in pictures]),
        "text": inputs.embeddings("text", TEXTS),
    }
    found = {"image": model.eval().encode_image(batch), "text": model.encode_text(tokenizer(TEXTS).to("cpu"))}
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).abs().max() < 1e-5
    assert torch.equal(found["text"], expected["text"])
    assert (model.encode_text(tokenizer(TEXTS[0])) - expected["text"][:1]).abs().max() < 1e-5
    units = model.encode_image(batch, normalize=True)
    assert (units - expected["image"] / expected["image"].norm(dim=1, keepdim=True)).abs().max() < 1e-6
    alone = torch.cat([model.encode_image(batch[i : i + 1]) for i in range(6)])
    assert (alone - found["image"]).abs().max() < 1e-5
    # Workers get a copy of the transform, which must not hold the model.
    assert len(pickle.dumps(transform)) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(transform))(pictures[0]), batch[0])  # noqa: S301


def test_clip_gives_what_the_dual_encoder_of_the_export_gives(exported: Path, pictures: list[Image.Image]) -> None:
    model, transform, tokenizer = clip.load(pretrained=str(exported))
    stock: Any = AutoModel.from_pretrained(exported / "image_text").eval()
    pixels = AutoImageProcessor.from_pretrained(exported / "image_text")(pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(exported / "image_text")(
        TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = stock(**pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    images = model.encode_image(torch.stack([transform(each) for each in pictures]), normalize=True)
    assert (images - outputs.image_embeds).abs().max() < 1e-5
    assert (model.encode_text(tokenizer(TEXTS), normalize=True) - outputs.text_embeds).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [("image", "reads image; image and text are needed"), ("nowhere", "neither a run")],
)
def test_clip_needs_both(name: str, words: str, exported: Path) -> None:
    with pytest.raises(EncoderError, match=words):
        clip.load(pretrained=str(exported / name))


def test_clip_needs_a_space_of_both(exported: Path, tmp_path: Path) -> None:
    for name in ("image", "text"):
        (tmp_path / name).symlink_to(exported / name)
    with pytest.raises(EncoderError, match="has no embeddings of image; allowed are a run, an export with a folder"):
        clip.load(pretrained=str(tmp_path))


def test_clip_benchmarks_own_functions(exported: Path, scored: Scored, pictures: list[Image.Image]) -> None:
    zero_shot = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    retrieval = importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")
    model, transform, tokenizer = clip.load(pretrained=str(exported))
    images = [transform(each) for each in pictures]
    names, templates = ["low", "middle", "high"], ["a {c} tone", "one {c} tone"]
    weights = zero_shot.zero_shot_classifier(model, tokenizer, names, templates, "cpu", amp=False)
    rows: Any = [(image, i % 3) for i, image in enumerate(images)]
    logits, target = zero_shot.run_classification(model, weights, DataLoader(rows, batch_size=4), "cpu", amp=False)
    inputs = Inputs(scored)
    classes = class_embeddings([inputs.embeddings("text", [t.format(c=name) for t in templates]) for name in names])
    embeddings = inputs.embeddings("image", [np.asarray(each) for each in pictures])
    assert (logits / 100 - unit_rows(embeddings, "images") @ classes.T).abs().max() < 1e-5
    assert target.tolist() == [0, 1, 2, 0, 1, 2]

    captions = [f"a {names[i % 3]} tone" if i < 3 else f"one {names[i % 3]} tone" for i in range(6)]
    pairs: Any = [(image, [caption]) for image, caption in zip(images, captions, strict=True)]
    batches: DataLoader[Any] = DataLoader(
        pairs, 4, collate_fn=lambda rows: (torch.stack([row[0] for row in rows]), [row[1] for row in rows])
    )
    recall = retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 2, 6])
    places = torch.arange(6)
    ours = retrieve(inputs.embeddings("text", captions), embeddings, pair_positives(places, places), ks=(1, 2, 6))
    for k, share in ours.recall.items():
        assert recall[f"image_retrieval_recall@{k}"] == pytest.approx(share)


def test_clip_benchmark_knows_the_loader(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: Any = types.ModuleType("clip_benchmark.models")
    models.TYPE2FUNC, models.MODEL_TYPES = {"open_clip": None}, ["open_clip"]
    cli: Any = types.ModuleType("clip_benchmark.cli")
    cli.main = lambda: models.TYPE2FUNC["triptych"](
        model_name="mine", pretrained=str(exported / "audio"), cache_dir=None, device="cpu"
    )
    for module in (models, cli):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert clip.register() is clip.register() is cli
    assert models.MODEL_TYPES == ["open_clip", "triptych"]
    assert clip.main() == 2


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", None)
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    assert clip.main() == 2
    assert "clip_benchmark.models needs clip_benchmark" in capsys.readouterr().err


def test_a_folder_of_pictures(
    tmp_path: Path, scored: Scored, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "below").mkdir()
    names = ["a.png", "below/b.PNG", "below/c.webp", "d.png", "e.png"]
    for name, image in zip(names, pictures, strict=False):
        image.save(tmp_path / name, lossless=True)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    inputs = Inputs(scored)
    paths, embeddings = embed_pictures(inputs, tmp_path, batch_size=2)
    assert [str(path.relative_to(tmp_path)) for path in paths] == names
    expected = inputs.embeddings("image", [np.asarray(each) for each in pictures[:5]])
    assert (embeddings - expected).abs().max() < 1e-5
    assert "broken.jpg: left out: image of 10 bytes" in capsys.readouterr().err
    for folder in (tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="no picture below it that can be read; allowed are "):
            embed_pictures(inputs, folder)
