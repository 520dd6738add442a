"""Verification, part of every export: the artifact in ONNX Runtime, the same graph in torch, and the model in float.

``own`` is what LAMP costs (torch against float), ``drift`` what the artifact adds (ONNX Runtime against torch). The
artifact passes when its drift is small beside LAMP's own error, and when it is not the float model in disguise: some
runtimes drop casts, and a "low" precision that was never low would show as equality, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamp_compile.frontends.onnx.exporting import kept_logits
from lamp_compile.quality.metrics import Comparison, Scores
from lamp_compile.runtime import cache_argument
from lamp_compile.runtime.ort import providers

DRIFT = 0.5
"""Most of LAMP's own error that the artifact may add. A sum in another order moves some keys and queries over the edge
of a rounding step, and every layer sees the steps of those before it: 0.1 to 0.3 on trained models of 4 and 6 layers. A
missing offset or a wrong tile is several times LAMP's own error."""
FLOOR = 1e-4
"""Relative error below which drift is arithmetic (float32 in another order, through all layers)."""


@dataclass(frozen=True)
class OutputDrift:
    """One output of the graph.

    Attributes:
        name: Its name.
        max_torch: Largest absolute difference to torch with LAMP.
        max_float: Largest absolute difference to the float model; NaN for what the float model does not have.
        drift: ||artifact - torch|| / ||torch||.
        own: ||torch - float|| / ||float||; NaN likewise.
    """

    name: str
    max_torch: float
    max_float: float
    drift: float
    own: float


@dataclass(frozen=True)
class Verification:
    """Numbers of one artifact, and what is wrong with them.

    Attributes:
        outputs: Every output that was compared.
        against_float: Predictions against the float model; None where outputs are no logits.
        against_torch: Predictions against torch with LAMP.
        what: What it ran on.
        failures: Why it does not pass; empty if it does.
    """

    outputs: tuple[OutputDrift, ...]
    against_float: Scores | None
    against_torch: Scores | None
    what: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "passed": self.passed}


def session(path: str) -> Any:
    """The artifact in ONNX Runtime's CPU provider, which runs the bodies of every target.

    Raises:
        OptionError: ONNX Runtime is not installed.
    """
    ort = providers.onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Differences:
    """Running sums over one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._torch = self._torch_size = self._own = self._float_size = 0.0
        self._max_torch = self._max_float = 0.0
        self._has_float = False
        self.equal_to_float = True

    def add(self, artifact: Tensor, lamp: Tensor, original: Tensor | None) -> None:
        """Take in one run."""
        artifact, lamp = artifact.double(), lamp.double()
        difference = artifact - lamp
        self._torch += float(difference.square().sum())
        self._torch_size += float(lamp.square().sum())
        self._max_torch = max(self._max_torch, float(difference.abs().max()) if difference.numel() else 0.0)
        if original is None:
            return
        self._has_float = True
        self.equal_to_float &= bool(torch.equal(artifact, original.double()))
        self._own += float((lamp - original.double()).square().sum())
        self._float_size += float(original.double().square().sum())
        self._max_float = max(self._max_float, float((artifact - original.double()).abs().max()))

    def result(self) -> OutputDrift:
        """The sums so far."""
        none = float("nan")
        return OutputDrift(
            self.name, self._max_torch, self._max_float if self._has_float else none,
            _ratio(self._torch, self._torch_size), _ratio(self._own, self._float_size) if self._has_float else none,
        )  # fmt: skip


def _ratio(square: float, size: float) -> float:
    return math.sqrt(square / size if size else square)


def failures_of(differences: Sequence[Differences], reduced: bool) -> list[str]:
    """What is wrong with these outputs; ``reduced`` says whether precision was to be reduced."""
    found = []
    for item in differences:
        result = item.result()
        own = 0.0 if result.own != result.own else result.own
        allowed = max(DRIFT * own, FLOOR)
        if not result.drift <= allowed:
            found.append(
                f"{result.name} differs from torch by {result.drift:.2e} of its size, {allowed:.2e} is allowed"
            )
    named = [item for item in differences if item.result().own == item.result().own]
    if reduced and named and all(item.equal_to_float for item in named):
        found.append("the artifact equals the float model bit for bit: its low precision is not real")
    return found


def steps_of(length: int, prefill: int, single: int) -> Iterator[slice]:
    """Tokens of one window in steps: two chunks of a prompt, then single tokens."""
    rest = max(0, length - single)
    edges = [0, *(edge for edge in (min(prefill, rest), rest) if edge), *range(rest + 1, length + 1)]
    for first, last in pairwise(edges):
        if last > first:
            yield slice(first, last)


def last_alone(run: Any, given: dict[str, Any], every: Any) -> list[str]:
    """What is wrong with the logits of the last token alone, as sessions ask for them; nothing where the artifact gives
    those of all tokens only.

    Args:
        run: ``onnxruntime.InferenceSession`` of the artifact.
        given: Inputs of a step of several tokens.
        every: Logits of all of them ``[W, S, V]``.
    """
    if kept_logits.NAME not in {value.name for value in (*run.get_inputs(), *run.get_overridable_initializers())}:
        return []
    (found,) = run.run(["logits"], {**given, kept_logits.NAME: np.array([-1], np.int64)})
    wanted = every[:, -1:]
    if found.shape != wanted.shape:
        return [f"{kept_logits.NAME}=[-1] gives logits {list(found.shape)}, the last token's are {list(wanted.shape)}"]
    pair = Differences("logits")
    pair.add(torch.from_numpy(found), torch.from_numpy(wanted), None)
    drift = pair.result().drift
    if drift <= FLOOR:
        return []
    return [
        f"{kept_logits.NAME}=[-1]: the last token's logits alone differ from those among all by {drift:.2e} of their "
        f"size, {FLOOR:.2e} is allowed"
    ]


def decoder(run: Any, fast: Any, empty: dict[str, Any], ids: Tensor, reduced: bool, what: str) -> Verification:
    """Both sides over windows of tokens, in a prompt of two chunks and then token by token.

    Where the artifact can leave out logits, the last chunk runs once more for those of its last token alone. The torch
    side is the compiled model over its own cache, which shares no code with the graph that was exported; its
    attention is the reference, because kernels decide online and may refine more.

    Args:
        run: ``onnxruntime.InferenceSession`` of the artifact.
        fast: The compiled decoder.
        empty: An empty cache for these windows, by the names of inputs.
        ids: Tokens ``[W, L]``.
        reduced: Whether precision was to be reduced.
        what: The text in words.
    """
    names = [value.name for value in run.get_outputs()]
    feeds, here, there = dict(empty), [], []
    steps = list(steps_of(ids.shape[1], ids.shape[1] // 2, min(8, ids.shape[1] // 4)))
    chunk = max(steps, key=lambda step: (step.stop - step.start > 1, step.start))
    failures: list[str] = []
    held = fast.lamp.cache(ids.shape[1])
    for layer in held.layers:
        layer.reference_only = True
    with torch.no_grad():
        wanted = fast.lamp.original(input_ids=ids, use_cache=False).logits
        for step in steps:
            there.append(fast(input_ids=ids[:, step], **cache_argument.given(fast, held), use_cache=True).logits)
            positions = torch.full((ids.shape[0],), step.start)
            given = {"input_ids": ids[:, step].contiguous().numpy(), "positions": positions.numpy(), **feeds}
            found = dict(zip(names, run.run(None, given), strict=True))
            if step == chunk:
                failures += last_alone(run, given, found["logits"])
            feeds = {name: found[f"present{name.removeprefix('past')}"] for name in feeds}
            here.append(torch.from_numpy(found["logits"]))
    artifact, lamp = torch.cat(here, 1), torch.cat(there, 1)
    logits, errors = Differences("logits"), Differences("guard's mean error")
    logits.add(artifact, lamp, wanted)
    for index, layer in enumerate(held.layers):
        if (state := feeds.get(f"past.{index}.state")) is not None:
            errors.add(torch.from_numpy(state)[..., 0], layer.state[..., 0], None)
    against_float, against_torch = Comparison(), Comparison()
    against_float.add(wanted.float(), artifact, ids)
    against_torch.add(lamp.float(), artifact, ids)
    return Verification(
        (logits.result(), errors.result()), against_float.result(), against_torch.result(), what,
        (*failures_of([logits], reduced), *failures),
    )  # fmt: skip


def _feeds(inputs: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Tensors by the graph's names of inputs: named ones by theirs, others in order."""
    from torch.utils import _pytree as pytree

    if kwargs and all(name in inputs for name, x in kwargs.items() if isinstance(x, Tensor)) and not args:
        return {name: x.contiguous().numpy() for name, x in kwargs.items() if isinstance(x, Tensor)}
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return {name: x.contiguous().numpy() for name, x in zip(inputs, tensors, strict=False)}


Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named inputs."""


def module(
    run: Any, program: Any, original: Any, names: Sequence[str], batches: Sequence[Batch], reduced: bool, what: str
) -> Verification:
    """Both sides on batches of inputs.

    Args:
        run: ``onnxruntime.InferenceSession`` of the artifact.
        program: The rewritten program, as a module.
        original: The module without LAMP.
        names: Of its outputs, flattened.
        batches: Positional and named inputs.
        reduced: Whether precision was to be reduced.
        what: The inputs in words.
    """
    from torch.utils import _pytree as pytree

    inputs = [value.name for value in run.get_inputs()]
    differences = [Differences(name) for name in names]
    state: dict[str, Any] = {}
    kept = [value.name for value in run.get_outputs() if value.name.endswith("_new")]
    for args, kwargs in batches:
        with torch.no_grad():
            wanted = pytree.tree_leaves(original(*args, **kwargs))
            mine = pytree.tree_leaves(program(*args, **kwargs))
        given = _feeds(inputs, args, kwargs)
        found = run.run([*names, *kept], {**given, **state})
        state = {name.removesuffix("_new"): x for name, x in zip(kept, found[len(names) :], strict=True)}
        flat = [x for x in wanted if isinstance(x, Tensor)]
        for item, there, here, float_ in zip(
            differences, found[: len(names)], [x for x in mine if isinstance(x, Tensor)], flat, strict=True
        ):
            item.add(torch.from_numpy(there), here, float_)
    return Verification(
        tuple(item.result() for item in differences), None, None, what, tuple(failures_of(differences, reduced))
    )
