"""Code that comes with a checkpoint runs where the user trusts it, and nowhere else."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from hub_server import NAME, hub_of
from test_conversation import write_tokenizer
from test_hub import be_the_hub

import moeinf
import moeinf.cli
from moeinf.errors import CheckpointError

IDS = torch.tensor([[3, 1, 4, 1, 5]])
CODE = """
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

class TomorrowConfig(Qwen3MoeConfig):
    model_type = "tomorrow_moe"

class TomorrowForCausalLM(Qwen3MoeForCausalLM):
    config_class = TomorrowConfig
"""


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = write_checkpoint(tmp_path / "known", original_names=False)
    write_tokenizer(folder, None)
    return folder


@pytest.fixture
def tomorrow(known: Path, tmp_path: Path) -> Path:
    """The same weights, of a family that transformers does not know."""
    folder = tmp_path / f"tomorrow_{tmp_path.name}"  # transformers knows modules by this name
    folder.mkdir()
    for file in known.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((known / "config.json").read_text())
    config |= {"model_type": "tomorrow_moe", "architectures": ["TomorrowForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "code.TomorrowConfig",
        "AutoModelForCausalLM": "code.TomorrowForCausalLM",
    }
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE)
    return folder


def logits(path: str | Path, **options: bool) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = moeinf.load(path, slots=3, device="cpu", **options)(IDS).logits
    return found


def test_trusted_code_computes_and_generates(known: Path, tomorrow: Path) -> None:
    assert torch.equal(logits(tomorrow, trust_remote_code=True), logits(known))
    options = {"max_new_tokens": 3, "do_sample": False}
    model = moeinf.load(tomorrow, device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "TomorrowForCausalLM"
    assert torch.equal(
        model.generate(IDS, **options), moeinf.load(known, device="cpu").generate(IDS, **options)
    )


def test_it_is_fetched_only_where_it_is_trusted(
    known: Path, tomorrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of(tomorrow) as hub:
        be_the_hub(hub, tmp_path, monkeypatch)
        with pytest.raises(CheckpointError, match=r"'tomorrow_moe'.*: trust_remote_code=True"):
            moeinf.load(NAME)
        assert "code.py" not in hub.sent and "config.json" in hub.sent
        assert torch.equal(logits(NAME, trust_remote_code=True), logits(known))


@pytest.mark.parametrize("command", ["run", "info", "trace", "chat"])
def test_the_commands_have_an_option_for_it(
    tomorrow: Path, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    short = [] if command == "info" else ["--max-new-tokens", "1"]
    for trusted in ([], ["--trust-remote-code"]):
        arguments = [command, str(tomorrow), *short, *trusted, "--json"]
        monkeypatch.setattr(sys, "argv", ["moeinf", *arguments])
        with pytest.raises(SystemExit) as ended:
            moeinf.cli.main()
        refused = not trusted and command != "info"  # info says why
        assert bool(ended.value.code) == refused, ended.value.code


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package", "no_such_package"),
        ("raise ZeroDivisionError('of its own')", "of its own"),
        (CODE.replace("TomorrowConfig", "OtherConfig"), "TomorrowConfig"),
        (CODE.replace("TomorrowForCausalLM", "Other"), "auto_map names .*, which fails"),
    ],
)
def test_code_that_fails_is_one_sentence(tomorrow: Path, code: str, message: str) -> None:
    (tomorrow / "code.py").write_text(code)
    with pytest.raises(CheckpointError, match=message) as caught:
        moeinf.load(tomorrow, trust_remote_code=True)
    assert str(tomorrow / "config.json") in str(caught.value) and "\n" not in str(caught.value)
