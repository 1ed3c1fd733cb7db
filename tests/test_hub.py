"""Names on the Hub: a real client against a Hub on 127.0.0.1, and caches as they lie on disks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from hub_server import COMMIT, GATED, NAME, Hub, hub_of
from huggingface_hub import constants
from test_conversation import write_tokenizer

import moeinf
import moeinf.cli
from moeinf.checkpoint.folder import Checkpoint
from moeinf.errors import CheckpointError


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the weights in several other forms beside those that are needed."""
    folder = write_checkpoint(tmp_path_factory.mktemp("published"), max_shard_size="40KB")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for unused in (
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "metal/model.bin",
        "consolidated.safetensors",
        "model-Q4_K_M.gguf",
        "pytorch_model.bin",
        "README.md",
    ):
        (folder / unused).parent.mkdir(exist_ok=True)
        (folder / unused).write_bytes(b"unused")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What huggingface_hub takes for the Hub; its cache is tmp_path/hub and empty."""
    with hub_of(published) as served:
        be_the_hub(served, tmp_path, monkeypatch)
        yield served


def be_the_hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def needed(folder: Path) -> set[str]:
    kept = {".json", ".jinja"}
    small = {file.name for file in folder.iterdir() if file.suffix in kept}
    return small | {file.name for file in folder.glob("model-*.safetensors")}


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[2]


def test_a_name_fetches_the_files_that_are_needed_and_each_once(hub: Hub, published: Path) -> None:
    store = moeinf.ExpertStore.open(NAME)
    sizes = {name: (published / name).stat().st_size for name in needed(published)}
    assert hub.sent == sizes
    assert store.checkpoint.path.name == COMMIT
    original = moeinf.ExpertStore.open(published)
    for name, tensor in original.read(2, 5).items():
        assert torch.equal(store.read(2, 5)[name], tensor)
    moeinf.ExpertStore.open(NAME, revision="v1")
    moeinf.ExpertStore.open(NAME, revision=COMMIT)
    assert hub.sent == sizes


def test_a_model_of_a_name_computes_what_that_of_the_folder_does(hub: Hub, published: Path) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        named = moeinf.load(NAME, revision="v1", slots=3)(ids).logits
        assert torch.equal(named, moeinf.load(published, slots=3)(ids).logits)


def test_the_commands_take_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write_tokenizer(folder, None)
    with hub_of(folder) as hub:
        be_the_hub(hub, tmp_path, monkeypatch)
        texts, names = [], []
        for checkpoint in ([NAME, "--revision", "v1"], [str(folder)]):
            arguments = [*checkpoint, "--prompt", "hi", "--max-new-tokens", "3", "--json"]
            monkeypatch.setattr(sys, "argv", ["moeinf", "run", *arguments, "--record", "trace"])
            with pytest.raises(SystemExit) as ended:
                moeinf.cli.main()
            assert not ended.value.code
            texts.append(json.loads(capsys.readouterr().out)["tokens"])
            names.append(moeinf.Trace.load("trace").model)
    assert texts[0] == texts[1]
    assert names == [NAME, "model"]


def test_a_folder_of_that_name_wins(hub: Hub, published: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).symlink_to(published)
    assert Checkpoint.open(NAME).path == Path(NAME)
    assert not hub.sent
    with pytest.raises(ValueError, match=f"{NAME} is a folder: revision='v1' is for names"):
        Checkpoint.open(NAME, revision="v1")


def test_the_token_is_shown_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Checkpoint.open(NAME)
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    "name, revision, message",
    [
        (NAME, "v2", "http://127.0.0.1:[0-9]+ has no revision 'v2' of it"),
        (GATED, None, "its licence must be accepted at http://127.0.0.1:[0-9]+/tiny/gated"),
        ("tiny/absent", None, "a checkpoint folder or a repository of .*, found neither"),
        ("tiny/a--b", None, "tiny/a--b"),
        ("one", None, "expected a checkpoint folder, or a name on the Hub"),
        ("one/two/three", None, "expected a checkpoint folder, or a name on the Hub"),
        ("/tiny/moe", None, "expected a checkpoint folder, or a name on the Hub"),
        ("../tiny", None, "expected a checkpoint folder, or a name on the Hub"),
    ],
)
def test_what_the_hub_lacks_is_one_sentence(
    hub: Hub, name: str, revision: str | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(name, revision)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_without_network_a_name_is_what_the_cache_has(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint.open(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert Checkpoint.open(NAME).path.name == COMMIT
    with pytest.raises(CheckpointError, match=r"found neither, and http://.*:9 cannot be"):
        Checkpoint.open("tiny/other")


@pytest.fixture
def offline_cache(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache made by hand, offline: links of links, blobs in two folders. Returns the snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--tiny--moe"
    snapshot = repository / "snapshots" / COMMIT
    for made in (snapshot, repository / "refs", repository / "blobs", tmp_path / "other disk"):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(sorted(needed(published))):
        blob = repository / "blobs" / f"{number:040x}"
        if number % 2:
            (tmp_path / "other disk" / name).write_bytes((published / name).read_bytes())
            blob.symlink_to(tmp_path / "other disk" / name)
        else:
            blob.write_bytes((published / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_offline_a_cache_of_links_is_served(offline_cache: Path, published: Path) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        cached = moeinf.load(NAME, slots=3)(ids).logits
        assert torch.equal(cached, moeinf.load(published, slots=3)(ids).logits)


def test_offline_a_missing_file_is_named(offline_cache: Path) -> None:
    for lost in (a_shard(offline_cache), offline_cache / "config.json"):
        kept = lost.rename(lost.with_suffix(".kept"))
        with pytest.raises(CheckpointError, match=lost.name):
            Checkpoint.open(NAME)
        with pytest.raises(CheckpointError, match=lost.name):
            moeinf.load(NAME)
        kept.rename(lost)
    with pytest.raises(CheckpointError, match=r"found neither, and HF_HUB_OFFLINE is set"):
        Checkpoint.open("tiny/other")


def test_a_file_that_the_cache_lost_is_fetched_by_its_name(hub: Hub) -> None:
    path = a_shard(Checkpoint.open(NAME).path)
    path.resolve().unlink()
    hub.sent.clear()
    Checkpoint.open(NAME)
    assert hub.sent == {path.name: path.stat().st_size}
