"""How fast a training step is: ours beside open_clip's, transformers' CLIP, FLAVA's and lightly's MAE, timed in turn.

    python benchmarks/step.py                       # 20 minutes on 2 CPU cores; a GPU takes ViT-S/16 and B/16
    python benchmarks/step.py --rounds 3 --batches 64 --lengths --modes eager       # a quick look

bf16 by autocast, AdamW, forward, backward and optimiser step on random data in memory; all models of a table have the
same width, depth, heads, patches and tokens. Each is alone in a process, as in training, and in its turn makes a step
that is not timed and one that is. On a CPU these processes keep the memory that steps free, as runs of ours do
(pretrain/allocator.py), and so all sides have what else only ours would; with --system none has it. FLAVA gets its
image tokens for free, and a multimodal encoder of half the depth, as in its paper. lightly's MAE has a decoder as large
as ours; it sees images alone, and beside it stands our masked-region objective on images alone. Where a peer is absent,
its line says why.

Products are counted by torch's flop counter, with attention as plain products, before anything is compiled. "GFLOP/s"
is what was counted of forward and backward over the time of a whole step, and "of peak" its share of the fastest square
product in bf16 that was measured on the same device and threads. Work that a step leaves out (patches that it does not
see, a last block that only computes what is read) is not counted, so a step may be faster at a lower share.

On a GPU one step of each is profiled, too: flash attention's kernels, and how often the host waits for the device.
The last line is one JSON object with the ratios at the first batch size, eager, and milliseconds of all.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, FlavaConfig, FlavaForPreTraining

from benchmarks.measure import Spread, elapsed, in_turn, ratio, spread, table
from benchmarks.peers import MissingPeerError, load, open_clip
from data.batch import Batch, Field
from data.rows import start_worker
from data.transforms import ImageView, TextView, Views
from objectives.contrastive import ContrastiveConfig
from objectives.masked_language import MaskedLanguageConfig
from objectives.masked_region import MaskedRegionConfig
from objectives.pretraining import KeepConfig, ObjectivesConfig, Pretraining, UnimodalKeepConfig
from pretrain.allocator import keep_freed_memory
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import ModelConfig, Vocabulary

WORDS = 8000
VOCABULARY = Vocabulary(size=WORDS, pad_id=1, mask_id=4, special_ids=(0, 1, 2, 3, 4))
MAE_KEEP = 0.25

Step = Callable[[], Tensor]


class Size(NamedTuple):
    """Of model and inputs."""

    side: int
    patch: int
    tokens: int
    width: int
    depth: int
    heads: int
    embed: int


SIZES = {
    "micro": Size(side=32, patch=8, tokens=16, width=64, depth=2, heads=2, embed=32),
    "small": Size(side=64, patch=8, tokens=32, width=192, depth=6, heads=3, embed=128),
    "vit_s16": Size(side=224, patch=16, tokens=77, width=384, depth=12, heads=6, embed=512),
    "vit_b16": Size(side=224, patch=16, tokens=77, width=768, depth=12, heads=12, embed=512),
}


class Side(NamedTuple):
    """A model, its loss on the batch, and what compiles it as its own users do."""

    model: nn.Module
    loss: Step
    compile: Callable[[], object]


Make = Callable[[Batch, Size], Side]


def pairs(n: int, size: Size) -> Batch:
    """Random images and texts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size.side, size.side, generator=generator)
    ids = torch.randint(5, WORDS, (n, size.tokens), generator=generator)
    return Batch({"image": Field(images, torch.arange(n)), "text": Field(ids, torch.arange(n))}, n, [""] * n)


def ours(batch: Batch, size: Size, objectives: ObjectivesConfig) -> Side:
    """This project's step."""
    device = batch.fields["image"].x.device
    config = ModelConfig(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        embed_dim=size.embed,
        image_patch=size.patch,
        audio_patch=size.patch,
    )
    text = TextView(max_tokens=size.tokens) if "text" in batch.fields else None
    views = Views(ImageView(size=size.side), text, None)
    model = Pretraining(Encoder(config, views, VOCABULARY), objectives).to(device)
    seeds = iter(range(10**9))
    return Side(model, lambda: model(batch, seed=next(seeds)).total, model.encoder.compile_blocks)


def contrastive_only(keep: float) -> ObjectivesConfig:
    """No masked objectives; the share of patches that the encoder sees."""
    return ObjectivesConfig(
        masked_language=MaskedLanguageConfig(weight=0),
        masked_region=MaskedRegionConfig(weight=0),
        contrastive=ContrastiveConfig(),
        keep=UnimodalKeepConfig(image=keep),
    )


def region_only() -> ObjectivesConfig:
    """Masked patches of all images, as many as MAE hides."""
    return ObjectivesConfig(
        contrastive=ContrastiveConfig(weight=0),
        masked_language=MaskedLanguageConfig(weight=0),
        joint_keep=KeepConfig(image=MAE_KEEP),
        joint_share=1.0,
    )


def regions(batch: Batch, size: Size) -> Side:
    """Our masked-region objective on the images alone."""
    return ours(images_of(batch), size, region_only())


def clip(batch: Batch, size: Size) -> Side:
    """open_clip's."""
    model_module, loss_module = open_clip("model"), open_clip("loss")
    images, ids = batch.fields["image"].x, batch.fields["text"].x
    model = open_clip_model(model_module, size, WORDS).to(images.device)
    loss = loss_module.ClipLoss()
    return Side(model, lambda: loss(*model(images, ids)), model.compile)


def open_clip_model(module: Any, size: Size, words: int, **text: Any) -> nn.Module:
    """open_clip's CLIP of a size, of a vocabulary of ``words``; ``text`` goes to its CLIPTextCfg."""
    model: nn.Module = module.CLIP(
        embed_dim=size.embed,
        vision_cfg=module.CLIPVisionCfg(
            layers=size.depth,
            width=size.width,
            head_width=size.width // size.heads,
            patch_size=size.patch,
            image_size=size.side,
        ),
        text_cfg=module.CLIPTextCfg(
            context_length=size.tokens,
            vocab_size=words,
            width=size.width,
            heads=size.heads,
            layers=size.depth,
            **text,
        ),
    )
    return model


def stock_clip(batch: Batch, size: Size) -> Side:
    """That of `transformers`."""
    shape = sizes_of(size)
    config = CLIPConfig(
        text_config={
            **shape,
            "vocab_size": WORDS,
            "max_position_embeddings": size.tokens,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        vision_config={**shape, "image_size": size.side, "patch_size": size.patch},
        projection_dim=size.embed,
    )
    images, ids = batch.fields["image"].x, batch.fields["text"].x
    model: Any = CLIPModel(config)
    model.to(images.device).train()
    return Side(model, lambda: model(input_ids=ids, pixel_values=images, return_loss=True).loss, model.compile)


def sizes_of(size: Size) -> dict[str, int]:
    """As configurations of `transformers` name them."""
    return {
        "hidden_size": size.width,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.depth,
    }


def flava(batch: Batch, size: Size) -> Side:
    """FLAVA's pretraining: all of its losses, its image tokens given."""
    shape, image_words = sizes_of(size), 8192
    image = {**shape, "image_size": size.side, "patch_size": size.patch, "vocab_size": image_words, "mask_token": True}
    config = FlavaConfig(
        image_config=image,
        text_config={**shape, "vocab_size": WORDS, "max_position_embeddings": size.tokens, "pad_token_id": 1},
        multimodal_config={**shape, "num_hidden_layers": size.depth // 2},
        hidden_size=size.width,
        projection_dim=size.embed,
        init_codebook=False,
    )
    images, ids = batch.fields["image"].x, batch.fields["text"].x
    device = images.device
    model: Any = FlavaForPreTraining(config)
    model.to(device).train()
    generator = torch.Generator(device.type).manual_seed(0)
    n, patches = len(ids), (size.side // size.patch) ** 2

    def loss() -> Tensor:
        chosen = torch.rand(ids.shape, generator=generator, device=device) < 0.15
        hidden = torch.rand((n, patches), generator=generator, device=device) < 0.4
        out = model(
            input_ids=ids,
            input_ids_masked=ids.masked_fill(chosen, 4),
            pixel_values=images,
            attention_mask=torch.ones_like(ids),
            bool_masked_pos=hidden,
            mlm_labels=ids.masked_fill(~chosen, -100),
            mim_labels=torch.randint(image_words, (n, patches), generator=generator, device=device),
            itm_labels=torch.ones(n, dtype=torch.long, device=device),
            skip_unmasked_multimodal_encoder=True,
            return_loss=True,
        )
        total: Tensor = out.loss
        return total

    return Side(model, loss, model.compile)


def mae(batch: Batch, size: Size) -> Side:
    """lightly's MAE, put together as its examples do, with our decoder's size."""
    modules, utils, timm = (load(name) for name in ("lightly.models.modules", "lightly.models.utils", "timm.models"))
    images = batch.fields["image"].x
    vit = timm.VisionTransformer(
        img_size=size.side,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        num_classes=0,
    )
    decoder_size = MaskedRegionConfig()
    encoder = modules.MaskedVisionTransformerTIMM(vit=vit)
    decoder = modules.MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches,
        patch_size=size.patch,
        embed_dim=size.width,
        decoder_embed_dim=decoder_size.decoder_width,
        decoder_depth=decoder_size.decoder_depth,
        decoder_num_heads=decoder_size.decoder_heads,
    )
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(images.device)
    n, length = len(images), encoder.sequence_length

    def loss() -> Tensor:
        keep, hidden = utils.random_token_mask((n, length), mask_ratio=1 - MAE_KEEP, device=images.device)
        seen = decoder.embed(encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (n, length))
        tokens = utils.set_at_index(tokens, keep, seen.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, size.patch), hidden - 1)
        return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))

    return Side(model, loss, lambda: (encoder.compile(), decoder.compile()))


# Name -> its side from a batch of images and texts.
SIDES: dict[str, Make] = {
    "ours, contrastive": partial(ours, objectives=contrastive_only(1.0)),
    "ours, contrastive, 50 % of patches": partial(ours, objectives=contrastive_only(0.5)),
    "ours, all objectives": partial(ours, objectives=ObjectivesConfig()),
    "open_clip": clip,
    "transformers' CLIP": stock_clip,
    "FLAVA": flava,
    "ours, masked regions of images": regions,
    "lightly's MAE": mae,
}
ON_IMAGES = ("ours, masked regions of images", "lightly's MAE")
COMPILED = ", compiled"


def images_of(batch: Batch) -> Batch:
    """Without the texts."""
    return batch._replace(fields={"image": batch.fields["image"]})


def train_step(side: Side, device: torch.device) -> Step:
    """Forward, backward and update; returns the loss."""
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            value = side.loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def count(side: Side, device: torch.device) -> tuple[int, int]:
    """Floating-point operations of products, of the forward pass and of both passes; leaves no gradients."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autocast(device.type, torch.bfloat16):
            value = side.loss()
        forward = counter.get_total_flops()
        value.backward()  # type: ignore[no-untyped-call]
    side.model.zero_grad()
    return forward, counter.get_total_flops()


def peak(device: torch.device) -> float:
    """Most floating-point operations per second of a square product in bf16; some seconds."""
    best = 0.0
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(x)

        def multiply(x: Tensor = x, y: Tensor = y, out: Tensor = out) -> None:
            torch.mm(x, y, out=out)

        best = max([best, *(2 * n**3 / elapsed(multiply, device) for _ in range(10))])
    return best


def waits(step: Step) -> tuple[int, int]:
    """Of one step on a GPU: how many of flash attention's kernels run, and how often the host waits for the device."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
    names = [event.name for event in trace.events() or ()]
    flash = sum("flash" in name and "::" in name and not name.startswith("aten") for name in names)
    return flash, sum(name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for name in names)


class Case(NamedTuple):
    """Outcome of one table."""

    rounds: list[dict[str, float]]
    lines: list[list[str]]


# Title of a side -> its step, in the process that makes it.
_steps: dict[str, Step] = {}


def begin(
    title: str, make: Make, n: int, size: Size, device: torch.device, threads: int, keep: bool
) -> tuple[int, int]:
    """Make a side in this process, and say what `count` says of it.

    Raises:
        MissingPeerError: the side is not to be had.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep and device.type == "cpu":
        keep_freed_memory()
    side = make(pairs(n, size).to(device), size)
    counted = count(side, device)
    if title.endswith(COMPILED):
        side.compile()
    _steps[title] = train_step(side, device)
    rest()
    return counted


def again(title: str, device: torch.device) -> float:
    """Seconds of a step that follows another of the same side, as steps do."""
    elapsed(_steps[title], device)
    seconds = elapsed(_steps[title], device)
    rest()
    return seconds


def rest() -> None:
    """Leave memory to the other processes; the step that is not timed asks for it again."""
    torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def waits_of(title: str) -> tuple[int, int]:
    """What `waits` says of the side that was begun here."""
    return waits(_steps[title])


def measure(
    n: int, size: Size, modes: list[str], rounds: int, fastest: float, device: torch.device, keep: bool
) -> Case:
    """Time all sides, eager or compiled or both, in turn, each in a process of its own.

    Args:
        n: pairs of a step.
        size: of models and inputs.
        modes: eager, compiled.
        rounds: times that each step is timed.
        fastest: what `peak` found.
        device: where.
        keep: whether processes on a CPU keep the memory that they free.
    """
    counted: dict[str, tuple[int, int]] = {}
    absent: dict[str, str] = {}
    processes: dict[str, Executor] = {}
    with ExitStack() as stack:
        for name, mode in product(SIDES, modes):
            if name in absent:
                continue
            title = name + (COMPILED if mode == "compiled" else "")
            process = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), start_worker))
            made = process.submit(begin, title, SIDES[name], n, size, device, torch.get_num_threads(), keep)
            try:
                counted[title] = made.result()
            except MissingPeerError as error:
                absent[name] = str(error)
            else:
                processes[title] = process

        def seconds(title: str) -> float:
            return processes[title].submit(again, title, device).result()

        taken = in_turn({title: partial(seconds, title) for title in processes}, rounds, warm_up=2)
        waited: dict[str, tuple[int, int]] = {}
        if device.type == "cuda":
            waited = {title: process.submit(waits_of, title).result() for title, process in processes.items()}
    lines = []
    for title in processes:
        time: Spread = spread(taken, title)
        forward, both = counted[title]
        against = None if title.removesuffix(COMPILED) in ON_IMAGES else ratio(taken, "open_clip", title)
        lines.append(
            [
                title,
                time.show(1, 1000),
                f"{n / time.median:,.0f}",
                f"{forward / 1e9:,.3g}",
                f"{both / time.median / 1e9:,.3g}",
                f"{both / time.median / fastest:.1%}",
                "-" if against is None else f"{against:.2f}x",
                *map(str, waited.get(title, ())),
            ]
        )
    lines += [[name, f"absent: {reason}", *[""] * (len(lines[0]) - 2)] for name, reason in absent.items()]
    return Case(taken, lines)


def ratios(rounds: list[dict[str, float]]) -> dict[str, float | None]:
    """What is asked of the step; above 1 ours is faster, but in ``all_time_vs_own_contrastive``."""
    own, kept, every = "ours, contrastive", "ours, contrastive, 50 % of patches", "ours, all objectives"
    return {
        "contrastive_vs_open_clip": ratio(rounds, "open_clip", own),
        "contrastive_keep50_vs_open_clip": ratio(rounds, "open_clip", kept),
        "contrastive_vs_transformers_clip": ratio(rounds, "transformers' CLIP", own),
        "contrastive_keep50_vs_transformers_clip": ratio(rounds, "transformers' CLIP", kept),
        "all_time_vs_own_contrastive": ratio(rounds, every, own),
        "all_vs_flava": ratio(rounds, "FLAVA", every),
        "masked_region_vs_lightly_mae": ratio(rounds, "lightly's MAE", "ours, masked regions of images"),
    }


def length(text: str) -> tuple[int, int]:
    """``128x64`` -> (128, 64)."""
    try:
        side, tokens = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: allowed is SIDExTOKENS, such as 128x64") from None
    return side, tokens


def main(argv: list[str] | None = None) -> None:
    """Print the tables and the JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda"
    parser = argparse.ArgumentParser(description="Time training steps in turn.")
    parser.add_argument("--rounds", type=int, default=7, help="times that each step is timed, in turn")
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=["vit_s16", "vit_b16"] if large else ["small"],
        help="of the models",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[256, 64] if large else [64, 16, 256], help="pairs of a step"
    )
    parser.add_argument(
        "--lengths",
        type=length,
        nargs="*",
        default=[(384, 77)] if large else [(128, 64)],
        metavar="SIDExTOKENS",
        help="longer inputs, at the first batch size",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("eager", "compiled"),
        default=["eager", "compiled"],
        help="at the first batch size",
    )
    parser.add_argument(
        "--system", action="store_true", help="give freed memory back to the system, as malloc does if nobody tells it"
    )
    given = parser.parse_args(argv)
    fastest = peak(device)
    name = torch.cuda.get_device_name() if large else f"{torch.get_num_threads()} threads"
    print(f"{device.type}, {name}; fastest product in bf16: {fastest / 1e9:,.0f} GFLOP/s\n", flush=True)
    header = ["step", "ms (quartiles)", "samples/s", "forward GFLOP", "GFLOP/s", "of peak", "against open_clip"]
    header += ["flash kernels", "waits"] if large else []
    figures: dict[str, Any] = {}
    cases: dict[str, dict[str, float]] = {}
    for chosen in given.sizes:
        size, first = SIZES[chosen], given.batches[0]
        plan = [(batch, size, ["eager"] if i else given.modes) for i, batch in enumerate(given.batches)]
        plan += [(first, size._replace(side=side, tokens=tokens), ["eager"]) for side, tokens in given.lengths]
        for batch, shape, modes in plan:
            case = measure(batch, shape, modes, given.rounds, fastest, device, not given.system)
            title = f"{chosen}, batch {batch}, {shape.side} px in patches of {shape.patch}, {shape.tokens} tokens"
            print(f"{title}, width {shape.width}, depth {shape.depth}:\n\n{table(header, case.lines)}", flush=True)
            figures = figures or ratios(case.rounds)
            medians = {side: round(1000 * spread(case.rounds, side).median, 2) for side in case.rounds[0]}
            cases[f"{chosen} {batch} {shape.side}x{shape.tokens}"] = medians
    print(json.dumps({**figures, "ms": cases, "peak_gflops": round(fastest / 1e9)}))


if __name__ == "__main__":
    main()
