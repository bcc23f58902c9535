"""How fast is a whole training step? Images/s, share of the matmul peak, memory, ratio to plain.

    python tests/benchmark/step.py                                     vit_tiny, on what is here
    python tests/benchmark/step.py --model vit_base --batch-size 8
    python tests/benchmark/step.py --peer PATH                         the released code beside it
    python tests/benchmark/step.py --model vit_huge --batch-size 256   for a GPU

A step is all of it: masks, crop and flip, both encoders, predictor, loss, gradient, AdamW, moving
average; the pictures are noise, in memory. The rows of a table take turns within one run, so that
a machine that slows down slows them all (networks above 200 M parameters in all: one after the
other, with the memory that each takes on a GPU); a rate is the median over the turns.

`plain` is the same step as one would first write it: attention as a formula, the optimizer and the
moving average a loop over parameters, nothing drawn ahead, nothing compiled, float32. --peer
imports the released code from a checkout (nothing of it is kept here): with our masks and batches,
and in a row of its own with its own masks and loader.

FLOPs are those that the masks require (two for a multiplication with its addition, in matrix
products only): the target encoder sees N patches, the context encoder K, the predictor M times
K + T, and a gradient costs twice the forward pass. What a program computes beyond that does not
count for it. The peak is that of a large square product in the row's number format, measured in
the same run.
"""

import dataclasses
import gc
import importlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import record  # noqa: E402

import train  # noqa: E402
from data import (  # noqa: E402
    MEAN,
    STD,
    Batch,
    Pictures,
    Plan,
    UserError,
    autocast,
    cores,
    crop_resize,
    draw_step,
    generator_for,
    normalize,
    option,
    parse_options,
    run_script,
    to_picture,
    train_batches,
)
from ijepa import (  # noqa: E402
    IJEPA,
    MODELS,
    Attention,
    IJEPAConfig,
    MaskCollator,
    grid_of,
    parameter_groups,
    sincos_positions,
)


@dataclass(frozen=True)
class StepConfig:
    """What to time."""

    model: str = option("vit_tiny", "which model", MODELS)
    img_size: int | None = option(None, "pixels")
    patch_size: int | None = option(None, "pixels")
    predictor_dim: int | None = option(None, "width of the predictor")
    predictor_depth: int | None = option(None, "its layers")
    predictor_heads: int | None = option(None, "its heads")
    batch_size: int = option(256, "pictures a step")
    device: str | None = option(None, "cuda or cpu (default: a GPU if there is one)")
    rows: str | None = option(None, "which, as in --rows plain,float32; default: all")
    peer: str | None = option(None, "a checkout of the released code, to time beside ours")
    seconds: float = option(10.0, "a row takes, beside what it takes to get going")
    turns: int = option(5, "between which the rows alternate")
    out: str | None = option(None, "write results/step_<out>.json")


# ----------------------------------------------------------------------------------- what it costs


def layer_flops(tokens: int, dim: int, hidden: float) -> float:
    """Of a layer's forward pass for one sequence: four projections, two MLP layers, attention."""
    return 2 * tokens * dim * (4 * dim + 2 * hidden) + 4 * tokens**2 * dim


def step_flops(c: IJEPAConfig, context: int, blocks: int, size: int) -> dict[str, float]:
    """FLOPs an image and step, by part: K context patches, M target blocks of T patches."""
    (rows, columns), hidden = grid_of(c.img_size, c.patch_size), c.embed_dim * c.mlp_ratio
    embed = 2 * c.patch_size**2 * c.in_chans * c.embed_dim  # a patch
    encode = [
        n * embed + c.depth * layer_flops(n, c.embed_dim, hidden) for n in (rows * columns, context)
    ]
    ends = 2 * c.embed_dim * c.predictor_dim * (context + blocks * size)
    layer = layer_flops(context + size, c.predictor_dim, 4 * c.predictor_dim)
    predict = ends + c.predictor_depth * blocks * layer
    return {"target encoder": encode[0], "context encoder": 3 * encode[1], "predictor": 3 * predict}


def mean_flops(c: IJEPAConfig, masks: MaskCollator) -> float:
    """FLOPs an image and step, over the block shapes that the masks draw."""
    sizes = masks.target_shapes.prod(1).tolist()
    return statistics.mean(
        sum(step_flops(c, masks.context_size, masks.num_targets, size).values()) for size in sizes
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the best of a few."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(10 if device.type == "cuda" else 1):
            product = a @ b
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 * (10 if device.type == "cuda" else 1) / best


# -------------------------------------------------------------------------------------- the rows


@dataclass
class Setting:
    """What all rows share."""

    config: StepConfig
    architecture: IJEPAConfig
    masks: MaskCollator
    pictures: Pictures
    device: torch.device

    @property
    def plan(self) -> Plan:
        recipe = MODELS[self.config.model].recipe
        return Plan(
            seed=0, index=torch.arange(len(self.pictures)), batch_size=self.config.batch_size,
            accum_steps=1, masks=self.masks, crop_scale=recipe.crop_scale, flip=recipe.flip,
        )  # fmt: skip

    @cached_property
    def firsts(self) -> list[int]:
        """A step for each length of target blocks: code, graphs, plans are made once for each."""
        found = {}
        for number in range(1000):  # the length is drawn first, whatever the batch
            _, targets = self.masks.sample(1, generator_for(0, "masks", number))
            found.setdefault(targets.shape[-1], number)
        return list(found.values())

    def steps(self) -> Iterator[int]:
        return itertools.chain(self.firsts, itertools.count())

    def batches(self) -> Iterator[Batch]:
        return train_batches(self.pictures, self.plan, self.steps(), self.device)

    def model(self) -> IJEPA:
        torch.manual_seed(0)
        with self.device:  # initial weights by the GPU: those of a ViT-H take long on a CPU
            return IJEPA(self.architecture)


Step = Callable[[], Tensor]  # one training step; the loss, which nobody has waited for


def ours(
    setting: Setting, bf16: bool = False, compiled: bool = False, graphs: bool = False,
    recompute: bool = False, fused: bool = False,
) -> Step:  # fmt: skip
    """The step of train.py, with its options; fused: attention by PyTorch's kernel all the same."""
    model, device = setting.model(), setting.device
    if recompute:
        train.checkpoint_activations(model)
    if compiled:
        train.compile_layers(model)
    optimizer = torch.optim.AdamW(parameter_groups(model), fused=device.type == "cuda")
    batches = setting.batches()

    def run(batch: Batch) -> Tensor:
        how = torch.autocast(device.type, torch.bfloat16) if fused else autocast(device, bf16)
        with how:
            loss = model(batch.images, batch.context_idx, batch.target_idx)
        loss.backward()
        return loss.detach()

    if graphs:
        run = train.Graphs(run, [p for p in model.parameters() if p.requires_grad])

    def step() -> Tensor:
        loss = run(next(batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graphs)
        model.update_target(0.996)
        return loss

    return step


def attention_formula(self: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, as it stands in a textbook."""
    q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return self.proj(rearrange(weights @ v, "b h n d -> b n (h d)"))


def plain(setting: Setting) -> Step:
    """The same step as one would first write it."""
    model, plan, device = setting.model(), setting.plan, setting.device
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = attention_formula.__get__(module)
    optimizer = torch.optim.AdamW(parameter_groups(model), foreach=False)
    numbers = setting.steps()

    def step() -> Tensor:
        index, crops, context_idx, target_idx = draw_step(plan, next(numbers))
        side = torch.full_like(index, setting.pictures.img_size)
        boxes = crops.boxes(side, side, plan.crop_scale).to(device)
        images = normalize(setting.pictures.centre(index))
        if plan.crop_scale != (1.0, 1.0) or plan.flip:
            images = crop_resize(images, boxes, crops.flip.to(device), side[0].item())
        loss = model(images, context_idx.to(device), target_idx.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True)
            for target, online in pairs:
                target.lerp_(online, 0.004)
        return loss.detach()

    return step


# ------------------------------------------------------------------------------- the released code


def peer_module(path: str, name: str):
    """A module of the checkout."""
    if not Path(path, "src", "models").is_dir():
        raise UserError(f"--peer {path}: no src/models there: give a checkout of the released code")
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)


def peer_loader(setting: Setting, path: str) -> Iterator[tuple]:
    """Batches as it makes them: pictures cropped by torchvision in workers, and its own masks."""
    from torchvision import transforms

    c, plan = setting.architecture, setting.plan
    steps = [transforms.RandomResizedCrop(c.img_size, scale=plan.crop_scale)]
    steps += [transforms.RandomHorizontalFlip()] * plan.flip
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(steps)
    images = setting.pictures.images.cpu()

    class Opened(torch.utils.data.Dataset):
        def __len__(self):
            return 10**9

        def __getitem__(self, i):
            return transform(to_picture(images[i % len(images)])), 0

    collator = peer_module(path, "src.masks.multiblock").MaskCollator(
        input_size=c.img_size, patch_size=c.patch_size, enc_mask_scale=(0.85, 1.0),
        pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5), nenc=1, npred=4,
        # On an 8x8 grid its default of 10 makes it search forever for blocks of 9 patches.
        min_keep=min(10, setting.masks.num_patches // 16),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        Opened(), setting.config.batch_size, collate_fn=collator, num_workers=cores(),
        pin_memory=setting.device.type == "cuda",
    )  # fmt: skip
    for (images, _), context, targets in loader:
        move = [x.to(setting.device, non_blocking=True) for x in (images, *context, *targets)]
        yield move[0], move[1 : 1 + len(context)], move[1 + len(context) :]


def peer(setting: Setting, path: str, bf16: bool = False, its_loader: bool = False) -> Step:
    """The released networks, and a step in the order of its training loop."""
    c, device = setting.architecture, setting.device
    networks = peer_module(path, "src.models.vision_transformer")
    apply_masks = peer_module(path, "src.masks.utils").apply_masks
    make = getattr(networks, setting.config.model, None)
    if make is None:
        raise UserError(f"the released code has no {setting.config.model}")
    torch.manual_seed(0)
    encoder = make(img_size=[c.img_size], patch_size=c.patch_size).to(device)
    predictor = networks.vit_predictor(
        num_patches=setting.masks.num_patches, embed_dim=c.embed_dim,
        predictor_embed_dim=c.predictor_dim, depth=c.predictor_depth,
        num_heads=c.predictor_heads,
    ).to(device)  # fmt: skip
    target_encoder = make(img_size=[c.img_size], patch_size=c.patch_size).to(device)
    target_encoder.load_state_dict(encoder.state_dict())
    target_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()])
    scaler = torch.amp.GradScaler(device.type, enabled=bf16 and device.type == "cuda")
    if its_loader:
        batches = peer_loader(setting, path)
    else:
        batches = (
            (batch.images, [batch.context_idx], list(batch.target_idx.unbind(1)))
            for batch in setting.batches()
        )

    def step() -> Tensor:
        images, context, targets = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                h = target_encoder(images)
                h = apply_masks(F.layer_norm(h, h.shape[-1:]), targets)
            loss = F.smooth_l1_loss(predictor(encoder(images, context), context, targets), h)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip(target_encoder.parameters(), encoder.parameters(), strict=True)
            for target, online in pairs:
                target.mul_(0.996).add_(0.004 * online)
        return loss.detach()

    return step


def table_rows(setting: Setting) -> dict[str, tuple[Callable[[], Step], torch.dtype]]:
    """Name -> what makes the step, and the number format of its products."""
    half, full, cuda = torch.bfloat16, torch.float32, setting.device.type == "cuda"
    rows = {
        "plain": (lambda: plain(setting), full),
        "float32": (lambda: ours(setting), full),
        "bfloat16": (lambda: ours(setting, bf16=True), half),
        "compiled": (lambda: ours(setting, bf16=True, compiled=True), half),
    }
    if not cuda:
        rows["bfloat16 fused attention"] = (lambda: ours(setting, bf16=True, fused=True), half)
        rows["compiled float32"] = (lambda: ours(setting, compiled=True), full)
    if cuda:
        rows["compiled graphs"] = (lambda: ours(setting, True, compiled=True, graphs=True), half)
        rows["graphs"] = (lambda: ours(setting, True, graphs=True), half)
        rows["recomputed"] = (lambda: ours(setting, True, recompute=True), half)
    if path := setting.config.peer:
        rows["released"] = (lambda: peer(setting, path), full)
        rows["released bfloat16"] = (lambda: peer(setting, path, True), half)
        rows["released its loader"] = (
            lambda: peer(setting, path, cuda, True),
            half if cuda else full,
        )
    if wanted := setting.config.rows:
        names = [name.strip() for name in wanted.split(",")]
        if unknown := set(names) - set(rows):
            raise UserError(f"--rows: no {', '.join(sorted(unknown))}: there are {', '.join(rows)}")
        rows = {name: rows[name] for name in names}
    return rows


# ------------------------------------------------------------------------------------- the clock


def seconds_of(step: Step, count: int) -> float:
    """Wall time of so many steps."""
    start = time.perf_counter()
    for _ in range(count):
        loss = step()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def measure(setting: Setting) -> list[dict]:
    """A dict for each row of the table."""
    c, config, cuda = setting.architecture, setting.config, setting.device.type == "cuda"
    flops, peaks = mean_flops(c, setting.masks), {}
    found, alive = {}, {}
    rows = table_rows(setting)
    torch.compiler.reset()  # an earlier table's code: beyond a limit layers would stay eager
    sincos_positions(4, (1, 1))  # einops' first use, which torch 2.6 cannot have on that device
    with torch.device("meta"):
        together = sum(p.numel() for p in IJEPA(c).parameters()) < 200e6

    def begin(name: str) -> int:
        """Build a row, and find out how many of its steps a turn takes."""
        make, _ = rows[name]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        alive[name] = make()
        seconds_of(alive[name], 1)
        found[name] = {"first_step_s": round(time.perf_counter() - start, 1), "times": []}
        seconds_of(alive[name], len(setting.firsts))
        once = seconds_of(alive[name], 2) / 2
        return max(1, round(config.seconds / config.turns / once))

    def turn(name: str, count: int) -> None:
        dtype = rows[name][1]
        peaks[dtype] = max(peaks.get(dtype, 0.0), matmul_peak(setting.device, dtype))
        found[name]["times"].append(seconds_of(alive[name], count) / count)
        rate = config.batch_size / found[name]["times"][-1]
        print(f"    {name}: {rate:.4g} images/s", file=sys.stderr, flush=True)

    if together:
        counts = {name: begin(name) for name in rows}
        for _ in range(config.turns):
            for name, count in counts.items():
                turn(name, count)
    else:
        for name in rows:
            count = begin(name)
            for _ in range(config.turns):
                turn(name, count)
            if cuda:
                found[name]["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            del alive[name]
            gc.collect()
            torch.compiler.reset()
            if cuda:
                torch.cuda.empty_cache()
    report = []
    for name, of in found.items():
        rate = config.batch_size / statistics.median(of["times"])
        spread = [config.batch_size / t for t in (max(of["times"]), min(of["times"]))]
        peak = peaks[rows[name][1]]
        report.append(
            {"name": name, "images_per_s": float(f"{rate:.4g}")}
            | {"slowest_fastest": [float(f"{x:.4g}") for x in spread]}
            | {"peak_tflops": round(peak / 1e12, 3)}
            # Its own masks ask for other FLOPs.
            | ({} if "its loader" in name else {"share_of_peak": round(rate * flops / peak, 3)})
            | {key: value for key, value in of.items() if key != "times"}
        )
    for row in report:
        for base in ("plain", "released"):
            of = next((r for r in report if r["name"] == base), None)
            if of:
                row[f"against {base}"] = round(row["images_per_s"] / of["images_per_s"], 2)
    return report


def format_rows(rows: list[dict]) -> str:
    """The table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([str(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def prepare(config: StepConfig) -> Setting:
    """Pictures of noise and masks for a model; UserError for what does not fit together."""
    names = ("img_size", "patch_size", "predictor_dim", "predictor_depth", "predictor_heads")
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        architecture = dataclasses.replace(MODELS[config.model].config, **changes)
        masks = MaskCollator(grid_of(architecture.img_size, architecture.patch_size))
    except ValueError as error:
        raise UserError(str(error)) from error
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    side = architecture.img_size
    count = max(config.batch_size, min(50_000, int(2e9 / (3 * side * side))))
    count = count if device.type == "cuda" else max(512, config.batch_size)
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=device)
    pictures = Pictures(images, {"none": torch.full((count,), -1)}, {"none": []})
    return Setting(config, architecture, masks, pictures, device)


def main() -> None:
    config, _ = parse_options(StepConfig, __doc__)
    setting = prepare(config)
    rows = measure(setting)
    c, masks = setting.architecture, setting.masks
    gflop = mean_flops(c, masks) / 1e9
    print(
        f"{config.model} {c.img_size}/{c.patch_size}, predictor {c.predictor_dim} wide and "
        f"{c.predictor_depth} deep, batch {config.batch_size}, context {masks.context_size} of "
        f"{masks.num_patches} patches: {gflop:.2f} GFLOP an image; {record.hardware()}, "
        f"torch {torch.__version__}"
    )
    print(format_rows(rows))
    if config.out:
        words = [word.replace(config.peer, "PATH") if config.peer else word for word in sys.argv]
        words = [f'"{word}"' if " " in word else word for word in words[1:]]
        command = " ".join(["python tests/benchmark/step.py", *words])
        record.write(
            f"step_{config.out}", command, model=config.model, batch=config.batch_size,
            img_size=c.img_size, patch_size=c.patch_size,
            predictor=[c.predictor_dim, c.predictor_depth], gflop=round(gflop, 2), rows=rows,
        )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
