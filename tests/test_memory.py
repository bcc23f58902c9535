"""The formulas behind the README's table of memory, against what a small model really keeps."""

import dataclasses
import importlib

import pytest
import torch
from test_train import ROOT

import ijepa

SMALL = ijepa.IJEPAConfig(
    img_size=32, patch_size=4, embed_dim=96, depth=3, num_heads=3, mlp_ratio=4.0,
    predictor_dim=48, predictor_depth=2, predictor_heads=3,
)  # fmt: skip
BATCH = 16


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmark"))
    return importlib.import_module("memory")


def kept(model: ijepa.IJEPA, batch: tuple, half: bool) -> int:
    """Bytes of all storages that autograd keeps in a forward pass, but for the weights."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), x)  # kept alive: addresses differ
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model(*batch)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", [{}, {"depth": 5}, {"predictor_dim": 96}, {"mlp_ratio": 2.0}])
def test_activations_are_what_autograd_keeps(memory, change, half):
    config = dataclasses.replace(SMALL, **change)
    masks = ijepa.MaskCollator(8)
    context_idx, target_idx = masks.sample(BATCH)
    batch = torch.randn(BATCH, 3, 32, 32), context_idx, target_idx
    measured = kept(ijepa.IJEPA(config), batch, half)
    sizes = (BATCH, context_idx.shape[1], *target_idx.shape[1:])
    assert memory.activation_bytes(config, *sizes, half) == pytest.approx(measured, rel=0.01)


def test_state_is_what_a_step_leaves(memory):
    model = ijepa.IJEPA(SMALL)
    optimizer = torch.optim.AdamW(ijepa.parameter_groups(model))
    model(torch.randn(2, 3, 32, 32), *ijepa.MaskCollator(8).sample(2)).backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert memory.state_bytes(SMALL) == sum(x.nbytes for x in tensors)


def test_shards_add_up_to_the_state_and_to_what_is_gathered(memory):
    """With 1 process the parts are everything; with more, each has its share."""
    whole = memory.state_bytes(SMALL)
    gathered = memory.state_bytes(SMALL, 1, shard=True) - whole
    block = sum(p.numel() for p in ijepa.Block(96, 3, 4.0, 1e-6).parameters())
    assert gathered > 3 * 4 * block
    for processes in (2, 4, 8):
        part = memory.state_bytes(SMALL, processes, shard=True) - gathered
        assert whole / processes <= part < 1.02 * whole / processes
