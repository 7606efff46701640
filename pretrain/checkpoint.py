"""Checkpoints: a folder that is whole or absent, of JSON and safetensors only.

checkpoints/step-00000600/
    encoder/          config.json, model.safetensors and tokenizer/: all that evaluation and export need
    objectives.safetensors
    optimizer.safetensors
    stream.json       where the data stood, what they are, what was skipped of them
    state.json        step, what the run is, hyper-parameters of the optimiser
checkpoints/last      link to the newest
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.stream import Stream
from data.text import load_tokenizer
from objectives.pretraining import Pretraining
from pretrain.model.encoder import Encoder

SCHEMA = 2
LAST = "last"
_PARTIAL = ".partial"


class CheckpointError(UserError):
    """A checkpoint that can't be read or doesn't belong to this run; names its folder and what differs."""


class Trained(NamedTuple):
    """What a checkpoint's ``encoder`` folder holds."""

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase


def save_checkpoint(
    folder: Path,
    step: int,
    model: Pretraining,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Optimizer,
    stream: Stream,
    identity: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint aside, rename it when whole, point ``last`` at it and drop all but the ``keep`` newest.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: steps done.
        model: unwrapped module.
        tokenizer: saved with the encoder.
        optimizer: its state is saved too.
        stream: where it stands is saved too.
        identity: what a resumed run must have in common with this one, JSON-able.
        keep: how many checkpoints remain.

    Returns:
        the checkpoint's folder.
    """
    name = f"step-{step:08d}"
    partial = folder / (name + _PARTIAL)
    for leftover in folder.glob("step-*" + _PARTIAL):  # of a run that was killed while saving
        shutil.rmtree(leftover)
    (partial / "encoder").mkdir(parents=True)
    model.encoder.save(partial / "encoder")
    tokenizer.save_pretrained(partial / "encoder" / "tokenizer")
    objectives = {key: value.contiguous() for key, value in model.objectives.state_dict().items()}
    save_file(objectives, partial / "objectives.safetensors")
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
    save_file(tensors, partial / "optimizer.safetensors")
    trainer = {"schema": SCHEMA, "step": step, "identity": identity, "param_groups": state["param_groups"]}
    (partial / "state.json").write_text(json.dumps(trainer, indent=2) + "\n")
    stream.save(partial)
    for path in sorted(partial.rglob("*")):
        _flush(path)

    final = folder / name
    if final.exists():  # the same step of the same run, saved again after resuming from an older one
        shutil.rmtree(final)
    partial.rename(final)
    link = folder / (LAST + _PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(folder / LAST)
    _flush(folder)
    for old in sorted(folder.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)
    return final


def find_last(folder: Path) -> Path | None:
    """The newest checkpoint of a run's ``checkpoints`` folder, or None."""
    whole = sorted(folder.glob("step-????????"))
    return whole[-1] if whole else None


def load_checkpoint(checkpoint: Path, model: Pretraining, optimizer: Optimizer, identity: dict[str, Any]) -> int:
    """Restore model and optimiser in place.

    Args:
        checkpoint: a checkpoint's folder.
        model: unwrapped module, built from the same configuration.
        optimizer: over the same parameters.
        identity: of this run; must equal the saved one.

    Returns:
        the number of steps done.

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
        model.encoder.load_state_dict(load_file(checkpoint / "encoder" / "model.safetensors"))
        model.objectives.load_state_dict(load_file(checkpoint / "objectives.safetensors"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(checkpoint / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        # Hyper-parameters are this run's, as they stand in its config.yaml; the saved ones only say what belongs where.
        groups = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
            raise ValueError("the optimiser has other parameters")
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} does not fit this configuration: {error}") from error
    step: int = saved["step"]
    return step


def load_encoder(checkpoint: Path) -> Trained:
    """Encoder (on the CPU, in evaluation mode) and tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: its tensors don't fit its config.
    """
    folder = checkpoint / "encoder"
    return Trained(Encoder.load(folder).eval(), load_tokenizer(folder / "tokenizer"))


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk, so that a rename never outruns the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
