"""The training run: build everything from a Config, then one loop that reads on a screen."""

import copy
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs, PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerBase

from data.batch import Batch
from data.index import write_whole
from data.source import Source
from data.stream import Stream, open_cache, open_split, open_train
from data.text import MAX_CAPTIONS, TokenizerConfig, continues_word, load_tokenizer, train_tokenizer
from data.transforms import OnDevice
from eval.monitor import Monitor
from objectives.pretraining import Loss, Pretraining, Together, trunk_gradients
from pretrain import trackers
from pretrain.checkpoint import Checkpoints, find_checkpoint, find_last, load_checkpoint, point_last
from pretrain.config import Config, ConfigError, to_yaml
from pretrain.explain import differences
from pretrain.initial import load_initial
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import Vocabulary
from pretrain.optimizer import BadSteps, TrainingError, learning_rate, make_optimizer, set_learning_rate
from pretrain.progress import Progress
from pretrain.ranks import Ranks, Stop, first_alone

# Settings that change memory and speed alone.
SAME_RESULT = {"objectives.contrastive.tile"}
# Ways in which several processes may share the work.
SHARED_BY = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
LOCK = ".lock"
# What may lie in a run's folder before it has begun.
BEFORE_A_RUN = {"checkpoints", "tokenizer", "trackers", "bad_steps", "export", "eval", "pictures", "dry_run"}


@dataclass
class Run:
    """All that the loop works with.

    Attributes:
        config: the whole run.
        accelerator: device, precision, ranks.
        stream: the data, where it stands.
        tokenizer: of the texts.
        bare: the module itself.
        model: the module as ranks share it.
        optimizer: as Accelerate wraps it.
        average: of the encoder's weights, if ``train.ema`` is set.
        step: steps done.
        bad: steps that were left out.
        tracker_ids: by which trackers know the run again.
    """

    config: Config
    accelerator: Accelerator
    stream: Stream
    tokenizer: PreTrainedTokenizerBase
    bare: Pretraining
    model: nn.Module
    optimizer: Any
    average: Encoder | None
    step: int
    bad: BadSteps
    tracker_ids: dict[str, str]

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)

    @property
    def done(self) -> float:
        """Share of the steps that are done."""
        return self.step / self.config.train.steps

    @property
    def encoder(self) -> Encoder:
        """What evaluation sees."""
        return self.bare.encoder if self.average is None else self.average

    def counters(self) -> dict[str, Any]:
        """What a resumed run has to know besides weights and data."""
        scaler = self.accelerator.scaler
        return {
            "bad_steps": self.bad.count,
            "trackers": self.tracker_ids,
            "scaler": None if scaler is None else scaler.state_dict(),
        }


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A signal asked the run to stop; it is saved.

    Attributes:
        signal: its name.
        checkpoint: where the run goes on.
    """

    def __init__(self, signal: str, checkpoint: Path, resume: str) -> None:
        again = "with resume=auto it goes on from there" if resume == "none" else "the same command goes on from it"
        super().__init__(f"stopped by {signal}; {checkpoint} is saved, {again}")
        self.signal, self.checkpoint = signal, checkpoint


def pretrain(
    config: Config,
    sources: Sequence[Source] | None = None,
    accelerator: Accelerator | None = None,
    given: str | None = None,
) -> Path:
    """Train from the start or from the newest checkpoint to the last step.

    Args:
        config: the whole run. ``config.out`` gets config.yaml, env.json, metrics.jsonl and checkpoints/.
        sources: ``open_train(config.data)``, for those who have it already.
        accelerator: ``start_accelerator(config)``, likewise.
        given: what of the configuration the user gave; kept as given.yaml.

    Returns:
        the last checkpoint's folder.

    Raises:
        ConfigError: settings that this machine or these data can't meet.
        ShardError, FetchError: shards that are missing or damaged.
        StreamError: too many samples that can't be used, or a checkpoint that belongs to other data.
        CheckpointError: a checkpoint that belongs to another model, or can't be written.
        TrainingError: too many steps whose gradient is not finite.
        Stopped: SIGTERM or SIGUSR1 came.
    """
    accelerator = accelerator or start_accelerator(config)
    with claimed(Path(config.out), accelerator):
        run = set_up(config, sources, accelerator, given)
        if run.step == config.train.steps and (finished := find_last(run.out / "checkpoints")) is not None:
            if run.accelerator.is_main_process:
                point_last(finished)  # a run that is killed at its end may not have come to that; if it can be made
            return finished
        return train(run)


@contextmanager
def claimed(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a folder; the system gives it back when this process ends, however that is.

    Raises:
        ConfigError: another run is at work there.
    """
    if not accelerator.is_main_process:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"out={out}: another run is at work there ({file.read().strip()}): wait for it, end it, or choose "
                "another `out`"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def train(run: Run) -> Path:
    """The loop; what it raises see `pretrain`."""
    config, settings, accelerator = run.config, run.config.train, run.accelerator
    steps, main = settings.steps, accelerator.is_main_process
    on_device = OnDevice(config.data.views).to(accelerator.device)
    timeout = timedelta(seconds=settings.timeout)
    ranks = Ranks(accelerator.num_processes, timeout)
    warn = partial(warn_of, accelerator)
    checkpoints = Checkpoints(run.out / "checkpoints", settings.keep, settings.keep_every, warn)
    # A line at each checkpoint too, so that none before it is lost to a run that resumes from it.
    progress = Progress(
        run.out / "metrics.jsonl",
        steps,
        run.step,
        settings.batch_size,
        (settings.log_every, settings.save_every),
        run.stream.skips,
        main=main,
        log=partial(trackers.log, accelerator),
    )
    monitor = make_monitor(run)
    run.model.train()
    begun = time.perf_counter()
    batches = progress.timed(run.stream.batches(timeout))
    with Stop() as stop, checkpoints, ranks.watched():
        while True:
            batch = next(batches)  # there are enough of them
            rate = learning_rate(settings, run.step)
            set_learning_rate(run.optimizer, rate)
            whole = run.step >= steps * (1 - config.objectives.final_whole)
            inputs = on_device(batch.to(accelerator.device)).split(settings.accumulate)
            seed, done = step_seed(config.seed, run.step), run.done
            values: dict[str, Tensor | float] = {}
            if settings.gradients_every is not None and run.step % settings.gradients_every == 0:
                values |= pulls(accelerator, run.bare, inputs[0], seed, whole, done)
            loss = go_backward(accelerator, run.model, inputs, seed, whole, done)
            norm = accelerator.clip_grad_norm_(run.model.parameters(), settings.clip_norm)
            bad = run.bad.step(run.optimizer, norm, loss.total, accelerator)
            run.optimizer.zero_grad()
            run.step += 1
            run.bare.after_step(run.done)
            follow(run)

            if (failed := checkpoints.look()) is not None:  # on the first rank, which writes
                warn(f"{failed}. It is written again")
            again = {"save again": int(failed is not None)}
            everywhere = ranks.sum(stop.got | again | rows_of(batch, config) | terms_of(loss, run.bare))
            run.bad.note(run.step, bad, loss.terms, batch.keys)
            values |= mean_terms(loss, run.bare, everywhere) | shares_cut(batch, everywhere)
            values |= {"gradient_norm": norm, "learning_rate": rate}
            asked = next((name for name in stop.got if everywhere[name]), None)
            rows = {name: everywhere[f"rows {name}"] for name in config.data.views.used}
            last = run.step == steps or asked is not None
            saving = last or run.step % settings.save_every == 0 or everywhere["save again"] > 0
            due = progress.due or saving
            progress.update(values, rows, last=saving)  # none of what a checkpoint has behind it may lack a line
            if due:
                report_bad_steps(run)
            # Who is asked to stop has no time for a look.
            if monitor is not None and asked is None and monitor.due(run.step, time.perf_counter() - begun):
                with progress.aside():
                    progress.evaluated(monitor.look(run.encoder))
            if saving:
                with progress.aside():
                    if not save(run, checkpoints, wait=last):
                        warn(
                            f"step {run.step}: the checkpoint before is still being written, so there is none of this "
                            "step; raise train.save_every"
                        )
                    if settings.pictures and main:
                        draw(run.bare, inputs[0], seed, run.out / "pictures" / f"step-{run.step:08}.png")
            if last:
                break
        saved = checkpoints.wait()  # no second signal ends it
    accelerator.wait_for_everyone()  # others must not read, or end, before it is written
    trackers.finish(accelerator)
    saved = run.out / "checkpoints" / f"step-{run.step:08d}" if saved is None else saved
    if asked is not None and run.step < steps:
        raise Stopped(asked, saved, config.resume)
    return saved


def set_up(config: Config, sources: Sequence[Source] | None, accelerator: Accelerator, given: str | None = None) -> Run:
    """Everything built and, where there is a checkpoint to go on from, restored; raises what `pretrain` raises."""
    out, main = Path(config.out), accelerator.is_main_process
    if (part := config.train.batch_size // accelerator.num_processes) % config.train.accumulate:
        raise ConfigError(
            f"train.accumulate={config.train.accumulate} does not divide the {part} samples of a step that each of "
            f"{accelerator.num_processes} processes has"
        )
    resumed_from = prepare_folder(config, accelerator)
    sources = open_train(config.data) if sources is None else sources
    accelerator.print(modalities_of(config, sources))
    tokenizer = make_tokenizer(config.tokenizer, sources, resumed_from, out, accelerator)
    stream = Stream(
        sources,
        config.data,
        tokenizer,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    identity = identity_of(config)

    torch.manual_seed(config.seed)
    encoder = Encoder(config.model, config.data.views, vocabulary_of(tokenizer))
    if resumed_from is None:
        load_initial(encoder, config.init_from)
    encoder.recompute = config.train.recompute
    continues = continues_word(tokenizer) if config.objectives.masked_language.whole_words else None
    bare = Pretraining(encoder, config.objectives, continues).to(accelerator.device)
    average = copy.deepcopy(encoder).requires_grad_(False) if config.train.ema is not None else None
    if config.train.compile:
        encoder.compile_blocks()
    bare_optimizer = make_optimizer(bare, config.train)
    step, counters = 0, dict[str, Any]()
    if resumed_from is not None:
        step, counters = load_checkpoint(resumed_from, bare, bare_optimizer, identity, average)
        accelerator.print(f"resumed from {resumed_from} at step {step}")
        before = resumed_from.parents[1] / "config.yaml"  # of the run that saved it, which may have another folder
        if before.exists() and (lines := differences(before.read_text(), config)):
            accelerator.print("  " + "\n  ".join(lines))
        if changed := stream.load(resumed_from):
            accelerator.print("the data have changed, a new pass over them begins:\n  " + "\n  ".join(changed))
        if step > config.train.steps or (step == config.train.steps and find_last(out / "checkpoints") is None):
            raise ConfigError(f"train.steps={config.train.steps}, but {resumed_from} has done {step} already")
    if stream.steps is not None and stream.steps < config.train.steps:
        raise ConfigError(f"train.steps={config.train.steps}, but max_epochs of all sources end at step {stream.steps}")
    optimizer = accelerator.prepare(bare_optimizer)
    if accelerator.scaler is not None and counters.get("scaler"):
        accelerator.scaler.load_state_dict(counters["scaler"])
    bad = BadSteps(config.train.max_bad_steps, counters.get("bad_steps", 0))
    model = share_model(bare, accelerator.num_processes)
    run = Run(config, accelerator, stream, tokenizer, bare, model, optimizer, average, step, bad, {})
    if step < config.train.steps:
        if main:
            record_run(config, given)
            drop_later_metrics(out / "metrics.jsonl", step)
            for path in (out / "bad_steps").glob("*.jsonl"):
                drop_later_metrics(path, step)
            describe(config, accelerator, encoder, sources, len(tokenizer))
        # A run that goes on elsewhere with another one's checkpoint is a run of its own.
        own = resumed_from is not None and resumed_from.resolve().parent == (out / "checkpoints").resolve()
        ids = counters.get("trackers") if own else None
        run.tracker_ids = trackers.start(accelerator, config.trackers, asdict(config), out, step, ids)
    return run


def share_model(bare: Pretraining, world: int) -> nn.Module:
    """The module whose gradients are averaged over ranks.

    Not by ``Accelerator.prepare``, which names the device: DDP would then move all tensors of a batch to it, also those
    that say which rows are whose and are read on the CPU.
    """
    # One buffer for gradients and what is sent, no second copy of them.
    return DistributedDataParallel(bare, gradient_as_bucket_view=True) if world > 1 else bare


def warn_of(accelerator: Accelerator, message: str) -> None:
    """Say it where the run's progress is shown."""
    accelerator.print(f"WARNING {message}")


def save(run: Run, checkpoints: Checkpoints, wait: bool) -> bool:
    """Begin to write a checkpoint; the first rank does. Returns whether it could, see `Checkpoints.save`."""
    if run.accelerator.is_main_process:
        return checkpoints.save(
            run.step,
            run.bare,
            getattr(run.optimizer, "optimizer", run.optimizer),
            run.tokenizer,
            run.stream.state_dict(),
            identity_of(run.config),
            run.counters(),
            run.average,
            wait=wait,
        )
    return True


@torch.no_grad()
def follow(run: Run) -> None:
    """The average of the weights goes a step after them (Polyak and Juditsky 1992), if there is one."""
    if run.average is not None:
        # Faster at first, or a short run's average would hold much of the random weights that it began with.
        decay = min(run.config.train.ema or 0.0, run.step / (run.step + 9))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(run.average.parameters()), [p.detach() for p in run.bare.encoder.parameters()], None)


def make_monitor(run: Run) -> Monitor | None:
    """What looks at the encoder on the way, if ``eval.monitor.every`` is set."""
    config, accelerator = run.config, run.accelerator
    if config.eval.monitor.every is None:
        return None
    return Monitor(
        config.eval.monitor,
        open_split(config.data, config.data.val),
        Source([shard for source in run.stream.sources for shard in source.shards], cache=open_cache(config.data)),
        run.tokenizer,
        config.eval.label,
        accelerator.device,
        config.eval.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def rows_of(batch: Batch, config: Config) -> dict[str, int]:
    """How many rows of the batch have a modality, and of how many it was longer than its view."""
    fields, numbers = batch.fields, dict[str, int]()
    for name in config.data.views.used:
        numbers[f"rows {name}"] = len(fields[name].rows) if name in fields else 0
        numbers[f"cut {name}"] = (fields[name].cut or 0) if name in fields else 0
    return numbers


def terms_of(loss: Loss, bare: Pretraining) -> dict[str, int]:
    """Which terms this rank's loss has."""
    return {f"has {name}": int(name in loss.terms) for name in bare.names}


def mean_terms(loss: Loss, bare: Pretraining, everywhere: Mapping[str, int]) -> dict[str, Tensor | float]:
    """The loss and its terms over all ranks, of which some may have had nothing for a term."""
    names = [name for name in bare.names if everywhere[f"has {name}"]]
    zero = torch.zeros_like(loss.total)
    values = torch.stack([loss.total, *(loss.terms.get(name, zero).to(zero.dtype) for name in names)])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(["loss", *names], values.unbind(), strict=True))


def report_bad_steps(run: Run) -> None:
    """Say which steps since the last report were left out, and write down the samples that they had.

    Raises:
        TrainingError: there were more than ``train.max_bad_steps``.
    """
    found = run.bad.look()
    if not found:
        return
    path = run.out / "bad_steps" / f"rank-{run.accelerator.process_index}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for step in found:
            file.write(json.dumps({"step": step.step, "not_finite": step.terms, "keys": step.keys}) + "\n")
    last = found[-1]
    what = f", nor {', '.join(last.terms)}" if last.terms else ", though this process's losses are"
    message = (
        f"step {last.step}: the gradient is not finite{what}. {run.bad.count} step{'s' * (run.bad.count > 1)} left out "
        f"so far; the keys of their samples are in {path}"
    )
    if run.bad.count > run.bad.allowed:
        raise TrainingError(
            f"{message}. That is more than train.max_bad_steps={run.bad.allowed}; try a lower train.learning_rate, or "
            "train.precision=fp32"
        )
    warn_of(run.accelerator, message)


def go_backward(
    accelerator: Accelerator, model: nn.Module, inputs: Sequence[Batch], seed: int, whole: bool, progress: float
) -> Loss:
    """Forward and backward, one micro-batch after the other; returns the means of their losses."""
    bare: Pretraining = accelerator.unwrap_model(model)
    together: Sequence[Together | None] = [None]
    if len(inputs) > 1:
        with accelerator.autocast():
            together = bare.together(inputs, seed, whole, progress)
    losses: list[Loss] = []
    for part, (batch, others) in enumerate(zip(inputs, together, strict=True), 1):
        # Ranks exchange gradients once, with the last.
        with nullcontext() if part == len(inputs) else accelerator.no_sync(model):
            with accelerator.autocast():
                loss: Loss = model(batch, seed=seed, whole=whole, progress=progress, together=others)
            accelerator.backward(loss.total / len(inputs))
        losses.append(Loss(loss.total.detach(), {name: term.detach() for name, term in loss.terms.items()}))
    if len(losses) == 1:
        return losses[0]
    total = torch.stack([loss.total for loss in losses]).mean()
    names = dict.fromkeys(name for loss in losses for name in loss.terms)
    zero = torch.zeros_like(total)  # what a term is to a micro-batch that has nothing for it
    return Loss(total, {name: torch.stack([loss.terms.get(name, zero) for loss in losses]).mean() for name in names})


def pulls(
    accelerator: Accelerator, bare: Pretraining, batch: Batch, seed: int, whole: bool, progress: float
) -> dict[str, float]:
    """`trunk_gradients` of a batch, on a pass of its own."""
    bare.eval()  # there is no dropout; but objectives gather statistics of what they train on, and this is only a look
    with accelerator.autocast():
        loss = bare(batch, seed=seed, whole=whole, progress=progress)
    bare.train()
    return trunk_gradients(loss, bare.encoder.blocks.parameters())


def draw(bare: Pretraining, batch: Batch, seed: int, path: Path) -> None:
    """Write a picture of what the model makes of a batch, if it reconstructs anything and matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from pretrain.pictures import draw_step  # matplotlib takes its time

    if (picture := draw_step(bare, batch, seed)) is not None:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, picture)


def start_accelerator(config: Config) -> Accelerator:
    """The processes that this one is launched with, on the device that Accelerate finds, in the precision asked for.

    Raises:
        ConfigError: a precision that this device does not have.
        TrackerError: a tracker that is not installed.
    """
    # Without CUDA it is the CPU: Apple's GPUs have no float64, in which the log-mel is computed.
    cpu = not torch.cuda.is_available()
    settings = config.train
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=settings.timeout))
    state = PartialState(cpu=cpu, **timeout.to_kwargs())
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if fast_in_bf16(state.device) else "fp32"
    if precision == "fp16" and state.device.type != "cuda":
        raise ConfigError(f"train.precision=fp16 needs a GPU, and this is {state.device}; allowed are auto, fp32, bf16")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[timeout],
        **trackers.accelerator_arguments(config.trackers, Path(config.out)),
    )
    if accelerator.distributed_type not in SHARED_BY:
        raise ConfigError(
            f"launched with {accelerator.distributed_type.value}: so far processes share the work by plain data "
            "parallelism, on CPUs or CUDA GPUs, each with a whole model; the files in docs/launch do that"
        )
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets one thread per process where nobody chose, which would leave the others idle.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(settings.threads or max(1, available_cpus() // here))
    return accelerator


def fast_in_bf16(device: torch.device) -> bool:
    """Whether the device has matrix units for bf16; without them it is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def available_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_folder(config: Config, accelerator: Accelerator) -> Path | None:
    """Make the run's folder; returns the checkpoint to go on from, or None.

    Raises:
        ConfigError: ``resume`` does not fit what is there, or there is something that is no run.
        CheckpointError: ``resume`` is the path of nothing that can be resumed.
    """
    out = Path(config.out)
    own = find_last(out / "checkpoints")
    if config.resume == "none" and own is not None:
        raise ConfigError(
            f"resume=none, but {out / 'checkpoints'} holds a checkpoint: choose another `out`, or remove it"
        )
    if own is None and out.exists() and not (out / "config.yaml").exists():
        odd = sorted(path.name for path in out.iterdir() if path.name not in BEFORE_A_RUN and path.name[0] != ".")
        if odd:
            raise ConfigError(
                f"out={out}: there is something that is no run ({', '.join(odd[:3])}): choose another `out`"
            )
    resumed_from = own
    if config.resume not in ("auto", "none"):
        resumed_from = find_checkpoint(Path(config.resume)).resolve()
        if own is not None and began_with(out) == config.resume:
            resumed_from = own  # the same command once more: it goes on with what it has done since
        elif own is not None and resumed_from != own.resolve():
            raise ConfigError(
                f"resume={config.resume}, but {out / 'checkpoints'} holds checkpoints of its own: choose another `out`"
            )
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    return resumed_from


def began_with(out: Path) -> str | None:
    """What ``resume`` was when a run was last started in this folder."""
    saved = out / "config.yaml"
    try:
        settings = yaml.safe_load(saved.read_text()) if saved.exists() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{saved} is damaged: {error}") from error
    return settings.get("resume") if isinstance(settings, dict) else None


def record_run(config: Config, given: str | None) -> None:
    """Write config.yaml, given.yaml and env.json, once it is sure that this configuration runs."""
    out = Path(config.out)
    write_whole(out / "config.yaml", to_yaml(config).encode())  # by it a folder is known as a run's
    if given is not None:
        (out / "given.yaml").write_text(given)
    packages = ("torch", "transformers", "accelerate", "datasets", "webdataset", "numpy", "tokenizers", "safetensors")
    environment = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": available_cpus(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
    }
    (out / "env.json").write_text(json.dumps(environment, indent=2) + "\n")


def modalities_of(config: Config, sources: Sequence[Source]) -> str:
    """How many samples have each modality, and what nothing reads; a line per source.

    Raises:
        ConfigError: a modality in use that no sample has.
    """
    unread = ", ".join(f".{extension}" for extension in sorted(set().union(*(s.unread() for s in sources))))
    for name in config.data.views.used:
        if not any(source.count(name) for source in sources):
            raise ConfigError(
                f"data.views.{name} is in use, but no training sample has {name}"
                + (f"; not read are {unread}" if unread else "")
                + f". Set data.views.{name}=null to train without it"
            )
    lines = []
    for source in sources:
        counts = ", ".join(f"{source.count(name)} with {name}" for name in config.data.views.used)
        lines.append(f"{'samples' if len(sources) == 1 else source.name:9} {len(source)}: {counts}")
    if unread:
        lines.append(f"          members that nothing reads: {unread}")
    return "\n".join(lines)


def identity_of(config: Config) -> dict[str, Any]:
    """Everything but the data that, if it changed, would make a resumed run another run; dotted keys."""
    parts: dict[str, Any] = {
        "model": config.model,
        "objectives": config.objectives,
        "data.views": config.data.views,
        "tokenizer": config.tokenizer,
    }
    flat: dict[str, Any] = {"data.group": config.data.group}
    flat |= {key: value for name, part in parts.items() for key, value in flatten(name, asdict(part))}
    return {key: value for key, value in flat.items() if key not in SAME_RESULT}


def flatten(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts with their dotted keys."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for name, branch in tree.items():
        yield from flatten(f"{prefix}.{name}", branch)


def make_tokenizer(
    config: TokenizerConfig,
    sources: Sequence[Source],
    checkpoint: Path | None,
    out: Path,
    accelerator: Accelerator,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint if there is one, else the named one, else one trained on the captions.

    Raises:
        UserError: the tokenizer lacks a token that training needs, or ``train`` is too small.
    """
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "encoder" / "tokenizer")
    if config.name is not None:
        return load_tokenizer(config.name)
    folder = out / "tokenizer"
    with first_alone(accelerator.is_main_process, accelerator.num_processes):
        if accelerator.is_main_process:  # the others read it: a tokenizer of their own might differ
            captions = chain.from_iterable(source.captions(MAX_CAPTIONS // len(sources)) for source in sources)
            train_tokenizer(captions, config.train or 0).save_pretrained(folder)
    return load_tokenizer(folder)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What the model needs to know of a tokenizer."""
    return Vocabulary(
        len(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids))
    )


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's masks: a function of the run's seed and the step, so nothing of it has to be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take signed 64-bit seeds


def shares_cut(batch: Batch, everywhere: Mapping[str, int]) -> dict[str, float]:
    """``cut_text`` and the like: the share of a modality's samples that were longer than its view, of all ranks."""
    names = [name for name, field in batch.fields.items() if field.cut is not None]
    return {f"cut_{name}": everywhere[f"cut {name}"] / everywhere[f"rows {name}"] for name in names}


def drop_later_metrics(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: those after it are written again by the resumed run."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write_whole(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())


def describe(
    config: Config, accelerator: Accelerator, encoder: Encoder, sources: Sequence[Source], vocabulary: int
) -> None:
    """Say what is about to be trained, on what and where."""
    parameters = sum(p.numel() for p in encoder.parameters())
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    epochs = config.train.steps * config.train.batch_size / sum(map(len, sources))
    shards = sum(len(source.shards) for source in sources)
    print(
        f"encoder   {', '.join(config.data.views.used)}: {parameters / 1e6:.2f} M parameters, "
        f"{vocabulary} tokens of vocabulary\n"
        f"data      {shards} shards; "
        f"{config.train.steps} steps of {config.train.batch_size} are {epochs:.1f} epochs\n"
        f"device    {accelerator.device}{threads}, {precision}\n"
        f"run       {config.out}",
        flush=True,
    )
