"""All faults that a run is to survive, and a table of what became of them.

    python tests/faults/faults.py                     # kills as in kill.py, and all others; an hour on two cores
    python tests/faults/faults.py --small --kills 25  # what CI runs

A fault is survived if the command, started again, ends with the same results as a run that nobody touched ("right"), or
refuses in one line what only a person can mend ("refused"). Exit code 1 if it was not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import (
    Attempt,
    attempt,
    copied,
    die_in,
    differences,
    finished,
    limited_files,
    results_of,
    started,
    write_experiment,
)
from kill import KillTest

TRAINING = ("--stages", "teacher,baseline,student")
# The other rank must not wait longer for one that has died.
RANK_SECONDS = 60.0


@dataclass
class Outcome:
    """What became of one kind of fault."""

    tried: int = 0
    right: int = 0
    refused: int = 0
    skipped: str = ""
    wrong: list[str] = field(default_factory=list)


class FaultTest:
    """Does each kind of fault to runs of one experiment.

    Args:
        folder: for them.
        small: some of each kind only.
        say: gets a line for each fault.
    """

    def __init__(self, folder: Path, small: bool, say: Callable[[str], None]) -> None:
        self.folder, self.small, self.say = folder, small, say
        self.config = write_experiment(folder)
        self.outcomes: dict[str, Outcome] = {}
        self.whole = folder / "whole"
        self._expect(self.run("whole"), 0)
        self.reference = results_of(self.whole)
        report = ("report", "predictions")
        self.trained = {name: value for name, value in self.reference.items() if name not in report}
        # Killed as the last phase begins to write its third checkpoint (the stages write 4, 7, 4 and 4 of them).
        self.half = folder / "half"
        found = self.run("half", *TRAINING, prepare=die_in("a save", 18, 0.0))
        if found.code != -signal.SIGALRM or not (self.half / "student" / "seed-0.partial").is_dir():
            raise RuntimeError(f"the run that was to be killed in the last phase ended by {found.code}: {found.said}")

    def run(self, name: str | Path, *more: str, **how) -> Attempt:
        """An attempt with this folder of results."""
        return attempt(["run", str(self.config), "--no-doctor", "--output_dir", str(self.folder / name), *more], **how)

    def _expect(self, found: Attempt, code: int) -> None:
        if found.code != code:
            raise RuntimeError(f"a run ended by {found.code} instead of {code}: {found.said}")

    def judge(self, fault: str, what: str, run: Path, found: Attempt, reference: dict) -> None:
        """Counts an attempt after a fault."""
        outcome = self.outcomes.setdefault(fault, Outcome())
        outcome.tried += 1
        if found.code == 0 and not (other := differences(run, reference)):
            outcome.right += 1
            verdict = "right"
        elif found.code in (1, 2) and found.error:
            outcome.refused += 1
            verdict = f"refused: {found.error}"
        else:
            verdict = f"WRONG: code {found.code}, {other if found.code == 0 else found.said[-800:]}"
            outcome.wrong.append(f"{what}: {verdict}")
        self.say(f"{fault}, {what}: {verdict}")

    # ---- bytes that change ----

    def damaged_files(self) -> None:
        """Each file of a finished and of an interrupted run, cut in half or with a flipped bit."""
        for source, more, reference in ((self.whole, (), self.reference), (self.half, TRAINING, self.trained)):
            files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
            files = [name for name in files if (source / name).stat().st_size > 1]
            if source == self.half:
                # The finished stages are those of the other run.
                files = [name for name in files if ".partial" in str(name) or name.parts[0] == "teacher_cache"]
            for number, name in enumerate(files):
                for kind in ("cut", "flipped") if not self.small else (("cut", "flipped")[number % 2],):
                    run = copied(source, self.folder / "damaged")
                    _damage(run / name, kind, number)
                    state = "a finished" if source == self.whole else "an interrupted"
                    found = self.run(run, *more)
                    self.judge(f"file of {state} run {kind}", str(name), run, found, reference)

    # ---- a disk that refuses ----

    def full_disk(self) -> None:
        """Disks of several sizes; the run must go on when there is room again."""
        sizes = (400, 1400) if self.small else (150, 250, 400, 600, 900, 1400, 2000)
        for size in sizes:
            with _small_disk(self.folder / "disk", f"size={size}k") as disk:
                if disk is None:
                    self.outcomes["disk full (tmpfs)"] = Outcome(skipped="no tmpfs may be mounted here")
                    return
                first = self.run(disk / "run", *TRAINING)
                self._refusal("disk full (tmpfs)", f"{size} kB", first)
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                again = self.run(disk / "run", *TRAINING)
                self.judge("disk full (tmpfs)", f"{size} kB, then room", disk / "run", again, self.trained)

    def limited_size(self) -> None:
        """Files that may not grow beyond a size, as with a quota."""
        for size in (60_000,) if self.small else (500, 3_000, 20_000, 60_000, 150_000, 300_000):
            run = self.folder / f"limit-{size}"
            first = self.run(run, *TRAINING, prepare=limited_files(size))
            self._refusal("file size limited", f"{size} bytes", first)
            again = self.run(run, *TRAINING)
            self.judge("file size limited", f"{size} bytes, then none", run, again, self.trained)
            shutil.rmtree(run)

    def no_permission(self) -> None:
        """A disk that can only be read, and folders that nobody may change: root heeds no modes."""
        name = "write permission removed (disk read-only)"
        with _small_disk(self.folder / "disk", "size=64m") as disk:
            if disk is None:
                self.outcomes[name] = Outcome(skipped="no tmpfs may be mounted here")
            else:
                run = copied(self.half, disk / "run")
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
                self._refusal(name, "in the last phase", self.run(run, *TRAINING))
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
                again = self.run(run, *TRAINING)
                self.judge(name, "in the last phase, then given back", run, again, self.trained)
        name = "write permission removed (chattr +i)"
        places = (".", "student", "student/seed-0.partial/checkpoints")
        for place in places[-1:] if self.small else places:
            run = copied(self.half, self.folder / "immutable")
            if subprocess.run(["chattr", "+i", run / place], capture_output=True).returncode:
                self.outcomes[name] = Outcome(skipped="no file can be made immutable here")
                return
            try:
                found = self.run(run, *TRAINING)
            finally:
                subprocess.run(["chattr", "-i", run / place], check=True)
            self._refusal(name, place, found)
            again = self.run(run, *TRAINING)
            self.judge(name, f"{place}, then given back", run, again, self.trained)

    def _refusal(self, fault: str, what: str, found: Attempt) -> None:
        """While the fault lasts: it may only end by one line, or not meet it."""
        if found.code == 0 or (found.code in (1, 2) and found.error):
            self.say(f"{fault}, {what}: {found.error or 'not met'}")
            return
        outcome = self.outcomes.setdefault(fault, Outcome())
        outcome.wrong.append(f"{what}: code {found.code}, {found.said[-800:]}")

    # ---- two ranks ----

    def ranks(self) -> None:
        """One of two ranks is killed, or both are told to stop, in the middle of a step."""
        whole = self.folder / "ranks"
        for found in self._launch(whole):
            self._expect(found, 0)
        reference = results_of(whole)
        for place, number in (("a step", 16),) if self.small else (("a step", 16), ("a save", 4), ("an evaluation", 5)):
            run = self.folder / "ranks-killed"
            begun = time.monotonic()
            died, other = self._launch(run, killed=(place, number))
            waited = other.seconds - died.seconds
            what = f"in {place}, the other ended after {waited:.1f} s"
            if other.code == 0 or waited > RANK_SECONDS or died.code != -signal.SIGALRM:
                text = f"{what}: codes {died.code}, {other.code}; {time.monotonic() - begun:.0f} s; {other.said[-800:]}"
                self.outcomes.setdefault("one of two ranks killed", Outcome()).wrong.append(text)
            found = max(self._launch(run), key=lambda one: abs(one.code))
            self.judge("one of two ranks killed", what, run, found, reference)
            shutil.rmtree(run)
        run = self.folder / "ranks-told"
        told = self._launch(run, told=True)
        steps = [path.name for path in run.rglob("*.partial/checkpoints/checkpoint-*")]
        if [one.code for one in told] != [143, 143] or not steps:
            text = "; ".join(f"code {one.code}: {one.said[-800:]}" for one in told)
            self.outcomes.setdefault("SIGTERM to two ranks", Outcome()).wrong.append(text)
        found = max(self._launch(run), key=lambda one: abs(one.code))
        self.judge("SIGTERM to two ranks", f"both ended by 143, left {', '.join(steps)}", run, found, reference)

    def _launch(self, run: Path, killed: tuple[str, int] | None = None, told: bool = False) -> list[Attempt]:
        """Both ranks; first the one that is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["run", str(self.config), "--no-doctor", "--output_dir", str(run), "--stages", "teacher,baseline"]
        children = []
        for rank in (1, 0):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
            prepare = die_in(*killed, 0.0) if killed and rank == 1 else (lambda board: None)
            children.append(started(arguments, prepare, environment))
        if told:
            _wait_for(children[1][1], "a step")
            for child, *_ in children:
                os.kill(child, signal.SIGTERM)
        return [finished(*child) for child in children]


def _wait_for(board, place: str) -> None:
    deadline = time.monotonic() + 300
    while board.read() != place:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{place} was never reached")
        time.sleep(0.001)


def _damage(path: Path, kind: str, seed: int) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: len(data) // 2]
    else:
        draw = random.Random(seed)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@contextmanager
def _small_disk(place: Path, options: str) -> Iterator[Path | None]:
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def table(outcomes: dict[str, Outcome]) -> list[str]:
    """The outcomes in Markdown."""
    lines = ["| fault | tried | ended right | refused in one line | wrong |", "|---|---:|---:|---:|---:|"]
    for name, found in outcomes.items():
        counts = f"{found.tried} | {found.right} | {found.refused} | {len(found.wrong)}"
        lines.append(f"| {name} | {f'skipped: {found.skipped} | | |' if found.skipped else counts} |")
    return lines


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="some of each kind")
    parser.add_argument("--kills", type=int, default=200, help="as in kill.py; 0: none [200]")
    parser.add_argument("--only", nargs="*", help="of damaged_files, full_disk, limited_size, no_permission, ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the kills [0]")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    known = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    lines, wrong, outcomes = [], [], {}
    try:
        if known.kills:
            (folder / "kills").mkdir()
            kills = KillTest(folder / "kills", known.seed, lambda line: print(line, flush=True))
            kills.run(known.kills)
            lines += [*kills.table(), ""]
            wrong += kills.wrong
            outcomes["killed or told to stop"] = Outcome(kills.kills, kills.kills - len(kills.wrong), wrong=kills.wrong)
        kinds = ("damaged_files", "full_disk", "limited_size", "no_permission", "ranks")
        kinds = kinds if known.only is None else known.only
        if kinds:
            (folder / "others").mkdir()
            test = FaultTest(folder / "others", known.small, lambda line: print(line, flush=True))
            for kind in kinds:
                getattr(test, kind)()
            outcomes |= test.outcomes
            wrong += [line for found in test.outcomes.values() for line in found.wrong]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["", *lines, *table(outcomes)]))
    for line in wrong:
        print(f"WRONG: {line}")
    if known.json:
        known.json.write_text(json.dumps({name: vars(found) for name, found in outcomes.items()}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
