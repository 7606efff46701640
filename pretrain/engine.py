"""The training run: one loop that reads on a screen, and what it calls."""

import hashlib
import importlib.util
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data.batch import Batch
from data.errors import UserError
from data.index import write_whole
from data.source import Source
from data.stream import open_cache, open_split
from data.transforms import OnDevice
from eval.monitor import Monitor
from objectives.gather import world_size
from objectives.pretraining import Loss, Pretraining, Together, trunk_gradients
from pretrain import trackers
from pretrain.checkpoint import Checkpoints, find_last, point_last
from pretrain.config import Config
from pretrain.optimizer import learning_rate, set_learning_rate
from pretrain.progress import Progress
from pretrain.ranks import Ranks, Stop
from pretrain.sharding import Sharded, bare_of, full, gather, gathered, no_sync
from pretrain.start import Run, claimed, identity_of, set_up, start_accelerator


class TrainingError(UserError):
    """Training can't go on; names the step and the terms."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A signal asked the run to stop; it is saved."""

    def __init__(self, signal: str, checkpoint: Path, resume: str) -> None:
        again = "with resume=auto it goes on from there" if resume == "none" else "the same command goes on from it"
        super().__init__(f"stopped by {signal}; {checkpoint} is saved, {again}")


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
        InitialError: a model of ``init_from`` that does not fit.
        ShardError, FetchError: shards that are missing or damaged.
        StreamError: too many samples that can't be used, or a checkpoint that belongs to other data.
        CheckpointError: a checkpoint that belongs to another model, or can't be written.
        TrainingError: too many steps whose gradient is not finite.
        LostRankError: another process no longer answers.
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


def train(run: Run) -> Path:
    """The loop; what it raises see `pretrain`."""
    config, settings, accelerator = run.config, run.config.train, run.accelerator
    steps, main = settings.steps, accelerator.is_main_process
    on_device = OnDevice(config.data.views).to(accelerator.device)
    timeout = timedelta(seconds=settings.timeout)
    ranks = Ranks(accelerator.num_processes, timeout)
    warn = partial(warn_of, accelerator)
    checkpoints = Checkpoints(run.out / "checkpoints", settings.keep, settings.keep_every, warn, main=main)
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
                values |= pulls(accelerator, run.model, inputs[0], seed, whole, done)
            loss = go_backward(accelerator, run.model, inputs, seed, whole, done)
            norm = full(accelerator.clip_grad_norm_(run.model.parameters(), settings.clip_norm))
            checkpoints.copied()  # the next line changes what the thread may still copy
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
            values |= mean_terms(loss, run.bare, everywhere) | shares_cut(config.data.views.used, everywhere)
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
                    with run.evaluated() as encoder:
                        found = monitor.look(encoder)
                    progress.evaluated(found)
            if saving:
                with progress.aside():
                    if not save(run, checkpoints, wait=last):
                        warn(
                            f"step {run.step}: the checkpoint before is still being written, so there is none of this "
                            "step; raise train.save_every"
                        )
                    if settings.pictures:
                        with gathered(run.model):
                            if main:
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


def warn_of(accelerator: Accelerator, message: str) -> None:
    """Say it where the run's progress is shown."""
    accelerator.print(f"WARNING {message}")


def save(run: Run, checkpoints: Checkpoints, wait: bool) -> bool:
    """Begin to write a checkpoint; the first rank does. Returns whether it could, see `Checkpoints.save`."""
    if isinstance(run.model, Sharded):  # all give their part, if the first one can write
        busy = torch.tensor(int(checkpoints.busy and not wait), device=run.accelerator.device)
        dist.broadcast(busy, 0)
        if busy:
            return False
    elif not run.accelerator.is_main_process:
        return True
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
    """How many rows of the batch have a modality, how many of them may be longer than its view, and how many were."""
    numbers = dict[str, int]()
    for name in config.data.views.used:
        field = batch.fields.get(name)
        rows, cut = (0, None) if field is None else (len(field.rows), field.cut)
        numbers[f"rows {name}"] = rows
        numbers[f"cuttable {name}"] = 0 if cut is None else rows
        numbers[f"cut {name}"] = cut or 0
    return numbers


def terms_of(loss: Loss, bare: Pretraining) -> dict[str, int]:
    """Which terms this rank's loss has."""
    return {f"has {name}": int(name in loss.terms) for name in bare.names}


def mean_terms(loss: Loss, bare: Pretraining, everywhere: Mapping[str, int]) -> dict[str, Tensor | float]:
    """The loss and its terms over all ranks, of which some may have had nothing for a term."""
    names = [name for name in bare.names if everywhere[f"has {name}"]]
    zero = torch.zeros_like(loss.total)
    values = torch.stack([loss.total, *(loss.terms.get(name, zero).to(zero.dtype) for name in names)])
    if (world := world_size()) > 1:
        dist.all_reduce(values)
        values /= world
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
    together: Sequence[Together | None] = [None]
    if len(inputs) > 1:
        gather(model)
        with accelerator.autocast():
            together = bare_of(model).together(inputs, seed, whole, progress)
    losses: list[Loss] = []
    for part, (batch, others) in enumerate(zip(inputs, together, strict=True), 1):
        # Ranks exchange gradients once, with the last.
        with nullcontext() if part == len(inputs) else no_sync(model):
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
    accelerator: Accelerator, model: nn.Module, batch: Batch, seed: int, whole: bool, progress: float
) -> dict[str, float]:
    """`trunk_gradients` of a batch, on a pass of its own."""
    bare: Pretraining = bare_of(model)
    bare.eval()  # there is no dropout; but objectives gather statistics of what they train on, and this is only a look
    with gathered(model):
        with accelerator.autocast():
            loss = bare(batch, seed=seed, whole=whole, progress=progress)
        bare.train()
        return trunk_gradients(loss, bare.encoder.blocks.parameters())


def draw(bare: Pretraining, batch: Batch, seed: int, path: Path) -> None:
    """Write a picture of what the model makes of a batch, if it hides patches and matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from pretrain.pictures import draw_step  # matplotlib takes its time

    if (picture := draw_step(bare, batch, seed)) is not None:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, picture)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's masks: a function of the run's seed and the step, so nothing of it has to be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take signed 64-bit seeds


def shares_cut(modalities: Iterable[str], everywhere: Mapping[str, int]) -> dict[str, float]:
    """``cut_text`` and the like: the share of a modality's samples that were longer than its view, of all ranks."""
    rows = {name: everywhere[f"cuttable {name}"] for name in modalities}
    return {f"cut_{name}": everywhere[f"cut {name}"] / number for name, number in rows.items() if number}
