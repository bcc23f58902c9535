"""Convert encoder weights from and to other projects.

    python scripts/convert.py IN1K-vit.h.14-300e.pth.tar vit_huge.safetensors --to ijepa
    python scripts/convert.py path/to/ijepa_vith14_1k vit_huge.safetensors --to ijepa
    python scripts/convert.py runs/vit_tiny_cifar10 vit_tiny_hf --to hf
    python scripts/convert.py runs/vit_tiny_cifar10 vit_tiny_timm.safetensors --to timm

The source is a checkpoint of the released I-JEPA code, a local Hugging Face folder of an I-JEPA
model, a timm state dict (.safetensors or .pth), or anything that `probe.py` reads. The target is

    ijepa   a .safetensors file that probe.py and the scripts read
    hf      a folder for transformers: IJepaModel.from_pretrained(folder)
    timm    a .safetensors file for timm's VisionTransformer without class token; the command
            prints the call of timm.create_model that loads it

The target encoder is taken, as in the paper; --online takes the context encoder. (transformers and
timm took the context encoder from the released files.) Images are normalized as in data.py.
"""

import json
import math
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import UserError, atomic_write, option, parse_args, run_main
from ijepa import MODELS, IJEPAConfig, Pair, ViT, sincos_positions
from probe import load_encoder, save_encoder

State = dict[str, Tensor]

# Names of our parameters, and what transformers calls them.
HF_NAMES = {
    "blocks.": "encoder.layer.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "pos_embed": "embeddings.position_embeddings",
}


def hf_names(name: str) -> list[str]:
    """The parameters of transformers that make up ours; three for attn.qkv, otherwise one."""
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    if name.startswith("norm."):
        name = f"layer{name}"
    if "attn.qkv" not in name:
        return [name]
    return [name.replace("attn.qkv", f"attention.attention.{x}") for x in ("query", "key", "value")]


# --------------------------------------------------------------------------------------- reading


def read_encoder(source: str, online=False, num_heads: int | None = None):
    """The encoder in `source`, its config, and what is known of its training, a dict.

    online: the context encoder instead of the target encoder, where `source` has both.
    num_heads: for state dicts of a width that no model of `MODELS` has.
    Raises UserError if `source` holds no such encoder. No code in a file is ever run.
    """
    path, state, info = Path(source), None, {}
    try:
        if (path / "config.json").is_file():
            return *read_hf(path), info
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                ours = "config" in (file.metadata() or {})
            state = None if ours else load_file(path)
        elif path.is_file():
            # Memory-mapped: of a released file of 10 GB, only the encoder is read.
            mmap = zipfile.is_zipfile(path)  # older files cannot be
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if "target_encoder" in checkpoint:  # released
                info = {"network": "encoder" if online else "target_encoder"}
                checkpoint = checkpoint[info["network"]]
            if "architecture" not in checkpoint:
                state = {name.removeprefix("module."): x for name, x in checkpoint.items()}
        if state is not None:
            return *build_encoder(state, num_heads), info
        encoder, config, info = load_encoder(source, online)
        return encoder, config, {key: info[key] for key in ("network", "step", "train_config")}
    except UserError:
        raise
    except Exception as error:  # a damaged or foreign file can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(f"{source} does not hold an encoder ({reason})") from None


def read_hf(folder: Path) -> tuple[ViT, IJEPAConfig]:
    """The encoder in a Hugging Face folder. Raises UserError if it holds another kind of model."""
    hf = json.loads((folder / "config.json").read_text())
    if hf["model_type"] != "ijepa":
        raise UserError(f"{folder} holds a model of type {hf['model_type']}, not ijepa")
    theirs: State = {}
    for path in sorted(folder.glob("*.safetensors")):  # large models have several
        theirs |= {name.removeprefix("ijepa."): x for name, x in load_file(path).items()}
    names = ["pos_embed", *ViT(IJEPAConfig(4, 4, 4, hf["num_hidden_layers"], 1, 4)).state_dict()]
    state = {name: torch.cat([theirs[part] for part in hf_names(name)]) for name in names}
    size = hf["image_size"] if isinstance(hf["image_size"], int) else tuple(hf["image_size"])
    return build_encoder(state, hf["num_attention_heads"], hf["layer_norm_eps"], size)


def build_encoder(
    state: State, num_heads: int | None, norm_eps: float = 1e-6, img_size: int | Pair | None = None
) -> tuple[ViT, IJEPAConfig]:
    """A ViT from a state dict with the names of timm, whose shapes give the architecture.

    Raises UserError if the heads are unknown, or if positions do not fit, as with a class token.
    """
    state = {name: x for name, x in state.items() if not name.startswith("head.")}
    positions = state.pop("pos_embed")  # (1, N, D)
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    num_heads = num_heads or {c.embed_dim: c.num_heads for c in MODELS.values()}.get(embed_dim)
    if num_heads is None:
        raise UserError(f"weights of width {embed_dim} do not tell the heads: add --num-heads")
    config = IJEPAConfig(
        img_size=img_size or math.isqrt(positions.shape[1]) * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=sum(name.endswith("norm1.weight") for name in state),
        num_heads=num_heads,
        predictor_dim=embed_dim,  # there is no predictor; any valid value
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        in_chans=in_chans,
        norm_eps=norm_eps,
    )
    with torch.device("meta"):  # no memory and no initial weights: `assign` brings the tensors
        encoder = ViT(config)
    if positions.shape[1:] != encoder.pos_embed.shape:
        raise UserError(f"positions {tuple(positions.shape)} do not fit {encoder.grid} patches")
    encoder.load_state_dict(state, assign=True)
    # Elsewhere positions are parameters. They may have been trained.
    encoder.pos_embed = positions[0].float()
    return encoder.eval().requires_grad_(False), config


# --------------------------------------------------------------------------------------- writing


def timm_state(encoder: ViT, half: bool) -> State:
    """The state dict that timm expects: our parameters and the positions (1, N, D)."""
    dtype = torch.float16 if half else torch.float32
    state = {name: x.to("cpu", dtype).contiguous() for name, x in encoder.state_dict().items()}
    return state | {"pos_embed": encoder.pos_embed.float().cpu()[None].contiguous()}


def hf_state(encoder: ViT, half: bool) -> State:
    """The state dict that transformers expects."""
    state = {}
    for name, tensor in timm_state(encoder, half).items():
        names = hf_names(name)
        parts = (part.clone() for part in tensor.chunk(len(names)))
        state |= dict(zip(names, parts, strict=True))
    return state


def hf_config(config: IJEPAConfig) -> dict:
    """What transformers expects in config.json."""
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "dtype": "float32",  # to compute in, even if the file holds float16
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": round(config.embed_dim * config.mlp_ratio),
        "layer_norm_eps": config.norm_eps,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
    }


def timm_call(path: Path, config: IJEPAConfig) -> str:
    """Python code that creates the model with timm and loads the weights in `path`."""
    c, hidden = config, round(config.embed_dim * config.mlp_ratio)
    # timm rounds the product down, which may give one less.
    exact = int(c.embed_dim * c.mlp_ratio) == hidden
    ratio = c.mlp_ratio if exact else (hidden + 0.5) / c.embed_dim
    return (
        f"timm.create_model('vit_base_patch16_224', checkpoint_path={str(path)!r}, num_classes=0, "
        f"class_token=False, global_pool='avg', fc_norm=False, img_size={c.img_size}, "
        f"patch_size={c.patch_size}, in_chans={c.in_chans}, embed_dim={c.embed_dim}, "
        f"depth={c.depth}, num_heads={c.num_heads}, mlp_ratio={ratio}, "
        f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={c.norm_eps}))"
    )


def write_encoder(target: Path, to: str, encoder: ViT, half: bool, info: dict) -> None:
    """Write the encoder in a format of the module's docstring. Raises UserError or OSError."""
    config, folder = encoder.config, target if to == "hf" else target.parent
    folder.mkdir(parents=True, exist_ok=True)
    if to == "hf":
        with atomic_write(folder / "model.safetensors") as temporary:
            save_file(hf_state(encoder, half), temporary, metadata={"format": "pt"})
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(hf_config(config), indent=2) + "\n")
    elif to == "timm":
        with atomic_write(target) as temporary:
            save_file(timm_state(encoder, half), temporary, metadata={"format": "pt"})
        print(timm_call(target, config))
    else:
        fixed = sincos_positions(config.embed_dim, encoder.grid)
        if (encoder.pos_embed - fixed).abs().max() > 4e-3:  # the rounding of bfloat16
            raise UserError("its positions are trained: only --to hf and --to timm can store them")
        save_encoder(target, encoder, config, half, info)


# ---------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class ConvertConfig:
    """Options of this script."""

    source: str | None = option(None, "file, folder or included weights", positional=True)
    target: str | None = option(None, "file, or folder for hf", positional=True)
    to: str = option("ijepa", "format of the target", choices=["ijepa", "hf", "timm"])
    online: bool = option(False, "take the context encoder, not the EMA target encoder")
    half: bool = option(False, "store float16")
    num_heads: int | None = option(None, "attention heads, where the source does not tell them")


def main() -> None:
    config = parse_args(ConvertConfig, __doc__)
    if config.target is None:
        raise UserError("give a source and a target (see --help)")
    if config.to != "hf" and not config.target.endswith(".safetensors"):
        raise UserError(f"--to {config.to} writes a file: {config.target} must end in .safetensors")
    target = Path(config.target)
    encoder, a, info = read_encoder(config.source, config.online, config.num_heads)
    try:
        write_encoder(target, config.to, encoder, config.half, info)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} could not be written: {error}") from error
    print(f"wrote {target}: width {a.embed_dim}, {a.depth} layers, {a.num_heads} heads")


if __name__ == "__main__":
    run_main(main)
