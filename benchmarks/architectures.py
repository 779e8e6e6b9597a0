"""Networks of other libraries with random weights, small, each with an input of four samples."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SAMPLES = 4
Built = tuple[nn.Module, dict[str, Tensor]]


class Architecture(NamedTuple):
    """``build`` gives the network and its input by argument; digits are positional ones."""

    library: str
    family: str
    name: str
    build: Callable[[], Built]


def every() -> Iterator[Architecture]:
    """All that the installed libraries offer."""
    if importlib.util.find_spec("timm"):
        yield from timm_networks()
    if importlib.util.find_spec("transformers"):
        yield from transformers_networks()
    yield from pytorch_networks()


SMALL = 10_000_000
# The smallest of each class of timm that has none so small.
LARGER = (
    "beit_base_patch16_224", "cait_xxs24_224", "convmixer_768_32", "csatv2", "davit_tiny", "efficientformer_l1",
    "efficientvit_l1", "focalnet_tiny_srf", "gcvit_xxtiny", "hiera_tiny_224", "hrnet_w18_small",
    "inception_resnet_v2", "inception_v3", "inception_v4", "legacy_seresnet18", "legacy_xception", "levit_256d",
    "lowformer_b0", "mobilenetv5_base", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge",
    "nest_tiny", "nextvit_small", "pnasnet5large", "poolformerv2_s12", "qwen3_vit_88m", "rdnet_tiny", "resnetv2_18",
    "sam2_hiera_tiny", "samvit_base_patch16_224", "selecsls42", "sequencer2d_s", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m",
    "twins_svt_small", "visformer_tiny", "volo_d1_224", "xception41p"
)  # fmt: skip


class TooLarge(Exception):
    """A network that is left to its smaller relatives."""


def timm_networks() -> Iterator[Architecture]:
    """Every one of less than ten million parameters, and the smallest of each class that has none."""
    for name in sorted(_timm().list_models(), key=lambda name: name in LARGER):
        yield Architecture("timm", name.partition("_")[0], name, functools.partial(_build_timm, name))


def _build_timm(name: str) -> Built:
    timm = _timm()
    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(name).parameters())
    if size >= SMALL and name not in LARGER:
        raise TooLarge(name)
    settings = timm.create_model(name).default_cfg
    channels, native, _ = settings["input_size"]
    fixed = bool(settings.get("fixed_input_size"))
    least = max(64, settings.get("min_input_size", (0, 0, 0))[1])
    for side in dict.fromkeys((least, 128, 224, native)):
        x = torch.randn(SAMPLES, channels, side, side)
        try:
            model = timm.create_model(name, **({"img_size": side} if fixed and side != native else {})).eval()
            with torch.no_grad():
                model(x)
        except Exception as error:  # too small for so many strides, a window that does not divide it, no such argument
            last = error
            continue
        return model, {"0": x}
    raise last


@functools.cache
def _timm() -> Any:
    """timm, also over a torchvision whose compiled part is for another build of PyTorch."""
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            # Its Python describes two operators that its library would have defined. No network here calls them.
            library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


# What makes the networks of transformers small, where their configuration has it.
TINY: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "embedding_size": 32, "d_model": 32, "n_embd": 32, "dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "intermediate_size": 64, "ffn_dim": 64, "hidden_dim": 64, "max_position_embeddings": 64, "n_positions": 64,
    "image_size": 32, "patch_size": 8, "num_labels": 5, "pad_token_id": 0, "d_kv": 8, "d_ff": 64,
}  # fmt: skip

# The common encoders and classifiers: configuration, what it needs beyond TINY, and the model's class.
TEXT: dict[str, dict[str, Any]] = {
    "BertModel": {}, "BertForSequenceClassification": {}, "RobertaModel": {}, "DistilBertModel": {}, "AlbertModel": {},
    "ElectraModel": {}, "MPNetModel": {}, "DebertaModel": {}, "DebertaV2Model": {}, "XLMRobertaModel": {},
    "CamembertModel": {}, "ErnieModel": {}, "RoFormerModel": {}, "ConvBertModel": {}, "MobileBertModel": {},
    "SqueezeBertModel": {}, "FunnelModel": {"block_sizes": [1, 1], "num_hidden_layers": None},
    "NystromformerModel": {"segment_means_seq_len": 12, "num_landmarks": 4}, "LayoutLMModel": {}, "IBertModel": {},
    "MegatronBertModel": {}, "ModernBertModel": {}, "XLNetModel": {"max_position_embeddings": None}, "GPT2Model": {},
    "GPT2ForSequenceClassification": {"pad_token_id": 0}, "OpenAIGPTModel": {}, "GPTNeoXModel": {}, "OPTModel": {},
    "LlamaModel": {}, "MistralModel": {}, "Qwen2Model": {}, "T5EncoderModel": {}, "CLIPTextModel": {},
    "SiglipTextModel": {}, "BloomModel": {}, "GPTNeoModel": {"attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2],
}  # fmt: skip
_CONVNEXT: dict[str, Any] = {"depths": [1] * 4, "num_hidden_layers": None, "image_size": 64, "patch_size": None}
_PYRAMID: dict[str, Any] = {
    "image_size": 64, "patch_sizes": [4, 2, 2, 2], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 1, 2, 2],
}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "ViTModel": {}, "ViTForImageClassification": {}, "DeiTModel": {}, "BeitModel": {}, "Data2VecVisionModel": {},
    "Dinov2Model": {}, "Dinov2WithRegistersModel": {}, "IJepaModel": {}, "ViTMSNModel": {}, "DINOv3ViTModel": {},
    "SwinModel": _SWIN, "SwinForImageClassification": _SWIN, "Swinv2Model": _SWIN, "DonutSwinModel": _SWIN,
    "ConvNextModel": _CONVNEXT, "ConvNextV2Model": _CONVNEXT, "ConvNextForImageClassification": _CONVNEXT,
    "BitModel": {"depths": [1] * 4, "embedding_size": None}, "ResNetModel": {"embedding_size": 8} | _STAGES,
    "ResNetForImageClassification": {"embedding_size": 8} | _STAGES, "PoolFormerModel": {"image_size": 64} | _STAGES,
    "RegNetModel": {"groups_width": 8, "embedding_size": 8} | _STAGES,
    "MobileNetV1Model": {"image_size": 64}, "MobileNetV2Model": {"image_size": 64},
    "MobileViTModel": {"image_size": 128, "patch_size": 2}, "MobileViTV2Model": {"image_size": 128, "patch_size": 2},
    "EfficientNetModel": {"image_size": 64, "hidden_dim": 2560}, "PvtModel": _PYRAMID, "PvtV2Model": _PYRAMID,
    "SegformerModel": _PYRAMID, "CvtModel": {"image_size": 64}, "FocalNetModel": {"image_size": 64},
    "LevitModel": {"image_size": 224, "patch_size": 16},
    "HieraModel": {
        "image_size": [224, 224], "patch_size": [7, 7], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4,
    },
    "CLIPVisionModel": {}, "SiglipVisionModel": {},
}  # fmt: skip


def transformers_networks() -> Iterator[Architecture]:
    """Common encoders, classifiers and language models, made small."""
    for modality, table in (("text", TEXT), ("image", IMAGES)):
        for name, settings in table.items():
            build = functools.partial(_build_transformers, name, settings, modality)
            yield Architecture("transformers", name.partition("For")[0].removesuffix("Model"), name, build)


def _build_transformers(name: str, settings: dict[str, Any], modality: str) -> Built:
    kind = getattr(importlib.import_module("transformers"), name)
    default = kind.config_class()
    tiny = {key: value for key, value in TINY.items() if isinstance(getattr(default, key, None), type(value))}
    chosen = {key: value for key, value in (tiny | settings).items() if value is not None}
    model = kind(kind.config_class(**chosen)).eval()
    if modality == "text":
        return model, {"input_ids": torch.randint(1, 90, (SAMPLES, 12))}
    side = getattr(model.config, "image_size", 32)
    height, width = (side, side) if isinstance(side, int) else side
    return model, {"pixel_values": torch.randn(SAMPLES, 3, height, width)}


def pytorch_networks() -> Iterator[Architecture]:
    """PyTorch's own, batch first and sequence first."""
    for first in (True, False):
        name = "batch_first" if first else "sequence_first"
        for kind in ("TransformerEncoder", "TransformerDecoder", "Transformer"):
            yield Architecture("torch", kind, f"{kind}.{name}", functools.partial(_build_torch, kind, first))


def _build_torch(kind: str, batch_first: bool) -> Built:
    options: dict[str, Any] = {"dim_feedforward": 32, "batch_first": batch_first}
    shape = (SAMPLES, 7, 16) if batch_first else (7, SAMPLES, 16)
    x, y = torch.randn(shape), torch.randn(shape)
    if kind == "Transformer":
        return nn.Transformer(16, 2, 1, 1, **options), {"0": x, "1": y}
    layer = getattr(nn, kind + "Layer")(16, 2, **options)
    stack = getattr(nn, kind)(layer, 2)
    return stack, {"0": x} if kind == "TransformerEncoder" else {"0": x, "1": y}
