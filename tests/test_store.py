"""A store knows every expert of a checkpoint, and refuses a checkpoint that is not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeinf.checkpoint.folder import Checkpoint, read_tensor
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, ReadError
from moeinf.kernels.forms import ExpertForm, Gate

Header = dict[str, Any]


@pytest.fixture
def folder(qwen3_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, to damage."""
    return Path(shutil.copytree(qwen3_folder, tmp_path / "copy"))


def edit_header(folder: Path, edit: Callable[[Header], Any]) -> None:
    """Rewrites the header of the one shard, leaving the data as it is."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    replaced = edit(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites the one shard with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def expert_name(expert: int, part: str, layer: int = 1) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


@pytest.mark.parametrize("original_names", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_reads_as_transformers_loads_it(
    family: str, original_names: bool, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, family, original_names=original_names, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    store = ExpertStore.open(tmp_path)
    for layer, layer_id in enumerate(store.layer_ids):
        experts = model.model.layers[layer_id].mlp.experts
        for expert in range(store.num_experts):
            read = store.read(layer, expert)
            assert torch.equal(read["gate_up"], experts.gate_up_proj[expert])
            assert torch.equal(read["down"], experts.down_proj[expert])


def test_the_store_counts_its_experts(qwen3_folder: Path) -> None:
    store = ExpertStore.open(qwen3_folder)
    assert (store.num_layers, store.num_experts, store.top_k) == (3, 6, 2)
    assert store.form == ExpertForm(Gate("glu", "silu"), has_gate=True, has_bias=False)
    assert store.modules == [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    assert store.nbytes == 3 * 6 * 3 * 24 * 40 * 4
    assert store.slot_bytes % 4096 == 0 and store.slot_bytes >= 3 * 24 * 40 * 4
    assert [segment.shape for segment in store.layout.segments] == [(48, 40), (40, 24)]


def test_layers_beyond_the_model_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 checkpoints carry prediction blocks that the model does not run."""
    write_checkpoint(tmp_path)
    edit_config(tmp_path, num_hidden_layers=2)
    assert ExpertStore.open(tmp_path).layer_ids == [0, 1]


@pytest.mark.parametrize("layer, expert", [(3, 0), (0, 6), (-1, 0), (0, -1)])
def test_an_expert_that_does_not_exist(qwen3_folder: Path, layer: int, expert: int) -> None:
    with pytest.raises(IndexError, match=r"3 MoE layers of 6 experts"):
        ExpertStore.open(qwen3_folder).read(layer, expert)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: expected a checkpoint folder"):
        ExpertStore.open(tmp_path / "nowhere")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        ExpertStore.open(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found neither"):
        ExpertStore.open(folder)


def test_missing_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: missing, though .* puts \d+ tensors"
    ):
        ExpertStore.open(tmp_path)


def test_a_shard_without_a_tensor_of_the_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*the index says it holds '{name}'"):
        ExpertStore.open(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 7])
def test_an_index_that_points_outside_the_folder(folder: Path, name: Any) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name"):
        ExpertStore.open(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_shard_size="60KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    with pytest.raises(CheckpointError, match=rf"'{name}' is also in {first.name}"):
        ExpertStore.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 200])
def test_a_file_cut_inside_its_header(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(at least 8 bytes|header)"):
        ExpertStore.open(folder)


def test_a_file_cut_inside_its_data(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"tensor '.*': bytes .* leave the file's"):
        ExpertStore.open(folder)


def test_a_header_longer_than_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes((2**63).to_bytes(8, "little") + raw[8:])
    with pytest.raises(CheckpointError, match=r"header length 9223372036854775808 goes beyond"):
        ExpertStore.open(folder)


NAME = expert_name(2, "up")


def _overlap(header: Header) -> None:
    begin, end = header[NAME]["data_offsets"]
    header[NAME]["data_offsets"] = [begin - 8, end - 8]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda h: h[NAME].update(data_offsets=[0, 10**15]), "leave the file's"),
        (lambda h: h[NAME].update(data_offsets=[-8, 3832]), "not a pair of offsets"),
        (lambda h: h[NAME].update(data_offsets=[3840, 0]), "leave the file's"),
        (lambda h: h[NAME].update(data_offsets=[1.5, 2]), "not a pair of offsets"),
        (lambda h: h[NAME].update(data_offsets=None), "not a pair of offsets"),
        (lambda h: h[NAME].update(shape=[24, 41]), r"takes \d+ bytes, its offsets span \d+"),
        (lambda h: h[NAME].update(shape=[2**40, 2**40]), "more bits than a 64-bit number"),
        (lambda h: h[NAME].update(shape=[-24, -40]), "not a list of sizes"),
        (lambda h: h[NAME].update(shape=[True, 40]), "not a list of sizes"),
        (lambda h: h[NAME].update(dtype=["F32"]), "is not a name"),
        (lambda h: h.update({NAME: [1, 2]}), "its entry is a list"),
        (lambda h: [1, 2], r"expected '{', found b'\['"),
        (_overlap, "overlap"),
    ],
)
def test_a_damaged_header(folder: Path, edit: Callable[[Header], Any], message: str) -> None:
    edit_header(folder, edit)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        ExpertStore.open(folder)


def test_a_dtype_that_nobody_knows(folder: Path) -> None:
    """It keeps nothing from being served but what is stored in it."""
    edit_header(folder, lambda header: header["lm_head.weight"].update(dtype="F12"))
    store = ExpertStore.open(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'lm_head.*found F12"):
        read_tensor(store.checkpoint.tensors["lm_head.weight"])
    edit_header(folder, lambda header: header[NAME].update(dtype="F12"))
    with pytest.raises(CheckpointError, match=r"2\.up_proj.*F12 .*differs from .*0\.up_proj.*F32"):
        ExpertStore.open(folder)


def test_a_header_that_is_not_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((6).to_bytes(8, "little") + b"[[[[[[")
    with pytest.raises(CheckpointError, match=r"not a JSON object.*found b'\['"):
        ExpertStore.open(folder)


def test_an_expert_missing_from_one_layer(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: [tensors.pop(expert_name(4, p)) for p in ("gate", "up", "down")]
    )
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.1\.mlp\.experts, expert 4: no tensor for its down and gate",
    ):
        ExpertStore.open(folder)


def test_a_part_of_an_expert_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(expert_name(4, "gate")))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts, expert 4: no tensor for its gate"
    ):
        ExpertStore.open(folder)


def test_more_experts_than_configured(folder: Path) -> None:
    edit_config(folder, num_experts=5)
    with pytest.raises(CheckpointError, match=r"layer 0 has an expert 5, config\.json says .* 5"):
        ExpertStore.open(folder)


@pytest.mark.parametrize(
    "replacement, message",
    [
        (torch.zeros(24, 41), r"2\.up_proj.*\[24, 41\].*differs from .*0\.up_proj.*\[24, 40\]"),
        (
            torch.zeros(24, 40, dtype=torch.bfloat16),
            r"2\.up_proj.*BF16.*differs from .*F32",
        ),
        (torch.zeros(960), r"2\.up_proj.*\[960\].*differs"),
    ],
)
def test_an_expert_unlike_the_others(folder: Path, replacement: torch.Tensor, message: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({NAME: replacement}))
    with pytest.raises(CheckpointError, match=message):
        ExpertStore.open(folder)


def test_experts_whose_shapes_do_not_fit_together(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".experts." in name and "gate_proj" in name:
                tensors[name] = torch.zeros(23, 40)

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=r"gate_proj.*\[23, 40\].*expected F32 \[24, 40\]"):
        ExpertStore.open(folder)


def test_experts_of_a_dtype_without_kernels(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].to(torch.float64)

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=r"F64.*expected one of the weight formats bf16, f16"):
        ExpertStore.open(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 48}, "hidden_size is 48"),
        ({"num_experts": None, "num_local_experts": None}, "none of num_experts, "),
        ({"num_experts": "6"}, "num_experts is '6'"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 7}, "routes to 7 experts per token, there are 6"),
        ({"hidden_act": "xielu"}, "activation 'xielu'"),
    ],
)
def test_a_configuration_that_does_not_fit(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        ExpertStore.open(folder)


def test_a_checkpoint_without_experts(folder: Path) -> None:
    edit_config(folder, model_type="mystery")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    edit_tensors(folder, drop)
    with pytest.raises(CheckpointError, match=r"no experts found in a 'mystery' checkpoint"):
        ExpertStore.open(folder)


def test_a_file_that_vanishes_after_opening(folder: Path) -> None:
    store = ExpertStore.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ReadError, match=r"model\.safetensors: .*No such file"):
        store.read(0, 0)


def test_a_file_cut_after_opening(folder: Path) -> None:
    store = ExpertStore.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ReadError, match=r"model.safetensors: was written to after the checkpoint"):
        store.read(2, 5)


def test_opening_reads_no_weights(folder: Path) -> None:
    """The index alone is enough: data may be all zeros, or a hole, and opening succeeds."""
    path = folder / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(8 + length)
        file.truncate(size)
    assert len(Checkpoint.open(folder).tensors) == 84
    assert ExpertStore.open(folder).read(0, 0)["down"].abs().sum() == 0
