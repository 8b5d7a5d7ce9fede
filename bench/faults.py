"""Test secateur with damaged files, killed processes, full disks and a hundred runs in a row.

    python bench/faults.py [inputs] [kills] [interrupts] [disk] [repeats] [--inputs N] [--kills N]

Without names, all parts run; each is written to `results/faults.json` as it ends. Then the table in
docs/explanation/security.md is written.

- `inputs`: files of every format, changed at random, are read in child processes: none may hang,
  end by a signal or raise anything but a `SecateurError`, and an accepted network must be the one
  that was saved.
- `kills`: runs of prune, finetune and compare are killed at random moments and resumed until they
  end; the result must be that of an undisturbed run.
- `interrupts`: the same with Ctrl-C, also measuring how long the run takes to end.
- `disk`: a run is repeated once for each of its writes, and the disk fails from that write on.
- `repeats`: many runs in one process, measuring memory, files, threads and global state.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

import secateur
from rows import ROOT, revision, surroundings, write_json
from secateur.cli import app
from secateur.experiments import run_folder
from secateur.experiments.manifest import read_contents
from secateur.experiments.report import run_charts  # noqa: F401  (scipy sets filters of warnings as it comes)
from secateur.runtime.errors import SecateurError
from secateur.runtime.signals import INTERRUPTED
from tables import with_table

sys.path.append(str(ROOT / "tests"))
from fault_case import CLASSES, Case, FailingDisk, differences, outcome, renewed, state_of
from fault_inputs import Reader, mutate, readers, write_files

RESULTS = ROOT / "results" / "faults.json"
PAGE = ROOT / "docs" / "explanation" / "security.md"
SEED = 0
HANG = 20.0
"""Seconds after which an input is taken to hang its reader."""
MEMORY = 12 * 2**30
"""Address space of a reading process, in bytes."""
JOBS = ("prune", "finetune", "compare")
RUNS = 100


# --- damaged files -----------------------------------------------------------------------------


def try_inputs(folder: Path, count: int) -> dict[str, Any]:
    """Read `count` changed inputs, spread evenly over all readers."""
    results: dict[str, Counter[str]] = {}
    failures: list[str] = []
    all_readers = readers(folder)
    for place, reader in enumerate(all_readers):
        inputs_each = count // len(all_readers) + (place < count % len(all_readers))
        results[reader.name] = _try_reader(reader, inputs_each, failures)
        print(f"{reader.name}: {dict(results[reader.name])}", flush=True)
    total = sum(results.values(), Counter())
    return {
        "inputs": sum(total.values()),
        "seed": SEED,
        "refused": total["refused"],
        "accepted_same": total["same"],
        "accepted_other": total["other"],
        "not_compared": total["read"],
        "crashes": total["crash"],
        "hangs": total["hang"],
        "by_reader": {name: dict(counts) for name, counts in results.items()},
        "failures": failures[:50],
    }


def _try_reader(reader: Reader, count: int, failures: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    done = 0
    while done < count:
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=_read_all, args=(reader, done, count, there))
        process.start()
        there.close()
        while done < count:
            if not here.poll(HANG):
                process.kill()
                kind, words = "hang", ""
            else:
                try:
                    kind, words = here.recv()
                except EOFError:  # it has ended with this input
                    process.join()
                    kind, words = "crash", f"the process ended with {process.exitcode}"
            counts[kind] += 1
            if kind in ("crash", "hang", "other"):
                failures.append(f"{reader.name}, input {done}: {kind} {words}")
            done += 1
            if kind == "hang" or words.startswith("the process"):
                break
        process.join()
        here.close()
    return counts


def _read_all(reader: Reader, first: int, last: int, say: Connection) -> None:
    """Read inputs in a child process, and send the outcome of each."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        for number in range(first, last):
            generator = random.Random(f"{SEED} {reader.name} {number}")
            say.send(_read_one(reader, generator, renewed(Path(name) / "input")))


def _read_one(reader: Reader, generator: random.Random, folder: Path) -> tuple[str, str]:
    """Return the outcome and a message; `other` is an accepted network that was not saved."""
    write_files(mutate(reader.files, generator, reader.fix), folder)
    try:
        value = reader.read(folder)
    except SecateurError as error:
        text = str(error)
        return ("refused", "") if text and "\n" not in text else ("crash", f"says {text!r}")
    except BaseException:
        return "crash", " ".join(traceback.format_exc().split()[-40:])
    if reader.expected is None:
        return "read", ""
    return ("same", "") if value == reader.expected else ("other", "")


# --- killed processes --------------------------------------------------------------------------


def kill_often(folder: Path, kills: int) -> dict[str, Any]:
    """Kill each kind of work equally often, at random moments."""
    case = Case(folder)
    results: dict[str, Any] = {"kills": 0, "seed": SEED}
    for job in JOBS:
        results[job] = _kill_job(case, job, kills // len(JOBS))
        results["kills"] += results[job]["kills"]
        print(f"{job}: {results[job]}", flush=True)
    return results


def _kill_job(case: Case, job: str, kills: int) -> dict[str, Any]:
    start = _start_of(case, job)
    left_alone = renewed(case.folder / "alone", start)
    began = time.monotonic()
    assert Child(getattr(case, job), left_alone).wait() == 0
    seconds = time.monotonic() - began
    expected = outcome(left_alone)
    generator = random.Random(f"{SEED} {job}")
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        folder = renewed(case.folder / "killed", start)
        is_ended = False
        while not is_ended:
            child = Child(getattr(case, job), folder)
            if child.killed_after(generator.uniform(0, 1.1 * seconds)):
                counts["kills"] += 1
                counts["damaged_folders"] += not _is_sound(folder)
                continue
            is_ended = True
            counts["errors"] += child.wait() != 0
        counts["runs"] += 1
        different = differences(outcome(folder), expected)
        counts["other_results"] += bool(different)
        for difference in different[:5]:
            print(f"{job}: {difference}", flush=True)
    keys = ("kills", "runs", "damaged_folders", "errors", "other_results")
    return {**{key: counts[key] for key in keys}, "seconds_alone": round(seconds, 1)}


def _start_of(case: Case, job: str) -> Path | None:
    """Return the folder that a job starts from: for finetune a run that was only cut."""
    if job != "finetune":
        return None
    folder = case.folder / "cut"
    if not folder.is_dir():
        assert Child(lambda out: _prune_only(case, out), folder).wait() == 0
    return folder


def _prune_only(case: Case, out: Path) -> None:
    secateur.run(case.config(epochs=0), out)


def _is_sound(folder: Path) -> bool:
    """Return whether the folder can be read; a folder without a run counts as sound."""
    if not run_folder.is_run(folder):
        return True
    try:
        read_contents(folder)
        outcome(folder)
    except SecateurError:
        return False
    return True


class Child:
    """A process that does some work in a folder and ends with 0, or 1 after an error of ours."""

    def __init__(self, work: Callable[[Path], None], folder: Path) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 3
            try:
                os.setsid()
                torch.set_num_threads(1)
                work(folder)
                code = 0
            except SecateurError as error:
                print(error, file=sys.stderr)
                code = 1
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 3
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def killed_after(self, seconds: float) -> bool:
        """Kill the process after some seconds; return whether it was still running."""
        if not self.sent_after(signal.SIGKILL, seconds):
            return False
        os.waitpid(self.pid, 0)
        return True

    def sent_after(self, number: signal.Signals, seconds: float) -> bool:
        """Send a signal after some seconds; return whether the process was still running."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, self._status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return False
            time.sleep(0.002)
        os.kill(self.pid, number)
        return True

    def wait(self) -> int:
        """Wait for the process, and return its exit code."""
        if self.pid:
            _, self._status = os.waitpid(self.pid, 0)
            self.pid = 0
        return os.waitstatus_to_exitcode(self._status)


# --- interrupts --------------------------------------------------------------------------------


def interrupt_often(folder: Path, count: int) -> dict[str, Any]:
    """Interrupt the command line's processes at random moments."""
    case = Case(folder)
    results: dict[str, Any] = {"interrupts": 0, "seed": SEED}
    for job in JOBS:
        results[job] = _interrupt_job(case, job, count // len(JOBS))
        results["interrupts"] += results[job]["interrupts"]
        print(f"{job}: {results[job]}", flush=True)
    return results


def _interrupt_job(case: Case, job: str, count: int) -> dict[str, Any]:
    start = _start_of(case, job)

    def work(out: Path) -> None:
        sys.argv = ["secateur", *case.command(job, out)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        app.main()

    left_alone = renewed(case.folder / "alone", start)
    began = time.monotonic()
    assert Child(work, left_alone).wait() == 0
    seconds = time.monotonic() - began
    expected = outcome(left_alone)
    generator = random.Random(f"{SEED} {job}")
    counts: Counter[str] = Counter()
    longest = 0.0
    while counts["interrupts"] < count:
        folder = renewed(case.folder / "interrupted", start)
        code = INTERRUPTED
        while code == INTERRUPTED:
            child = Child(work, folder)
            # The first moments belong to the start of Python, which this process has behind it.
            is_there = child.sent_after(signal.SIGINT, generator.uniform(0.1, 1.1 * seconds))
            asked = time.monotonic()
            code = child.wait()
            if is_there:
                longest = max(longest, time.monotonic() - asked)
                counts["interrupts"] += 1
                counts["other_codes"] += code not in (0, INTERRUPTED)
                counts["damaged_folders"] += not _is_sound(folder)
        counts["runs"] += 1
        counts["other_results"] += bool(differences(outcome(folder), expected))
    keys = ("interrupts", "runs", "other_codes", "damaged_folders", "other_results")
    return {**{key: counts[key] for key in keys}, "longest_s": round(longest, 2)}


# --- full disks --------------------------------------------------------------------------------


def fill_disks(folder: Path) -> dict[str, Any]:
    """Repeat each kind of work once for each write, with a disk that fails from that write on."""
    case = Case(folder, checkpoint_minutes=60.0)
    numbers = (errno.ENOSPC, errno.EIO, errno.EACCES)
    results: dict[str, Any] = {"errors": [errno.errorcode[number] for number in numbers]}
    for job in JOBS:
        start = _start_of(case, job)
        expected_folder = renewed(case.folder / "alone", start)
        writes = _count_writes(case, job, expected_folder)
        expected = outcome(expected_folder)
        counts: Counter[str] = Counter()
        for place in range(1, writes + 1):
            out = renewed(case.folder / "full", start)
            earlier = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            number = numbers[place % len(numbers)]
            child = Child(_with_disk(case, job, place, number), out)
            code = child.wait()
            counts["no_error"] += code == 0
            counts["crashes"] += code not in (0, 1)
            counts["damaged_folders"] += not _is_sound(out)
            counts["lost_files"] += sum(not (out / name).is_file() for name in earlier)
            code = Child(getattr(case, job), out).wait()
            counts["errors_when_resumed"] += code != 0
            counts["other_results"] += code == 0 and bool(differences(outcome(out), expected))
        keys = ("crashes", "damaged_folders", "lost_files", "errors_when_resumed", "other_results")
        results[job] = {"writes": writes, "no_error": counts["no_error"]}
        results[job].update({key: counts[key] for key in keys})
        print(f"{job}: {results[job]}", flush=True)
    return results


def _count_writes(case: Case, job: str, out: Path) -> int:
    here, there = multiprocessing.Pipe(duplex=False)

    def counted(folder: Path) -> None:
        with FailingDisk(case.folder).mounted() as disk:
            getattr(case, job)(folder)
        there.send(disk.count)

    assert Child(counted, out).wait() == 0
    count: int = here.recv()
    return count


def _with_disk(case: Case, job: str, place: int, number: int) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        with FailingDisk(case.folder, place, number).mounted():
            getattr(case, job)(folder)

    return work


# --- a hundred runs ----------------------------------------------------------------------------


def repeat(folder: Path) -> dict[str, Any]:
    """Run `secateur.prune` many times in one process, with saving and reports."""
    case = Case(folder)
    dataset = secateur.load_data(case.source)
    model = secateur.load_model(case.model_name, num_classes=len(CLASSES))
    pixels = dataset.train.read(torch.arange(60), secateur.data.preprocessing.Preprocessing(16, 16))
    images = [(pixels.float() / 255, dataset.train.labels[:60])]
    before, resources = state_of(model), []
    threads = torch.get_num_threads()
    for number in range(1, RUNS + 1):
        pruned = secateur.prune(model, images, target="macs=0.6", epochs=1, settings=_QUICK)
        pruned.save(folder / "repeated", overwrite=True)
        pruned.report(folder / "report.html", images=8)
        del pruned
        gc.collect()
        if number % 10 == 0:
            resources.append({"runs": number, **_resources()})
            print(resources[-1], flush=True)
    torch.set_num_threads(threads)
    first, last = resources[0], resources[-1]
    return {
        "runs": RUNS,
        "resources": resources,
        "memory_growth": last["memory_mib"] / first["memory_mib"] - 1,
        "more_files": last["files"] - first["files"],
        "more_threads": last["threads"] - first["threads"],
        "state_as_before": before == state_of(model),
    }


_QUICK = {"finetune.batch_size": 16, "finetune.workers": 0, "finetune.warmup_steps": 0}


def _resources() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "memory_mib": round(process.memory_info().rss / 2**20, 1),
        "files": process.num_fds(),
        "threads": threading.active_count(),
    }


# --- results -----------------------------------------------------------------------------------


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("inputs", "kills", "interrupts", "disk", "repeats")
    parser.add_argument("parts", nargs="*", help=", ".join(parts))
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=300)
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in parts]:
        parser.error(f"there is no part {unknown[0]}")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")
    works: dict[str, Callable[[Path], dict[str, Any]]] = {
        "inputs": lambda folder: try_inputs(folder, arguments.inputs),
        "kills": lambda folder: kill_often(folder, arguments.kills),
        "interrupts": lambda folder: interrupt_often(folder, arguments.kills // 5),
        "disk": fill_disks,
        "repeats": repeat,
    }
    for part in arguments.parts or parts:
        since = time.monotonic()
        results = _in_a_process(works[part])
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        known[part] = {
            **results,
            "minutes": round((time.monotonic() - since) / 60, 1),
            "command": f"python bench/faults.py {part}",
            "revision": revision(),
            "environment": surroundings(),
        }
        write_json(RESULTS, known)
    PAGE.write_text(with_table(PAGE.read_text(), "results/faults.json", table()))


def _in_a_process(work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run a part in its own process: gradients computed earlier would prevent it from forking."""
    here, there = multiprocessing.Pipe(duplex=False)

    def part() -> None:
        with tempfile.TemporaryDirectory() as name:
            Case(Path(name)).write()
            there.send(work(Path(name)))

    process = multiprocessing.Process(target=part)
    process.start()
    there.close()
    results: dict[str, Any] = here.recv()  # EOFError where it has failed
    process.join()
    return results


def total(part: dict[str, Any], *keys: str) -> int:
    """Return the sum of counts over all kinds of work."""
    return sum(part[job][key] for job in JOBS for key in keys)


def table() -> str:
    """Return a table with one line for each part."""
    results = json.loads(RESULTS.read_text())
    lines = ["| test | result |", "|---|---|"]
    if "inputs" in results:
        part = results["inputs"]
        lines.append(
            f"| {part['inputs']:,} changed inputs for {len(part['by_reader'])} readers | "
            f"{part['hangs']} hangs, {part['crashes']} crashes, {part['accepted_other']} accepted "
            f"networks other than the saved one; {part['refused']:,} refused, "
            f"{part['accepted_same']:,} accepted as the saved network, "
            f"{part['not_compared']:,} accepted that hold no saved network to compare with |"
        )
    if "kills" in results:
        part = results["kills"]
        lines.append(
            f"| SIGKILL, {part['kills']} times, at random moments of prune, finetune and compare | "
            f"{total(part, 'damaged_folders')} damaged folders, "
            f"{total(part, 'errors')} that could not be resumed, "
            f"{total(part, 'other_results')} of {total(part, 'runs')} resumed runs "
            "with another result than an undisturbed run |"
        )
    if "interrupts" in results:
        part = results["interrupts"]
        lines.append(
            f"| Ctrl-C, {part['interrupts']} times, at random moments of the same | all ended "
            f"within {max(part[job]['longest_s'] for job in JOBS):.1f} s, "
            f"{total(part, 'other_codes')} with another exit code than 130; "
            f"{total(part, 'damaged_folders')} damaged folders, "
            f"{total(part, 'other_results')} of {total(part, 'runs')} resumed runs "
            "with another result |"
        )
    if "disk" in results:
        part = results["disk"]
        lines.append(
            f"| a disk that fails ({', '.join(part['errors'])}), starting at each of "
            f"{total(part, 'writes')} writes of the same | "
            f"{total(part, 'crashes')} crashes, "
            f"{total(part, 'lost_files')} lost files, "
            f"{total(part, 'damaged_folders')} damaged folders, "
            f"{total(part, 'errors_when_resumed', 'other_results')} runs "
            "with another result once the disk worked again |"
        )
    if "repeats" in results:
        part = results["repeats"]
        state = "as before" if part["state_as_before"] else "changed"
        lines.append(
            f"| {part['runs']} runs in one process | since the tenth run "
            f"{100 * part['memory_growth']:+.1f} % memory, {part['more_files']:+d} open files, "
            f"{part['more_threads']:+d} threads; hooks, modes and global state {state} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
