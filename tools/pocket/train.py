"""Trains the built-in model for a given number of minutes on the machine's own CPU cores.

The learning rate follows the clock, not the step count: it rises, then falls in a line to zero
when the minutes are spent, so a busy machine trains less but always finishes. Every few minutes
the held-out loss goes into a JSON log and the weights into a checkpoint.

Workers are processes of one thread each (see `workers.py`), which on a shared machine lose far
less time waiting for one another than the threads of one process.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from tools.pocket.batches import batches, windows
from tools.pocket.corpus import documents
from tools.pocket.model import Pocket
from tools.pocket.optimizer import Optimizer
from tools.pocket.shape import Shape
from tools.pocket.workers import Gradients, launch

WARM_UP = 0.02  # part of the time over which the learning rate rises
SHORT_UNTIL = 0.75  # part of the time spent on half-length windows, which cost less


def rate(progress: float) -> float:
    return max(0.0, min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP)))


class Journal:
    """The first worker's notes: progress bar, running averages, log and checkpoint."""

    def __init__(self, args: argparse.Namespace, model: Pocket, check: tuple[Tensor, Tensor]):
        self.args, self.model, self.check = args, model, check
        self.log: list[dict[str, float]] = []
        self.begin = self.last_check = time.monotonic()
        self.step = self.tokens = 0
        self.loss = self.balance = 0.0
        self.bar = tqdm(total=round(args.minutes * 60), unit="s", mininterval=10)

    def progress(self) -> float:
        return (time.monotonic() - self.begin) / (60 * self.args.minutes)

    def note(self, tokens: int, loss: float, balance: float, turn: int) -> None:
        keep = min(0.98, self.step / (self.step + 1))
        self.loss = keep * self.loss + (1 - keep) * loss
        self.balance = keep * self.balance + (1 - keep) * balance
        self.step, self.tokens, self.turn = self.step + 1, self.tokens + tokens, turn
        now = time.monotonic()
        text = f"step {self.step} loss {self.loss:.3f} balance {self.balance:.2f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(int(now - self.begin) - self.bar.n)
        if now - self.last_check > self.args.check_every:
            self.last_check = now
            self.save()

    @torch.no_grad()
    def held_out(self) -> float:
        parts = zip(*(part.split(16) for part in self.check), strict=True)
        losses = [self.model.loss(x, y)[0].item() for x, y in parts]
        return sum(losses) / len(losses)

    def save(self) -> None:
        entry = {
            "seconds": round(time.monotonic() - self.begin, 1),
            "step": self.step,
            "tokens": self.tokens,
            "passes_done": self.turn,
            "train_loss": round(self.loss, 4),
            "held_out_loss": round(self.held_out(), 4),
            "balance": round(self.balance, 4),
        }
        self.log.append(entry)
        tqdm.write(json.dumps(entry))
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        state = {"shape": asdict(self.model.s), "model": self.model.state_dict()}
        torch.save(state, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
        arguments = {key: str(value) for key, value in vars(self.args).items()}
        summary = {"arguments": arguments, "log": self.log}
        (out / "log.json").write_text(json.dumps(summary, indent=1) + "\n")


def work(rank: int, args: argparse.Namespace, model: Pocket, gradients: Gradients) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    docs = documents()
    feed = batches(
        [d for d in docs if not d.held_out][rank :: args.workers],
        tokenizer,
        rows=args.rows,
        width=model.s.context,
        seed=args.seed + rank,
    )
    turn, x, y = next(feed)  # the first pass is encoded before the clock starts
    gradients.meet()
    named = list(model.named_parameters())
    share = named[rank :: args.workers]
    optimizer = Optimizer(share, matrix_lr=args.matrix_lr, other_lr=args.other_lr)
    journal = None
    if rank == 0:
        unseen = [d for d in docs if d.held_out and not d.is_test]
        x64, y64 = (part[:64] for part in windows(unseen, tokenizer, model.s.context))
        journal = Journal(args, model, (x64, y64))
    progress = 0.0
    while progress < 1:
        if progress < SHORT_UNTIL:
            x, y = (part.reshape(-1, model.s.context // 2) for part in (x, y))
        loss, uneven, size = model.loss(x, y)
        gradients.collect(rank, loss + args.balance * uneven + args.router_size * size)
        if journal:
            gradients.progress[0] = journal.progress()
        gradients.meet()
        progress = gradients.progress[0].item()
        gradients.average()
        optimizer.step(rate(progress))
        gradients.meet()
        if journal:
            journal.note(args.workers * x.numel(), loss.item(), uneven.item(), turn)
        turn, x, y = next(feed)
    if journal:
        journal.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=Path("moeinf/pocket/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket"))
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to go on from")
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="windows per worker and step")
    parser.add_argument("--matrix-lr", type=float, default=0.012)
    parser.add_argument("--other-lr", type=float, default=0.005)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--router-size", type=float, default=0.0005)
    parser.add_argument("--check-every", type=float, default=180, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vocab = Tokenizer.from_file(str(args.tokenizer)).get_vocab_size()
    model = Pocket(Shape(vocab=vocab))
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["model"])
    launch(work, args.workers, args, model)


if __name__ == "__main__":
    main()
