"""How fast does a model train on this machine, and how much memory does it need?

    python scripts/benchmark.py --model vit_nano
    python scripts/benchmark.py --model vit_huge --batch-size 64 --compile

One process runs whole training steps (masks, forward, backward, AdamW, EMA) on random images. Data
loading is left out. One line is printed: images per second by the median step, its time, the
fastest and the slowest step, and the peak memory (of the process on a CPU, of tensors on a GPU;
not measured on a CPU under Windows).
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import UserError, distributed, option, parse_args, run_main
from ijepa import IJEPA, MODELS, parameter_groups, to_pair
from train import TrainConfig, compile_layers, make_masks, resolve


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of this script."""

    model: str = option("vit_nano", "architecture and recipe", choices=[*MODELS])
    batch_size: int = option(64, "images per step")
    steps: int = option(20, "timed steps, after a quarter as many to warm up")
    device: str | None = option(None, "cpu, cuda or cuda:1; default: a GPU if there is one")
    bf16: bool | None = option(None, "bfloat16 autocast; default: on a GPU that has it")
    compile: bool = option(False, "torch.compile every transformer layer, as train.py does")


def step_times(config: BenchmarkConfig, device: torch.device, bf16: bool) -> list[float]:
    """Seconds of each timed training step."""
    recipe, architecture, _ = resolve(TrainConfig(model=config.model, batch_size=config.batch_size))
    masks = make_masks(recipe, architecture)
    torch.manual_seed(0)
    model = IJEPA(architecture).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model), fused=True)
    if config.compile:
        compile_layers(model)
    size = to_pair(architecture.img_size)
    images = torch.randn(config.batch_size, architecture.in_chans, *size, device=device)

    times = []
    for _ in range(config.steps + config.steps // 4 + 1):
        start = time.perf_counter()
        context_idx, target_idx = (x.to(device) for x in masks.sample(config.batch_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(images, context_idx, target_idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(0.996)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[-config.steps :]


def peak_memory(device: torch.device) -> float:
    """GB, of this process or of the tensors on the GPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def main() -> None:
    config = parse_args(BenchmarkConfig, __doc__)
    if min(config.steps, config.batch_size) < 1:
        raise UserError("--steps and --batch-size must be at least 1")
    with distributed(config.device, alone=True) as process:
        device = process.device
        bf16 = process.bf16 if config.bf16 is None else config.bf16
        times = step_times(config, device, bf16)
        memory = peak_memory(device)
    middle, low, high = (1000 * f(times) for f in (statistics.median, min, max))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name += f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    mode = ("bf16" if bf16 else "float32") + (", compiled" if config.compile else "")
    print(
        f"{config.model} on {name}, {mode}, batch {config.batch_size}: "
        f"{1000 * config.batch_size / middle:.1f} images/s, {middle:.1f} ms/step "
        f"({low:.1f} to {high:.1f}, {config.steps} steps), peak memory {memory:.2f} GB"
    )


if __name__ == "__main__":
    run_main(main)
