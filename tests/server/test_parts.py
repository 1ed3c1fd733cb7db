"""Parts of the server alone: text from tokens, stop strings, turns, and the page."""

from __future__ import annotations

import errno
import random
import re
import threading
from typing import Any

import h11
import pytest
import torch

from moeinf.server.app import PAGE
from moeinf.server.protocol import protocol_for
from moeinf.server.settings import Settings
from moeinf.server.text import Detokenizer, StopStrings
from moeinf.server.turns import Turns


def test_pieces_of_text_are_the_text_of_all_tokens(tokenizer: Any, seed: int) -> None:
    draw = random.Random(seed)
    texts = ["naïve — “ü” 日本語 🦊🦊", "def f(x):\n\treturn x\n"]
    tokens = tokenizer("".join(draw.choices(texts, k=5)))["input_ids"]
    for _ in range(3):  # also such as make no whole characters
        tokens.insert(draw.randrange(len(tokens)), draw.randrange(2, 3072))
    pieces = Detokenizer(tokenizer)
    found = [pieces.add(token) for token in tokens]
    assert "".join([*found, pieces.rest()]) == tokenizer.decode(tokens, skip_special_tokens=True)
    whole = tokenizer("🦊 fox")["input_ids"]
    pieces = Detokenizer(tokenizer)
    assert all("\ufffd" not in pieces.add(token) for token in whole)


def test_text_ends_where_the_first_stop_string_begins(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        stops = ["".join(draw.choices("ab", k=draw.randrange(1, 5))) for _ in range(2)]
        text = "".join(draw.choices("abc", k=draw.randrange(12)))
        stop, sent, place = StopStrings(stops), "", 0
        while place < len(text) and not stop.met:
            size = draw.randrange(1, 4)
            sent += stop.add(text[place : place + size])
            place += size
            # Nothing is sent that is within a stop string, and nothing waits without need.
            assert not any(one in sent for one in stops)
            waiting = text[len(sent) : place]
            assert stop.met or not waiting or any(one.startswith(waiting) for one in stops)
        if not stop.met:
            sent += stop.rest()
        found = [text.index(one) for one in stops if one in text[:place]]
        assert stop.met == bool(found)
        assert sent == (text[: min(found)] if found else text), (stops, text)


def test_threads_run_one_at_a_time_in_turn_with_random_numbers_of_their_own() -> None:
    turns, order, busy = Turns(torch.device("cpu")), [], []
    drawn: dict[int, list[float]] = {0: [], 1: [], 2: []}
    started = threading.Barrier(4)

    def run(number: int) -> None:
        started.wait()
        with turns.turn(seed=number):
            for _ in range(20):
                busy.append(number)
                assert len(busy) == 1
                order.append(number)
                drawn[number].append(float(torch.rand(())))
                busy.pop()
                turns.hand_over()

    threads = [threading.Thread(target=run, args=(number,)) for number in drawn]
    for thread in threads:
        thread.start()
    with turns.turn(seed=9):
        started.wait()
        while len(turns._waiting) < 3:
            pass
    for thread in threads:
        thread.join()
    assert all(set(order[place : place + 3]) == {0, 1, 2} for place in range(0, 60, 3))
    for number, found in drawn.items():
        torch.manual_seed(number)
        assert found == [float(torch.rand(())) for _ in range(20)]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|https?://""", text)
    assert len(text.encode()) < 40_000


@pytest.mark.parametrize("count", [1, 3])
def test_a_turn_that_fails_is_given_on(count: int) -> None:
    turns = Turns(torch.device("cpu"))
    for _ in range(count):
        with pytest.raises(KeyError), turns.turn(seed=0):
            raise KeyError
    with turns.turn(seed=0):
        turns.hand_over()


def test_a_client_that_has_gone_before_it_is_refused() -> None:
    """The socket then cannot be closed half: the connection ends, and nothing is raised."""
    calls = []

    class Gone:
        def write(self, data: bytes) -> None:
            calls.append(data.split(b" ")[1])

        def write_eof(self) -> None:
            raise OSError(errno.ENOTCONN, "not connected")

        def abort(self) -> None:
            calls.append("abort")

    connection = object.__new__(protocol_for(Settings("pocket")))
    connection.conn, connection.cycle, connection._deadline = h11.Connection(h11.SERVER), None, None
    connection.transport = Gone()
    connection._refuse(400, "illegal request line")
    assert calls == [b"400", "abort"]
