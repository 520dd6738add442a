"""Execution providers: a user's word to ONNX Runtime's name, and sessions that run there or not at all.

ONNX Runtime answers a request for a provider that is not there with a warning and a session on the CPU. Here that is
an error, before and after the session is made.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamp_compile.errors import OptionError

CPU, CUDA, MIGRAPHX = "CPUExecutionProvider", "CUDAExecutionProvider", "MIGraphXExecutionProvider"
WORDS = {"cpu": CPU, "cuda": CUDA, "migraphx": MIGRAPHX, "amd": MIGRAPHX, "rocm": MIGRAPHX}
GONE = "ROCMExecutionProvider"
DEVICES = {CPU: "cpu", CUDA: "cuda", MIGRAPHX: "cuda"}
"""What ONNX Runtime calls the memory of a provider; HIP memory goes by CUDA's name there."""
SETTINGS = {CUDA: {"use_tf32": "0"}}
"""Options that are not ONNX Runtime's defaults: an artifact says float32, and TF32 has 10 bits of it."""
SHAPES = frozenset(
    (
        "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Mod", "Mul", "NonZero", "Range", "ReduceProd", "Slice",
        "Split", "Squeeze", "Sub", "Unsqueeze",
    )
)  # fmt: skip
"""What ONNX Runtime's CUDA provider leaves to the CPU of the artifacts made for it: their shape arithmetic, whose
results are read there. Operators alone decide, because ONNX Runtime reports no types, and nodes of functions' bodies
have no names to look types up by: a float ``Add`` on the CPU would pass."""
INSTALL = {
    CPU: "pip install 'lamp_compile[onnx-cpu]'",
    CUDA: "pip install 'onnxruntime-gpu[cuda,cudnn]' in an environment without the package onnxruntime",
    MIGRAPHX: "the onnxruntime-migraphx wheel of your ROCm, in an environment without the package onnxruntime",
}


@dataclass(frozen=True)
class Provider:
    """A provider that is there.

    Attributes:
        name: As ONNX Runtime calls it.
        note: What the user should know about the choice, or empty.
    """

    name: str
    note: str = ""

    @property
    def device(self) -> str:
        """Where its tensors lie, in ONNX Runtime's words."""
        return DEVICES[self.name]


def onnxruntime() -> Any:
    """The package onnxruntime, its telemetry switched off for this process.

    Raises:
        OptionError: It is not installed.
    """
    try:
        import onnxruntime as package
    except ImportError as error:
        raise OptionError(
            f"onnxruntime cannot be imported: {error}", where="lamp_compile.OrtSession", fix=INSTALL[CPU]
        ) from error
    package.disable_telemetry_events()
    return package


def resolve(word: str) -> Provider:
    """The provider meant by ``word``: "cpu", "cuda", "migraphx", "amd", "rocm", or ONNX Runtime's own name.

    Raises:
        OptionError: The word is unknown, or this onnxruntime lacks the provider.
    """
    known = {**WORDS, **{name.lower(): name for name in (CPU, CUDA, MIGRAPHX)}, GONE.lower(): MIGRAPHX}
    name = known.get(word.lower()) if isinstance(word, str) else None
    if name is None:
        raise OptionError(f"unknown provider {word!r}", where="provider", fix=f"one of {', '.join(WORDS)}")
    note = ""
    if word.lower() in ("rocm", GONE.lower()):
        note = f"{word!r}: ONNX Runtime has no ROCm provider any more, AMD GPUs are served by {MIGRAPHX}"
        warnings.warn(note, UserWarning, stacklevel=2)
    available = onnxruntime().get_available_providers()
    if name not in available:
        raise OptionError(
            f"{name} was asked for, and this onnxruntime {onnxruntime().__version__} has {', '.join(available)}",
            where=f"provider={word!r}",
            fix=INSTALL[name],
        )
    return Provider(name, note)


def make_session(
    model: Any, provider: Provider, options: Any, *, strict: bool, settings: Mapping[str, str] | None = None
) -> Any:
    """An ``onnxruntime.InferenceSession`` that runs where it was asked to.

    Args:
        model: Path or bytes.
        provider: Of ``resolve``.
        options: ``onnxruntime.SessionOptions``; entries are added to it.
        strict: With CUDA, nothing may be left to the CPU but nodes of operators in ``SHAPES``, by name and whatever
            their types; with other providers nothing at all, which ONNX Runtime sees to. Otherwise ``placement``
            lists what was left.
        settings: The provider's own options, beside ``SETTINGS``.

    Raises:
        OptionError: The provider did not come up, or left nodes to the CPU under ``strict``.
    """
    ort = onnxruntime()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    wanted: list[Any] = [(provider.name, {**SETTINGS.get(provider.name, {}), **(settings or {})})]
    if provider.name != CPU:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        if strict and provider.name != CUDA:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        else:
            wanted.append(CPU)
    try:
        session = ort.InferenceSession(model, options, providers=wanted, enable_fallback=0)
    except Exception as error:
        if provider.name == CPU:
            raise
        raise OptionError(
            f"{provider.name} did not take the model: {str(error).splitlines()[0][:300]}",
            where=str(model) if isinstance(model, str) else "the model",
            fix="strict=False leaves what it cannot run to the CPU and lists it in placement()" if strict else "",
        ) from error
    got = session.get_providers()
    if got[0] != provider.name:
        raise OptionError(
            f"{provider.name} was asked for and the session runs on {', '.join(got)}",
            where="provider",
            fix=INSTALL[provider.name],
        )
    if provider.name != CPU and strict:
        _check_placement(session, provider)
    return session


def _check_placement(session: Any, provider: Provider) -> None:
    """Raise OptionError where nodes of other operators than ``SHAPES`` were left to the CPU."""
    left = {name: n for name, n in placement(session).get(CPU, {}).items() if name not in SHAPES}
    if left:
        what = ", ".join(f"{n} {name}" for name, n in left.items())
        raise OptionError(
            f"{provider.name} left nodes to the CPU: {what}"[:300],
            where="strict=True",
            fix="export for this target, or strict=False, which lists them in placement()",
        )


def placement(session: Any) -> dict[str, dict[str, int]]:
    """How many nodes of each operator run on each provider, of a session of ``make_session``; what was inlined or
    fused counts as what became of it."""
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts = found.setdefault(part.ep_name, Counter())
        for node in part.get_nodes():
            counts[f"{node.domain}.{node.op_type}" if node.domain else node.op_type] += 1
    return {name: dict(sorted(counts.items())) for name, counts in sorted(found.items())}
