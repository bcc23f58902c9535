"""The fast ways of doing a training step, against the plain one; and what the benchmark counts."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))
import step

import train
from data import Place, UserError, _AttentionFormula, autocast
from ijepa import IJEPA, MODELS, IJEPAConfig, MaskCollator

CPU = torch.device("cpu")
SMALL = IJEPAConfig(
    img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=3, predictor_dim=12,
    predictor_depth=2, predictor_heads=3, init_std=0.06,
)  # fmt: skip


def setting(**changes) -> step.Setting:
    config = step.StepConfig(model="vit_nano", batch_size=8, device="cpu", **changes)
    return step.prepare(config)


def drawn(config: IJEPAConfig, batch: int, seed: int = 0) -> tuple:
    """Images and masks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, config.img_size, config.img_size, generator=generator)
    masks = MaskCollator(config.img_size // config.patch_size)
    return images, *masks.sample(batch, generator)


# ------------------------------------------------------------------------ equal to the plain form


def test_attention_taken_apart_is_the_fused_one():
    q, k, v = torch.randn(3, 2, 3, 10, 8, dtype=torch.float64, requires_grad=True)
    fused = F.scaled_dot_product_attention(q, k, v)
    with _AttentionFormula():
        apart = F.scaled_dot_product_attention(q, k, v)
    weight = torch.randn_like(fused)
    assert torch.allclose(apart, fused, rtol=0, atol=1e-14)
    for one, other in zip(
        torch.autograd.grad((apart * weight).sum(), (q, k, v)),
        torch.autograd.grad((fused * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)


def test_attention_is_taken_apart_in_bfloat16_on_a_cpu_and_nowhere_else(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: calls.append(1) or x * 0)
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    for bf16 in (False, True):
        with autocast(CPU, bf16):
            fused(q, k, v)
        assert len(calls) == bf16


def test_bfloat16_step_is_as_close_to_float32_as_the_fused_kernel():
    """Loss and gradients under our autocast: no further from float64 than PyTorch's own."""
    torch.manual_seed(0)
    model, inputs = IJEPA(SMALL), drawn(SMALL, 16)

    def gradients(context, model=model, images=inputs[0]):
        with context:
            loss = model(images, *inputs[1:])
        model.zero_grad()
        loss.backward()
        trained = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad]
        return loss.item(), torch.cat(trained)

    ours = gradients(autocast(CPU, True))
    theirs = gradients(torch.autocast("cpu", torch.bfloat16))
    exact = gradients(autocast(CPU, False), model.double(), inputs[0].double())
    assert ours[0] == pytest.approx(exact[0], rel=0.01)
    distance = [(found[1] - exact[1]).norm() / exact[1].norm() for found in (ours, theirs)]
    assert 0 < distance[0] < max(0.02, 1.5 * distance[1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_layers_compute_what_plain_ones_do():
    """Loss and gradients, for two numbers of target patches, without compiling again and again."""
    torch.manual_seed(0)
    model = IJEPA(SMALL)
    shapes = {}
    for seed in range(30):
        inputs = drawn(SMALL, 4, seed)
        shapes.setdefault(inputs[2].shape[-1], inputs)
    assert len(shapes) >= 2

    def results() -> list:
        found = []
        for inputs in shapes.values():
            model.zero_grad()
            loss = model(*inputs)
            loss.backward()
            found.append([loss] + [p.grad for p in model.parameters() if p.requires_grad])
        return found

    plain = results()
    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()
    train.compile_layers(model)
    try:
        compiled = results()
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch.compiler.reset()
    for one, other in zip(compiled, plain, strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-6)
    # Context encoder, target encoder, and the predictor for all lengths; not one for each layer.
    assert frames == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_compute_what_plain_steps_do():
    """Five steps with changing block shapes, and gradients that add up over two micro-batches."""
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = IJEPA(SMALL).cuda()
        trained = [p for p in model.parameters() if p.requires_grad]
        # eps: or gradients that are rounding noise would be steps of full length.
        optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4, fused=True)

        def run(batch, model=model):
            loss = model(batch.images, batch.context_idx, batch.target_idx)
            loss.backward()
            return loss.detach()

        if graphs:
            run = train.Graphs(run, trained)
        losses = []
        for seed in range(10):
            inputs = [x.cuda() for x in drawn(SMALL, 8, seed)]
            losses.append(run(step.Batch(*inputs, torch.arange(8))).item())
            if seed % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=not graphs)
                model.update_target(0.9)
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for plain, graphed in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(plain, graphed, rtol=1e-3, atol=1e-5)


def test_the_benchmarks_rows_take_the_same_steps():
    """`plain` and `float32` see the same batches, and so have the same losses, step by step."""
    shared = setting()
    steps = [step.plain(shared), step.ours(shared)]
    losses = [[take().item() for _ in range(5)] for take in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 5
    half = [take().item() for take in [step.ours(shared, bf16=True)] for _ in range(5)]
    assert half == pytest.approx(losses[0], rel=0.02)


# ----------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("name", ["vit_nano", "vit_tiny"])
def test_flops_are_those_that_pytorch_counts(name):
    """Forward passes, and a whole step but for the patches that are embedded and not used."""
    config = MODELS[name].config
    model, (images, context_idx, target_idx) = IJEPA(config), drawn(config, 2)
    (_, k), (_, m, t) = context_idx.shape, target_idx.shape
    ours = step.step_flops(config, k, m, t)

    def counted(run) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / len(images)

    with torch.no_grad():
        assert counted(lambda: model.target_encoder(images)) == ours["target encoder"]
        context = torch.randn(2, k, config.embed_dim)
        predict = counted(lambda: model.predictor(context, context_idx, target_idx))
        assert 3 * predict == ours["predictor"]
    whole = counted(lambda: model(images, context_idx, target_idx).backward())
    # All patches are embedded before K are kept, and no gradient goes on to the images.
    embed = 2 * config.patch_size**2 * 3 * config.embed_dim
    n = (config.img_size // config.patch_size) ** 2
    assert whole == sum(ours.values()) - 3 * k * embed + 2 * n * embed


def test_mean_flops_is_over_the_shapes_that_are_drawn():
    masks = MaskCollator(8)
    counts = [
        sum(step.step_flops(SMALL, masks.context_size, 4, masks.sample(1)[1].shape[-1]).values())
        for _ in range(2000)
    ]
    assert step.mean_flops(SMALL, masks) == pytest.approx(sum(counts) / len(counts), rel=0.003)


# --------------------------------------------------------------------------------- the benchmark


def test_a_table_has_what_was_asked_for():
    rows = step.measure(setting(rows="plain,bfloat16", seconds=0.1, turns=2))
    assert [row["name"] for row in rows] == ["plain", "bfloat16"]
    assert rows[0]["against plain"] == 1.0
    ratio = rows[1]["images_per_s"] / rows[0]["images_per_s"]
    assert rows[1]["against plain"] == pytest.approx(ratio, abs=0.01)
    assert all(0 < row["share_of_peak"] < 1.5 for row in rows)
    lines = step.format_rows(rows).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1


def test_what_cannot_be_timed_is_refused(tmp_path):
    with pytest.raises(UserError, match="no fast: there are plain, float32"):
        step.table_rows(setting(rows="plain,fast"))
    with pytest.raises(UserError, match="give a checkout of the released code"):
        step.table_rows(setting(peer=str(tmp_path)))["released"][0]()
    with pytest.raises(UserError, match="do not divide into patches"):
        step.prepare(dataclasses.replace(setting().config, img_size=50))


def test_compiling_is_refused_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(train.shutil, "which", lambda _: None)
    precision = torch.get_float32_matmul_precision()
    options = ["--bf16", "--out", str(tmp_path / "run")]
    try:
        with pytest.raises(UserError, match="needs a C compiler: install gcc, or add --no-compile"):
            train._train(*train.configure(options), Place(0, 1, torch.device("cuda")))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert not (tmp_path / "run").exists()


def test_graphs_are_refused_where_they_cannot_work(tmp_path):
    options = ["--graphs", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--graphs is for one process on a GPU"):
        train.train(*train.configure(options))
    assert not (tmp_path / "run").exists()
