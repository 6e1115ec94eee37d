"""What a run shows while it trains, and its clock."""

import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experiments.metrics import METRICS


def clock_face(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Chrono:
    """Wall time of the whole run, and time per step without compilation, evaluation and checkpoints.

    `state()` goes into the checkpoints, so that both survive restarts; the work that a kill threw away
    is not counted.
    """

    def __init__(self, state: dict | None = None, devices: int = 1, now: Callable[[], float] = time.monotonic):
        self._now, self._devices = now, devices
        self._started = now()
        state = state or {"seconds": 0.0, "step_seconds": 0.0, "timed_steps": 0}
        self._before, self._step_seconds = state["seconds"], state["step_seconds"]
        self._device_seconds_before = state.get("device_seconds", devices * self._before)
        self._timed_steps = state["timed_steps"]
        self._mark: float | None = None  # None until the first step, which compiles, is over
        self._interval = (self._step_seconds, self._timed_steps)
        self._waited = 0.0

    @property
    def seconds(self) -> float:
        return self._before + self._now() - self._started

    @property
    def device_seconds(self) -> float:
        """Of all devices that were used, which may have been more or fewer before a restart."""
        return self._device_seconds_before + self._devices * (self._now() - self._started)

    def state(self) -> dict:
        return {
            "seconds": self.seconds,
            "device_seconds": self.device_seconds,
            "step_seconds": self._step_seconds,
            "timed_steps": self._timed_steps,
        }

    def step(self) -> None:
        """Call when a step is over."""
        now = self._now()
        if self._mark is not None:
            self._step_seconds += now - self._mark
            self._timed_steps += 1
        self._mark = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training time."""
        yield
        if self._mark is not None:
            self._mark = self._now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data: part of the training time.

        Of the host's: a device that still computes the step before does not wait.
        """
        start = self._now()
        yield
        if self._mark is not None:
            self._waited += self._now() - start

    def interval(self) -> tuple[float, float] | None:
        """Seconds per step since the last call, and percent of them in `waiting` (None: no step was timed)."""
        seconds, steps = self._interval
        self._interval = (self._step_seconds, self._timed_steps)
        timed, waited, self._waited = self._timed_steps - steps, self._waited, 0.0
        seconds = self._step_seconds - seconds
        return (seconds / timed, 100 * waited / seconds) if timed else None

    @property
    def seconds_per_step(self) -> float | None:
        return self._step_seconds / self._timed_steps if self._timed_steps else None


class Display:
    """One live line on a terminal's stderr; elsewhere one plain line per logged step."""

    def __init__(self, total: int, start: int, tokens_per_step: int):
        self._total, self._tokens = total, tokens_per_step
        self._live = _live_line(total, start) if sys.stderr.isatty() else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, step: int) -> None:
        if self._live:
            self._live.update(self._live.task_ids[0], completed=step)

    def log(self, line: dict) -> None:
        """Shows a line of metrics.jsonl: one of training replaces the last, one of evaluation stays."""
        text = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k.endswith(("loss", *METRICS)))
        if speed := line.get("tokens_per_second"):
            left = clock_face((self._total - line["step"]) * self._tokens / speed)
            text += f"  {speed:,} tokens/s  waiting {line['waiting_percent']:.2g} %  ETA {left}"
        text += f"\n{line['sample']}\n" if "sample" in line else ""
        if self._live and "loss" in line:
            self._live.update(self._live.task_ids[0], text=text)
        elif self._live:
            self._live.console.print(f"step {line['step']}  {text}", highlight=False, markup=False)
        else:
            print(f"step {line['step']}/{self._total}  {text}", file=sys.stderr, flush=True)


def _live_line(total: int, start: int):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = ("step {task.completed}/{task.total}", BarColumn(20), TextColumn("{task.fields[text]}"))
    live = Progress(*columns, console=Console(stderr=True))
    live.add_task("", total=total, completed=start, text="compiling")
    return live


class TensorBoard:
    """Writes the lines of metrics.jsonl as TensorBoard events; opened at the first line."""

    def __init__(self, folder: pathlib.Path, start: int):
        self._folder, self._start = folder, start
        self._writer = None

    def __enter__(self) -> "TensorBoard":
        import tensorboardX  # noqa: F401  # takes seconds: not while steps are timed

        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.close()

    def log(self, line: dict) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._start + 1, flush_secs=10)
        for name, value in line.items():
            if name != "step":
                add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
                add(name, value, line["step"])
