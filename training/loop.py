"""The training loop of both stages: processes of one thread each, a schedule by the clock, and checkpoints that resume.

Gradients are averaged over the processes in one flat buffer. The clock, not a step count, drives the learning rate,
because the machine is shared: a run of N minutes ends after N minutes of training, however fast the machine was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

_SAVE_EVERY = 120.0  # seconds
_LOG_EVERY = 60.0
_WARM_UP = 150  # steps
_LONGEST_STEP = 10.0  # seconds: whoever was suspended did not train meanwhile
# The last share of the time, in which the learning rate falls to nothing. Until then it stays up, so that a run may be
# prolonged while it still learns.
_DECAY = 0.3
_EMA = 0.998


class Task(Protocol):
    """What a stage brings along: its module, learning rates, a loss per step, and a check of where it stands."""

    module: nn.Module

    def rate(self, name: str) -> float:
        """The peak learning rate of the parameter of this name."""

    def loss(self, step: int, rank: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of one step's batch, and figures to log."""

    def check(self) -> dict[str, float]:
        """Figures on scenes kept apart, for the log; called with the averaged weights in place."""


@dataclass(frozen=True)
class Options:
    """How to run: where checkpoints go, minutes of training in all, processes, and minutes between two checks."""

    folder: Path
    minutes: float
    processes: int = 2
    check_every: float = 5.0


def train(make: Callable[[], Task], options: Options) -> None:
    """Trains until the minutes are over; run again, it goes on where the last checkpoint was written."""
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rendezvous = options.folder / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    spawn(_worker, args=(make, options, str(rendezvous.resolve())), nprocs=options.processes)  # type: ignore[no-untyped-call]


def _worker(rank: int, make: Callable[[], Task], options: Options, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.processes)
    Trainer(make(), options, rank).run()
    dist.destroy_process_group()


class Trainer:
    """One process's part of a run."""

    def __init__(self, task: Task, options: Options, rank: int) -> None:
        self.task, self.options, self.rank = task, options, rank
        self.named = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            groups.setdefault((task.rate(name), _decay(name, parameter)), []).append(parameter)
        settings = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
        self.optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.98), fused=True)
        self.peaks = [rate for rate, _ in groups]
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.elapsed = 0, 0.0
        self.path = options.folder / "checkpoint.pt"
        if self.path.exists():
            self._load()

    def run(self) -> None:
        """Steps until the time is over; process 0 also saves, checks and logs."""
        last, saved, checked, logged = time.monotonic(), self.elapsed, self.elapsed, self.elapsed
        figures: dict[str, list[float]] = {}
        steps_logged = self.step
        while (progress := self.elapsed / 60 / self.options.minutes) < 1:
            self._schedule(progress)
            loss, found = self.task.loss(self.step, self.rank)
            loss.backward()  # type: ignore[no-untyped-call]
            now = time.monotonic()
            self._exchange(min(now - last, _LONGEST_STEP))
            last = now
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            torch._foreach_lerp_(
                self.average, [p.detach() for p in self.parameters], 1 - min(_EMA, self.step / (self.step + 20))
            )
            if self.rank:
                continue
            for name, value in {"loss": loss.item(), **found}.items():
                figures.setdefault(name, []).append(value)
            if self.elapsed - logged > _LOG_EVERY:
                pace = (self.step - steps_logged) / (self.elapsed - logged)
                self._log(f"{pace:.2f} steps/s", {k: sum(v) / len(v) for k, v in figures.items()})
                figures, logged, steps_logged = {}, self.elapsed, self.step
            if self.elapsed - saved > _SAVE_EVERY:
                self._save()
                saved = self.elapsed
            if self.elapsed - checked > self.options.check_every * 60:
                self._log("check", self._check())
                checked = self.elapsed
        if self.rank == 0:
            self._save()
            self._log("end", self._check())

    def _schedule(self, progress: float) -> None:
        factor = min(1.0, (self.step + 1) / _WARM_UP, max(0.01, (1 - progress) / _DECAY))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def _exchange(self, seconds: float) -> None:
        """Averages gradients and the clock over the processes, and clips the gradients' norm to 1."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([torch.tensor([seconds]), *(g.reshape(-1) for g in gradients)])
        dist.all_reduce(flat)
        flat /= self.options.processes
        self.elapsed += flat[0].item()
        flat = flat[1:]
        flat *= 1.0 / max(1.0, flat.norm().item())
        start = 0
        for p in self.parameters:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    def _check(self) -> dict[str, float]:
        kept = [p.detach().clone() for p in self.parameters]
        self._put(self.average)
        self.task.module.eval()
        found = self.task.check()
        self.task.module.train()
        self._put(kept)
        return found

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], values)

    def _log(self, title: str, figures: dict[str, float]) -> None:
        text = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
        line = f"{self.elapsed / 60:6.1f} min, step {self.step}, {title}: {text}"
        print(line, flush=True)
        with (self.options.folder / "log.txt").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        model = self.task.module.state_dict()
        average = {**model, **dict(zip(self.named, self.average, strict=True))}
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "model": model,
            "average": average,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.task.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [state["average"][name].clone() for name in self.named]
        self.step, self.elapsed = state["step"], state["elapsed"]


def _decay(name: str, parameter: nn.Parameter) -> float:
    """Weight decay; vectors (norms, biases) and embeddings have none."""
    return 0.05 if parameter.ndim > 1 and "embed" not in name else 0.0
