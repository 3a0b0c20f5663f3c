"""How fast are training and prediction, and in how much memory?

KerasHub's own LoRA, PEFT on the same shapes in transformers, and LoRA Dropout
in its forms. Each contender lives in a process of its own; they take turns,
action by action, so that a drifting machine slows all of them. Compilation and
warm-up come first, and so does one call of each turn. The file is written after
each round.

    python examples/benchmarks/speed.py --model deberta
    python examples/benchmarks/speed_report.py
"""

import contextlib
import datetime
import pathlib
import platform
import signal
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1]))

import arguments
from children import Child
from children import ChildFailed
from contenders import GROUPS
from contenders import choose
from machine import available_cores
from machine import commit
from machine import limit_cores
from machine import memory_left
from machine import processor
from progress import Progress
from results import Results
from tables import failures
from tables import ratio_table
from tables import time_table


def main():
    options, workload = arguments.parse(__doc__.splitlines()[0])
    limit_cores(options.threads)
    # Whoever ends the driver ends its children.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    planned = {
        contender: actions
        for contender in choose(options.backends, options.contenders)
        if (actions := contender.measured(options.actions))
    }
    folder = pathlib.Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    where = options.device + ("_kept" if options.keep_memory else "")
    name = f"speed_{workload.model}_{workload.scale}_{where}.json"
    results = Results(folder / name, describe(options, workload), planned)
    results.save()
    samples = options.repeats * sum(map(len, planned.values()))
    run = Run(workload, options, results, Progress(samples, "samples"))
    try:
        try:
            if not options.one_at_a_time:
                run.all_at_once(planned)
        except MemoryError:
            print("\nMemory gets short: one at a time from here.", flush=True)
            options.one_at_a_time = True
            results.content["visits"] = options.rounds
        if options.one_at_a_time:
            run.in_visits(planned)
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted; what is finished is in {folder / name}")
    results.save(finished=True)
    content = results.content
    parts = time_table(content), ratio_table([content]), failures(content)
    print(*filter(None, parts), f"Written: {folder / name}", sep="\n\n")
    if all(map(results.has_failed, planned)):
        sys.exit("No contender could be measured.")


class Run:
    """Children, and their turns."""

    def __init__(self, workload, options, results, progress):
        self._workload = workload
        self._options = options
        self._results = results
        self._progress = progress

    def all_at_once(self, contenders):
        """All children live at the same time and take turns."""
        with contextlib.ExitStack() as stack:
            children = []
            for contender in contenders:
                children.append(self._start(contender, stack))
                if not room_for_all(children):
                    raise MemoryError
            self._measure(children, self._options.repeats)
        self._progress.end()

    def in_visits(self, contenders):
        """One child at a time, where memory does not hold them all."""
        rounds, repeats = self._options.rounds, self._options.repeats
        for visit in range(rounds):
            share = repeats * (visit + 1) // rounds - repeats * visit // rounds
            for contender in contenders:
                if not self._results.has_failed(contender):
                    with contextlib.ExitStack() as stack:
                        self._measure([self._start(contender, stack)], share)
        self._progress.end()

    def _start(self, contender, stack):
        """Return a child that is ready, or `None` if it cannot be."""
        child = Child(contender, self._workload, self._options)
        stack.callback(child.close)
        try:
            child.start(
                lambda doing: self._progress.tell(f"{contender.name} {doing}")
            )
        except ChildFailed as failure:
            self._fail(child, failure)
            return None
        self._results.ready(contender, child.report)
        self._results.save()
        return child

    def _fail(self, child, failure):
        child.close()
        self._results.fail(child.contender, str(failure))
        self._results.save()

    def _measure(self, children, rounds):
        running = [child for child in children if child is not None]
        for group in GROUPS:
            for number in range(rounds):
                # No action of a group is always the one after the other.
                order = group if number % 2 == 0 else group[::-1]
                for child in list(running):
                    try:
                        self._take_turn(child, order)
                    except ChildFailed as failure:
                        self._fail(child, failure)
                        running.remove(child)
                self._results.save()

    def _take_turn(self, child, actions):
        for action in actions:
            if child.does(action):
                # In a training, step follows step; this call finds the caches
                # as the contender before it has left them, and its threads
                # still spinning.
                child.ask(action)
                milliseconds = child.ask(action)
                contender = child.contender
                self._results.add(contender, action, milliseconds)
                self._progress.advance(
                    1,
                    f"{contender.name} {action}: {milliseconds:.0f} ms",
                    seconds=milliseconds / 1000,
                )


def room_for_all(children):
    """Whether the machine holds another child and the largest one at work."""
    left = memory_left()
    if left is None:
        return True
    available, total = left
    growth = [
        peak["peak"] - peak["resting"]
        for child in children
        if child is not None
        for peak in child.report["memory"].values()
        if peak and peak["resting"]
    ]
    return available > total / 8 + max(growth, default=0)


def describe(options, workload):
    """What the numbers depend on besides the versions."""
    return {
        "question": __doc__.splitlines()[0],
        "model": workload.model,
        "scale": workload.scale,
        "device": options.device,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "batch": workload.batch,
        "length": workload.length,
        "rank": workload.rank,
        "optimizer": "Adam, 1e-4",
        "threads": options.threads,
        "keeps_memory": options.keep_memory,
        "warm_up": options.warm_up,
        "repeats": options.repeats,
        "visits": options.rounds if options.one_at_a_time else None,
        "processor": processor(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
