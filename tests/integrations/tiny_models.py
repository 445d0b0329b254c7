"""Well-known architectures as code with random weights: a few thousand parameters each, nothing downloaded.

A row is (what it is, configuration -> model, batch). The sizes are the smallest that keep an architecture's own
kinds of tensors: grouped key/value heads, tied embeddings, 1-d and 2-d convolutions, relative position tables, scans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

_IDS = torch.arange(16).reshape(2, 8) % 11
_TEXT = {"input_ids": _IDS, "labels": _IDS}
_PIXELS = torch.linspace(-2.0, 2.0, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
_IMAGES = {"pixel_values": _PIXELS, "labels": torch.tensor([1, 2])}
_BOXES = [
    {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.2]])}
] * 2
_SCENES = {"pixel_values": _PIXELS, "labels": _BOXES}
_SPEECH = {"input_features": torch.linspace(-2.0, 2.0, 2 * 8 * 32).sin().reshape(2, 8, 32), "labels": _IDS}
_WORDS = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    **_WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16,
}  # fmt: skip
_ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8,
    "num_labels": 5,
}  # fmt: skip
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}


def _detr() -> nn.Module:
    backbone = hf.ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage2"], **_STAGES)
    return hf.DetrForObjectDetection(
        hf.DetrConfig(
            backbone_config=backbone,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=4,
            num_labels=5,
        )
    )


def _whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
            **_WORDS,
        )
    )


@dataclass(frozen=True)
class Architecture:
    """A model and what it is fed.

    Attributes:
        what: one phrase for the table.
        make: random weights.
        batch: keyword arguments of its forward, targets among them.
    """

    what: str
    make: Callable[[], nn.Module]
    batch: dict[str, Any]

    def build(self, seed: int = 0) -> nn.Module:
        """The same weights for the same seed; dropout off, so that two passes are equal."""
        torch.manual_seed(seed)
        return self.make().eval()

    def backward(self, model: nn.Module) -> None:
        """Fill the gradients of one step."""
        model.zero_grad()
        model(**self.batch).loss.backward()


ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2": Architecture(
        "decoder, tied output",
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=8, n_embd=16, n_layer=2, n_head=2, **_WORDS)),
        _TEXT,
    ),
    "Llama": Architecture("decoder, grouped keys", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)), _TEXT),
    "Qwen3": Architecture(
        "decoder, normalised heads, tied output",
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(tie_word_embeddings=True, **_DECODER)),
        _TEXT,
    ),
    "T5": Architecture(
        "encoder and decoder, relative positions, tied embeddings",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        _TEXT,
    ),
    "Mamba": Architecture(
        "state-space scan, depthwise 1-d convolution, tied output",
        lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **_WORDS)),
        _TEXT,
    ),
    "ViT": Architecture(
        "patches and attention", lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=32, **_ENCODER)), _IMAGES
    ),
    "ResNet": Architecture(
        "convolutions and BatchNorm",
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, layer_type="basic", **_STAGES)),
        _IMAGES,
    ),
    "ConvNeXt": Architecture(
        "depthwise convolutions and LayerNorm",
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(image_size=32, num_stages=2, **_STAGES)),
        _IMAGES,
    ),
    "DETR": Architecture("detector: convolutions, attention, queries", _detr, _SCENES),
    "YOLOS": Architecture(
        "detector: patches, detection tokens",
        lambda: hf.YolosForObjectDetection(hf.YolosConfig(image_size=[32, 32], num_detection_tokens=4, **_ENCODER)),
        _SCENES,
    ),
    "Whisper": Architecture("speech, encoder and decoder, tied output", _whisper, _SPEECH),
}
