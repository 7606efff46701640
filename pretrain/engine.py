"""The training run: build everything from a Config, then one loop that reads on a screen."""

import hashlib
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.batch import Batch
from data.errors import UserError
from data.index import write_whole
from data.source import Source
from data.stream import Stream, open_train
from data.text import MAX_CAPTIONS, TokenizerConfig, continues_word, load_tokenizer, train_tokenizer
from data.transforms import OnDevice
from objectives.pretraining import Contrast, Loss, Pretraining, trunk_gradients
from pretrain.checkpoint import find_last, load_checkpoint, save_checkpoint
from pretrain.config import Config, ConfigError, TrainConfig, to_yaml
from pretrain.initial import load_initial
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import Vocabulary
from pretrain.progress import Progress

# Settings that change memory and speed alone.
SAME_RESULT = {"objectives.contrastive.tile"}


class TrainingError(UserError):
    """Training can't go on; names the step and the terms."""


def pretrain(config: Config, sources: Sequence[Source] | None = None) -> Path:
    """Train from the start or from the newest checkpoint to the last step.

    Args:
        config: the whole run. ``config.out`` gets config.yaml, env.json, metrics.jsonl and checkpoints/.
        sources: ``open_train(config.data)``, for those who have it already.

    Returns:
        the last checkpoint's folder.

    Raises:
        ConfigError: settings that this machine or these data can't meet.
        ShardError, FetchError: shards that are missing or damaged.
        StreamError: too many samples that can't be used, or a checkpoint that belongs to other data.
        CheckpointError: a checkpoint that belongs to another model.
        TrainingError: a loss that is not finite.
    """
    accelerator = start_accelerator(config.train)
    checkpoints = prepare_folder(config)
    sources = open_train(config.data) if sources is None else sources
    check_modalities(config, sources)
    resumed_from = find_last(checkpoints)
    tokenizer = make_tokenizer(config.tokenizer, sources, resumed_from)
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
    if config.train.compile:
        encoder.compile_blocks()
    continues = continues_word(tokenizer) if config.objectives.masked_language.whole_words else None
    bare = Pretraining(encoder, config.objectives, continues)
    bare_optimizer = make_optimizer(bare, config.train)
    model, optimizer = accelerator.prepare(bare, bare_optimizer)
    step = 0
    if resumed_from is not None:
        step = load_checkpoint(resumed_from, bare, bare_optimizer, identity)
        print(f"resumed from {resumed_from} at step {step}")
        if changed := stream.load(resumed_from):
            print("the data have changed, a new pass over them begins:\n  " + "\n  ".join(changed))
        if step > config.train.steps:
            raise ConfigError(f"train.steps={config.train.steps}, but {resumed_from} has done {step} already")
        if step == config.train.steps:
            return resumed_from
    if stream.steps is not None and stream.steps < config.train.steps:
        raise ConfigError(f"train.steps={config.train.steps}, but max_epochs of all sources end at step {stream.steps}")
    record_run(config)
    drop_later_metrics(Path(config.out) / "metrics.jsonl", step)
    describe(config, accelerator, encoder, sources, len(tokenizer))

    steps, batch_size = config.train.steps, config.train.batch_size
    on_device = OnDevice(config.data.views).to(accelerator.device)
    # A line at each checkpoint too, so that none before it is lost to a run that resumes from it.
    every = (config.train.log_every, config.train.save_every)
    progress = Progress(Path(config.out) / "metrics.jsonl", steps, step, batch_size, every, stream.skips)
    model.train()
    batches = progress.timed(stream.batches())
    while True:
        batch = next(batches)  # there are enough of them
        rate = learning_rate(config.train, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        whole = step >= steps * (1 - config.objectives.final_whole)
        inputs = on_device(batch.to(accelerator.device)).split(config.train.accumulate)
        seed = step_seed(config.seed, step)
        values: dict[str, torch.Tensor | float] = {}
        if config.train.gradients_every is not None and step % config.train.gradients_every == 0:
            values |= pulls(accelerator, bare, inputs[0], seed, whole, step / steps)
        loss = go_backward(accelerator, model, inputs, seed, whole, step / steps)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bare.after_step(step / steps)
        if progress.due:
            check_finite(loss, norm, step)
        values |= {"loss": loss.total, **loss.terms, "gradient_norm": norm, "learning_rate": rate, **shares_cut(batch)}
        progress.update(values)
        if step % config.train.save_every == 0 or step == steps:
            saved = save_checkpoint(
                checkpoints, step, bare, tokenizer, bare_optimizer, stream, identity, config.train.keep
            )
            if config.train.pictures:
                draw(bare, inputs[0], seed, Path(config.out) / "pictures" / f"step-{step:08}.png")
            if step == steps:
                return saved


def go_backward(
    accelerator: Accelerator, model: nn.Module, inputs: Sequence[Batch], seed: int, whole: bool, progress: float
) -> Loss:
    """Forward and backward, one micro-batch after the other; returns the means of their losses."""
    bare: Pretraining = accelerator.unwrap_model(model)
    seeds = [seed] if len(inputs) == 1 else [step_seed(seed, part) for part in range(len(inputs))]
    contrasts: list[Contrast | None] = [None] * len(inputs)
    config = bare.config
    if len(inputs) > 1 and config.contrastive.cached and config.weight("contrastive", progress) > 0:
        with accelerator.autocast():
            contrasts = [*bare.contrast_together(inputs, seeds, whole)]
    losses: list[Loss] = []
    for part, (batch, its_seed, contrast) in enumerate(zip(inputs, seeds, contrasts, strict=True), 1):
        # Ranks exchange gradients once, with the last.
        with nullcontext() if part == len(inputs) else accelerator.no_sync(model):
            loss: Loss = model(batch, seed=its_seed, whole=whole, progress=progress, contrast=contrast)
            accelerator.backward(loss.total / len(inputs))
        losses.append(Loss(loss.total.detach(), {name: term.detach() for name, term in loss.terms.items()}))
    if len(losses) == 1:
        return losses[0]
    names = {name: None for loss in losses for name in loss.terms}
    means = {name: torch.stack([loss.terms[name] for loss in losses if name in loss.terms]).mean() for name in names}
    return Loss(torch.stack([loss.total for loss in losses]).mean(), means)


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


def start_accelerator(config: TrainConfig) -> Accelerator:
    """One process, on the device that Accelerate finds, in the precision asked for.

    Raises:
        ConfigError: launched with several processes.
    """
    # Without CUDA it is the CPU: Apple's GPUs have no float64, in which the log-mel is computed.
    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu)
    if state.num_processes > 1:
        raise ConfigError(f"launched with {state.num_processes} processes, training runs in one: add --num_processes 1")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if fast_in_bf16(state.device) else "fp32"
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if precision == "bf16" else "no")
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets one thread per process where nobody chose, which would leave the others idle.
        torch.set_num_threads(config.threads or available_cpus())
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


def prepare_folder(config: Config) -> Path:
    """Make the run's folder; returns its ``checkpoints``.

    Raises:
        ConfigError: ``resume=none`` where there is a checkpoint already.
    """
    out = Path(config.out)
    checkpoints = out / "checkpoints"
    if config.resume == "none" and find_last(checkpoints) is not None:
        raise ConfigError(f"resume=none, but {checkpoints} holds a checkpoint: choose another `out`, or remove it")
    checkpoints.mkdir(parents=True, exist_ok=True)
    return checkpoints


def record_run(config: Config) -> None:
    """Write config.yaml and env.json, once it is sure that this configuration runs."""
    out = Path(config.out)
    (out / "config.yaml").write_text(to_yaml(config))
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


def check_modalities(config: Config, sources: Sequence[Source]) -> None:
    """Print how many samples have each modality, and what nothing reads.

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
    for source in sources:
        counts = ", ".join(f"{source.count(name)} with {name}" for name in config.data.views.used)
        print(f"{'samples' if len(sources) == 1 else source.name:9} {len(source)}: {counts}")
    if unread:
        print(f"          members that nothing reads: {unread}")


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
    config: TokenizerConfig, sources: Sequence[Source], checkpoint: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint if there is one, else the named one, else one trained on the captions.

    Raises:
        UserError: the tokenizer lacks a token that training needs, or ``train`` is too small.
    """
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "encoder" / "tokenizer")
    if config.name is not None:
        return load_tokenizer(config.name)
    captions = chain.from_iterable(source.captions(MAX_CAPTIONS // len(sources)) for source in sources)
    return train_tokenizer(captions, config.train or 0)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What the model needs to know of a tokenizer."""
    return Vocabulary(
        len(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids))
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear layers, and nothing else."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up from 0, then a cosine to 0 at the last step; ``step`` counts from 0."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's masks: a function of the run's seed and the step, so nothing of it has to be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take signed 64-bit seeds


def check_finite(loss: Loss, norm: torch.Tensor, step: int) -> None:
    """Stop at a loss or gradient that is not finite.

    Raises:
        TrainingError: names the step and every term.
    """
    if math.isfinite(loss.total.item()) and math.isfinite(float(norm)):
        return
    terms = ", ".join(f"{name} {value.item():.3g}" for name, value in loss.terms.items())
    raise TrainingError(
        f"step {step}: the loss or its gradient is not finite ({terms}, gradient norm {float(norm):.3g}); "
        "try a lower train.learning_rate, or train.precision=fp32"
    )


def shares_cut(batch: Batch) -> dict[str, float]:
    """``cut_text`` and the like: the share of a modality's samples that were longer than its view."""
    fields = batch.fields.items()
    return {f"cut_{name}": field.cut / len(field.rows) for name, field in fields if field.cut is not None}


def drop_later_metrics(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: those after it are written again by the resumed run."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def describe(
    config: Config, accelerator: Accelerator, encoder: Encoder, sources: Sequence[Source], vocabulary: int
) -> None:
    """Say what is about to be trained, on what and where."""
    parameters = sum(p.numel() for p in encoder.parameters())
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
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
