"""`moeinf chat` at a terminal and from a script, and the chat template in `moeinf run`."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from test_conversation import TEMPLATE, write_tokenizer

from moeinf.integrations.transformers.generation import Request, Result, generate

CHAT = [sys.executable, "-m", "moeinf.cli", "chat"]


class Terminal:
    """A program that takes a pseudo-terminal for the terminal of a person."""

    def __init__(self, arguments: list[str]):
        self.pid, self.side = pty.fork()
        if self.pid == 0:
            # Both a job runner and a parent that ignores Ctrl-C would pass that on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execvpe(arguments[0], arguments, {**os.environ, "TERM": "dumb"})
        self.text = ""

    def types(self, keys: str) -> None:
        os.write(self.side, keys.encode())

    def shows(self, wanted: str, seconds: float = 120) -> None:
        """Waits until that text has come since the last wait."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            ready, *_ = select.select([self.side], [], [], max(0.0, end - time.monotonic()))
            try:
                self.text += os.read(self.side, 4096).decode() if ready else self._give_up()
            except OSError:  # the program has ended
                raise AssertionError(f"{wanted!r} never came: {self.text}") from None
        self.text = self.text.partition(wanted)[2]

    def _give_up(self) -> str:
        os.kill(self.pid, signal.SIGKILL)
        raise OSError

    def ends(self) -> int:
        while True:  # what it still writes, so that it need not wait
            try:
                os.read(self.side, 4096)
            except OSError:
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.timeout(600)
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends() -> None:
    chat = Terminal([*CHAT, "--max-new-tokens", "480", "--temperature", "1"])
    chat.shows("no chat template")
    chat.shows("> ")
    chat.types("10\n")
    chat.shows("e")  # of the answer: neither prompt nor echo has this letter
    chat.types("\x03")
    chat.shows(", stopped, ")
    chat.shows("> ")
    chat.types("/stats\n")
    chat.shows("of 512 tokens")
    chat.shows("> ")
    time.sleep(1)  # readline sees a signal that comes just before it waits at the next key alone
    chat.types("\x03")  # nothing is being written
    chat.shows("/exit or Ctrl-D ends")
    chat.types("/reset\nx\x15y = " + "1, " * 300 + "\n")  # longer than the context
    chat.shows("there is no room for an answer")
    chat.shows("> ")  # a terminal that readline has not taken over yet would swallow the key
    chat.types("\x04")
    assert chat.ends() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("chat"), max_position_embeddings=256)
    write_tokenizer(folder, TEMPLATE)
    return folder


def test_a_script_gets_one_json_object_for_each_answer(folder: Path) -> None:
    options = ["--json", "--max-new-tokens", "7", "--temperature", "0", "--system", "be brief"]
    result = subprocess.run(
        [*CHAT, str(folder), *options],
        input="hello\n\nwho?\n/unknown\n/reset\nhello\n/exit\nunread\n",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "/unknown is not a command" in result.stderr and "template" not in result.stderr
    first, second, third = map(json.loads, result.stdout.splitlines())
    assert first["run_tokens"] == first["prompt_tokens"] > second["run_tokens"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + len(first["tokens"])
    for field in ("text", "tokens", "ended", "prompt_tokens", "run_tokens"):
        assert third[field] == first[field]
    assert 0 < second["hit_rate"] <= 1 and second["tokens_per_second"] > 0
    assert first["ended"] == ("end" if first["tokens"][-1] == 1 else "length")


def test_a_prompt_is_told_in_the_template_unless_it_is_raw(folder: Path) -> None:
    def run(prompt: str, raw: bool) -> Result:
        request = Request(path=folder, prompt=prompt, max_new_tokens=6, raw=raw)
        return generate(request, memory="100%", stream=None)

    told, raw, written = run("hi", False), run("hi", True), run("<u>hi</s><a>", True)
    assert told.metrics.prompt_tokens == written.metrics.prompt_tokens == 5
    assert raw.metrics.prompt_tokens == 2
    assert told.tokens == written.tokens != raw.tokens
