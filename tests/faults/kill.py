"""The kill test: runs of the command are killed again and again, and must end as one that nobody touched.

    python tests/faults/kill.py --kills 200

Prints a table of where the kills fell and how many runs ended with the same weights, logs and report; exit code 1 if
one did not. The faults are drawn by --seed: SIGKILL after a random while; SIGKILL right before the n-th file that the
run opens to write, renames or removes; death in a given place (a save, the cache fill, ...); SIGTERM after a while.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from harness import PLACES, attempt, die_at_file_event, die_in, differences, results_of, write_experiment

# Faults of one run, at most; then it is left to end.
_FAULTS_OF_A_RUN = 6
# What cannot be killed within a moment is drawn less: the reports of these tiny runs take as long as a stage.
_SHARES = (("time", 0.25), ("file", 0.4), ("place", 0.25), ("term", 0.1))


class KillTest:
    """Draws faults and counts what became of them.

    Args:
        folder: for the experiment and its runs.
        seed: of the faults.
        say: gets a line for each attempt.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.draw, self.say = folder, random.Random(seed), say
        self.config = write_experiment(folder)
        counted = mmap.mmap(-1, 8)
        begun = time.monotonic()
        first = attempt(self._command("reference"), die_at_file_event(folder / "reference", 0, counted))
        if first.code != 0:
            raise RuntimeError(f"the run that nobody touches has failed: {first.said}")
        self.reference = results_of(folder / "reference")
        self.events = int.from_bytes(counted[:8], "little")
        self.seconds = time.monotonic() - begun
        self.fallen: Counter[tuple[str, str]] = Counter()
        self.runs = self.attempts = 0
        self.wrong: list[str] = []

    def _command(self, name: str) -> list[str]:
        return ["run", str(self.config), "--no-doctor", "--output_dir", str(self.folder / name)]

    @property
    def kills(self) -> int:
        return sum(self.fallen.values())

    def run(self, kills: int, minutes: float = float("inf")) -> None:
        """Runs with faults until there were so many; after so many minutes no other run is begun."""
        deadline = time.monotonic() + 60 * minutes
        while self.kills < kills and time.monotonic() < deadline:
            self._one_run(min(kills - self.kills, self.draw.randint(2, _FAULTS_OF_A_RUN)))

    def _one_run(self, faults: int) -> None:
        name = f"run-{self.runs}"
        run, done, history = self.folder / name, False, []
        self.runs += 1
        # The later ones fall later, or the first stage would get them all.
        for i in range(faults):
            kind = self.draw.choices([k for k, _ in _SHARES], [s for _, s in _SHARES])[0]
            done, line = self._faulty(kind, name, i)
            history.append(line)
            if done:
                break
        if not done:
            self.attempts += 1
            last = attempt(self._command(name))
            history.append(f"left to end: {last.code}")
            if last.code != 0:
                self.wrong.append(f"{name} ({'; '.join(history)}): {last.said[-600:]}")
                return
        if wrong := differences(run, self.reference):
            self.wrong.append(f"{name} ({'; '.join(history)}): other {', '.join(wrong)}")
        else:
            shutil.rmtree(run)

    def _faulty(self, kind: str, name: str, earlier: int) -> tuple[bool, str]:
        """One attempt with a fault; whether it ended before the fault fell, and what happened."""
        self.attempts += 1
        prepare, watch, what = (lambda board: None), (lambda pid: None), ""
        if kind == "file":
            number = self.draw.randint(1, max(2, self.events // (earlier + 1)))
            what, prepare = f"before file event {number}", die_at_file_event(self.folder / name, number)
        elif kind == "place":
            place = self.draw.choice(list(PLACES.values()))
            number, delay = self.draw.randint(1, 3), self.draw.uniform(0, 0.05)
            what, prepare = f"{delay:.3f} s into {place} {number}", die_in(place, number, delay)
        else:
            signum, delay = (
                (signal.SIGKILL if kind == "time" else signal.SIGTERM),
                self.draw.uniform(0, self.seconds / (earlier + 1)),
            )
            what, watch = f"{signum.name} after {delay:.1f} s", lambda pid: _after(delay, pid, signum)
        ended = attempt(self._command(name), prepare, watch)
        self.say(f"{name}: {what}: ended by {ended.code} in {ended.where}")
        # Before the command has taken the signal over, it ends it as the system does: 143 in a shell as well.
        if ended.code in (-signal.SIGKILL, -signal.SIGALRM) or (
            ended.code in (143, -signal.SIGTERM) and kind == "term"
        ):
            # Told to stop, it has left the place by the time that it ends.
            how, where = ("SIGTERM", "any place") if kind == "term" else ("SIGKILL", ended.where)
            self.fallen[how, where] += 1
            return False, f"{what} in {ended.where}"
        if ended.code != 0:
            self.wrong.append(f"{name}, {what}: exit code {ended.code}: {ended.said[-600:]}")
        return ended.code == 0, f"{what}: too late"

    def table(self) -> list[str]:
        """The outcome as a table in Markdown."""
        lines = ["| signal | fell in | times |", "|---|---|---:|"]
        lines += [f"| {how} | {where} | {count} |" for (how, where), count in sorted(self.fallen.items())]
        lines.append(f"| | all | {self.kills} |")
        good = self.runs - len({line.split(" ")[0].rstrip(",") for line in self.wrong})
        lines += ["", f"{self.runs} runs in {self.attempts} attempts; {good} ended as the one that nobody touched."]
        return lines


def _after(delay: float, pid: int, signum: int) -> None:
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        # Not reaped here: its number stays its own.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)
    os.kill(pid, signum)


def main() -> int:
    """Runs the test as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="faults that must have fallen [200]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the faults [0]")
    parser.add_argument("--folder", type=Path, help="for the runs, kept where something is wrong")
    parser.add_argument("--json", type=Path, help="write the counts here")
    known = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir=known.folder))
    start = time.monotonic()
    test = KillTest(folder, known.seed, lambda line: print(line, flush=True))
    print(f"a run that nobody touches: {test.seconds:.1f} s, {test.events} file events", flush=True)
    test.run(known.kills, known.minutes)
    print("\n".join(["", *test.table(), f"seed {known.seed}, {time.monotonic() - start:.0f} s"]))
    if known.json:
        counts = {f"{how} in {where}": count for (how, where), count in test.fallen.items()}
        known.json.write_text(json.dumps({"kills": counts, "runs": test.runs, "wrong": test.wrong}))
    for line in test.wrong:
        print(f"WRONG: {line}")
    if not test.wrong:
        shutil.rmtree(folder)
    return 1 if test.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
