"""Models of images and text: with pixels, equal to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from table import WHERE
from tiny import tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moeinf
from moeinf.integrations.transformers.experts import experts_modules, parameters_of
from moeinf.integrations.transformers.models import model_class

IMAGE_TOKEN = 90
GRID = torch.tensor([[1, 4, 4]])  # 16 patches, of which 4 each become one token
IMAGE = torch.tensor([[5, 6, 7, *[IMAGE_TOKEN] * 4, 8, 9]])


def inputs_of(model_type: str, config: Any) -> dict[str, Any]:
    """A text with one random image in it."""
    vision = config.vision_config
    values = vision.in_channels * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
    pixels = torch.randn(16, values, generator=torch.Generator().manual_seed(3))
    kinds = (IMAGE == IMAGE_TOKEN).int()
    inputs = {
        "input_ids": IMAGE,
        "attention_mask": torch.ones_like(IMAGE),
        "pixel_values": pixels,
        "image_grid_thw": GRID,
        "mm_token_type_ids": kinds,
    }
    if model_type == "ernie4_5_vl_moe":  # these tokens go to the experts of images
        inputs["moe_mm_token_type_ids"] = kinds
    return inputs


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_an_image(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    sizes = tiny(config_class) | {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 91}
    sizes |= {"image_start_token_id": 91, "image_end_token_id": 92, "video_token_id": 93}
    base, config = model_class(config_class(**sizes), WHERE)
    model: Any = base(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    reference: Any = base.from_pretrained(tmp_path, experts_implementation="eager").eval()
    inputs = inputs_of(model_type, config)
    expected = logits_of(reference, inputs)
    scale = expected.abs().max()
    served: Any = moeinf.load(tmp_path, device="cpu", dtype=torch.float32)
    found = logits_of(served, inputs)
    assert (found - expected).abs().max() <= 1e-4 * scale
    small = moeinf.load(tmp_path, device="cpu", slots=2)
    assert torch.equal(logits_of(small, inputs), found)
    options: Any = {"max_new_tokens": 4, "do_sample": False}
    tokens = reference.generate(**inputs, **options)
    assert torch.equal(served.generate(**inputs, **options), tokens)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert (logits_of(served, other) - found).abs().max() > 1e-3 * scale  # pixels matter
    if model_type == "ernie4_5_vl_moe":
        assert [cache.stats()["accesses"] > 0 for cache in served.moeinf.caches] == [True, True]
    for path, module in experts_modules(reference).items():
        if model_type != "ernie4_5_vl_moe" or "vision" in path:
            for name in parameters_of(module):
                getattr(module, name).data.zero_()
    assert (logits_of(reference, inputs) - expected).abs().max() > 1e-3 * scale
