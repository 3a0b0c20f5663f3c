"""The command line of `speed.py`."""

import argparse
import glob

from contenders import ACTIONS
from contenders import BACKENDS
from contenders import KEYS
from contenders import choose
from machine import available_cores
from machine import can_keep_memory
from workloads import MODELS
from workloads import SCALES
from workloads import make_workload


def parse(description):
    """Return the options and the `Workload` that they choose."""
    parser = make_parser(description)
    options = parser.parse_args()
    complete(options)
    try:
        workload = make_workload(
            options.model,
            options.scale,
            options.batch,
            options.length,
            options.rank,
        )
    except ValueError as error:
        parser.error(str(error))
    chosen = choose(options.backends, options.contenders)
    if not any(contender.measured(options.actions) for contender in chosen):
        parser.error(
            f"none of --contenders {','.join(options.contenders)} does "
            f"--actions {','.join(options.actions)} on "
            f"--backends {','.join(options.backends)}"
        )
    if options.threads > available_cores():
        parser.error(f"--threads: there are {available_cores()} cores")
    if options.keep_memory and not can_keep_memory():
        parser.error("--keep-memory needs Linux with glibc 2.35 or later")
    return options, workload


def make_parser(description):
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", choices=MODELS, default="deberta")
    add("--scale", choices=SCALES, default="small")
    add("--smoke", action="store_true", help="tiny shapes, for CI")
    add("--batch", type=positive, help="examples of a batch")
    add("--length", type=positive, help="tokens of an example")
    add("--rank", type=positive)
    for name, known in [
        ("--backends", BACKENDS),
        ("--contenders", KEYS),
        ("--actions", ACTIONS),
    ]:
        words = f"some of {','.join(known)}"
        add(name, type=names_of(known), default=known, help=words)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=positive, default=available_cores())
    add(
        "--keep-memory",
        action="store_true",
        help="processes keep memory that they free, in large pages (glibc)",
    )
    add("--warm-up", type=positive, help="calls that are not measured")
    add("--repeats", type=positive, help="samples of each action")
    add(
        "--one-at-a-time",
        action="store_true",
        help="where memory does not hold all contenders (always at 7b)",
    )
    add("--rounds", type=positive, default=3, help="visits, one at a time")
    add("--timeout", type=positive, default=3600, help="seconds for an answer")
    add("--output", default="demo-output/benchmarks", help="folder")
    return parser


def complete(options):
    """Fill in what depends on other options, or on the machine."""
    if options.smoke:
        options.scale = "smoke"
    options.repeats = options.repeats or (3 if options.smoke else 30)
    options.rounds = min(options.rounds, options.repeats)
    options.warm_up = options.warm_up or (1 if options.smoke else 3)
    if options.scale == "7b":
        options.one_at_a_time = True
    if options.device == "auto":
        options.device = "cuda" if glob.glob("/dev/nvidia[0-9]*") else "cpu"


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def names_of(known):
    """Return a parser of lists of known names, with commas between them."""

    def parse(text):
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is none of {', '.join(known)}"
                )
        return names

    return parse
