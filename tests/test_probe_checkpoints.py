"""Reading and writing encoders: golden files, transformers and timm are the oracles.

Files are damaged in many ways: what comes out is a correct encoder or one line that says why not.
"""

import copy
import dataclasses
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import probe
from data import UserError
from ijepa import IJEPA, MODELS, IJEPAConfig, ViT
from probe import export, load_encoder, read_checkpoint, released_model

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden" / "hf_ijepa"
ARCHITECTURE = IJEPAConfig(
    img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.5, norm_eps=1e-4,
    predictor_dim=16, predictor_depth=1, predictor_heads=2,
)  # fmt: skip


def scrambled(network):
    """Weights without structure: a norm or a bias that is forgotten or swapped must show."""
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return scrambled(IJEPA(ARCHITECTURE))


def ours(model):
    """A checkpoint as train.py writes it."""
    return {
        "format": "ijepa-1",
        "config": {"model": "vit_nano", "seed": 7},
        "architecture": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "pictures": 100,
        "step": 12,
        "best_knn": 31.5,
    }


def released(encoder, target_encoder=None, prefix="module."):
    """Encoders as the released code stores them."""
    parts = {"encoder": encoder, "target_encoder": target_encoder or encoder}
    return {
        part: {f"{prefix}{name}": x for name, x in network.state_dict().items()}
        | {f"{prefix}pos_embed": network.pos_embed[None]}
        for part, network in parts.items()
    } | {"opt": {"state": {}}, "epoch": 300, "loss": 0.1}


def same(first, second):
    """Whether two networks have the same weights, names and architecture, to the last bit."""
    a, b = first.state_dict(), second.state_dict()
    sizes = [
        (n.grid, n.patch_size, n.blocks[0].attn.num_heads, n.norm.eps, n.blocks[0].norm1.eps)
        for n in (first, second)
    ]
    equal = sizes[0] == sizes[1] and torch.equal(first.pos_embed, second.pos_embed)
    return equal and same_weights(a, b)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(function, *args, **kwargs):
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# -------------------------------------------------------------------------------- Hugging Face


def test_golden_hugging_face_folder():
    loaded = load_encoder(str(GOLDEN))
    example = torch.load(GOLDEN / "example.pt", weights_only=True)
    output = loaded.encoder(example["images"])
    assert torch.allclose(output, example["last_hidden_state"], atol=1e-5, rtol=0)
    assert (loaded.kind, loaded.which, loaded.config, loaded.step) == (
        "huggingface", "context", None, None
    )  # fmt: skip
    assert "context encoder" in loaded.note and "\n" not in loaded.note
    assert "context encoder" not in load_encoder(str(GOLDEN), which="context").note
    content = (GOLDEN / "model.safetensors").read_bytes()
    assert loaded.sha256 == hashlib.sha256(content).hexdigest()
    assert not loaded.encoder.training and not output.requires_grad
    assert same(load_encoder(str(GOLDEN / "model.safetensors")).encoder, loaded.encoder)


def test_positions_of_their_own_are_kept_and_bound_to_their_grid(tmp_path):
    """The golden model has such; those of sine and cosine fit every grid."""
    own = load_encoder(str(GOLDEN), which="context")
    assert "8x8 patches" in own.note
    with pytest.raises(ValueError, match="8x8 patches alone, not of 8x10"):
        own.encoder.last_layers(torch.zeros(1, 3, 32, 40), 1)
    with pytest.raises(ValueError, match="8x8 patches alone"):
        copy.deepcopy(own.encoder)(torch.zeros(1, 3, 16, 16))
    for folder, off in (("a", 0.0), ("b", 9e-6), ("c", 2e-5)):
        theirs = transformers_model()
        theirs.embeddings.position_embeddings.data[0, 0, 0] += off
        theirs.save_pretrained(tmp_path / folder)
        loaded = load_encoder(str(tmp_path / folder), which="context")
        assert torch.equal(loaded.encoder.pos_embed, theirs.embeddings.position_embeddings[0])
        assert ("6x6 patches" in loaded.note) == (off > 1e-5)
        if off < 1e-5:
            loaded.encoder(torch.zeros(1, 3, 24, 32))


def test_released_positions_must_be_sine_and_cosine(model, tmp_path):
    stored = released(model.encoder)
    stored["target_encoder"]["module.pos_embed"] = model.encoder.pos_embed[None] + 1e-4
    torch.save(stored, tmp_path / "x.pt")
    assert "off by 0.0001" in refusal(load_encoder, str(tmp_path / "x.pt"), num_heads=3)


def transformers_model(classifier=False, positions=True, **changes):
    """One of uncommon sizes, with weights everywhere."""
    sizes = {
        "image_size": 24, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 100, "layer_norm_eps": 1e-3,
    }  # fmt: skip
    config = transformers.IJepaConfig(**sizes | changes)
    kind = transformers.IJepaForImageClassification if classifier else transformers.IJepaModel
    theirs = scrambled(kind(config))
    if positions:
        size = config.image_size if isinstance(config.image_size, int) else tuple(config.image_size)
        fixed = ViT(size, 4, 48, 1, 4).pos_embed
        (theirs.ijepa if classifier else theirs).embeddings.position_embeddings.data[0] = fixed
    return theirs


@pytest.mark.parametrize(
    "written", ["whole", "sharded", "module names", "classifier", "not square", "float16"]
)
def test_what_transformers_writes(tmp_path, written):
    changes = {"image_size": [24, 32]} if written == "not square" else {}
    theirs = transformers_model(classifier=written == "classifier", **changes)
    if written == "float16":
        theirs.half()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if written == "sharded" else "1GB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 if written == "sharded" else not shards
    if written == "module names":
        assert "layers.0.attention.q_proj.weight" in theirs.state_dict()
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    loaded = load_encoder(str(tmp_path))
    images = torch.randn(2, 3, *([24, 32] if changes else [24, 24]))
    theirs = (theirs.ijepa if written == "classifier" else theirs).float()
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
    assert loaded.encoder.pos_embed.dtype == loaded.encoder.norm.weight.dtype == torch.float32
    tolerance = 2e-3 if written == "float16" else 1e-5  # positions are those before rounding
    assert torch.allclose(loaded.encoder(images), expected, atol=tolerance, rtol=0)
    paths = sorted(shards) or [tmp_path / "model.safetensors"]
    contents = b"".join(path.read_bytes() for path in paths)
    assert loaded.sha256 == hashlib.sha256(contents).hexdigest()


def edited(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


KEY = "encoder.layer.1.attention.attention.key.weight"
INDEX = b'{"weight_map": {"a": "model-1.safetensors"}}'


@pytest.mark.parametrize(
    "damage, said",
    [
        (without("config.json"), "has neither last.pt nor config.json"),
        (without("model.safetensors"), "has no model.safetensors"),
        (text("config.json", b'{"model_type": "ij'), "config.json that is truncated or damaged"),
        (text("config.json", b"[1]"), "config.json that is no JSON object"),
        (text("config.json", b"\xff\xfe"), "config.json that is truncated or damaged"),
        (text("config.json", b"[" * 100_000), "config.json that is truncated or damaged"),
        (edited(model_type="vit"), "no I-JEPA model.*vit"),
        (edited(hidden_act="relu"), "no I-JEPA model.*relu"),
        (edited(num_attention_heads=5), "width 32.*5 heads"),
        (edited(num_attention_heads=None), "num_heads is None"),
        (edited(num_attention_heads=True), "num_heads is True"),
        (edited(layer_norm_eps="small"), "norm_eps is 'small'"),
        (edited(layer_norm_eps=float("nan")), "norm_eps is nan"),
        (edited(image_size=[32]), "impossible architecture"),
        (edited(image_size=[32, 32, 32]), "impossible architecture"),
        (edited(image_size=33), "33x33 pixels do not divide"),
        (edited(image_size=[16, 32]), "lacks the positions of a 4x8 grid.*64"),
        (edited(image_size=10**7), "impossible architecture.*patches"),
        (edited(hidden_size=64), "hidden_size 64 in its config.json, but 32"),
        (edited(hidden_size=10**30), "hidden_size 10+ in its config.json, but 32"),
        (edited(num_hidden_layers=10**9), "num_hidden_layers 1000000000 .* 2 in its weights"),
        (edited(intermediate_size=None), "intermediate_size None in its config.json, but 128"),
        (edited(patch_size=8), "patch_size 8 in its config.json, but 4"),
        (weights(lambda w: w.pop(KEY)), "lacks one of blocks.1.attn.q.weight"),
        (weights(lambda w: w.pop("layernorm.bias")), "lacks the weights norm.bias"),
        (weights(lambda w: w.update({KEY: torch.zeros(31, 32)})), "different shapes"),
        (weights(lambda w: w.update(cls_token=torch.zeros(1))), "architecture lacks.*cls_token"),
        (weights(lambda w: w.update({"layernorm.bias": torch.zeros(3)})), r"shape \(3,\)"),
        (weights(lambda w: w.update({"layernorm.bias": torch.arange(32)})), "no plain tensor"),
        (
            weights(lambda w: w["embeddings.position_embeddings"].fill_(torch.nan)),
            "positions that are not finite",
        ),
        (weights(lambda w: w.pop("embeddings.position_embeddings")), "lacks the positions"),
        (weights(dict.clear), "no I-JEPA encoder"),
        (text("model.safetensors", b"\x10" * 100), "truncated or damaged"),
        (text("model.safetensors", b""), "truncated or damaged"),
    ],
)
def test_hugging_face_folders_that_cannot_be_read(tmp_path, damage, said):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    damage(tmp_path)
    start = time.perf_counter()
    found = refusal(load_encoder, str(tmp_path))
    assert re.search(said, found) and found.startswith(f"{tmp_path} ")
    assert time.perf_counter() - start < 5  # whatever sizes are claimed


@pytest.mark.parametrize("index", [INDEX, b'{"weight_map": {"a": "../x"}}', b'{"weight_map": 1}'])
def test_shards_that_are_not_there(tmp_path, index):
    (tmp_path / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert re.search("lacks (model-1|../x|its weight_map)", refusal(load_encoder, str(tmp_path)))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of Hugging Face as it takes to download one small model."""

    def do_GET(self):
        path = Path(self.path.partition("?")[0])
        files = {file.name: file.read_bytes() for file in GOLDEN.iterdir()}
        if "/some/ijepa" not in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            content = b""
        elif "/tree/" in self.path:
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ]
            content = self.found(json.dumps(found).encode())
        elif path.parts[1] == "api":
            siblings = [{"rfilename": name} for name in files]
            found = {"id": "some/ijepa", "sha": "a" * 40, "siblings": siblings}
            content = self.found(json.dumps(found).encode())
        else:
            content = self.found(files[path.name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def found(self, content):
        self.send_response(200)
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", "a" * 40)
        return content

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's library talks to a server of our own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub(hub, tmp_path):
    loaded = load_encoder("some/ijepa")
    assert same(loaded.encoder, load_encoder(str(GOLDEN)).encoder)
    assert "this is the context encoder, which Hugging Face and timm hold" in loaded.note
    names = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert names == {"config.json", "model.safetensors"}  # nothing else is downloaded


def test_an_unknown_name_on_the_hub(hub):
    said = refusal(load_encoder, "some/other")
    assert said == (
        "there is no file or folder some/other, and no such public model on Hugging Face"
    )


def test_the_hub_without_a_network(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    said = refusal(load_encoder, "some/ijepa")
    assert said.startswith("there is no file or folder some/ijepa, and Hugging Face cannot be")


def test_the_hub_without_its_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal(load_encoder, "some/ijepa")
    # It is not missed by whoever has a file.
    assert load_encoder(str(GOLDEN)).kind == "huggingface"


@pytest.mark.parametrize(
    "name", ["nothing", "runs/last.pt", "a/b/c", "", "/no/such", "a/../b", "x" * 5000, "a\0b"]
)
def test_paths_that_are_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("asked the hub for it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"there is no|neither last\.pt|cannot be read"):
        load_encoder(name)


# ----------------------------------------------------------------------------- the released files


@pytest.fixture(scope="module")
def golden():
    return torch.load(HERE / "golden" / "reference_steps.pt", weights_only=True)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_golden_released_file(golden, tmp_path, prefix, zipped):
    path = tmp_path / "x.pth.tar"
    stored = {
        part: {prefix + n.removeprefix("module."): x for n, x in found.items()}
        if part in ("encoder", "predictor", "target_encoder")
        else found
        for part, found in golden["checkpoint"].items()
    }
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    target = load_encoder(str(path), num_heads=2)
    context = load_encoder(str(path), which="context", num_heads=2)
    step = golden["steps"][0]
    for loaded, name, keep in (
        (target, "target_output", None),
        (context, "context_output", step["context_masks"][0]),
    ):
        output = loaded.encoder(step["images"], keep)
        assert torch.allclose(output, step[name], atol=1e-5, rtol=0)
        assert (loaded.kind, loaded.note, loaded.config, loaded.step) == (
            "released",
            "",
            None,
            None,
        )
        assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (target.which, context.which) == ("target", "context")
    assert not same(target.encoder, context.encoder)
    assert same(released_model(path, num_heads=2).target_encoder, target.encoder)


@pytest.mark.parametrize(
    "img_size, patch_size, model, grid",
    [(224, 14, "vit_huge", 16), (448, 16, "vit_huge", 28), (224, 16, "vit_giant", 14)],
)
def test_sizes_of_the_released_models(tmp_path, img_size, patch_size, model, grid):
    """At full width, with one layer: H/14 (two of them), H/16 at 448 pixels, G/16."""
    c = dataclasses.replace(MODELS[model].config, img_size=img_size, patch_size=patch_size, depth=1)
    with torch.device("meta"):
        encoder = ViT(img_size, patch_size, c.embed_dim, 1, c.num_heads, c.mlp_ratio)
    encoder = encoder.to_empty(device="cpu")
    encoder.pos_embed = ViT(img_size, patch_size, c.embed_dim, 0, 1).pos_embed
    for parameter in encoder.parameters():
        parameter.data.zero_()
    torch.save(released(encoder), tmp_path / "x.pth.tar")
    loaded = load_encoder(str(tmp_path / "x.pth.tar"))
    assert loaded.encoder.grid == (grid, grid) and loaded.encoder.norm.eps == 1e-6
    assert loaded.encoder.blocks[0].attn.num_heads == 16
    # timm's model of that name takes what is exported of it.
    name = {"vit_huge": f"vit_huge_patch{patch_size}_gap_{img_size}"}
    name = name.get(model, "vit_giant_patch16_gap_224")
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0, depth=1)
    shapes = {n: x.shape for n, x in theirs.state_dict().items()}
    export(loaded.encoder, tmp_path / "export", "target")
    written = load_file(tmp_path / "export" / "timm.safetensors")
    assert {n: x.shape for n, x in written.items()} == shapes


def test_a_released_file_with_one_encoder(model, tmp_path):
    for kept, lost in (("encoder", "target_encoder"), ("target_encoder", "encoder")):
        stored = released(model.encoder, model.target_encoder)
        del stored[lost]
        torch.save(stored, tmp_path / kept)
        which = {"encoder": "context", "target_encoder": "target"}
        asked = load_encoder(str(tmp_path / kept), which[lost], num_heads=3)
        assert asked.which == which[kept]
        assert f"this is the {which[kept]} encoder, the only one" in asked.note
        assert ("the paper evaluates the target" in asked.note) == (kept == "encoder")
        assert load_encoder(str(tmp_path / kept), which[kept], num_heads=3).note == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as on Linux")
def test_the_rest_of_a_released_file_stays_on_the_disk(tmp_path):
    """Peak memory of a process that reads one of two encoders beside 160 MB of optimizer state."""
    path = tmp_path / "x.pth.tar"
    c = IJEPAConfig(img_size=32, patch_size=4, embed_dim=768, depth=2)
    encoder = ViT(32, 4, 768, 2, 12)
    state = {"opt": {"state": {0: {"exp_avg": torch.zeros(40_000_000)}}}}
    torch.save(released(encoder) | state, path)
    weights = sum(x.nbytes for x in encoder.parameters())
    assert c.embed_dim == 768 and weights < 60e6 and path.stat().st_size > 160e6
    script = (
        "import re, sys, torch, probe\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+) kB', open(status).read())[1])\n"
        "status = '/proc/self/status'\n"
        "probe.load_encoder(sys.argv[2]); before = peak()\n"
        "encoder = probe.load_encoder(sys.argv[1]).encoder\n"
        "encoder(torch.zeros(1, 3, 32, 32)); print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(path), str(GOLDEN)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE.parent))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert 1024 * int(done.stdout) < weights + 40e6  # the encoder, once, and what torch takes


# ------------------------------------------------------------------------------ our checkpoints


def test_our_checkpoints(model, tmp_path):
    torch.save(ours(model), tmp_path / "last.pt")
    for source in (str(tmp_path), str(tmp_path / "last.pt")):
        loaded = load_encoder(source)
        assert same(loaded.encoder, model.target_encoder) and loaded.which == "target"
        context = load_encoder(source, which="context")
        assert same(context.encoder, model.encoder) and context.which == "context"
        assert not same(context.encoder, loaded.encoder)
        assert (loaded.kind, loaded.step, loaded.note) == ("ijepa", 12, "")
        assert loaded.config == {"model": "vit_nano", "seed": 7, "init_std": 0.02}
        content = (tmp_path / "last.pt").read_bytes()
        assert loaded.sha256 == hashlib.sha256(content).hexdigest()
    images = torch.randn(2, 3, 16, 24)  # and in use, on another grid as well
    assert torch.equal(loaded.encoder(images), model.target_encoder(images))
    read = read_checkpoint(tmp_path / "last.pt")
    assert read["step"] == 12 and torch.equal(
        read["model"]["encoder.norm.bias"], model.encoder.norm.bias
    )


def test_what_is_done_to_an_encoder_leaves_its_file_alone(model, tmp_path):
    torch.save(ours(model), tmp_path / "last.pt")
    export(model.encoder, tmp_path / "export", "context")
    for source in (tmp_path / "last.pt", tmp_path / "export" / "model.safetensors"):
        before = source.read_bytes()
        with torch.no_grad():
            for parameter in load_encoder(str(source)).encoder.parameters():
                parameter.add_(1.0)
        assert source.read_bytes() == before


def set_(*keys, to):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = to

    return change


def lose(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return change


BIAS = "target_encoder.norm.bias"
BOTH = [
    (set_("format", to="ijepa-0"), "no checkpoint of train.py"),
    (lose("format"), "no checkpoint of train.py"),
    (lose("architecture"), "lacks its architecture"),
    (set_("config", to=3), "lacks its config"),
    (set_("step", to="12"), "lacks its step"),
    (set_("architecture", "colour", to=3), "architecture of another version, with colour"),
    (set_("architecture", 3, to=3), "architecture of another version, with 3"),
    (set_("architecture", "depth", to="2"), "depth is '2'"),
    (set_("architecture", "loss", to="l1"), "impossible architecture: loss is 'l1'"),
    (set_("architecture", "norm_eps", to=-1.0), "norm_eps is -1.0"),
    (set_("architecture", "img_size", to=10**7), "impossible architecture.*patches"),
    (set_("architecture", "img_size", to=10**30), "impossible architecture.*patches"),
    (set_("architecture", "depth", to=10**9), "has 2 encoder.blocks, .* has 1000000000"),
    (set_("architecture", "predictor_depth", to=10**9), "has 1 predictor.predictor_blocks"),
    (set_("architecture", "embed_dim", to=36), r"shape .*24.*, where .*36.* is needed"),
    (set_("architecture", "embed_dim", to=3 * 2**40), "(impossible architecture|is needed)"),
    (set_("architecture", "embed_dim", to=3 * 2**62), "impossible architecture"),
    (set_("architecture", "mlp_ratio", to=1e300), "impossible architecture"),
    (set_("architecture", "num_heads", to=5), "24 must be divisible .* 5 heads"),
    (set_("model", to=[1]), "lacks its model"),
    (set_("model", BIAS, to=1), "no plain tensor of numbers for target_encoder.norm.bias"),
    (set_("model", BIAS, to=torch.arange(24)), "no plain tensor"),
    (set_("model", BIAS, to=torch.zeros(24, device="meta")), "code .*_rebuild_meta_tensor"),
    (set_("model", BIAS, to=torch.zeros(1).expand(24)), "no plain tensor"),
    (set_("model", BIAS, to=torch.zeros(24).to_sparse()), "code .*_rebuild_sparse_tensor"),
    (set_("model", BIAS, to=torch.zeros(23)), r"norm.bias of shape \(23,\), where \(24,\)"),
    (set_("model", 3, to=torch.zeros(23)), "no weights called model"),
    (set_("model", "cls_token", to=torch.zeros(24)), "architecture lacks: cls_token"),
    (lose("model", BIAS), "lacks the weights target_encoder.norm.bias"),
]
RESUME = [(lose("optimizer"), "its optimizer"), (lose("pictures"), "its pictures")]


@pytest.mark.parametrize("damage, said", BOTH + RESUME)
def test_our_checkpoints_that_cannot_be_read(model, tmp_path, damage, said):
    path = tmp_path / "last.pt"
    checkpoint = ours(model)
    checkpoint["model"] = dict(checkpoint["model"])
    damage(checkpoint)
    torch.save(checkpoint, path)
    start = time.perf_counter()
    functions = [read_checkpoint] if (damage, said) in RESUME else [read_checkpoint, load_encoder]
    for function in functions:
        found = refusal(function, str(path))
        assert re.search(said, found) and found.startswith(f"{path} ")
    assert time.perf_counter() - start < 5


def test_an_encoder_does_not_need_what_only_resuming_needs(model, tmp_path):
    torch.save({k: v for k, v in ours(model).items() if k != "optimizer"}, tmp_path / "best.pt")
    assert same(load_encoder(str(tmp_path / "best.pt")).encoder, model.target_encoder)


def test_heads_that_contradict_the_file(model, tmp_path):
    torch.save(ours(model), tmp_path / "last.pt")
    assert "has 3 heads, not 4" in refusal(load_encoder, str(tmp_path), num_heads=4)
    assert same(load_encoder(str(tmp_path), num_heads=3).encoder, model.target_encoder)
    torch.save(released(model.encoder), tmp_path / "x.pth.tar")
    said = refusal(load_encoder, str(tmp_path / "x.pth.tar"))
    assert "width 24" in said and "num_heads" in said


def test_which_is_target_or_context():
    with pytest.raises(ValueError, match="target or context"):
        load_encoder(str(GOLDEN), which="both")


# ----------------------------------------------------------- code, truncated and damaged files


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def saved(state, how):
    """A file's content as torch.save or pickle writes it."""
    if isinstance(how, int):
        return pickle.dumps(state, protocol=how)
    buffer = io.BytesIO()
    options = {
        "zip": {},
        "old": {"_use_new_zipfile_serialization": False},
        "zip, protocol 4": {"pickle_protocol": 4},
    }
    torch.save(state, buffer, **options[how])
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["zip", "old", "zip, protocol 4", 2, 4, 5])
@pytest.mark.parametrize("kind", ["ours", "released"])
def test_code_in_a_file_does_not_run_and_is_named(model, tmp_path, kind, how):
    harm, path = tmp_path / "harm", tmp_path / "x.pt"
    state = ours(model) if kind == "ours" else released(model.encoder)
    if isinstance(how, int):
        state = {"format": "ijepa-1"}  # of tensors pickle's own way is yet another one
    path.write_bytes(saved(state | {"epoch": Trap(harm)}, how))
    for function in (read_checkpoint, load_encoder):
        said = refusal(function, str(path))
        assert "is no checkpoint to trust: reading it would run code (posix.mkdir)" in said
        assert not harm.exists()
    with pytest.raises(ValueError, match="would run code"):
        released_model(path, num_heads=3)
    assert not harm.exists()
    torch.load(path, weights_only=False) if isinstance(how, str) else pickle.loads(
        path.read_bytes()
    )
    assert harm.exists()  # the trap is one


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"PK\x03\x04 not really", b"\x80\x04", b"text\n", os.urandom(5000), b"\0" * 999]
    + [saved(x, "zip") for x in (3, [1], {}, {"model": {}}, {"encoder": 3}, torch.zeros(3))]
    + [saved({3: 4}, "old"), pickle.dumps({"a": 1}), pickle.dumps(print, protocol=2)],
)
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    for function in (read_checkpoint, load_encoder):
        assert f"{tmp_path / 'x.pt'} is no " in refusal(function, str(tmp_path / "x.pt"))


def test_files_that_cannot_be_opened(tmp_path):
    assert refusal(read_checkpoint, tmp_path / "x") == f"there is no checkpoint {tmp_path / 'x'}"
    assert "Is a directory" in refusal(read_checkpoint, tmp_path)
    assert "neither last.pt nor config.json" in refusal(load_encoder, str(tmp_path))


def altered(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def correct_or_refused(function, path, right):
    """Whether a file is read: rightly then, and refused in one line otherwise."""
    try:
        found = function(str(path))
    except UserError as error:
        assert "\n" not in str(error)
        return False
    assert right(found)
    return True


@pytest.mark.parametrize("kind", ["ours", "released", "resume"])
def test_every_truncated_file_is_refused(model, tmp_path, kind):
    state = released(model.encoder) if kind == "released" else ours(model)
    content, path = saved(state, "zip"), tmp_path / "x.pt"
    function = {"resume": read_checkpoint}.get(kind, lambda p: load_encoder(p, num_heads=3))
    path.write_bytes(content)
    assert correct_or_refused(function, path, lambda _: True)
    for kept in (*range(0, len(content), len(content) // 60), len(content) - 1):
        path.write_bytes(content[:kept])
        assert not correct_or_refused(function, path, lambda _: True), kept


FILES = {}  # content of the files to be altered, made once


@pytest.mark.parametrize("kind", ["ours", "released", "resume", "old"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_altered_files_are_refused_or_right(tmp_path_factory, model, kind, data):
    """One bit: most are found by the checksums, and the others stand where nothing is read."""
    if kind not in FILES:
        state = released(model.encoder) if kind == "released" else ours(model)
        FILES[kind] = saved(state, "old" if kind == "old" else "zip")
    content = FILES[kind]
    position = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path_factory.getbasetemp() / "altered.pt"
    path.write_bytes(altered(content, position, data.draw(st.integers(0, 7))))
    expected = model.state_dict()
    if kind == "resume":
        correct_or_refused(read_checkpoint, path, lambda c: same_weights(c["model"], expected))
        return
    encoder = model.encoder if kind == "released" else model.target_encoder
    expected = encoder.state_dict()
    if kind == "old":  # has no checksums: numbers may be altered, but nothing else happens
        expected = {}
    correct_or_refused(
        lambda p: load_encoder(p, num_heads=3),
        path,
        lambda x: not expected or same_weights(x.encoder.state_dict(), expected),
    )


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_altered_folders_are_refused_or_read(tmp_path_factory, data):
    """safetensors has no checksums either: in its header, and in config.json, anything goes."""
    folder = tmp_path_factory.getbasetemp() / "altered"
    folder.mkdir(exist_ok=True)
    contents = {name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors")}
    name = data.draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    header = 8 + int.from_bytes(content[:8], "little") if name != "config.json" else len(content)
    position = data.draw(st.integers(0, header - 1))
    contents[name] = altered(content, position, data.draw(st.integers(0, 7)))
    if data.draw(st.booleans()):
        contents[name] = content[:position]
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    correct_or_refused(load_encoder, folder, lambda x: x.encoder.embed_dim == 32)


def test_a_view_that_claims_more_than_the_file_holds(model, tmp_path):
    """Sizes in the pickle are only claims: with sound checksums as well."""
    path = tmp_path / "x.pt"
    content = saved(ours(model), "zip")
    before, after = b"K\x18\x85q", b"J\xff\xff\xff\x7f\x85q"  # size (24,) to (2^31 - 1,)
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            if name.endswith("data.pkl"):
                assert before in record
                record = record.replace(before, after)
            new.writestr(name, record)
    for function in (read_checkpoint, load_encoder):
        assert "is no checkpoint, or is truncated or damaged" in refusal(function, str(path))


# ----------------------------------------------------------------------------------- written


def encoders():
    """Square and not, an odd MLP, gray pictures, another epsilon."""
    torch.manual_seed(3)
    return {
        "square": ViT(16, 4, 24, 2, 3, mlp_ratio=2.5, norm_eps=1e-4),
        "not square": ViT((16, 24), 4, 24, 2, 3),
        "gray": ViT(16, 8, 32, 1, 2, in_chans=1),
        "odd": ViT(8, 4, 44, 1, 4, mlp_ratio=48 / 11),
    }


def blocks_of(readme):
    return re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


@pytest.mark.parametrize("name", encoders())
def test_transformers_and_timm_read_what_is_exported(tmp_path, monkeypatch, name):
    """By the code of the README.md that is written beside it."""
    encoder = scrambled(encoders()[name])
    export(encoder, tmp_path / "a" / "b", "target")
    monkeypatch.chdir(tmp_path / "a" / "b")
    height, width = (side * encoder.patch_size for side in encoder.grid)
    images = torch.randn(3, encoder.patch_embed.proj.in_channels, height, width)
    by_transformers, by_timm = blocks_of(Path("README.md").read_text())
    with torch.no_grad():
        expected = encoder(images)
        found = {"images": images}
        exec(by_transformers, found)
        assert torch.allclose(found["patches"], expected, atol=1e-5, rtol=0)
        exec(by_timm, found)  # strictly: that is the default of load_state_dict
        assert torch.allclose(found["features"], expected.mean(1), atol=1e-5, rtol=0)
    assert not list(Path.cwd().glob("*.tmp"))


@pytest.mark.parametrize("name", encoders())
def test_there_and_back_is_exact(tmp_path, name):
    encoder = scrambled(encoders()[name])
    export(encoder, tmp_path, "target")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "timm.safetensors"):
        loaded = load_encoder(str(source))
        assert same(loaded.encoder, encoder)
        assert (loaded.which, loaded.note) == ("target", "")
    note = load_encoder(str(tmp_path), which="context").note
    assert note == "this is the target encoder, the only one in the file"
    # Through transformers as well, which does not keep the word that it is the target encoder.
    transformers.IJepaModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    loaded = load_encoder(str(tmp_path / "theirs"))
    assert same(loaded.encoder, encoder) and loaded.which == "context"


def test_half_the_space(tmp_path):
    """Weights rounded to float16 and no more; positions, which are compared, not rounded."""
    encoder = scrambled(encoders()["square"])
    export(encoder, tmp_path, "target", half=True)
    written = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for n, x in written.items() if "position" not in n} == {torch.float16}
    loaded = load_encoder(str(tmp_path))
    assert torch.equal(loaded.encoder.pos_embed, encoder.pos_embed)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], weight.half().float()), name
    theirs = transformers.IJepaModel.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 16, 16)
    assert theirs.dtype == torch.float32
    expected = loaded.encoder(images)
    assert torch.allclose(theirs(images).last_hidden_state, expected, atol=1e-5, rtol=0)
    encoder.norm.weight.data[0] = 1e5
    with pytest.raises(ValueError, match="too large for float16"):
        export(encoder, tmp_path / "other", "target", half=True)
    assert not (tmp_path / "other").exists()


def test_an_export_says_how_it_was_trained(model, tmp_path):
    training = {"config": {"data": "cifar10", "init_std": 0.046}, "step": 12}
    told = training["config"] | {"out": "/home/me/runs", "data_dir": "/home/me", "workers": 3}
    export(model.target_encoder, tmp_path, "target", {"config": told, "step": 12})
    loaded = load_encoder(str(tmp_path))
    assert {"config": loaded.config, "step": loaded.step} == training
    told = training["config"] | {"data": "/home/me/pictures"}
    export(model.target_encoder, tmp_path, "target", {"config": told, "step": 12})
    assert load_encoder(str(tmp_path)).config == {"init_std": 0.046}
    wrong = ({"init_std": "x"}, {"data": 5}, {"init_std": True})
    wrong = [json.dumps({"config": config, "step": 1}) for config in wrong]
    nonsense = ("{", "[]", "{}", '{"config": 1, "step": 2}', '{"config": {}}', "[" * 10**5)
    for damaged in (*nonsense, *wrong):
        tensors = load_file(tmp_path / "model.safetensors")
        note = {"encoder": "target", "training": damaged}
        save_file(tensors, tmp_path / "model.safetensors", note)
        assert "a note on its training that is damaged" in refusal(load_encoder, str(tmp_path))


def test_weights_that_come_along_are_read_by_name(model, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "WEIGHTS", tmp_path / "weights")
    assert refusal(load_encoder, "small") == "there is no file or folder small"
    export(model.target_encoder, tmp_path / "weights" / "small", "target")
    monkeypatch.chdir(tmp_path)
    assert same(load_encoder("small").encoder, model.target_encoder)
    said = refusal(load_encoder, "smal")
    assert said.endswith("folder smal (weights that come with the project: small)")
    for other in ("../weights/small", "*", ""):
        with pytest.raises(UserError):
            load_encoder(other)
    torch.save(ours(model), tmp_path / "small")  # what lies here goes before
    assert load_encoder("small").kind == "ijepa"


def test_the_golden_folder_there_and_back_is_exact(tmp_path):
    loaded = load_encoder(str(GOLDEN))
    export(loaded.encoder, tmp_path, loaded.which)
    given, written = (load_file(p / "model.safetensors") for p in (GOLDEN, tmp_path))
    assert given.keys() == written.keys()
    for name, tensor in given.items():
        assert torch.equal(tensor, written[name]), name
    configs = [json.loads((p / "config.json").read_text()) for p in (GOLDEN, tmp_path)]
    assert configs[1].items() <= configs[0].items()
    assert "context" in (tmp_path / "README.md").read_text()
    assert load_encoder(str(tmp_path)).which == "context"


def test_an_mlp_whose_ratio_is_no_exact_number(tmp_path, monkeypatch):
    """timm rounds width x ratio down: where that gives one less, README.md has another ratio."""
    width, hidden = 44, 15
    assert int(hidden / width * width) == hidden - 1
    encoder = ViT(8, 4, width, 1, 4, mlp_ratio=hidden / width + 1e-6)
    assert encoder.blocks[0].mlp.fc1.out_features == hidden
    export(encoder, tmp_path, "target")
    monkeypatch.chdir(tmp_path)
    found = {"images": torch.randn(1, 3, 8, 8)}
    exec(blocks_of(Path("README.md").read_text())[1], found)
    assert found["model"].blocks[0].mlp.fc1.out_features == hidden
    assert same(load_encoder(str(tmp_path)).encoder, encoder)


def test_a_folder_that_cannot_be_written(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "could not be written" in refusal(export, model.encoder, tmp_path / "file", "target")
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    assert "could not be written" in refusal(export, model.encoder, tmp_path / "out", "target")
    with pytest.raises(ValueError, match="target or context"):
        export(model.encoder, tmp_path / "new", "both")
    assert not (tmp_path / "new").exists()

    def full(*args, **kwargs):
        raise probe.SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(probe, "save_file", full)
    assert "no space left" in refusal(export, model.encoder, tmp_path / "new", "target")
    assert list((tmp_path / "new").iterdir()) == []
