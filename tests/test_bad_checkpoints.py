"""Checkpoints that cannot be run are refused by every command, in one sentence, before any text."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_conversation import write_tokenizer
from transformers import AutoModelForCausalLM

import moeinf
import moeinf.cli

Change = Callable[[Path], Any]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def config(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def tensors(*without: str, **more: torch.Tensor) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        kept = {n: t for n, t in load_file(file).items() if not n.startswith(without or ("-",))}
        save_file(kept | {name.replace("__", "."): t for name, t in more.items()}, file)

    return apply


def pointer(name: str) -> Change:
    return lambda folder: (folder / name).write_text(POINTER)


def lost_shard(folder: Path) -> None:
    """An index that names a shard which is not there."""
    names = {name: "model-2.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


REFUSED: list[tuple[Change, str]] = [
    (config(model_type="tomorrow", auto_map={"AutoConfig": "a.B"}), "does not know it; to run"),
    (config(model_type="tomorrow", auto_map=7), "does not know it"),
    (config(architectures=7), "config.json: architectures is 7, expected a list of names"),
    (config(architectures=[[]]), "config.json: architectures is [[]], expected a list of names"),
    (config(architectures=["Qwen3MoeForSequenceClassification"]), ""),
    (tensors("model.norm"), "no tensor for model.norm.weight, which the model needs"),
    (tensors(model__norm__weight=torch.ones(7)), "model.norm.weight (model.safetensors: F32 [7])"),
    (tensors("model.layers.1.mlp.experts.5."), "no tensor of expert 5"),
    (
        config(num_experts=5, num_local_experts=5),
        "says there are 5 experts, found a tensor of expert 5",
    ),
    (config(num_experts=7, num_local_experts=7), "no tensor of expert 6"),
    (config(num_experts_per_tok=7), "config.json: routes to 7 experts per token, there are 6"),
    (config(tie_word_embeddings=False), "no tensor for lm_head.weight"),
    (pointer("model.safetensors"), "model.safetensors: expected the file itself, found a Git LFS"),
    (pointer("config.json"), "config.json: expected the file itself, found a Git LFS pointer"),
    (lost_shard, "model-2.safetensors: missing, though model.safetensors.index.json puts"),
    (lambda folder: (folder / "model.safetensors").unlink(), "found neither model.safetensors nor"),
]
NO_TEXT: list[tuple[Change, str]] = [  # `moeinf info` and `moeinf.load` take these
    (config(architectures=["Qwen3MoeModel"]), "Qwen3MoeModel does not write text"),
    (pointer("tokenizer.json"), "tokenizer.json: expected the file itself, found a Git LFS"),
    (lambda folder: [file.unlink() for file in folder.glob("tok*")], "found none"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tied embeddings and no lm_head."""
    folder = write_checkpoint(tmp_path_factory.mktemp("good"), tie_word_embeddings=True)
    write_tokenizer(folder, None)
    return folder


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    def run(*arguments: str) -> tuple[str, str]:
        """Standard output, and what the process ended with."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.stdin", (tmp_path / "messages").open("w+"))
        monkeypatch.setattr(sys, "argv", ["moeinf", *arguments])
        with pytest.raises(SystemExit) as ended:
            moeinf.cli.main()
        return capsys.readouterr().out, str(ended.value.code or "")

    return run


@pytest.mark.parametrize(("change", "reason"), REFUSED + NO_TEXT)
def test_a_command_says_why_in_one_sentence(
    cli: Any, good: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "bad"))
    change(folder)
    for command in ("run", "trace", "chat"):
        out, ended = cli(command, str(folder))
        assert ended.startswith(f"moeinf: {folder}") and reason in ended
        assert "\n" not in ended and not out
    out, ended = cli("info", str(folder), "--json")
    facts = json.loads(out) if out else {"served": False, "reason": ended}
    assert facts["served"] == ((change, reason) in NO_TEXT)
    assert facts["served"] or reason in facts["reason"]


def test_a_name_without_network_is_one_sentence(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    for command in ("run", "trace", "chat", "info"):
        out, ended = cli(command, "tiny/absent")
        assert "found neither, and http://127.0.0.1:9 cannot be reached" in ended and not out


def test_what_the_model_has_no_use_for_is_named_once(cli: Any, good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "more"))
    tensors(model__extra__weight=torch.ones(7))(folder)
    with pytest.warns(UserWarning, match="has no use for model.extra.weight; not loaded") as found:
        _, ended = cli("run", str(folder), "--prompt", "hi", "--max-new-tokens", "1")
    assert not ended and len(found) == 1


@pytest.mark.parametrize("names", [None, [], ["NoSuchModel"], ["BertForMaskedLM"], ["AutoConfig"]])
def test_a_class_that_cannot_be_meant_leaves_the_one_of_the_model_type(
    good: Path, tmp_path: Path, names: Any
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "named"))
    config(architectures=names)(folder)
    assert type(moeinf.load(folder, slots=2)).__name__ == "Qwen3MoeForCausalLM"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def assert_equals_transformers(model: Any, reference: Any) -> None:
    expected = logits_of(reference)
    assert (logits_of(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def eager(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("head", ["none", "equal", "another", "alone"])
def test_tied_embeddings_with_and_without_a_head(good: Path, tmp_path: Path, head: str) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "tied"))
    embedding = load_file(good / "model.safetensors")["model.embed_tokens.weight"]
    made = {"equal": embedding, "another": embedding.flip(0), "alone": embedding}
    if head in made:
        without = ["model.embed_tokens"] if head == "alone" else []
        tensors(*without, lm_head__weight=made[head].clone())(folder)
    assert_equals_transformers(moeinf.load(folder, device="cpu"), eager(folder))


@pytest.mark.parametrize("options", [{}, {"slots": 2}, {"slots": 4, "prefetch": "gate"}])
def test_a_router_that_is_told_to_choose_more_after_loading(
    good: Path, options: dict[str, Any]
) -> None:
    model, reference = moeinf.load(good, device="cpu", **options), eager(good)
    assert_equals_transformers(model, reference)
    before = logits_of(reference)
    for one in (model, reference):
        one.config.num_experts_per_tok = 4
        for layer in one.model.layers:
            layer.mlp.gate.top_k = 4
    with model.moeinf.cache.record() as recorder:
        assert_equals_transformers(model, reference)
    assert not torch.allclose(before, logits_of(reference))
    assert recorder.trace().experts.shape[-1] == 4


ODD = ["two words", "größe-模型", "a[b]*?{c}", "--json", "100%", "a\nb", "quo'te\"", ".hidden"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_have_any_name(cli: Any, good: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(good, folder)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    assert torch.equal(logits_of(moeinf.load(os.fsencode(folder))), logits_of(moeinf.load(good)))
    _, ended = cli("run", "--max-new-tokens", "1", "--record", f"{name}.trace", "--", name)
    assert not ended and moeinf.Trace.load(tmp_path / f"{name}.trace").model == name
    out, ended = cli("info", "--json", "--", name)
    assert not ended and json.loads(out)["path"] == name
    moeinf.load(folder).save_pretrained(tmp_path / "saved" / name)
    saved = moeinf.load(tmp_path / "saved" / name)
    assert torch.equal(logits_of(saved), logits_of(moeinf.load(good)))


def test_a_path_that_is_not_utf8_is_refused(cli: Any, good: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(good, os.fsdecode(folder))
    for command in ("run", "trace", "chat", "info"):
        _, ended = cli(command, os.fsdecode(folder))
        assert ended.endswith(
            r"caf\udce9': expected a path in UTF-8, as tokenizers need it: make a link to it"
        )
    for opened in (moeinf.load, moeinf.ExpertStore.open):
        with pytest.raises(moeinf.CheckpointError, match="expected a path in UTF-8"):
            opened(folder)
        with pytest.raises(TypeError, match=r"expected str, bytes or .*, not int"):
            opened(7)  # type: ignore[arg-type]
    (tmp_path / "link").symlink_to(os.fsdecode(folder))
    assert torch.equal(logits_of(moeinf.load(tmp_path / "link")), logits_of(moeinf.load(good)))
