"""Feed damaged models to the reader: it must answer, or say what is wrong, within bounded time; nothing else.

    python -m tests.onnx.fuzz SEED CASES

What is accepted must not bring down onnx's own checker and shape inference, nor the rewriter. Case ``i``
depends on ``SEED`` and ``i`` alone: ``python -m tests.onnx.fuzz SEED 1 i`` repeats one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import resource
import sys
import time
from dataclasses import dataclass

import onnx

from lamp_compile.errors import LampError, PassError
from lamp_compile.frontends.onnx.files import reading
from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
from tests.onnx import hostile

_THEIRS = (RuntimeError, ValueError)
"""What onnx's own checks raise besides."""
SECONDS = 5.0
"""No case may take longer, on a slow machine either; a millisecond is usual."""


@dataclass
class Outcome:
    """What became of the cases."""

    accepted: int = 0
    rewritten: int = 0
    refused: int = 0
    slowest: float = 0.0


def run(seed: int, cases: int, first: int = 0) -> Outcome:
    """Read so many damaged models; whatever is raised besides LampError comes through."""
    outcome, models = Outcome(), hostile.seeds()
    for index in range(first, first + cases):
        rng = random.Random(f"{seed}:{index}")
        data = hostile.damage(rng.choice(models), rng)
        begun = time.process_time()
        try:
            outcome.rewritten += read(data)
            outcome.accepted += 1
        except LampError:
            outcome.refused += 1
        except BaseException as error:
            raise AssertionError(f"case {index} of seed {seed}: {type(error).__name__}: {error}") from error
        taken = time.process_time() - begun
        assert taken < SECONDS, f"case {index} of seed {seed} took {taken:.1f} s"
        outcome.slowest = max(outcome.slowest, taken)
    return outcome


def read(data: bytes) -> bool:
    """One model, all the way that a file from outside goes; gives back whether it was rewritten."""
    model = reading.parse(data)
    for check in (onnx.checker.check_model, onnx.shape_inference.infer_shapes):
        with contextlib.suppress(onnx.checker.ValidationError, onnx.shape_inference.InferenceError, *_THEIRS):
            check(model)  # what it thinks does not matter here, but that it comes back
    try:
        rewrite_onnx(model)
    except PassError as error:
        raise AssertionError(f"the rewriter made something malformed: {error}") from error
    except LampError:
        return False
    return True


def main(argv: list[str]) -> int:
    """Run as a program."""
    seed, cases, first = (int(x) for x in [*argv, *("1", "100000", "0")[len(argv) :]])
    faulthandler.enable()
    total = Outcome()
    for start in range(first, first + cases, 1000):
        part = run(seed, min(1000, first + cases - start), start)
        total.accepted, total.refused = total.accepted + part.accepted, total.refused + part.refused
        total.rewritten += part.rewritten
        total.slowest = max(total.slowest, part.slowest)
        print(f"{start + 1000 - first:>8} of {cases}: {total}", file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"onnx {onnx.__version__}, seed {seed}: {total.accepted} accepted, of these {total.rewritten} rewritten,")
    print(f"{total.refused} refused, none broke out;")
    print(f"slowest {1000 * total.slowest:.0f} ms, peak memory of the process {peak:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
