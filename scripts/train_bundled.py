"""Train the bundled model on the standard library of the running interpreter.

A byte-level BPE of 4,096 tokens and a llama-shaped model of about 5M
parameters, from random weights, on two cores, in about an hour and a half:

    python scripts/train_bundled.py --time-steps 100      # speed and estimate only
    python scripts/train_bundled.py --steps 4000 --resume # the run; may be repeated
    python scripts/evaluate_bundled.py                    # fills in training.json

glibc hands every large tensor back to the system at once; with
``MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000`` in the
environment a step takes a fifth less time.

What the recipe is made of:

* hidden matrices: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/,
  ``torch.optim.Muon`` with the step scaled to AdamW's size, arXiv:2502.16982 eq. 4);
  embeddings and norms: AdamW (arXiv:1711.05101);
* warm-up, stable, decay to zero (arXiv:2405.18392). The end can be moved by
  resuming with another ``--steps``, as long as the decay has not begun;
* windows without overlap at a random offset that changes every epoch;
* the decay runs at twice the context and half the rows, so positions up to
  ``max_position_embeddings`` have been seen.

A run is a function of the seed and the step: ``--resume`` continues with the
windows that an uninterrupted run would have used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from bundled_model import Recipe, build_model, build_tokenizer, encode_files, save_folder
from stdlib_text import SPLITS, of_split, stdlib_files

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bundled" / "code-llama-5m"
WORK = ROOT / "build" / "bundled"


class Windows:
    """Token windows of one epoch after another, a function of seed and step.

    Epoch e cuts the stream at offset r_e + k * context and visits the pieces in
    a random order; both come from ``default_rng([seed, e, context])``.
    """

    def __init__(self, ids: np.ndarray, recipe: Recipe) -> None:
        self.ids, self.recipe = ids, recipe
        self._key: tuple[int, int] | None = None
        self._starts = np.zeros(0, dtype=np.int64)

    def batch(self, step: int, context: int) -> torch.Tensor:
        """Rows of ``context + 1`` tokens for one step, int64 [rows, context + 1]."""
        rows = self.recipe.tokens_per_step // context
        per_epoch = (len(self.ids) - 1 - context) // context // rows
        epoch, position = divmod(step, per_epoch)
        if self._key != (epoch, context):
            rng = np.random.default_rng([self.recipe.seed, epoch, context])
            pieces = rng.permutation(per_epoch * rows)
            self._starts = rng.integers(context) + context * pieces
            self._key = (epoch, context)
        starts = self._starts[position * rows : (position + 1) * rows]
        return torch.from_numpy(self.ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate at a step as a fraction of its peak: up, flat, linearly to zero."""
    decay_from = recipe.decay_from
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if step < decay_from:
        return 1.0
    return (recipe.steps - step) / max(1, recipe.steps - decay_from)


def optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    hidden, rest, norms = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            norms.append(parameter)
        else:
            (rest if "embed" in name or "lm_head" in name else hidden).append(parameter)
    muon = torch.optim.Muon(hidden, lr=recipe.lr_muon, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": rest, "lr": recipe.lr_adamw, "weight_decay": recipe.weight_decay_embedding},
            {"params": norms, "lr": recipe.lr_adamw, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-10,
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of logits [N, V] against targets [N].

    The same number as ``torch.nn.functional.cross_entropy`` in float32; the
    gradient is made in one pass in the logits' own type, which on two cores
    saves a tenth of a step.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean of logsumexp(logits) - logits[target]."""
        full = logits.float()
        log_norm = torch.logsumexp(full, 1, keepdim=True)
        ctx.save_for_backward(logits, log_norm, targets)
        return (log_norm - full.gather(1, targets[:, None])).mean()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(softmax - one hot) / N."""
        logits, log_norm, targets = ctx.saved_tensors
        out = (logits - log_norm).exp_()
        out.scatter_add_(1, targets[:, None], -torch.ones_like(log_norm))
        return out.mul_(grad / len(targets)).to(logits.dtype), None


def loss_of(model: torch.nn.Module, window: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean cross-entropy in nats per token of windows [rows, context + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return CrossEntropy.apply(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def watch_loss(model: torch.nn.Module, ids: np.ndarray, context: int, dtype: torch.dtype) -> float:
    """Mean nats per token over the watch split, windows without overlap."""
    model.eval()
    n = (len(ids) - 1) // context
    total = 0.0
    for first in range(0, n, 8):
        starts = context * np.arange(first, min(first + 8, n))
        window = torch.from_numpy(ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))
        total += float(loss_of(model, window, dtype)) * len(starts)
    model.train()
    return total / n


def one_step(model, opts, windows: Windows, step: int, recipe: Recipe) -> tuple[float, float]:
    """Loss (nats per token) and gradient norm of one update."""
    context = recipe.context if step < recipe.decay_from else recipe.context_decay
    window = windows.batch(step, context)
    dtype = torch.bfloat16 if recipe.autocast else torch.float32
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    loss = loss_of(model, window, dtype)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), float(norm)


def save_state(path: Path, model, opts, step: int, seconds: float) -> None:
    """Write the run's state beside its place, then rename: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "opts": [optimizer.state_dict() for optimizer in opts],
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def record(recipe: Recipe, model, tokens: int, done: int, seconds: float, log: list, starts: list) -> dict:
    """What ``training.json`` says about the run; the evaluation adds its own part.

    ``starts``: the step, the settings and the command line of every start of this run.
    """
    return {
        "architecture": "llama",
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": recipe.as_dict(),
        "steps_done": done,
        "tokens_in_train": tokens,
        "tokens_seen": done * recipe.tokens_per_step,
        "epochs": round(done * recipe.tokens_per_step / tokens, 2),
        "minutes": round(seconds / 60, 1),
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "watch_loss_nats_per_token": log,
        "starts": starts,
    }


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    """The run: data, steps, states every few minutes, the folder at the end."""
    torch.manual_seed(recipe.seed)
    files = stdlib_files()
    texts = {split: [file.text for file in of_split(files, split)] for split in SPLITS}
    tokenizer = build_tokenizer(texts["train"], args.work / "tokenizer.json", recipe)
    ids = encode_files(tokenizer, texts["train"])
    watch_ids = encode_files(tokenizer, texts["watch"])
    model = build_model(recipe)
    if args.dtype:
        recipe = recipe.replace(autocast=args.dtype == "bf16")
    opts = optimizers(model, recipe)
    windows = Windows(ids, recipe)
    state_path, step, spent, log = args.work / "state.pt", 0, 0.0, []
    log_path, starts_path = args.work / "watch.json", args.work / "starts.json"
    if args.resume and state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(opts, state["opts"], strict=True):
            chosen = [{key: group[key] for key in ("peak", "weight_decay")} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, values in zip(optimizer.param_groups, chosen, strict=True):
                group.update(values)
        step, spent = state["step"], state["seconds"]
        log = [row for row in json.loads(log_path.read_text()) if row[0] <= step]
    starts = json.loads(starts_path.read_text()) if step else []
    starts.append({"from_step": step, "command": [Path(sys.argv[0]).name, *args.told], "recipe": recipe.as_dict()})
    print(f"{len(ids):,} tokens in train, {len(watch_ids):,} in watch, from step {step}")
    last = min(recipe.steps, step + args.time_steps) if args.time_steps else recipe.steps
    forward = torch.compile(model) if args.compile else model
    started = saved_at = time.time()
    first, mean = step, math.nan
    dtype = torch.bfloat16 if recipe.autocast else torch.float32
    while step < last:
        loss, norm = one_step(forward, opts, windows, step, recipe)
        step += 1
        mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
        now = time.time()
        if step % 20 == 0:
            each = (now - started) / (step - first)
            speed = f"{each:.3f} s/step, {recipe.tokens_per_step / each:,.0f} tokens/s"
            to_go = f"to go {(recipe.steps - step) * each / 60:.1f} min"
            print(f"step {step} loss {mean:.4f} norm {norm:.2f} rate {rate(step, recipe):.3f} {speed}, {to_go}")
        if args.time_steps:
            continue
        if step % args.watch_every == 0 or step == last:
            log.append([step, round(watch_loss(model, watch_ids, recipe.context, dtype), 4), round(mean, 4)])
            print(f"step {step} watch {log[-1][1]} train {log[-1][2]}")
        if now - saved_at > args.save_seconds or step == last or step == args.save_at:
            save_state(state_path, model, opts, step, spent + now - started)
            log_path.write_text(json.dumps(log))
            starts_path.write_text(json.dumps(starts))
            facts = record(recipe, model, len(ids), step, spent + now - started, log, starts)
            for folder in [args.early, args.out if step == last else None]:
                if folder is not None:
                    save_folder(folder, model, tokenizer, recipe, files, facts)
            saved_at = now


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model on the standard library.")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--time-steps", type=int, default=0, metavar="N", help="time N steps, write nothing")
    parser.add_argument("--resume", action="store_true", help="continue from the work folder's state")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=WORK, help="states and logs of the run")
    parser.add_argument("--early", type=Path, help="also write a loadable folder here at every save")
    parser.add_argument("--save-seconds", type=float, default=240)
    parser.add_argument("--save-at", type=int, default=60, metavar="STEP", help="one early save")
    parser.add_argument("--watch-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="products' type, instead of the recipe's")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=NUMBER", help="another recipe")
    args = parser.parse_args()
    paths = {"--work", "--out", "--early"}
    told = sys.argv[1:]
    args.told = [word for at, word in enumerate(told) if word not in paths and told[at - 1] not in paths]
    torch.set_num_threads(args.threads)
    sys.stdout.reconfigure(line_buffering=True)
    changes = {field: json.loads(value) for field, value in (item.split("=") for item in args.set)}
    train(Recipe(steps=args.steps).replace(**changes), args)


if __name__ == "__main__":
    main()
