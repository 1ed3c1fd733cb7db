"""What OpenAI's own client gets: the tokens of an offline run, streams, stops, seeds, logprobs."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from running import NAME, Running

import moeinf
from moeinf.pocket import POCKET

PROMPTS = [
    "import os\n",
    "def read_lines(path):\n",
    "class Parser:\n    def __init__(self",
    "é",
    "for name in sorted(",
    "x = [",
]


@pytest.fixture(scope="module")
def offline(tokenizer: Any) -> Any:
    """Text that the model writes without a server, with every expert in memory."""
    model: Any = moeinf.load(POCKET)

    def write(prompt: str, count: int, seed: int = 0, **options: Any) -> str:
        options = {"do_sample": False, "temperature": None, "top_p": None} | options
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=count, **options)[0]
        return str(tokenizer.decode(output[inputs["input_ids"].shape[1] :], True))

    return write


def streamed(chunks: Any) -> tuple[str, str]:
    """The text of a stream of completions, and why it ended."""
    text, reason = "", ""
    for chunk in chunks:
        for choice in chunk.choices:
            assert not reason, "nothing comes after the end"
            text += choice.text
            reason = choice.finish_reason or ""
    return text, reason


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_an_offline_run(served: Running, offline: Any, prompt: str) -> None:
    client = served.client()
    wanted = offline(prompt, 24)
    asked: Any = {"model": NAME, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == wanted
    assert streamed(client.completions.create(stream=True, **asked))[0] == wanted
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    chat = client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=24, temperature=0
    )
    assert chat.choices[0].message.content == wanted
    assert chat.choices[0].message.role == "assistant"


def test_requests_at_once_have_the_text_that_each_has_alone(served: Running, offline: Any) -> None:
    client = served.client()
    prompts = PROMPTS * 2

    def ask(number: int) -> str:
        return streamed(
            client.completions.create(
                model=NAME, prompt=prompts[number], max_tokens=16, temperature=0, stream=True
            )
        )[0]

    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(ask, range(len(prompts))))
    assert texts == [offline(prompt, 16) for prompt in prompts]


def test_a_seed_gives_the_text_of_an_offline_run_with_it_also_among_others(
    served: Running, offline: Any, seed: int
) -> None:
    client = served.client()
    seeds = [seed, seed + 1, seed, seed + 2]

    def ask(one: int) -> str:
        return str(
            client.completions.create(
                model=NAME, prompt="def ", max_tokens=20, temperature=0.9, top_p=0.8, seed=one
            )
            .choices[0]
            .text
        )

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, seeds))
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": None}
    assert texts == [offline("def ", 20, one, **options) for one in seeds]
    assert len(set(texts)) > 1


def test_without_a_temperature_the_checkpoint_says_how_tokens_are_chosen(
    served: Running, offline: Any
) -> None:
    text = served.client().completions.create(model=NAME, prompt="def ", max_tokens=12, seed=5)
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}  # its generation_config.json
    assert text.choices[0].text == offline("def ", 12, 5, **own)


def test_a_stop_string_ends_the_text_before_it(served: Running, offline: Any, seed: int) -> None:
    print(f"seed {seed}")
    client, draw = served.client(), random.Random(seed)
    text = offline("import os\n", 24)
    begin = draw.randrange(1, len(text) - 6)
    stop = text[begin : begin + draw.randrange(1, 6)]
    asked: Any = {
        "model": NAME,
        "prompt": "import os\n",
        "max_tokens": 24,
        "temperature": 0,
        "stop": [stop, "never in it"],
    }
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens <= 24
    assert streamed(client.completions.create(stream=True, **asked)) == (
        text[: text.index(stop)],
        "stop",
    )
    asked["stop"] = text[-1] + "never in it"  # the last letter waits for the rest of it
    unmet = client.completions.create(**asked)
    assert (unmet.choices[0].text, unmet.choices[0].finish_reason) == (text, "length")


def test_usage_comes_with_the_answer_and_last_in_a_stream_that_asks_for_it(
    served: Running, tokenizer: Any
) -> None:
    client = served.client()
    messages: Any = [{"role": "user", "content": "import os"}]
    whole = client.chat.completions.create(model=NAME, messages=messages, max_tokens=3)
    assert whole.usage.prompt_tokens == len(tokenizer("import os")["input_ids"])
    assert whole.usage.completion_tokens == 3
    assert whole.usage.total_tokens == 3 + whole.usage.prompt_tokens
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=messages,
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_are_those_of_the_model_before_temperature(
    served: Running, model: Any, tokenizer: Any
) -> None:
    client = served.client()
    asked: Any = {"model": NAME, "max_tokens": 6, "temperature": 0.5, "seed": 3}
    answer = client.completions.create(prompt="import os\n", logprobs=3, **asked).choices[0]
    found = answer.logprobs
    assert "".join(found.tokens) == answer.text and len(found.tokens) == 6
    assert [answer.text[place:] for place in found.text_offset] == [
        "".join(found.tokens[start:]) for start in range(6)
    ]
    ids = tokenizer("import os\n")["input_ids"]
    tokens = tokenizer(answer.text)["input_ids"]
    assert [tokenizer.decode([token]) for token in tokens] == found.tokens
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0].double()
    wanted = torch.log_softmax(logits[len(ids) - 1 : -1], dim=-1)
    for place, token in enumerate(tokens):
        # bf16 rounds a pass over all tokens otherwise than a pass of one.
        assert abs(found.token_logprobs[place] - float(wanted[place, token])) < 0.1
        likeliest = sorted(found.top_logprobs[place].values())
        assert torch.allclose(
            torch.tensor(likeliest).double(), wanted[place].topk(3).values.flip(0), atol=0.1
        )
    messages: Any = [{"role": "user", "content": "import os\n"}]
    chat = client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=2, stream=True, **asked
    )
    entries = [
        entry
        for chunk in chat
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in entries] == found.tokens
    assert [entry.logprob for entry in entries] == found.token_logprobs
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_a_prompt_may_be_tokens(served: Running, offline: Any, tokenizer: Any) -> None:
    ids = tokenizer("import os\n")["input_ids"]
    answer = served.client().completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0)
    assert answer.choices[0].text == offline("import os\n", 8)


def test_models_are_listed_and_another_name_is_not_found(served: Running) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="expected 'pocket', found 'other/one'"):
        client.models.retrieve("other/one")
    with pytest.raises(openai.NotFoundError, match="expected 'pocket'"):
        client.completions.create(model="gpt-4", prompt="a")


def test_the_context_bounds_prompt_and_answer(served: Running) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="at most 200 tokens, found 30") as refused:
        client.completions.create(model=NAME, prompt=[5] * 300)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="has 512 tokens, the prompt 150") as refused:
        client.completions.create(model=NAME, prompt=[5] * 150, max_tokens=363)
    with pytest.raises(openai.BadRequestError, match="writes at most 400 tokens"):
        client.completions.create(model=NAME, prompt=[5], max_tokens=401)


def test_metrics_count_what_was_done(served: Running) -> None:
    names = ("moeinf_prompt_tokens_total", "moeinf_generated_tokens_total")
    before = [served.metric(name) for name in names]
    served.client().completions.create(model=NAME, prompt=[5] * 7, max_tokens=9, temperature=0)
    assert [served.metric(name) for name in names] == [before[0] + 7, before[1] + 9]
    text = served.ask("GET", "/metrics").body.decode()
    for layer in range(8):
        assert re.search(rf'moeinf_hits_total{{cache=".+",layer="{layer}"}} [1-9]', text)
    assert served.metric("moeinf_slots") == 64 and served.metric("moeinf_total_experts") == 256
    assert 0 < served.metric("moeinf_hit_rate") < 1
    assert served.metric("moeinf_requests_running") == served.metric("moeinf_requests_waiting") == 0
