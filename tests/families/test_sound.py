"""Models that hear and speak: with sound, equal to transformers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moeinf
from moeinf.integrations.transformers.experts import experts_modules, parameters_of

if "qwen3_omni_moe_thinker" not in CONFIG_MAPPING:
    pytest.skip("this transformers has no thinker as a model of its own", allow_module_level=True)
configs: Any = import_module(CONFIG_MAPPING["qwen3_omni_moe_thinker"].__module__)

IDS: dict[str, Any] = {
    "audio_token_id": 90, "audio_start_token_id": 91, "image_token_id": 92, "video_token_id": 93,
    "vision_start_token_id": 94,
}  # fmt: skip
START, USER, ASSISTANT = 80, 82, 83
FRAMES = 40  # of the spectrum; they become five tokens


def thinker() -> dict[str, Any]:
    return tiny(configs.Qwen3OmniMoeThinkerConfig) | IDS


def whole() -> Any:
    """Thinker, talker and the decoder of waves."""
    text = tiny(configs.Qwen3OmniMoeTalkerTextConfig)
    predictor = tiny(configs.Qwen3OmniMoeTalkerCodePredictorConfig)
    talker = tiny(configs.Qwen3OmniMoeTalkerConfig) | IDS | {
        "text_config": text | {"vocab_size": 1100, "shared_expert_intermediate_size": 12},
        "code_predictor_config": predictor
        | {"vocab_size": 16, "eos_token_id": None, "pad_token_id": None},
        "accept_hidden_layer": 1, "codec_eos_token_id": 3, "codec_nothink_id": 4,
        "codec_think_bos_id": 5, "codec_think_eos_id": 6, "codec_pad_id": 7, "codec_bos_id": 8,
        "speaker_id": {"ethan": 9}, "spatial_merge_size": 2,
    }  # fmt: skip
    return configs.Qwen3OmniMoeConfig(
        thinker_config=thinker(),
        talker_config=talker,
        code2wav_config=tiny(configs.Qwen3OmniMoeCode2WavConfig),
        im_start_token_id=START,
        user_token_id=USER,
        assistant_token_id=ASSISTANT,
        tts_pad_token_id=85,
        tts_bos_token_id=86,
        tts_eos_token_id=87,
    )


def reference_of(base: Any, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = base(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def heard() -> dict[str, torch.Tensor]:
    """A text with a sound in it, up to where the answer begins."""
    ids = torch.tensor([[START, USER, 5, 91, *[90] * 5, 8, 81, START, ASSISTANT, 10]])
    draw = torch.Generator().manual_seed(3)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(1, 128, FRAMES, generator=draw),
        "feature_attention_mask": torch.ones(1, FRAMES, dtype=torch.long),
    }


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def test_a_sound(heard: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    config = configs.Qwen3OmniMoeThinkerConfig(**thinker())
    reference = reference_of(base, config, tmp_path)
    expected = logits_of(reference, heard)
    scale = expected.abs().max()
    served: Any = moeinf.load(tmp_path, device="cpu", dtype=torch.float32)
    found = logits_of(served, heard)
    assert (found - expected).abs().max() <= 1e-4 * scale
    assert torch.equal(logits_of(moeinf.load(tmp_path, device="cpu", slots=2), heard), found)
    options: Any = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(served.generate(**heard, **options), reference.generate(**heard, **options))
    other = heard | {"input_features": -heard["input_features"]}
    assert (logits_of(served, other) - found).abs().max() > 1e-3 * scale  # the sound matters


def test_text_and_sound_of_the_whole_model(heard: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = transformers.Qwen3OmniMoeForConditionalGeneration
    reference = reference_of(base, whole(), tmp_path)
    served: Any = moeinf.load(tmp_path, device="cpu", slots=2)
    options: Any = {
        "thinker_max_new_tokens": 4, "thinker_do_sample": False, "thinker_eos_token_id": 2,
        "talker_max_new_tokens": 4, "talker_do_sample": False, "return_audio": True,
    }  # fmt: skip
    text, sound = reference.generate(**heard, **options)
    served_text, served_sound = served.generate(**heard, **options)
    assert torch.equal(served_text, text)
    scale = sound.abs().max()
    assert (served_sound - sound).abs().max() <= 1e-3 * scale
    modules = {path for cache in served.moeinf.caches for path in cache.store.modules}
    assert modules == {*experts_modules(reference)}
    for module in experts_modules(reference.talker).values():
        for name in parameters_of(module):
            getattr(module, name).data.zero_()
    _, other = reference.generate(**heard, **options)
    assert other.shape != sound.shape or (other - sound).abs().max() > 1e-3 * scale
