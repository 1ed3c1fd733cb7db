"""compressed-tensors reads a pack: its own decoder gives the numbers that a store gives.

The library is in no environment of this project, for transformers takes it into use where it is
there: `make test-packs` has it in a folder of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file

import moeinf
from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.formats import MULTIPLIER, SCALES, VALUES
from moeinf.checkpoint.store import ExpertStore

pytest.importorskip("compressed_tensors", reason="make test-packs")


@pytest.mark.parametrize("name", ["int8", "int4", "mxfp4", "nvfp4"])
def test_it_decodes_the_same_numbers(name: str, tmp_path: Path, seed: int) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig

    source = write_checkpoint(
        tmp_path / "a", seed=seed, dtype=torch.bfloat16, hidden_size=64, moe_intermediate_size=96
    )
    moeinf.pack(source, tmp_path / "b", format=name)
    stated = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stated)
    (scheme,) = config.config_groups.values()
    assert "lm_head" in config.ignore and "model.layers.0.mlp.gate" in config.ignore
    decoder = BaseCompressor.get_value_from_registry(config.format)
    stored = {k: v for f in (tmp_path / "b").glob("*.safetensors") for k, v in load_file(f).items()}
    store = ExpertStore.open(tmp_path / "b")
    for layer in range(store.num_layers):
        for expert in range(store.num_experts):
            slot = torch.zeros(1, store.slot_bytes, dtype=torch.uint8)
            for segment, part in store.read(layer, expert).items():
                store.layout.views(slot)[segment][0] = part
            matrices = store.layout.matrices(slot)
            for word in ("gate", "up", "down"):
                view = getattr(matrices, word)
                row = getattr(store.layout, word).format
                pieces = {VALUES: view.values, SCALES: view.scales, MULTIPLIER: view.multiplier}
                parts = {piece: part[0] for piece, part in pieces.items() if part is not None}
                numbers = row.dequantise(parts)
                stem = f"{store.modules[layer]}.{expert}.{word}_proj."
                mine = {k.removeprefix(stem): v for k, v in stored.items() if k.startswith(stem)}
                if name == "nvfp4":  # the library rounds each step of its product to bfloat16
                    packed = mine["weight_packed"]
                    codes = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1])
                    scales = mine["weight_scale"].double() / mine["weight_global_scale"].double()
                    found = codes.double() * scales.repeat_interleave(16, 1)
                    assert torch.allclose(found, numbers, rtol=1e-7, atol=0)
                else:
                    wide = {k: v.float() if v.is_floating_point() else v for k, v in mine.items()}
                    found = decoder.decompress(wide, scheme)["weight"]
                    assert torch.equal(found.double(), numbers)


@pytest.mark.parametrize(("name", "dense"), [("int4", "int8"), ("mxfp4", "int4")])
def test_linear_layers_have_a_scheme_of_their_own(
    name: str, dense: str, tmp_path: Path, seed: int
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 32}
    source = write_checkpoint(tmp_path / "a", seed=seed, dtype=torch.bfloat16, **sizes)
    moeinf.pack(source, tmp_path / "b", format=name, dense=dense)
    stated = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    with torch.device("meta"):
        attention = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 128)})
        expert = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(64, 96)})
        mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([expert])})
        layer = torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp})
        body = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
        model = torch.nn.ModuleDict({"model": body})
    apply_quantization_config(model, QuantizationConfig.model_validate(stated))
    entries = Checkpoint.open(tmp_path / "b").tensors
    stored = {k: v for f in (tmp_path / "b").glob("*.safetensors") for k, v in load_file(f).items()}
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj"):
        scheme = model.get_submodule(path).quantization_scheme
        decoder = BaseCompressor.get_value_from_registry(scheme.format)
        mine = {k.removeprefix(path + "."): v for k, v in stored.items() if k.startswith(path)}
        wide = {k: v.float() if v.is_floating_point() else v for k, v in mine.items()}
        found = decoder.decompress(wide, scheme)["weight"]
        assert torch.equal(found.float(), read_tensor(entries[path + ".weight"]))
