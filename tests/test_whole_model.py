"""A served model is saved, copied, counted and adapted as a whole model, or says that it is not."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint
from fake_cuda_library import fake_cuda_library
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import moeinf
from moeinf.errors import ReadError, UnsupportedError
from moeinf.integrations.transformers import whole

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3"]


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


def prompt(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, COMMON["vocab_size"], (2, 9), generator=generator)


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def eager(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        read = load_file(path)
        assert not found.keys() & read.keys()
        found |= read
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shards", ["50GB", "30KB"])
@pytest.mark.parametrize("original_names", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_source_to_the_bit(
    family: str, original_names: bool, shards: str, device: str, tmp_path: Path, seed: int
) -> None:
    source = write_checkpoint(tmp_path / "a", family, seed=seed, original_names=original_names)
    served = moeinf.load(source, device=device, slots=2)
    saved = tmp_path / "b"
    served.save_pretrained(saved, max_shard_size=shards)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shards == "30KB")
    if original_names:
        assert same(tensors_of(saved), tensors_of(source))
    assert same(eager(saved).state_dict(), eager(source).state_dict())
    again, tokens = moeinf.load(saved, device=device, slots=2), prompt(seed)
    assert torch.equal(logits_of(again, tokens), logits_of(served, tokens))
    assert "experts_implementation" not in (saved / "config.json").read_text()


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"dtype": torch.bfloat16}])
def test_tied_weights_and_other_dtypes(changes: Any, tmp_path: Path, seed: int) -> None:
    dtype = changes.get("dtype", torch.float32)
    source = write_checkpoint(tmp_path / "a", seed=seed, **(changes | {"dtype": torch.float32}))
    moeinf.load(source, slots=2, dtype=dtype).save_pretrained(tmp_path / "b")
    expected = eager(source, dtype=dtype).state_dict()
    assert same(eager(tmp_path / "b").state_dict(), expected)


def test_what_was_trained_is_saved(qwen3_folder: Path, tmp_path: Path, seed: int) -> None:
    served, reference = moeinf.load(qwen3_folder, slots=2), eager(qwen3_folder)
    for model in (served, reference):
        with torch.no_grad():
            model.get_parameter("model.layers.1.self_attn.q_proj.weight").add_(0.5)
    served.save_pretrained(tmp_path, state_dict=served.state_dict(), variant="new")
    assert same(eager(tmp_path, variant="new").state_dict(), reference.state_dict())


def test_nothing_of_an_earlier_save_is_left(qwen3_folder: Path, tmp_path: Path) -> None:
    served = moeinf.load(qwen3_folder, slots=2)
    (tmp_path / "notes.txt").write_text("kept")
    names = []
    for size in ("50GB", "30KB", "60KB", "50GB"):
        served.save_pretrained(tmp_path, max_shard_size=size)
        names.append(sorted(path.name for path in tmp_path.iterdir()))
        assert same(tensors_of(tmp_path), tensors_of(qwen3_folder))
    assert names[0] == names[3] == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt"
    ]  # fmt: skip
    assert "model.safetensors.index.json" in names[1]


def test_a_save_holds_little_and_an_interrupted_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "a")
    served = moeinf.load(source, slots=2)
    monkeypatch.setattr(whole, "CHUNK", 1000)
    sizes = []
    read = whole.read_bytes

    def counted(entry: Any, offset: int, nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return read(entry, offset, nbytes)

    monkeypatch.setattr(whole, "read_bytes", counted)
    served.save_pretrained(tmp_path / "b")
    assert max(sizes) == 1000
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(20000)
    with pytest.raises(ReadError, match=r"model\.safetensors: was written to"):
        served.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a")
    (tmp_path / "link").symlink_to(source)
    served = moeinf.load(source, slots=2)
    before = tensors_of(source)
    for folder in (source, tmp_path / "link"):
        with pytest.raises(UnsupportedError, match="reads its experts from this folder"):
            served.save_pretrained(folder)
    assert same(tensors_of(source), before)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"push_to_hub": True}, r"model\.push_to_hub"),
        ({"distributed_checkpoint": True}, "by one process"),
        ({"state_dict": {}}, r"lm_head\.weight: expected the tensors of model\.state_dict\(\)"),
    ]
    for options, words in cases:
        with pytest.raises(UnsupportedError, match=words):
            served.save_pretrained(tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_push_to_hub_sends_the_whole_model(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from transformers.utils import hub

    sent = {}
    served = moeinf.load(qwen3_folder, slots=2)
    made = SimpleNamespace(repo_id="a/b")
    api = SimpleNamespace(create_repo=lambda *a, **k: made)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "hf_api", lambda: api, raising=False)
    monkeypatch.setattr(hub, "create_repo", api.create_repo, raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: card)
    monkeypatch.setattr(
        type(served),
        "_upload_modified_files",
        lambda self, folder, *a, **k: sent.update(tensors_of(Path(folder))),
    )
    served.push_to_hub("a/b")
    assert same(sent, tensors_of(qwen3_folder))


def test_copies_are_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    model = moeinf.load(qwen3_folder, slots=2)
    for one, words in (
        (model, "Qwen3MoeForCausalLM: a served model cannot be copied or pickled"),
        (model.model, ": a served model cannot be copied or pickled"),
        (model.moeinf.cache, "ExpertCache cannot be copied or pickled"),
    ):
        ways: list[Callable[[Any], Any]] = [
            copy.deepcopy,
            pickle.dumps,
            lambda x: torch.save(x, tmp_path / "x.pt"),
        ]
        for way in ways:
            with pytest.raises(UnsupportedError, match=words):
                way(one)


def test_a_state_dict_can_be_read_and_not_written(qwen3_folder: Path, tmp_path: Path) -> None:
    model, reference = moeinf.load(qwen3_folder, slots=2), eager(qwen3_folder)
    state = copy.deepcopy(model.state_dict())
    dense = {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}
    assert same(dense, {n: t for n, t in reference.state_dict().items() if "experts" not in n})
    for one in (state, dense):
        assert not model.load_state_dict(one).missing_keys
    path = tmp_path / "x"
    for write in (lambda: torch.save(state, path), lambda: save_model(model, str(path))):
        with pytest.raises(UnsupportedError, match=r"no experts: .*model\.save_pretrained"):
            write()
    with pytest.raises(ValueError, match="ExpertsInFiles"):
        save_file(state, path)
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj"):
        reference.load_state_dict(state)
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj: .*cannot be replaced"):
        model.load_state_dict(reference.state_dict(), strict=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_experts_are_counted(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    served, reference = moeinf.load(tmp_path, slots=2), eager(tmp_path)
    assert served.num_parameters() == reference.num_parameters()
    dense = sum(p.numel() for n, p in reference.named_parameters() if ".experts." not in n)
    assert served.num_parameters(only_trainable=True) == dense
    experts = served.moeinf.cache.store.num_parameters
    assert served.num_parameters(exclude_embeddings=True) == (
        reference.num_parameters(exclude_embeddings=True)
    )
    assert dense + experts == reference.num_parameters()


# Of each family: a projection of the attention; the names of an expert's matrices and of what
# holds them, as checkpoints (and adapters trained on transformers 4) have them.
ADAPTED = {
    "qwen3_moe": ("q_proj", "mlp", {"gate_proj": (40, 24), "up_proj": (40, 24),
                                    "down_proj": (24, 40)}),
    "qwen2_moe": ("q_proj", "mlp", {"gate_proj": (40, 24), "up_proj": (40, 24),
                                    "down_proj": (24, 40)}),
    "mixtral": ("v_proj", "block_sparse_moe", {"w1": (40, 24), "w3": (40, 24), "w2": (24, 40)}),
}  # fmt: skip


def write_adapter(folder: Path, model: Any, seed: int, **config: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(seed)
    config = {"r": 2, "init_lora_weights": False, **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ADAPTED)
def test_an_adapter_of_the_attention(family: str, device: str, tmp_path: Path, seed: int) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    source = write_checkpoint(tmp_path / "a", family, seed=seed)
    target = ADAPTED[family][0]
    adapted = write_adapter(tmp_path / "b", eager(source), seed, target_modules=[target])
    tokens = prompt(seed)
    expected = logits_of(adapted, tokens)
    served = moeinf.load(source, device=device, slots=2)
    served.load_adapter(tmp_path / "b")
    torch.testing.assert_close(logits_of(served, tokens), expected, rtol=1e-4, atol=1e-4)

    served = moeinf.load(source, device=device, slots=2)
    wrapped = peft.PeftModel.from_pretrained(served, tmp_path / "b", is_trainable=True)
    torch.testing.assert_close(logits_of(wrapped, tokens), expected, rtol=1e-4, atol=1e-4)
    reference = peft.PeftModel.from_pretrained(eager(source), tmp_path / "b", is_trainable=True)
    for model in (wrapped, reference):
        model(tokens, labels=tokens).loss.backward()
    trained = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert len(trained) == 6
    for name, grad in trained.items():
        found = wrapped.get_parameter(name).grad
        torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-5)

    wrapped.merge_and_unload().save_pretrained(tmp_path / "c")
    merged = logits_of(eager(tmp_path / "c"), tokens)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize("way", ["load_adapter", "PeftModel", "get_peft_model"])
@pytest.mark.parametrize("names", ["parameters", "per expert"])
def test_an_adapter_of_experts_is_refused(
    names: str, way: str, family: str, tmp_path: Path, seed: int
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    source = write_checkpoint(tmp_path / "a", family, seed=seed)
    attention, block, matrices = ADAPTED[family]
    config: dict[str, Any] = {"target_modules": [attention]}
    if names == "parameters":
        config["target_parameters"] = ["experts.down_proj"]
        write_adapter(tmp_path / "b", eager(source), seed, **config)
    else:
        write_adapter(tmp_path / "b", eager(source), seed, **config)
        weights = load_file(tmp_path / "b/adapter_model.safetensors")
        store = moeinf.ExpertStore.open(source)
        for layer in range(3):
            for expert in range(store.num_experts):
                for name, (inputs, outputs) in matrices.items():
                    path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                    weights[f"{path}.lora_A.weight"] = torch.ones(2, inputs)
                    weights[f"{path}.lora_B.weight"] = torch.ones(outputs, 2)
        save_file(weights, tmp_path / "b/adapter_model.safetensors", {"format": "pt"})
        file = tmp_path / "b/adapter_config.json"
        config["target_modules"] = [attention, *matrices]
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        if family == "qwen2_moe" and way == "get_peft_model":
            pytest.skip("peft does not take these names for experts of this family")
    served = moeinf.load(source, slots=2)
    tokens = prompt(seed)
    expected = logits_of(served, tokens)
    with pytest.raises(UnsupportedError, match=r"experts of a served model stay in its files"):
        if way == "load_adapter":
            served.load_adapter(tmp_path / "b")
        elif way == "PeftModel":
            peft.PeftModel.from_pretrained(served, tmp_path / "b")
        else:
            peft.get_peft_model(served, peft.LoraConfig(r=2, init_lora_weights=False, **config))
    if way == "load_adapter" and family == "qwen2_moe" and names == "per expert":
        assert torch.equal(logits_of(served, tokens), expected)  # what was adapted is as before


def test_an_adapter_is_saved_alone(qwen3_folder: Path, tmp_path: Path) -> None:
    wrapped = write_adapter(
        tmp_path, moeinf.load(qwen3_folder, slots=2), 0, target_modules=["q_proj"]
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors"}
    assert not list(tmp_path.glob("model*"))
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert isinstance(wrapped.get_base_model(), PreTrainedModel)
