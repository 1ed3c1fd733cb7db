"""Conversations: only new tokens run, the tokens are those of a run from the start, Ctrl-C."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import moeinf
from moeinf.errors import CheckpointError
from moeinf.integrations.transformers.conversation import Conversation
from moeinf.integrations.transformers.generation import read_tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') or message.content == 'no' %}"
    "{{ raise_exception('cannot say this') }}{% endif %}"
    "<{{ message.role[0] }}>{{ message.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
# As those of models that think: what an answer begins with is not told again later.
FORGETFUL = TEMPLATE.replace("{{ message.content }}", "{{ message.content[-4:] }}")


def write_tokenizer(folder: Path, template: str | None) -> None:
    """One token for each of 90 characters, and those of the template."""
    special = ["<pad>", "</s>", "<s>", "<u>", "<a>"]
    letters = [chr(code) for code in range(32, 32 + 90)]
    words = {word: number for number, word in enumerate([*special, "\n", *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("chat"), max_position_embeddings=256)
    write_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return moeinf.load(folder, slots=5)


def counting(model: Any) -> list[int]:
    """Tokens of each pass from now on."""
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda _module, arguments, _output: passes.append(arguments[0].shape[1])
    )
    return passes


def from_the_start(model: Any, prompt: list[int], count: int) -> list[int]:
    """What the model answers to a whole prompt, without keys and values from before."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL, None], ids=["all", "forgets", "none"])
def test_only_new_tokens_run_and_the_answers_are_those_of_a_run_from_the_start(
    folder: Path, model: Any, template: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    conversation = Conversation(model, tokenizer, "be brief" if template else None)
    passes = counting(model)
    written: list[dict[str, str]] = list(conversation.messages)
    said: list[int] = []
    before: list[int] = []
    for message in ("hello", "who are you?", "x"):
        passes.clear()
        stream = io.StringIO()
        answer = conversation.answer(message, max_new_tokens=9, temperature=0.0, stream=stream)
        if template is None:
            text = f"\n{message}" if said else message
            prompt = [token for token in said if token != 1] + tokenizer(text)["input_ids"]
        else:
            written.append({"role": "user", "content": message})
            prompt = tokenizer.apply_chat_template(written, add_generation_prompt=True)["input_ids"]
            written.append({"role": "assistant", "content": answer.text})
        same = 0
        while same < len(before) and before[same] == prompt[same]:
            same += 1
        assert answer.prompt_tokens == len(prompt)
        assert passes == [len(prompt) - same] + [1] * (len(answer.tokens) - 1)
        assert answer.run_tokens == len(prompt) - same
        assert answer.tokens == from_the_start(model, prompt, 9)
        assert stream.getvalue().rstrip("\n") == answer.text.rstrip("\n")
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert 0 <= answer.hit_rate <= 1 and answer.tokens_per_second > 0
        said = prompt + answer.tokens
        before = said[:-1]
    if template != FORGETFUL:
        assert answer.run_tokens < 10 < answer.prompt_tokens


def chat(folder: Path, model: Any) -> Conversation:
    return Conversation(model, AutoTokenizer.from_pretrained(folder))


def test_an_interrupt_ends_an_answer_and_the_conversation_goes_on(folder: Path, model: Any) -> None:
    conversation = chat(folder, model)

    whole = from_the_start(model, conversation._prompt("hello"), 30)
    passes: list[int] = []

    def impatient(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 4:
            conversation.interrupt()

    hook = model.model.embed_tokens.register_forward_hook(impatient)
    cut = conversation.answer("hello", max_new_tokens=30, temperature=0.0)
    hook.remove()
    assert cut.tokens == whole[:4]
    assert cut.ended == "interrupt"
    assert conversation.messages[-1] == {"role": "assistant", "content": cut.text}
    prompt = conversation._prompt("go on")
    answer = conversation.answer("go on", max_new_tokens=9, temperature=0.0)
    assert answer.ended in ("end", "length")
    assert answer.run_tokens == len(prompt) - cut.prompt_tokens - 3
    assert answer.tokens == from_the_start(model, prompt, 9)


@pytest.mark.parametrize("turn", [0, 1])
def test_an_interrupt_ends_the_reading_of_a_prompt_within_a_layer(
    folder: Path, model: Any, turn: int
) -> None:
    conversation = chat(folder, model)
    for _ in range(turn):
        conversation.answer("hello", max_new_tokens=9, temperature=0.0)
    before = list(conversation.messages)
    layers: list[int] = []

    def ran(layer: torch.nn.Module, *_: Any) -> None:
        layers.append(list(model.model.layers).index(layer))
        conversation.interrupt()

    first, last = (model.model.layers[number].register_forward_hook(ran) for number in (0, 2))
    answer = conversation.answer("a long story", max_new_tokens=9, temperature=0.0)
    first.remove()
    last.remove()
    assert (answer.ended, answer.tokens, answer.text) == ("interrupt", [], "")
    assert layers == [0]
    assert conversation.messages == before
    prompt = conversation._prompt("go on")
    after = conversation.answer("go on", max_new_tokens=9, temperature=0.0)
    assert after.tokens == from_the_start(model, prompt, 9)
    if turn:  # what had run before is not lost
        assert after.run_tokens < len(prompt) - 10


def test_a_pass_that_failed_leaves_nothing_behind(folder: Path, model: Any) -> None:
    conversation = chat(folder, model)
    conversation.answer("hello", max_new_tokens=9, temperature=0.0)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(OSError, match="the disk is gone"):
        conversation.answer("who?", max_new_tokens=9, temperature=0.0)
    hook.remove()
    prompt = conversation._prompt("who?")
    answer = conversation.answer("who?", max_new_tokens=9, temperature=0.0)
    assert answer.tokens == from_the_start(model, prompt, 9)


def test_windows_that_have_passed_run_again(tmp_path: Path) -> None:
    """Keys and values outside the window are gone: they cannot be cut, only made again."""
    folder = write_checkpoint(tmp_path, "mixtral", sliding_window=12)
    write_tokenizer(folder, FORGETFUL)
    model = moeinf.load(folder, slots=5)
    conversation = chat(folder, model)
    for message in ("hello", "who are you?", "x"):
        prompt = conversation._prompt(message)
        answer = conversation.answer(message, max_new_tokens=9, temperature=0.0)
        assert answer.tokens == from_the_start(model, prompt, 9)


def test_what_cannot_be_answered_leaves_the_conversation_as_it_was(
    folder: Path, model: Any
) -> None:
    conversation = chat(folder, model)
    conversation.answer("hello", max_new_tokens=9, temperature=0.0)
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"the chat template refuses .*: cannot say this"):
        conversation.answer("no", max_new_tokens=9)
    with pytest.raises(ValueError, match=r"has 3\d\d tokens and the model's context 256: there"):
        conversation.answer("long " * 60, max_new_tokens=9)
    assert conversation.messages == before
    filled = conversation.answer("fill " * 40, max_new_tokens=500, temperature=0.0)
    assert filled.prompt_tokens + len(filled.tokens) <= 256
    conversation.reset()
    assert conversation.answer("hi", max_new_tokens=1, temperature=0.0).run_tokens == 5


def test_a_system_message_needs_a_template(folder: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="a system message needs a chat template"):
        Conversation(model, tokenizer, "be brief")


def test_without_a_temperature_the_checkpoint_says_how_tokens_are_chosen(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    write_tokenizer(folder, TEMPLATE)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 5.0, "eos_token_id": [1, 2]})
    )
    model = moeinf.load(folder, slots=5)
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        conversation = chat(folder, model)
        assert conversation.ends == {1, 2}
        answers.add(conversation.answer("hello", max_new_tokens=9).text)
    assert len(answers) > 1


@pytest.mark.skipif(
    not hasattr(PreTrainedTokenizerFast, "get_response_parser"), reason="this transformers cannot"
)
def test_what_was_thought_is_told_apart_where_the_tokenizer_knows_how(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = chat(folder, model)
    conversation.tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<a>",
        "fields": {
            "reasoning_content": {"open": "[", "close": "]"},
            "content": {"close": "</s>"},
        },
    }
    tokens = conversation.tokenizer("[hm]yes</s>")["input_ids"]
    monkeypatch.setattr(conversation, "_run", lambda *_: tokens)
    assert conversation.answer("well?", max_new_tokens=20).text == "[hm]yes"
    reply = {"role": "assistant", "reasoning_content": "hm", "content": "yes"}
    assert conversation.messages == [{"role": "user", "content": "well?"}, reply]
    cut = conversation.tokenizer("[hm, I")["input_ids"]
    monkeypatch.setattr(conversation, "_run", lambda *_: cut)
    conversation.answer("and?", max_new_tokens=20)
    assert conversation.messages[-1]["reasoning_content"] == "hm, I"


def test_a_tokenizer_that_is_code_is_refused(tmp_path: Path) -> None:
    mapped = {"AutoTokenizer": ["code.Tokenizer", None]}
    config = {"tokenizer_class": "Tokenizer", "auto_map": mapped}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tomorrow"}))
    (tmp_path / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(CheckpointError, match="it needs code that comes with the checkpoint"):
        read_tokenizer(tmp_path)
