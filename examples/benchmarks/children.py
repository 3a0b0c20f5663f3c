"""The driver's side of a child process: start it, ask it, end it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading

WORKER = pathlib.Path(__file__).with_name("worker.py")

# Nothing goes back to the system, so that no page is cleared anew in each step.
KEEP_MEMORY = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=33554432",
        "glibc.malloc.trim_threshold=17179869184",
    )
)


class ChildFailed(Exception):
    """A contender cannot go on, and why."""


class Child:
    """One contender in a process of its own.

    Args:
        contender: A `Contender`.
        workload: A `Workload`.
        options: The command line: `device`, `threads`, `warm_up`, `actions`
            and `timeout` (seconds until an answer is given up).

    Attributes:
        report: What the child said about itself once it was ready.
    """

    def __init__(self, contender, workload, options):
        self.contender = contender
        self.report = None
        self._timeout = options.timeout
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        settings = {
            "backend": contender.backend,
            "key": contender.key,
            "workload": dataclasses.asdict(workload),
            "actions": contender.measured(options.actions),
            "device": options.device,
            "warm_up": options.warm_up,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(settings)],
            env=environment(contender, options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Ctrl-C is the driver's business; without it, a child ends.
            start_new_session=True,
        )
        self._answers = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, tell):
        """Wait until it is ready; `tell` is called with what it is doing.

        Raises:
            ChildFailed: If it cannot be.
        """
        while True:
            answer = self._answer()
            if "ready" in answer:
                self.report = answer
                return
            tell(answer["doing"])

    def does(self, action):
        """Whether an action is measured, and its warm-up was a success."""
        return action in self.report["memory"]

    def ask(self, action):
        """Let it do an action; return the milliseconds that it took."""
        with contextlib.suppress(OSError):  # It has ended: why, is said next.
            self._process.stdin.write(json.dumps({"action": action}) + "\n")
            self._process.stdin.flush()
        return self._answer()["ms"]

    def close(self):
        """End it; to end it twice does no harm."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # A command that it did not read.
            self._process.stdin.close()
        self._errors.close()

    def _listen(self):
        with self._process.stdout as stream:
            for line in stream:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self):
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            raise ChildFailed(f"no answer in {self._timeout} s") from None
        if line is None:
            raise ChildFailed(self._how_it_ended())
        answer = json.loads(line)
        if "failed" in answer:
            raise ChildFailed(answer["failed"])
        return answer

    def _how_it_ended(self):
        code = self._process.wait()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = [line for line in self._errors.read().split("\n") if line]
        return f"ended with code {code}: {lines[-1] if lines else 'silently'}"


def environment(contender, options):
    """The variables that choose the backend, the device and the threads."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if options.keep_memory:
        variables["GLIBC_TUNABLES"] = KEEP_MEMORY
    if contender.backend != "peft":
        variables["KERAS_BACKEND"] = contender.backend
        variables["KERAS_TORCH_DEVICE"] = options.device
    if options.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["JAX_PLATFORMS"] = "cpu"
    return variables


def shorten(reason):
    """A reason of failure as one line that names no folder of the machine."""
    reason = " ".join(reason.split())
    reason = re.sub(r"(?<!\w)(/[\w.+-]+)+/(?=[\w.+-])", "", reason)
    return reason if len(reason) <= 300 else reason[:297] + "..."
