"""Checkpoints: a folder that is whole or absent, of JSON and safetensors only.

checkpoints/step-00000600/
    encoder/          config.json, model.safetensors and tokenizer/: all that evaluation and export need
    trained.safetensors    with `train.ema`: the encoder that is trained, of which the one above is an average
    objectives.safetensors
    optimizer.safetensors
    stream.json       where the data stood, what they are, what was skipped of them
    state.json        step, what the run is, counters
checkpoints/last      link to the newest
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.stream import STATE
from data.text import load_tokenizer
from objectives.pretraining import Pretraining
from pretrain.model.encoder import Encoder

SCHEMA = 3
LAST = "last"
_PARTIAL = ".partial"


class CheckpointError(UserError):
    """A checkpoint that can't be read, written, or doesn't belong to this run; names its folder and what is wrong."""


class Trained(NamedTuple):
    """What a checkpoint's ``encoder`` folder holds."""

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase


class Resumed(NamedTuple):
    """What a run goes on with.

    Attributes:
        step: steps done.
        counters: as they were saved.
    """

    step: int
    counters: dict[str, Any]


class Checkpoints:
    """Writes a run's checkpoints, on a thread of its own while training goes on; one at a time."""

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None) -> None:
        """Nothing is written yet.

        Args:
            folder: the run's ``checkpoints`` folder.
            keep: how many of the newest remain.
            keep_every: those at multiples of this step remain, too.
        """
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        # What a checkpoint is copied to first; kept, since memory that was in use before is several times as fast.
        self._copies: dict[tuple[str, str], Tensor] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """What has been begun is written to its end, whatever ends the run."""
        self._thread.shutdown()

    def save(
        self,
        step: int,
        model: Pretraining,
        optimizer: Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        stream: Mapping[str, Any],
        identity: Mapping[str, Any],
        counters: Mapping[str, Any],
        average: nn.Module | None = None,
    ) -> None:
        """Copy all that a checkpoint holds, and begin to write it; waits for the one before.

        Args:
            step: steps done.
            model: unwrapped module.
            optimizer: its state is saved too.
            tokenizer: saved with the encoder.
            stream: ``Stream.state_dict()``.
            identity: what a resumed run must have in common with this one, for JSON.
            counters: what else is to be had back, for JSON.
            average: of the encoder's weights, which evaluation and export then get.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        weights = self._copy("trained", model.encoder.state_dict())
        tensors = {
            "objectives": self._copy("objectives", model.objectives.state_dict()),
            "optimizer": self._copy("optimizer", named(optimizer, model)),
        }
        if average is not None:
            tensors["trained"], weights = weights, self._copy("average", average.state_dict())
        state = {"schema": SCHEMA, "step": step, "identity": identity, "counters": counters}
        # Made here, not on the thread: what is shared may change while that one writes.
        texts = {"state.json": json.dumps(state, indent=2), STATE: json.dumps(stream, indent=1)}
        self._writing = self._thread.submit(self._write, step, model.encoder, weights, tokenizer, tensors, texts)

    def wait(self) -> Path | None:
        """Wait until the checkpoint that is being written is there; returns it, or None if none is.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def _copy(self, what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, contiguous, and no views of what goes on changing."""
        copies = {}
        for name, value in tensors.items():
            kept = self._copies.get((what, name))
            if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._copies[what, name] = kept
            copies[name] = kept.copy_(value.detach())
        return copies

    def _write(
        self,
        step: int,
        encoder: Encoder,
        weights: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        tensors: Mapping[str, dict[str, Tensor]],
        texts: Mapping[str, str],
    ) -> Path:
        """Write aside, rename when whole, point ``last`` at it and drop what need not remain."""
        name = f"step-{step:08d}"
        partial, final = self.folder / (name + _PARTIAL), self.folder / name
        try:
            for leftover in self.folder.glob("step-*" + _PARTIAL):  # of a run that was killed while saving
                shutil.rmtree(leftover)
            (partial / "encoder").mkdir(parents=True)
            encoder.save(partial / "encoder", weights)
            tokenizer.save_pretrained(partial / "encoder" / "tokenizer")
            for file, values in tensors.items():
                save_file(values, partial / f"{file}.safetensors")
            for file, text in texts.items():
                (partial / file).write_text(text + "\n")
            mode = (partial / "state.json").stat().st_mode
            for path in partial.rglob("*.safetensors"):  # safetensors gives them to the owner alone
                path.chmod(mode)
            for path in (*sorted(partial.rglob("*")), partial):
                _flush(path)
            if final.exists():  # the same step of the same run, saved again
                _remove(final)
            partial.rename(final)
            point_last(final)
            for old in sorted(self.folder.glob("step-????????"))[: -self.keep]:
                if self.keep_every is None or int(old.name.removeprefix("step-")) % self.keep_every:
                    _remove(old)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = find_last(self.folder)
            before = f"the newest one is {last}" if last else "there is none before it"
            raise CheckpointError(f"{final} could not be written ({error}); {before}") from error
        return final


def point_last(checkpoint: Path) -> None:
    """Let the link ``last`` beside a checkpoint lead to it."""
    link = checkpoint.with_name(LAST + _PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    link.replace(checkpoint.with_name(LAST))
    _flush(checkpoint.parent)


def find_last(folder: Path) -> Path | None:
    """The newest checkpoint of a run's ``checkpoints`` folder, or None."""
    whole = sorted(folder.glob("step-????????"))
    return whole[-1] if whole else None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "state.json").is_file():
        return path
    found = find_last(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint (it has no state.json) nor a run with checkpoints/")
    return found


def load_checkpoint(
    checkpoint: Path,
    model: Pretraining,
    optimizer: Optimizer,
    identity: Mapping[str, Any],
    average: nn.Module | None = None,
) -> Resumed:
    """Restore model and optimiser in place.

    Args:
        checkpoint: a checkpoint's folder.
        model: unwrapped module, built from the same configuration.
        optimizer: over the same parameters. Its hyper-parameters stay: they are this run's.
        identity: of this run; must equal the saved one.
        average: of the encoder's weights; restored, too. Where the checkpoint has none, it begins with the weights.

    Raises:
        CheckpointError: another schema, another identity (says in what), or tensors that don't fit.
        FileNotFoundError: a file is missing.
    """
    saved = json.loads((checkpoint / "state.json").read_text())
    if saved.get("schema") != SCHEMA:
        raise CheckpointError(f"{checkpoint}: schema {saved.get('schema')}; this version reads {SCHEMA}")
    changed = [key for key in {**saved["identity"], **identity} if saved["identity"].get(key) != identity.get(key)]
    if changed:
        lines = (f"  {key}: {saved['identity'].get(key)} then, {identity.get(key)} now" for key in changed)
        raise CheckpointError(
            f"{checkpoint} can't be resumed, since this would be another run:\n"
            + "\n".join(lines)
            + "\nGive the run another `out`, or restore what it began with."
        )
    try:
        weights = load_file(checkpoint / "encoder" / "model.safetensors")
        if average is not None:
            average.load_state_dict(weights)
        if (trained := checkpoint / "trained.safetensors").exists():  # the other one is an average, in use now or not
            weights = load_file(trained)
        model.encoder.load_state_dict(weights)
        model.objectives.load_state_dict(load_file(checkpoint / "objectives.safetensors"))
        restore(optimizer, model, load_file(checkpoint / "optimizer.safetensors"))
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} does not fit this configuration: {error}") from error
    return Resumed(saved["step"], saved["counters"])


def load_encoder(checkpoint: Path) -> Trained:
    """Encoder (on the CPU, in evaluation mode) and tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: its tensors don't fit its config.
    """
    folder = checkpoint / "encoder"
    return Trained(Encoder.load(folder).eval(), load_tokenizer(folder / "tokenizer"))


def named(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter's name>/<what>`` -> tensor: it does not depend on groups or their order."""
    return {
        f"{name}/{what}": value
        for name, parameter in model.named_parameters()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def restore(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimiser the state that `named` made.

    Raises:
        ValueError: it is that of other parameters.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = value
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    places = {name: numbers[id(p)] for name, p in model.named_parameters() if id(p) in numbers}
    if state and state.keys() != places.keys():
        odd = sorted(state.keys() ^ places.keys())
        raise ValueError(f"the optimiser has other parameters: {', '.join(odd[:3])}")
    groups = optimizer.state_dict()["param_groups"]
    # torch puts every tensor where its parameter is, in the type that it has to have.
    optimizer.load_state_dict({"state": {places[name]: each for name, each in state.items()}, "param_groups": groups})


def _remove(checkpoint: Path) -> None:
    """Take away its name first, so that a run that is killed here leaves no half of one under it."""
    aside = checkpoint.with_name(f"{checkpoint.name}.old{_PARTIAL}")
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk, so that a rename never outruns the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
