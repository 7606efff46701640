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
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from data.documents import read_document
from data.errors import UserError
from data.stream import STATE
from data.text import load_tokenizer
from objectives.pretraining import Pretraining
from pretrain.model.encoder import Encoder
from pretrain.sharding import full, load_shared, shared_like

SCHEMA = 4  # since contrastive scales and biases have one element, not none
LAST = "last"
# So many checkpoints in a row that can't be written end the run.
RETRIES = 3
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
    """Writes a run's checkpoints, on a thread of its own while training goes on; one at a time.

    A checkpoint counts as written once it has its name. What goes wrong after that (``last`` that can't be made, an
    old checkpoint that can't be removed since someone reads it) is only warned of, and tried again with the next one.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
        *,
        main: bool = True,
    ) -> None:
        """Nothing is written yet.

        Args:
            folder: the run's ``checkpoints`` folder.
            keep: how many of the newest remain.
            keep_every: those at multiples of this step remain, too.
            warn: gets what the user should know but no one has to act on, once for each file or folder that it is
                about. Called by the thread that calls `save`, `look` or `wait`, or leaves the ``with``.
            main: whether this rank writes; the others only give it their part of what ranks share.
        """
        self.folder, self.keep, self.keep_every, self.main = folder, keep, keep_every, main
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._failures = 0  # in a row
        self._newest = find_last(folder)
        self._warn = warn
        # Of the thread's; only `wait` takes from the list, once the thread is done.
        self._warned_of: set[Path] = set()
        self._warnings: list[str] = []
        # What a checkpoint is copied to first; kept, since memory that was in use before is several times as fast.
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._copying: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What has been begun is written to its end, whatever ends the run; if that fails, ``error`` gets a note of it.

        Raises:
            CheckpointError: it could not be written, and nothing else went wrong.
        """
        self._thread.shutdown()
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

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
        *,
        wait: bool = True,
    ) -> bool:
        """Begin to copy all that a checkpoint holds, and to write it. If the one before has failed, that is warned of.

        Neither weights nor what the optimiser keeps may change before `copied` has returned: passes may be made.
        Where ranks share weights all call it, and the checkpoint is the one that a single process would write.

        Args:
            step: steps done.
            model: unwrapped module.
            optimizer: its state is saved too.
            tokenizer: saved with the encoder.
            stream: ``Stream.state_dict()``.
            identity: what a resumed run must have in common with this one, for JSON.
            counters: what else is to be had back, for JSON.
            average: of the encoder's weights, which evaluation and export then get.
            wait: for the one before, however long that takes; and try, however many have failed.

        Returns:
            whether it was begun: without ``wait`` it is not while the one before is still being written.

        Raises:
            CheckpointError: `RETRIES` in a row could not be written; never with ``wait``.
        """
        if not wait and self.busy:
            return False
        try:
            self.wait()
        except CheckpointError as error:
            if self._failures >= RETRIES and not wait:
                raise
            self._warn(str(error))
        later: list[tuple[Tensor, Tensor]] = []
        weights = self._copy("trained", model.encoder, model.encoder.state_dict(), later)
        tensors = {
            "objectives": self._copy("objectives", model.objectives, model.objectives.state_dict(), later),
            "optimizer": self._copy("optimizer", model, named(optimizer, model), later),
        }
        if average is not None:
            tensors["trained"], weights = weights, self._copy("average", average, average.state_dict(), later)
        if not self.main:
            return True
        state = {"schema": SCHEMA, "step": step, "identity": identity, "counters": counters}
        # Made here, not on the thread: what is shared may change while that one writes.
        texts = {"state.json": json.dumps(state, indent=2), STATE: json.dumps(stream, indent=1)}
        copying = self._copying = self._thread.submit(copy_all, later)
        self._writing = self._thread.submit(
            self._write, step, model.encoder, weights, tokenizer, tensors, texts, copying
        )
        return True

    def copied(self) -> None:
        """Wait until all that `save` was given may change again."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def look(self) -> CheckpointError | None:
        """What has become of the checkpoint that was begun: why it failed, said once, or None. Does not wait.

        Raises:
            CheckpointError: it has failed, as the `RETRIES` - 1 before it.
        """
        if self._writing is None or self.busy:
            return None
        try:
            self.wait()
        except CheckpointError as error:
            if self._failures >= RETRIES:
                raise
            return error
        return None

    def wait(self) -> Path | None:
        """Wait until the checkpoint that is being written is there; returns it, or None if none is.

        Raises:
            CheckpointError: it could not be written; those before it are as they were. Said once.
        """
        if self._writing is None:
            return None
        writing = self._writing
        failed = writing.exception() is not None  # what is interrupted in waiting here can wait again
        self._writing = None
        self._failures = self._failures + 1 if failed else 0
        found, self._warnings = self._warnings, []
        for message in found:
            self._warn(message)
        return writing.result()

    def _copy(
        self, what: str, module: nn.Module, tensors: Mapping[str, Tensor], later: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """On the CPU, contiguous, whole, and no views of what goes on changing; nothing on ranks that do not write.

        Args:
            what: the part of the checkpoint.
            module: that they are of.
            tensors: by name.
            later: gets (to, from) of what is still to be copied. What a pass may change, and what ranks share and
                gather here together, is copied at once.
        """
        copies, buffers = {}, {name for name, _ in module.named_buffers()}
        for name, part in tensors.items():
            value = full(part.detach())  # one at a time: the device need not have room for all
            if not self.main:
                continue
            kept = self._copies.get((what, name))
            if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._copies[what, name] = kept
            copies[name] = kept
            if name in buffers or isinstance(part, DTensor):
                kept.copy_(value)
            else:
                later.append((kept, value))
        return copies

    def _write(
        self,
        step: int,
        encoder: Encoder,
        weights: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        tensors: Mapping[str, dict[str, Tensor]],
        texts: Mapping[str, str],
        copying: Future[None],
    ) -> Path:
        """Once all is copied: write aside, rename when whole, point ``last`` there, drop what need not remain."""
        copying.result()
        final = self.folder / f"step-{step:08d}"
        partial = _aside(final)
        try:
            self._sweep()
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
                final.rename(_aside(final, ".old"))
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            before = f"the newest one is {self._newest}" if self._newest else "there is none before it"
            raise CheckpointError(f"{final} could not be written ({error}); {before}") from error
        self._newest = final
        self._tidy(final)
        return final

    def _tidy(self, final: Path) -> None:
        """What is left to do once a checkpoint has its name; raises nothing, since the checkpoint is there."""
        try:
            _flush(self.folder)  # those before it remain until its name is on disk
            whole = sorted(self.folder.glob("step-????????"))
        except OSError as error:
            self._note(self.folder, f"{final} is written, but those before it are kept: {self.folder} failed ({error})")
            return
        if (problem := point_last(final)) is not None:
            self._note(final.with_name(LAST), problem)
        for old in whole[: -self.keep]:
            if self.keep_every is None or int(old.name.removeprefix("step-")) % self.keep_every:
                try:  # its name goes first, so that a run that is killed here leaves no half of one under it
                    old.rename(_aside(old, ".old"))
                except OSError as error:
                    self._note(old, f"{old} could not be removed ({error}); the next checkpoint tries again")
        try:
            self._sweep()
        except OSError as error:
            self._note(self.folder, f"{self.folder} could not be cleared ({error}); the next checkpoint tries again")

    def _sweep(self) -> None:
        """Remove what has no name of its own: old checkpoints, and those of a run that was killed while saving."""
        for leftover in self.folder.glob("step-*" + _PARTIAL):
            try:
                shutil.rmtree(leftover)
            except OSError as error:
                self._note(leftover, f"{leftover} could not be removed ({error}); the next checkpoint tries again")

    def _note(self, path: Path, message: str) -> None:
        """Keep what is to be warned of, if it is the first about this path."""
        if path not in self._warned_of:
            self._warned_of.add(path)
            self._warnings.append(message)


def point_last(checkpoint: Path) -> str | None:
    """Let the link ``last`` beside a checkpoint lead to it; returns why that can't be done, or None.

    Some file systems have no links. Runs don't need it: `find_last` goes by the names.
    """
    last, link = checkpoint.with_name(LAST), checkpoint.with_name(LAST + _PARTIAL)
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.replace(last)
        _flush(checkpoint.parent)
    except OSError as error:
        return f"{last} could not be made to lead to {checkpoint.name} ({error}); use the newest step-* beside it"
    return None


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
        model: unwrapped module, built from the same configuration; ranks may share its weights, however they did then.
        optimizer: over the same parameters. Its hyper-parameters stay: they are this run's.
        identity: of this run; must equal the saved one.
        average: of the encoder's weights; restored, too. Where the checkpoint has none, it begins with the weights.

    Raises:
        CheckpointError: another schema, another identity (says in what), or tensors that don't fit.
        UserError: a state.json that is damaged.
        FileNotFoundError: a file is missing.
    """
    saved = read_document(checkpoint / "state.json")
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
            load_shared(average, weights)
        if (trained := checkpoint / "trained.safetensors").exists():  # the other one is an average, in use now or not
            weights = load_file(trained)
        load_shared(model.encoder, weights)
        load_shared(model.objectives, load_file(checkpoint / "objectives.safetensors"))
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


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fill the first of each pair with the values of the second."""
    for to, value in pairs:
        to.copy_(value)


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
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = shared_like(value, parameters.get(name, value))
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    places = {name: numbers[id(p)] for name, p in parameters.items() if id(p) in numbers}
    if state and state.keys() != places.keys():
        odd = sorted(state.keys() ^ places.keys())
        raise ValueError(f"the optimiser has other parameters: {', '.join(odd[:3])}")
    groups = optimizer.state_dict()["param_groups"]
    # torch puts every tensor where its parameter is, in the type that it has to have.
    optimizer.load_state_dict({"state": {places[name]: each for name, each in state.items()}, "param_groups": groups})


def _aside(path: Path, mark: str = "") -> Path:
    """A name beside it for what is not whole, or no more; not that of a leftover that can't be removed."""
    numbers = chain([""], map(".{}".format, count(1)))
    names = (path.with_name(path.name + mark + number + _PARTIAL) for number in numbers)
    return next(name for name in names if not os.path.lexists(name))


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk, so that a rename never outruns the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
