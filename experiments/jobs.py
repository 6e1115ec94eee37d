"""Runs that train at once, each in a process of its own, with its share of this machine's GPUs."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments import commandline, records, train
from experiments.progress import clock_face
from experiments.workdir import LOG, Workdir, refuse_foreign

MEMORY = [f"XLA_PYTHON_CLIENT_{name}" for name in ("PREALLOCATE", "MEM_FRACTION", "ALLOCATOR")]
MEMORY += ["XLA_CLIENT_MEM_FRACTION"]
POLL_SECONDS = 0.1


class Member(NamedTuple):
    name: str
    folder: pathlib.Path
    arguments: list[str]  # of `experiments.train`

    def result(self) -> dict | None:
        return Workdir(self.folder, {}).read("result.json")

    def last_line(self) -> str:
        """Of what it printed."""
        lines = (self.folder / LOG).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def at_once(members: Sequence[Member], jobs: int) -> tuple[int, list[Member]]:
    """So many at a time, each in a process; a signal stops them all, and no more are started.

    Returns 0, 1 where one failed, or the status of the signal, and those that failed. Raises ValueError before any
    starts where a config or a folder is wrong.
    """
    devices = max(commandline.parse(["train", *member.arguments], "").config.devices for member in members)
    for member in members:
        refuse_foreign(member.folder)
    waiting, running, failed, told = list(members), {}, [], 0
    free, gpus, begun = list(range(jobs)), local_gpus(os.environ), time.monotonic()
    with train.stop_on_signals(0) as stop:
        try:
            while running or (waiting and not stop.signal):
                while waiting and free and not stop.signal:
                    member, slot = waiting.pop(0), free.pop(0)
                    running[slot] = member, start(member, os.environ | share(os.environ, slot, jobs, gpus, devices))
                    print(f"started  {member.name}, {len(members) - len(waiting)} of {len(members)}", flush=True)
                if stop.signal > told:
                    told = stop.signal
                    terminate(running)
                for slot, (member, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        free.append(slot)
                        if not report(member, process.returncode, bool(stop.signal)):
                            failed.append(member)
                time.sleep(POLL_SECONDS)
        finally:  # of a second Ctrl-C
            terminate(running)
    print(f"{'stopped' if stop.signal else 'over'} after {clock_face(time.monotonic() - begun)}", flush=True)
    return stop.status or int(bool(failed)), failed


def start(member: Member, environment: Mapping[str, str]) -> subprocess.Popen:
    """Its process, which Ctrl-C in this terminal does not reach."""
    command = [sys.executable, "-m", "experiments.train", *member.arguments]
    try:
        member.folder.mkdir(parents=True, exist_ok=True)
        log = open(member.folder / LOG, "a")
    except OSError as error:
        raise ValueError(f"cannot write to {member.folder}: {error.strerror}") from error
    with log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def terminate(running: Mapping[int, tuple[Member, subprocess.Popen]]) -> None:
    for _, process in running.values():
        process.terminate()


def report(member: Member, status: int, stopping: bool) -> bool:
    """One line on how a member ended; whether it did not fail."""
    if result := status == 0 and member.result():
        print(f"finished {member.name}: {records.sentence(result)}", flush=True)
    elif status == 0 or stopping:
        print(f"stopped  {member.name}: {member.last_line().removeprefix('stopped ')}", flush=True)
    else:
        where = f"exit status {status}, see {member.folder / LOG}"
        print(f"failed   {member.name}: {member.last_line()} ({where})", file=sys.stderr, flush=True)
        return False
    return True


def local_gpus(environment: Mapping[str, str]) -> list[str]:
    """Those that members may use: of CUDA_VISIBLE_DEVICES, or all of this machine."""
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def share(environment: Mapping[str, str], slot: int, jobs: int, gpus: Sequence[str], devices: int) -> dict[str, str]:
    """The variables that give one of `jobs` its `devices` of the GPUs, and its part of their memory."""
    if not gpus:
        return {}
    mine = [gpus[(slot * devices + i) % len(gpus)] for i in range(min(devices, len(gpus)))]
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
    sharing = -(-jobs * len(mine) // len(gpus))
    if sharing > 1 and not any(name in environment for name in MEMORY):
        variables["XLA_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
    return variables
