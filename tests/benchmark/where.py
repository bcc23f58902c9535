"""Where does the time of a training step go, and where do the FLOPs?

    python tests/benchmark/where.py                       vit_tiny, float32 and bfloat16
    python tests/benchmark/where.py --out cpu             results/where_cpu.json

Time by PyTorch's profiler, the own time of each operator (on a GPU: of its kernels), summed by
kind. FLOPs by the formula of step.py, which a test compares with PyTorch's counter.
"""

import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import record  # noqa: E402
import step  # noqa: E402

from data import option, parse_options, run_script  # noqa: E402
from ijepa import MODELS, IJEPAConfig, MaskCollator, grid_of  # noqa: E402

KINDS = {  # of operators and kernels, by what their names contain; the first that fits
    "attention": ("attention", "softmax", "bmm", "flash", "fmha"),
    "matrix products": ("addmm", "aten::mm", "gemm", "nvjet", "cutlass", "convolution", "conv"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm", "layernorm"),
    "copies and casts": ("copy", "cat", "gather", "index", "contiguous"),
    "sums and products": ("add", "mul", "sum", "div", "sub"),
}


@dataclass(frozen=True)
class WhereConfig:
    """Which step."""

    model: str = option("vit_tiny", "which model", MODELS)
    batch_size: int = option(256, "pictures a step")
    steps: int = option(4, "to look at")
    device: str | None = option(None, "cuda or cpu (default: a GPU if there is one)")
    out: str | None = option(None, "write results/where_<out>.json")


def shares(config: WhereConfig, row: str) -> dict[str, float]:
    """Percent of the time for each of `KINDS`, and the rest."""
    asked = step.StepConfig(
        model=config.model, batch_size=config.batch_size, device=config.device, rows=row
    )
    setting = step.prepare(asked)
    take = step.table_rows(setting)[row][0]()
    step.seconds_of(take, 2)
    cuda = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        step.seconds_of(take, config.steps)
    total = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")
        total[kind] += own
    return {kind: round(100 * own / sum(total.values()), 1) for kind, own in total.items()}


def flops_row(name: str, **changes) -> dict:
    """GFLOP of a step for one image, the share of each part, and what one trick would save.

    The trick: of the predictor's last layer only the target patches are read, so the MLP and the
    output projection of its context patches could be left out.
    """
    c: IJEPAConfig = dataclasses.replace(MODELS[name].config, **changes)
    masks = MaskCollator(grid_of(c.img_size, c.patch_size))
    sizes = masks.target_shapes.prod(1).tolist()
    k, m, p = masks.context_size, masks.num_targets, c.predictor_dim
    of = [step.step_flops(c, k, m, size) for size in sizes]
    total = statistics.mean(sum(parts.values()) for parts in of)
    unread = 3 * 2 * m * k * p * (p + 8 * p)  # with the gradient
    return {
        "model": name,
        "patches": f"{c.img_size}/{c.patch_size}",
        "predictor": f"{p} wide, {c.predictor_depth} deep",
        "gflop": float(f"{total / 1e9:.3g}"),
        "share": {
            part: round(100 * statistics.mean(parts[part] for parts in of) / total, 1)
            for part in of[0]
        },
        "last_layer_saves": round(100 * unread / total, 1),
    }


def main() -> None:
    config, _ = parse_options(WhereConfig, __doc__)
    rows = {row: shares(config, row) for row in ("float32", "bfloat16")}
    for row, of in rows.items():
        print(row, ", ".join(f"{kind} {share} %" for kind, share in of.items()))
    flops = [flops_row("vit_tiny"), flops_row("vit_tiny", predictor_dim=384, predictor_depth=6)]
    flops += [flops_row(name) for name in ("vit_small", "vit_base", "vit_large", "vit_huge")]
    for of in flops:
        print(of)
    if config.out:
        command = f"python tests/benchmark/where.py --out {config.out}"
        record.write(
            f"where_{config.out}", command, model=config.model, batch=config.batch_size,
            time=rows, flops=flops,
        )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
