# SPDX-License-Identifier: Apache-2.0
"""Trains the needle checkpoint on one GPU within a given number of seconds.

python -m bench.needle.train --out OUT --seconds 420 --rope-theta 5000
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from bench.needle import tokenizer as needle_tokenizer
from bench.needle.data import ANSWER, CONTEXT, Encoder, Sequences
from bench.needle.generate import CausalRows, rope_tables, rotate
from bench.needle.model import NeedleConfig, NeedleLlama, save_checkpoint
from sglang_tokenselect.needle import tasks

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
STAGE_ENDS = (0.06, 0.12, 0.20, 0.28, 0.40, 0.58, 1.0)
"""Share of the time at which each length stops being the longest."""
CONTEXT_LOSS = 0.1
LOG_EVERY = 100


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420, help="training time, compilation not counted")
    parser.add_argument("--rope-theta", type=float, default=5000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a step")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a state.pt to start from, at the longest length")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def check_encoder(encode: Encoder, tokenizer: Tokenizer) -> None:
    """The fast encoder must agree with the tokenizer that the served model uses."""
    for seed in range(4):
        context = tasks.make_context(seed, 800, count_tokens=lambda s: len(encode(s)), num_chains=1)
        for sample in tasks.questions(context):
            text = sample.prompt + sample.completion
            if encode(text) != tokenizer.encode(text).ids:
                raise ValueError(f"encoder: expected the tokens of tokenizer.json, got others for {text!r}")


def loss_terms(model: NeedleLlama, hidden: Tensor, targets: Tensor, roles: Tensor) -> Tensor:
    """Sums over answer and context tokens: [answer loss, answers, context loss, contexts, correct answers]."""
    logits = model.logits(hidden).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    answer, context = (roles == ANSWER).float(), (roles == CONTEXT).float()
    correct = (logits.argmax(-1) == targets).float() * answer
    return torch.stack([(loss * answer).sum(), answer.sum(), (loss * context).sum(), context.sum(), correct.sum()])


def learning_rate(progress: float, step: int, peak: float) -> float:
    warmup = min(1.0, (step + 1) / 200)
    return peak * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Trainer:
    def __init__(self, args: argparse.Namespace, model: NeedleLlama, device: str) -> None:
        self.args, self.model, self.device = args, model, device
        self.turn, self.loss_terms = rotate, loss_terms
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=device == "cuda"
        )
        positions = torch.arange(LENGTHS[-1], device=device)
        self.tables = rope_tables(args.rope_theta, model.config.head_dim, positions)
        if not args.no_compile:
            self._compile()

    def _compile(self) -> None:
        # Everything but attention sees tokens * hidden, whatever the length: one graph for all stages.
        for layer in self.model.model.layers:
            layer.project = torch.compile(layer.project, dynamic=False)
            layer.finish = torch.compile(layer.finish, dynamic=False)
        self.turn = torch.compile(rotate, dynamic=False)
        self.loss_terms = torch.compile(loss_terms, dynamic=False)

    def step(self, ids: Tensor, roles: Tensor, lr: float) -> Tensor:
        """One update on rows [rows, length]; returns the sums of ``loss_terms``."""
        rows, length = ids.shape
        cos, sin = (table[:length].repeat(rows, 1, 1) for table in self.tables)
        attention = CausalRows(rows, length, cos, sin, self.turn)
        flat = ids.to(self.device, torch.int64, non_blocking=True)
        targets = F.pad(flat[:, 1:], (0, 1)).flatten()
        roles = roles.to(self.device, non_blocking=True).flatten()
        with torch.autocast(self.device, torch.bfloat16):
            hidden = self.model(flat.flatten(), attention, dtype=torch.bfloat16)
            sums = self.loss_terms(self.model, hidden, targets, roles)
        loss = sums[0] / sums[1] + CONTEXT_LOSS * sums[2] / sums[3]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums.detach()

    def run(self, batches, stage, log) -> None:
        args, began, totals = self.args, None, None
        for step, (ids, roles) in enumerate(batches):
            elapsed = time.time() - began if began else 0.0
            progress = elapsed / args.seconds
            if progress >= 1:
                return
            if not args.resume:
                index = next(i for i, end in enumerate(STAGE_ENDS) if progress < end)
                stage.value = min(LENGTHS[index], args.longest)
            lr = learning_rate(progress, step, args.lr)
            sums = self.step(ids, roles, lr)
            totals = sums if totals is None else totals + sums
            if step == 2:  # compiled by now
                began = time.time()
            if step % LOG_EVERY == LOG_EVERY - 1:
                answer, answers, context, contexts, correct = totals.tolist()
                log(step + 1, elapsed, stage.value, lr, answer / answers, context / contexts, correct / answers)
                totals = None


def open_log(path: Path):
    """A function that writes a row to the CSV file and to the terminal."""
    names = ["step", "seconds", "longest", "lr", "answer_loss", "context_loss", "answer_token_accuracy"]
    file = path.open("w", newline="")
    writer = csv.writer(file)
    writer.writerow(names)

    def log(*row: float) -> None:
        row = [f"{x:.4g}" if isinstance(x, float) else x for x in row]
        writer.writerow(row)
        file.flush()
        print(" ".join(f"{n} {x}" for n, x in zip(names, row, strict=True)), flush=True)

    return log


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    vocab = needle_tokenizer.vocabulary()
    encode = Encoder(vocab, vocab[needle_tokenizer.EOS])
    check_encoder(encode, needle_tokenizer.build())
    model = NeedleLlama(
        NeedleConfig(
            vocab_size=len(vocab),
            rope_theta=args.rope_theta,
            num_layers=args.layers,
            intermediate_size=args.intermediate,
        )
    )
    model.init_weights()
    if args.resume:
        model.load_state_dict(torch.load(args.resume, weights_only=True))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, rope theta {args.rope_theta:g}", flush=True)
    stage = multiprocessing.Value("i", args.longest if args.resume else LENGTHS[0])
    lengths = tuple(n for n in LENGTHS if n <= args.longest)
    sequences = Sequences(encode, lengths, args.tokens, stage, seed=random.Random(args.seed).randrange(1 << 20))
    batches = DataLoader(
        sequences,
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=device == "cuda",
    )
    trainer = Trainer(args, model.to(device), device)
    trainer.run(batches, stage, open_log(args.out / "training_log.csv"))
    torch.save({name: weight.cpu() for name, weight in model.state_dict().items()}, args.out / "state.pt")
    save_checkpoint(model, args.out, vocab[needle_tokenizer.EOS], vocab[needle_tokenizer.PAD])
    needle_tokenizer.save(args.out)


if __name__ == "__main__":
    sys.exit(main())
