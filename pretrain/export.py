"""The encoder as `transformers` models: a folder per use, each loaded back and compared before it gets its name.

    python pretrain/export.py runs/digits exported                    # the run's newest checkpoint, or a checkpoint
    python pretrain/export.py runs/digits exported --image-size 64 --audio-seconds 2 --dtype bfloat16 --onnx
    python pretrain/export.py runs/digits exported --folders image text       # each has weights of its own
    python pretrain/export.py --check exported                        # is it still what was written?

image/ text/ audio/ are the streams, embed_image/ embed_text/ embed_audio/ give their contrastive embeddings,
image_text/ compares pictures and captions as CLIP does, text/masked_lm/ fills gaps, joint/ reads several modalities as
one sequence with code of its own; README.md in each says what it is and has the lines that load it.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # whichever release of it that is
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from data.errors import UserError
from data.manifest import ManifestError, check, write_manifest
from data.source import Source
from data.stream import open_split, open_train
from data.text import load_tokenizer, train_tokenizer
from data.transforms import Views
from eval.scored import digest, tensors_digest, tokenizer_digest
from objectives.pretraining import ObjectivesConfig, Pretraining
from pretrain.cards import LICENCE, About, card, overview, read_about, versions
from pretrain.checkpoint import find_checkpoint, load_encoder
from pretrain.config import load_config
from pretrain.exports.folders import FOLDERS, INPUTS, check_names, folders_of
from pretrain.exports.graphs import check_onnx, write_onnx
from pretrain.exports.place import BESIDE, check_replaceable
from pretrain.exports.streams import save_tokenizer
from pretrain.exports.subject import ExportError, Subject, resized, rounded
from pretrain.exports.verify import TEXTS, Sample, make_inputs, random_samples, real_samples, verify
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import ModelConfig, Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Exportable(NamedTuple):
    """What a checkpoint has to export.

    Attributes:
        encoder: on the CPU, in evaluation mode.
        tokenizer: of its texts.
        objectives: what the objectives learned beside it.
        about: where it comes from.
    """

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    objectives: dict[str, Tensor]
    about: About


def export(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    objectives: Mapping[str, Tensor] | None = None,
    about: About | None = None,
    *,
    sample: Sample | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    onnx: bool = False,
    fresh: bool = True,
) -> dict[str, Path]:
    """Write a folder per use of the encoder, verify all, and only then let them take the place of earlier ones.

    Args:
        encoder: on the CPU.
        tokenizer: saved beside the models that read text.
        out: absent, empty, or an earlier export.
        objectives: what the objectives learned, by the names of objectives.safetensors. Without the contrastive loss'
            there are no embeddings, without the masked-language loss' no masked_lm.
        about: where the encoder comes from, for the cards.
        sample: raw samples to compare with; None: random ones.
        names: of the folders, which bring those that they need; None: all that there can be.
        dtype: in which weights are saved.
        onnx: write graphs for ONNX, too.
        fresh: verify in a process of its own, which takes seconds to start.

    Returns:
        name -> folder, such as ``embed_text``; the streams come first.

    Raises:
        ExportError: ``out`` holds anything but an earlier export, a folder that there can't be is named, or something
            that was saved gives anything else than the encoder; nothing of it remains, and what was there is as it was.
    """
    check_replaceable(out)
    if onnx:
        check_onnx()
    about = about or About()
    subject = rounded(Subject(encoder.eval(), tokenizer, dict(objectives or {})), dtype)
    sample = sample or random_samples(encoder.views)
    folders = folders_of(subject, names)
    place = out.resolve()  # behind links, which remain
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, folder in folders.items():
            (partial / name).mkdir(parents=True, exist_ok=True)
            folder.write(subject, partial / name)
        differences = verify(subject, partial, folders, sample, fresh=fresh)
        graphs: dict[str, float] = {}
        if onnx:
            (partial / "onnx").mkdir()
            streams = [each for each in subject.modalities if any(each in name or name == "joint" for name in folders)]
            inputs = make_inputs(encoder.views, tokenizer, sample)
            graphs = write_onnx(subject, partial / "onnx", inputs, streams)
        for name in folders:
            (partial / name / "README.md").write_text(card(name, subject, about, differences, sample.origin))
        (partial / "README.md").write_text(overview(subject, about, differences, graphs))
        described = {
            "source": _source(subject, about, list(folders)),
            "checkpoint": about.checkpoint,
            "step": about.step,
            "dtype": str(dtype).removeprefix("torch."),
            "averaged": about.averaged,
            "versions": versions(),
            "verified": {"with": sample.origin, "differences": differences, "onnx": graphs},
        }
        write_manifest(partial, described)
        _replace(place, partial)
    except SafetensorError as error:  # such as a full disk
        raise ExportError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {name: out / name for name in folders}


def _replace(out: Path, partial: Path) -> None:
    """Give what is whole its name; what had it goes away after that."""
    old = out.with_name(f".{out.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def find_whole(given: Exportable, out: Path, names: Sequence[str] | None = None) -> dict[str, Path] | None:
    """The folders of an export that `export` would only make again, or None where there is none that is whole.

    Args:
        given: what would be exported, in float32.
        out: where the export would be.
        names: of the folders, as for `export`.

    Raises:
        ExportError: one is named that there can't be.
    """
    subject = Subject(given.encoder, given.tokenizer, given.objectives)
    folders = list(folders_of(subject, names))
    try:
        same = check(out).get("source") == _source(subject, given.about, folders)
    except ManifestError:
        return None
    return {name: out / name for name in folders} if same else None


def _source(subject: Subject, about: About, folders: Sequence[str]) -> str:
    """Hex sha256 of all that decides what an export of these folders consists of, its code included."""
    encoder, here = subject.encoder, Path(__file__).parent
    code = [path for folder in ("exports", "model") for path in sorted((here / folder).glob("*.py"))]
    code += [
        here / name for name in ("cards.py", "export.py", "stock.py", "../data/transforms.py", "../eval/report.py")
    ]
    return digest(
        {
            "weights": [tensors_digest(encoder.state_dict()), tensors_digest(subject.objectives), str(subject.dtype)],
            "sizes": [asdict(encoder.config), asdict(encoder.views), encoder.vocabulary],
            "tokenizer": tokenizer_digest(subject.tokenizer),
            "cards": about,
            "folders": folders,
            "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
            "versions": versions(),
        }
    )


def check_exportable(
    config: ModelConfig,
    views: Views,
    out: Path,
    tokenizer: str | None = None,
    objectives: ObjectivesConfig | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse, before a run begins, what could not be exported at its end.

    The stock models are built and filled without memory, so that what they don't take shows.

    Args:
        config: of the encoder.
        views: of its modalities.
        out: where the export is going to be.
        tokenizer: name of the tokenizer, if it is not going to be trained.
        objectives: from what the encoder is going to learn; None: the default ones.
        names: of the folders, as for `export`.

    Raises:
        ExportError: a modality that no stock class reads, a shape that it does not take, a tokenizer that makes other
            ids once it is saved, a folder that holds something else, or names of folders that there won't be.
        UserError: sizes that patches don't divide, or a tokenizer that can't be used.
    """
    check_replaceable(out)
    if odd := [name for name in views.used if name not in FOLDERS]:
        raise ExportError(f"data.views.{odd[0]}: no stock model reads it; allowed are {', '.join(INPUTS)}")
    reads = train_tokenizer([], 261) if tokenizer is None else load_tokenizer(tokenizer)
    special = tuple(sorted(reads.all_special_ids))
    with torch.device("meta"):
        encoder = Encoder(config, views, Vocabulary(len(reads), reads.pad_token_id, reads.mask_token_id, special))
        everything = torch.ones(len(reads), dtype=torch.bool)  # which tokens continue a word is no matter here
        learned = Pretraining(encoder, objectives or ObjectivesConfig(), everything).objectives.state_dict()
        subject = Subject(encoder, reads, learned)
        folders_of(subject, names)
        for modality in views.used:
            for name in (modality, f"embed_{modality}"):
                try:
                    FOLDERS[name].build(subject)
                except (ValueError, TypeError, RuntimeError) as error:  # of configs, and of tensors of other shapes
                    raise ExportError(f"{name}: no stock model takes the shape of this encoder: {error}") from error
    if tokenizer is not None and "text" in views.used:
        _check_tokenizer(subject, tokenizer)


def _check_tokenizer(subject: Subject, name: str) -> None:
    """Raises ExportError where the saved tokenizer makes other ids."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(subject, Path(folder))
        saved = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in (*TEXTS, f"a {subject.tokenizer.mask_token} caption"):
        ours, theirs = (each(text)["input_ids"] for each in (subject.tokenizer, saved))
        if ours != theirs:
            raise ExportError(
                f"tokenizer.name={name} can't be exported: for {text!r} it makes {ours}, and saved as a "
                f"PreTrainedTokenizerFast {theirs}"
            )


def read_exportable(
    checkpoint: Path, *, ema: bool | None = None, evaluated: bool = True, licence: str = LICENCE
) -> Exportable:
    """What a checkpoint has to export.

    Args:
        checkpoint: its folder.
        ema: True: the average of the weights, which the checkpoint must have; False: the weights themselves; None: the
            average if there is one, as evaluation does.
        evaluated: whether it is going to be exported as it was evaluated.
        licence: of the weights.

    Raises:
        ExportError: there is no average.
        FileNotFoundError: a file of the checkpoint is missing.
        UserError: its tensors don't fit its config, or a file is damaged.
    """
    trained = checkpoint / "trained.safetensors"
    if ema and not trained.exists():
        raise ExportError(f"--ema: {checkpoint} has no average of its weights; train.ema makes one")
    averaged = trained.exists() and ema is not False
    try:
        encoder, tokenizer = load_encoder(checkpoint)
        objectives = load_file(checkpoint / "objectives.safetensors")
        if trained.exists() and not averaged:
            encoder.load_state_dict(load_file(trained))
    except UserError:  # which says more
        raise
    except (RuntimeError, ValueError, KeyError, OmegaConfBaseException, SafetensorError) as error:
        raise ExportError(f"{checkpoint} is damaged: {error}") from error
    same = evaluated and averaged == trained.exists()
    about = read_about(checkpoint, averaged=averaged, evaluated=same, licence=licence)
    return Exportable(encoder, tokenizer, objectives, about)


def sample_of(sources: Iterable[Source], views: Views) -> Sample | None:
    """A few samples with all modalities from the first source that has them; None where none has, or can be read."""
    for source in sources:
        try:
            sample = real_samples(source, views)
        except (OSError, UserError):
            continue
        if sample is not None:
            return sample
    return None


def _sample_of_run(run: Path, views: Views) -> Sample | None:
    """A few samples of a run's own data, if they are at hand."""
    try:
        config = load_config(run / "config.yaml")
        return sample_of([open_split(config.data, config.data.val)] if config.data.val else [], views) or sample_of(
            open_train(config.data), views
        )
    except (OSError, UserError):
        return None


def push(out: Path, repo: str) -> str:
    """Upload an export that is whole; a repository that is not there is made, private.

    Args:
        out: the export.
        repo: ``owner/name`` at the hub.

    Returns:
        its address.

    Raises:
        ManifestError: the export is damaged.
        ExportError: the hub refuses.
    """
    check(out)
    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        # What an earlier export left in these folders would be left over in this one.
        tops = {name.partition("/")[0] for name in (*FOLDERS, *BESIDE)} - {"README.md"}
        api.upload_folder(
            repo_id=repo,
            folder_path=out,
            commit_message="Export of Triptych",
            delete_patterns=[f"{top}/*" for top in sorted(tops)],
        )
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        raise ExportError(f"--push-to-hub {repo}: {error}; the export is in {out}") from error
    return str(address)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(
        prog="pretrain/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", nargs="?", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint's")
    add("out", nargs="?", type=Path, metavar="OUT", help="folder for the export, new or an earlier export")
    add("--check", type=Path, metavar="EXPORT", help="compare the files of an export with what was written, and stop")
    add("--ema", action=argparse.BooleanOptionalAction, help="the average of the weights (default: if there is one)")
    add("--image-size", type=int, metavar="PIXELS", help="side of the images, if not that of training")
    add("--audio-seconds", type=float, metavar="SECONDS", help="length of the sounds, likewise")
    add("--folders", nargs="+", metavar="NAME", help=f"only these and what they need, of {', '.join(FOLDERS)}")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    add("--onnx", action="store_true", help="the streams as ONNX graphs, too; needs the extra onnx")
    add("--licence", default=LICENCE, metavar="ID", help="of the weights, for the cards, such as cc-by-4.0")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the export; a new repository is private")
    arguments = parser.parse_args(argv)
    if (arguments.check is None) == (arguments.out is None):
        parser.error("give RUN_OR_CHECKPOINT and OUT, or --check EXPORT")
    disable_progress_bar()
    try:
        if arguments.check is not None:
            print(f"{arguments.check}: {len(check(arguments.check)['files'])} files as they were written")
            return 0
        check_names("--folders", arguments.folders)
        checkpoint = find_checkpoint(arguments.source)
        check_replaceable(arguments.out)
        other = arguments.image_size is not None or arguments.audio_seconds is not None
        given = read_exportable(checkpoint, ema=arguments.ema, evaluated=not other, licence=arguments.licence)
        encoder = resized(given.encoder, arguments.image_size, arguments.audio_seconds)
        folders = export(
            encoder,
            given.tokenizer,
            arguments.out,
            given.objectives,
            given.about,
            sample=_sample_of_run(checkpoint.resolve().parent.parent, encoder.views),
            names=arguments.folders,
            dtype=DTYPES[arguments.dtype],
            onnx=arguments.onnx,
        )
        for name, folder in folders.items():
            print(f"{name:14} {folder}")
        if arguments.push_to_hub is not None:
            print(f"pushed to {push(arguments.out, arguments.push_to_hub)}")
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
