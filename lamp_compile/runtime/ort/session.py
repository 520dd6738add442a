"""``OrtSession``: an exported artifact on ONNX Runtime, with its planes in memory that stays where it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import CacheError, InputError, LampError, OptionError
from lamp_compile.runtime.ort import artifact, opening, providers
from lamp_compile.runtime.ort.bound import BoundStep, Place, captured
from lamp_compile.runtime.ort.buffers import Buffers
from lamp_compile.runtime.ort.control import SessionControl
from lamp_compile.runtime.ort.controls import Controls
from lamp_compile.runtime.ort.statistics import SiteStatistics

PREFILL_ROWS = 512
"""Tokens of a prompt that go through the artifact at a time."""


class OrtSession:
    """Runs an artifact of ``export_onnx``.

    The planes of all layers are bound once, as inputs and as the outputs that take their place: a step writes its new
    rows where they belong and copies nothing. Not for several threads at a time.

    Attributes:
        artifact: What the file says about itself.
        provider: Name of the execution provider that the session was verified to run on.
        native: Whether the native operators compute the ``ai.lamp`` nodes, rather than their bodies of standard
            operators.
        graph: Whether steps of one token are replays of a CUDA graph.
        notes: What a user should know about the choices made here.
        controls: tau, floor level and budget of every site; ``controls.set(tau=0.02)`` acts from the next step on.
        raw: The ``onnxruntime.InferenceSession``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "cpu",
        native: bool | None = None,
        threads: int = 0,
        strict: bool = True,
        graph: bool = False,
        settings: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Load an artifact.

        Args:
            path: The ``.onnx`` file.
            provider: "cpu", "cuda", "migraphx" (also "amd", "rocm"), or ONNX Runtime's own name.
            native: True: the native operators or an error; False: the artifact's own bodies; None: native where they
                can be, and a warning where they would be faster and are not there.
            threads: Of ONNX Runtime's pool, which the native operators share; 0 takes the cores of this process.
            strict: On a GPU, nothing may be left to the CPU; with CUDA, nothing but operators that its shape arithmetic
                is made of (``providers.SHAPES``; operators go by name, types are not known).
            graph: On a CUDA device, steps of one token for all sequences are replays of a CUDA graph, of a second
                session whose shapes are fixed: weights are in memory twice, and growth and another batch record anew,
                from the file, which must stay as it is. The artifact must have no control flow (``guard="select"``),
                and one thread runs the session.
            settings: The provider's own options, such as ``{"device_id": "1"}``.
            config: Entries of ONNX Runtime's session configuration.

        Raises:
            InputError: There is no such file, or it is no artifact.
            OptionError: The provider or the native operators cannot be had, or it captures no graphs.
        """
        file = os.path.abspath(path)
        self._request = opening.Request(
            file, provider, native, threads, strict=strict, settings=dict(settings or {}), config=dict(config or {})
        )
        self._source = opening.Source.of(file)
        opened = opening.open_session(self._request)
        self.raw, self.provider, self.native = opened.raw, opened.provider.name, opened.native
        self.notes = list(opened.notes)
        self.artifact = artifact.read(self.raw, str(path))
        opening.check_native(opened, self.artifact, str(path))
        self.controls = Controls(self.artifact.planes)
        self._place = Place(opened.provider.device, int(dict(settings or {}).get("device_id", 0)))
        self._buffers = Buffers(self.artifact.sites, self._place.device, self._place.number)
        if graph:
            opening.check_graph(opened, self.artifact, str(path))
        self.graph = graph
        self._bound: BoundStep | None = None
        self._captured: BoundStep | None = None
        self._lengths = np.zeros(0, np.int64)
        self._control: SessionControl | None = None

    def control(self, **target: Any) -> SessionControl:
        """Adjust tau of every site between steps, to hold a target; a context manager, at work at once.

        Args:
            **target: Fields of ``ControlPlan``: ``quality``, ``error_budget``, ``speed``, ``refined``, and limits.

        Raises:
            OptionError: Unknown or contradictory targets, or another controller is at work.
            PlanError: Impossible values.
        """
        if self._control is not None and self._control.running:
            raise OptionError("a controller is at work", where="OrtSession.control", fix="stop() it first")
        self._control = SessionControl(self, ControlPlan.of(target))
        return self._control

    def placement(self) -> dict[str, dict[str, int]]:
        """How many nodes of each operator run on each provider."""
        return providers.placement(self.raw)

    # Sequences

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence holds."""
        found: list[int] = self._lengths.tolist()
        return found

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self._buffers.batch

    @property
    def capacity(self) -> int:
        """Tokens there is room for; it grows when it must."""
        return self._buffers.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as allocated, scales included."""
        return self._buffers.nbytes()

    def start(self, batch: int, capacity: int = 0) -> None:
        """Begin anew with ``batch`` empty sequences.

        Args:
            batch: Sequences.
            capacity: Tokens of each to make room for at once.

        Raises:
            InputError: The artifact has no cache, or there is no sequence.
            CacheError: There is no memory. The session is as it was.
        """
        self._need_decoder()
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"{batch!r} sequences", where="OrtSession.start", fix="a whole number above 0")
        if batch == self.batch and capacity <= self.capacity:
            self._buffers.clear()
        else:
            self._buffers.allocate(batch, max(1, capacity))
            self._moved()
        self._lengths = np.zeros(batch, np.int64)

    def step(self, tokens: Any, sequence: int | None = None) -> NDArray[np.float32]:
        """Append tokens and give back the logits ``[B, V]`` of the last of each sequence.

        Args:
            tokens: ``[B, S]``; ``[1, S]`` for one sequence.
            sequence: The only one that takes them; the others stay as they are. None for all.

        Raises:
            InputError: Tokens are no whole numbers, of another batch, or refused by the graph; or the artifact's file
                changed, and a CUDA graph was to be recorded from it.
            CacheError: There is no memory to grow, or ONNX Runtime records no CUDA graph. The session holds what it
                held.
        """
        ids, which = self._check_step(tokens, sequence)
        self.ensure_capacity(int(self._lengths[which].max()) + ids.shape[1])
        try:
            found = self._step_for(ids.shape[1], sequence).run(ids, self._lengths[which])
        except LampError:
            raise
        except Exception as error:  # what was written lies behind the lengths, where nobody looks
            raise InputError(opening.first_line(error), where="OrtSession.step") from error
        self._lengths[which] += ids.shape[1]
        if self._control is not None:
            self._control.stepped()
        return found

    def _check_step(self, tokens: Any, sequence: int | None) -> tuple[NDArray[np.int64], slice]:
        if sequence is not None and not 0 <= sequence < self.batch:
            raise InputError(f"sequence {sequence} of {self.batch}", where="OrtSession.step")
        which = slice(None) if sequence is None else slice(sequence, sequence + 1)
        try:
            ids = np.asarray(tokens)
        except ValueError as error:
            raise InputError(f"tokens: {error}", where="OrtSession.step") from error
        count = self.batch if sequence is None else 1
        if ids.ndim != 2 or 0 in ids.shape or ids.shape[0] != count or ids.dtype.kind not in "iu":
            raise InputError(
                f"tokens are {ids.dtype} {list(ids.shape)} for {count} sequences",
                where="OrtSession.step",
                fix="whole numbers [batch, tokens], after start(batch)",
            )
        return ids.astype(np.int64), which

    def prefill(self, prompts: Sequence[Any], rows: int = PREFILL_ROWS) -> NDArray[np.float32]:
        """A prompt for each sequence, of any lengths: logits ``[B, V]`` of the last token of each. At most ``rows``
        tokens go through the artifact at a time, of one sequence, so that there is no padding.

        Raises:
            InputError: Another number of prompts than sequences, or one that is no row of token ids.
            CacheError: There is no memory to grow. The session is as it was.
        """
        if len(prompts) != self.batch:
            raise InputError(f"{len(prompts)} prompts for {self.batch} sequences", where="OrtSession.prefill")
        checked = [self._check_step(np.asarray(prompt)[None], index)[0] for index, prompt in enumerate(prompts)]
        self.ensure_capacity(max(n + ids.shape[1] for n, ids in zip(self.lengths, checked, strict=True)))
        found = []
        for index, ids in enumerate(checked):
            sequence = None if self.batch == 1 else index
            for first in range(0, ids.shape[1], rows):
                logits = self.step(ids[:, first : first + rows], sequence)
            found.append(logits[0])
        return np.stack(found)

    def _step_for(self, rows: int, sequence: int | None) -> BoundStep:
        """What runs steps of this shape; made anew when shapes changed or planes have moved."""
        common = (self.artifact, self._buffers, self.controls.inputs, self._place)
        if self.graph and (rows, sequence) == (1, None):
            if self._captured is None:
                self._captured = self._capture()
            return self._captured
        if self._bound is None or self._bound.key != (rows, sequence):
            self._bound = None
            self._bound = BoundStep(self.raw, *common, (rows, sequence))
        return self._bound

    def _capture(self) -> BoundStep:
        """Steps of one token for all sequences, of a second session with the weights of the first."""
        dimensions = self._buffers.dimensions()
        self._source.check()
        try:
            opened = opening.open_session(self._request, dimensions)
            self._source.check()  # while it was read
            return captured(opened.raw, self.artifact, self._buffers, self.controls.inputs, self._place)
        except (InputError, CacheError):
            raise
        except Exception as error:
            raise CacheError(
                f"no CUDA graph of steps for {self.batch} sequences of {self.capacity} tokens: "
                f"{opening.first_line(error)}",
                where="OrtSession.step", fix="fewer sequences or a smaller capacity, or graph=False",
            ) from error  # fmt: skip

    def _moved(self) -> None:
        """Planes lie elsewhere than before."""
        self._bound = self._captured = None

    def reset(self) -> None:
        """Forget all tokens, and what the guards have seen; the memory and its addresses stay."""
        self._buffers.clear()
        self._lengths[:] = 0

    def crop(self, length: int | Sequence[int]) -> None:
        """Forget the tokens from ``length`` on: one number, or one for each sequence.

        Raises:
            CacheError: A sequence does not have that many.
        """
        kept = np.broadcast_to(np.asarray(length), self._lengths.shape)
        if kept.dtype.kind not in "iu" or (kept < 0).any() or (kept > self._lengths).any():
            raise CacheError(f"crop to {length} of {self.lengths} tokens", where="OrtSession.crop")
        self._lengths = kept.astype(np.int64)

    def reorder(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence ``indices[i]`` was, guard included: beam search. With another number of
        indices the batch changes.

        Raises:
            InputError: An index is no sequence.
        """
        if self._buffers.select(indices):
            self._moved()
        self._lengths = self._lengths[np.asarray(indices)]

    def ensure_capacity(self, tokens: int) -> None:
        """Make room ahead of time; contents are kept.

        Raises:
            CacheError: There is no memory. The session is as it was.
        """
        if self._buffers.grow(tokens):
            self._moved()

    def planes(self, site: str) -> dict[str, Any]:
        """The ``OrtValue`` of each plane, scale, guard state and statistics of a site, by name: the very memory that
        the session writes, for ``torch.from_dlpack`` and the like.

        Raises:
            InputError: There is no such site, or no sequence yet.
        """
        try:
            return self._buffers[site]
        except KeyError:
            names = ", ".join(each.name for each in self.artifact.sites)
            raise InputError(
                f"no planes of {site!r}", where="OrtSession.planes", fix=f"start(), then {names}"
            ) from None

    # What the guards say

    def statistics(self) -> dict[str, SiteStatistics]:
        """What every site's guard has seen, by site name."""
        return {
            site.name: SiteStatistics.of(self._buffers.read(site.name, "state"), self._buffers.read(site.name, "stats"))
            for site in self.artifact.planes
            if self.batch
        }

    def guard_report(self) -> list[dict[str, Any]]:
        """Per site: steps, share of sub-tiles refined, floor raised and lowered, flags in words."""
        return [found.report(site) for site, found in self.statistics().items()]

    # Running

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """All outputs of a plain module's artifact (an encoder), by name.

        Raises:
            InputError: The artifact is a decoder, or ONNX Runtime refuses the inputs.
        """
        if self.artifact.kind == "decoder":
            raise InputError("this artifact is a decoder", where="OrtSession.run", fix="start, step or generate")
        try:
            made = self.raw.run(None, dict(inputs))
        except Exception as error:
            raise InputError(opening.first_line(error), where="OrtSession.run") from error
        return dict(zip((output.name for output in self.raw.get_outputs()), made, strict=True))

    def stream(self, prompts: Sequence[Any], **options: Any) -> Iterator[tuple[int, int]]:
        """``generate``, token by token: yields (index of the prompt, token) as they are made."""
        from lamp_compile.runtime.ort import generation

        self._need_decoder()
        return generation.stream(self, generation.Request.of(self, prompts, **options))

    def generate(
        self, prompts: Sequence[Any], *, on_token: Callable[[int, int], None] | None = None, **options: Any
    ) -> list[NDArray[np.int64]]:
        """Continue prompts of any lengths, all in one batch.

        Args:
            prompts: Rows of token ids, or one row.
            on_token: Called with (index of the prompt, token) for every token made.
            **options: ``max_new_tokens`` (required), ``temperature`` (0 takes the likeliest token), ``top_k``,
                ``top_p``, ``seed``, ``eos_token_id`` (the artifact's by default, None for no end), ``progress``
                (called with tokens made and tokens to be made at most; True shows a bar on a terminal),
                ``prefill_rows``.

        Returns:
            Prompt and new tokens of each, int64.

        Raises:
            InputError: A prompt is no row of token ids, or longer than the model was made for.
            OptionError: An option is impossible.
        """
        from lamp_compile.runtime.ort import generation

        self._need_decoder()
        request = generation.Request.of(self, prompts, **options)
        made: list[list[int]] = [row.tolist() for row in request.prompts]
        for index, token in generation.stream(self, request):
            made[index].append(token)
            if on_token is not None:
                on_token(index, token)
        return [np.asarray(row, np.int64) for row in made]

    def _need_decoder(self) -> None:
        if self.artifact.kind != "decoder":
            raise InputError("this artifact has no cache", where="lamp_compile.OrtSession", fix="run(inputs)")
