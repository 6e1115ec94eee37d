"""Trains a model from a config file.

    python -m experiments.train --config=configs/smnist.py:s4d,demo --workdir=runs/smnist

The same command continues a run that was stopped, bit for bit, and says so when it is finished.
Exit status: 0 finished or time limit, 1 a number is not finite, 2 wrong input, 143 SIGTERM, 130 Ctrl-C.
"""

import contextlib
import functools
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from experiments import (
    checkpoint,
    commandline,
    metrics,
    optimizer,
    plots,
    progress,
    records,
    replicas,
    samples,
    setup,
    stages,
    steps,
)
from experiments.workdir import Workdir, claim

SECONDS_BETWEEN_PLOTS = 20


class Stop:
    """True once a signal or the time limit asks the run to stop after the present step."""

    def __init__(self, minutes: float):
        self.signal = 0
        self._deadline = time.monotonic() + 60 * minutes if minutes else math.inf

    def __bool__(self) -> bool:
        return self.signal > 0 or time.monotonic() > self._deadline

    @property
    def status(self) -> int:
        return 128 + self.signal if self.signal else 0


def train(config: ConfigDict, run: Workdir, stop: Stop, command: str) -> int:
    """Trains as `config` says in the folder `run`; returns the exit status."""
    if run.read("result.json") and not run.changes():
        print(f"finished already: {records.sentence(run.read('result.json'))}")
        return 0

    # ------------------------------------------------------------------ state: restored or new
    ready = setup.prepare(config)
    task, program, total = ready.task, ready.program, ready.train_steps
    restored = checkpoint.restore_latest(run.checkpoints, program.like)
    if restored:
        state, start, chrono = restored.state, restored.step, progress.Chrono(restored.extra, config.devices)
        for damage in restored.damaged:
            print(f"warning: passed over a damaged checkpoint, {damage}", file=sys.stderr)
        checkpoint.set_aside(run.checkpoints, newer_than=start)
    else:
        first, start = stages.begin(run, program), 0
        state, chrono = first.state, progress.Chrono(first.clock, config.devices)
    if start > total:
        raise ValueError(f"the run is at step {start} already, past its end at {total}")
    if ready.members:
        print(f"replicas {ready.members}", flush=True)
    train_step = program.make_train_step()
    environment = records.environment(command, config.devices)
    run.begin(environment)
    run.rewind(start)
    if not restored and first.commands:
        run.write("stages.json", first.commands)
    figure = next((line for line in reversed(run.lines()) if f"test/{task.metric}" in line), {"step": start})

    # ------------------------------------------------------------------ what is about to happen
    print(f"device   {environment['hardware']}, jax {jax.__version__}")
    print(f"data     {task.source}")
    print(f"workdir  {run.path}")
    print(optimizer.show(ready.rows))
    print(f"training from step {start} to {total} ({ready.epochs:.4g} epochs)", flush=True)

    # ------------------------------------------------------------------ what the loop uses
    read = functools.partial(
        steps.evaluate_split, program.eval_step, task=task, batch_size=config.eval_batch_size, place=program.place
    )
    batches = program.batches(start)
    display = progress.Display(total, start, program.tokens)
    board = progress.TensorBoard(run.path / "tensorboard", start)
    title = f"{config.task.name}: {config.model.pattern}, {config.preset}"
    plot = functools.partial(
        plots.curves, run.path / "curves.png", title=title, metric=task.metric, published=config.published
    )
    step, pending, plotted = start, None, time.monotonic()

    def log(line: dict) -> None:
        line = line | {"seconds": round(chrono.seconds, 3)}
        run.log(line)
        for receiver in (board, display):
            receiver.log({name: value for name, value in line.items() if not name.startswith("replicas/")})

    def account(step: int, summary: steps.Summary) -> None:
        """Waits for a step and takes its numbers down."""
        jax.block_until_ready(summary)
        chrono.step()
        display.step(step)
        if step % config.log_every_steps == 0 or step == total:
            means = metrics.means([summary.sums], task.metric, task.classes)
            means["gradient_norm"] = summary.gradient_norm
            line = program.line(step, {"": means}, summary.health)
            if timed := chrono.interval():
                line |= {"tokens_per_second": round(program.tokens / timed[0]), "waiting_percent": round(timed[1], 2)}
            log(line)

    # ------------------------------------------------------------------ loop
    # The order matters: evaluate and save the old state; only then take a batch and dispatch the next
    # step; look at the previous step's numbers while that one runs.
    with display, board:
        while True:
            stopping = step == total or (step > start and bool(stop))
            evaluating = step > start and (step == total or step % ready.eval_every == 0)
            saving = step > start and (stopping or step % ready.checkpoint_every == 0)
            if pending and (evaluating or saving):
                account(*pending)
                pending = None
                program.check(state.health)
            if evaluating:
                with chrono.pause():
                    line = steps.evaluate(
                        functools.partial(read, state.params, state.batch_stats),
                        functools.partial(program.line, step, health=state.health),
                        task,
                        best=figure,
                        last=step == total,
                    )
                    if tokens_to_write := config.get("sample_tokens", 0):
                        line["sample"] = samples.sample(ready.model, task, program.best(state, line), tokens_to_write)
                    log(line)
                    if f"test/{task.metric}" in line:
                        figure = line
                        saving = saving or "validation" in task.splits
                    if time.monotonic() > plotted + SECONDS_BETWEEN_PLOTS:
                        plot(run.lines())
                        plotted = time.monotonic()
            if saving:
                with chrono.pause():
                    run.sync()
                    keep = {"keep": config.keep_checkpoints, "protect": [figure["step"]]}
                    checkpoint.save(run.checkpoints, step, state, chrono.state(), **keep)
            if stopping:
                break

            with chrono.waiting():
                batch = next(batches)
            state, summary = train_step(state, batch)
            step += 1
            if pending:
                account(*pending)
            pending = step, summary

    # ------------------------------------------------------------------ end
    plot(run.lines())
    if step < total:
        print(f"stopped at step {step} of {total} with a checkpoint; the same command continues")
        return stop.status
    seconds = chrono.seconds_per_step
    further = {split: figure.get(f"{split}/{task.metric}") for split in steps.further_splits(task)}
    several = replicas.record(figure, ready.members, task.metric, list(further)) if ready.members else {}
    result = records.result(
        run.config,
        environment,
        value=figure[f"test/{task.metric}"],
        step=figure["step"],
        wall_seconds=round(chrono.seconds, 1),
        device_seconds=round(chrono.device_seconds, 1),
        tokens_per_second=round(program.tokens / seconds) if seconds else 0,
        parameters=sum(row.count for row in ready.rows),
        data=task.source,
        **({"further": further} if further else {}),
        **several,
        **({"stages": before} if (before := run.read("stages.json")) else {}),
    )
    run.write("result.json", result)
    print(records.sentence(result))
    if ready.members:
        print(f"replicas {replicas.sentence(result, ready.members, figure['replica'])}")
    print(f"curves   {run.path / 'curves.png'}")
    print(f"next     {config.get('next') or f'python -m experiments.report --add {run.path}'}")
    return 0


@contextlib.contextmanager
def stop_on_signals(minutes: float) -> Iterator[Stop]:
    """SIGTERM and Ctrl-C ask for a stop; a second one acts at once."""
    stop = Stop(minutes)

    def ask(number, frame):
        stop.signal = number
        signal.signal(number, old[number])

    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(argv: Sequence[str]) -> int:
    arguments = commandline.parse(argv, __doc__)
    config = arguments.config
    with (
        claim(arguments.workdir, config.to_dict(), allow_config_change=arguments.allow_config_change) as run,
        stop_on_signals(config.time_limit_minutes) as stop,
    ):
        return train(config, run, stop, arguments.command)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
