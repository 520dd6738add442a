"""Generating for many prompts at once: one decode step for all slots, and slots that finish are refilled."""

from __future__ import annotations

import functools
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import CacheError, InputError, OptionError
from lamp_compile.frontends.huggingface.sampling import Sampling
from lamp_compile.runtime.growable_layer import rounded_capacity
from lamp_compile.runtime.slot_cache import SlotCache

UNUSED_TOKEN = 0
"""What a slot outside the step is fed; nothing of it is stored."""


@dataclass
class Stream:
    """One prompt on its way."""

    index: int
    prompt: Tensor
    """int64 ``[n]`` on the CPU."""
    most: int
    """New tokens at most."""
    draws: random.Random
    made: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the cache must hold at most: the last one is never fed back."""
        return int(self.prompt.shape[0]) + self.most - 1

    def result(self) -> tuple[int, Tensor]:
        """Index, and prompt and new tokens ``[n + new]``."""
        return self.index, torch.cat((self.prompt, torch.tensor(self.made, dtype=torch.int64)))


def streams_of(prompts: Iterable[Any], max_new_tokens: int | Sequence[int], seed: int) -> list[Stream]:
    """The prompts, checked.

    Raises:
        InputError: A prompt is no non-empty row of whole numbers.
        OptionError: ``max_new_tokens`` is no whole number above 0, nor one for each prompt.
    """
    rows = [_ids(index, prompt) for index, prompt in enumerate(prompts)]
    most = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(most) != len(rows) or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in most):
        raise OptionError(
            f"max_new_tokens is {max_new_tokens!r} for {len(rows)} prompts",
            where="generate_many",
            fix="a whole number above 0, or one for each prompt",
        )
    return [
        Stream(index, row, new, random.Random(f"{seed} {index}"))
        for index, (row, new) in enumerate(zip(rows, most, strict=True))
    ]


def _ids(index: int, prompt: Any) -> Tensor:
    try:
        row = torch.as_tensor(prompt).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"prompt {index} is a {type(prompt).__name__}: {error}", where="generate_many", fix="a list of token ids"
        ) from error
    if row.dim() != 1 or row.numel() == 0 or row.is_floating_point() or row.dtype == torch.bool:
        raise InputError(
            f"prompt {index} has shape {tuple(row.shape)}, {str(row.dtype).removeprefix('torch.')}",
            where="generate_many",
            fix="a list of token ids or a 1-D tensor of them, at least one",
        )
    return row.long()


def sizes_for(waiting: Sequence[Stream], streams: int) -> tuple[int, int, int]:
    """Slots, tokens and longest length of a cache in which any of these can run beside any other. Rounded, so that
    nearby lengths share a compiled graph.

    Raises:
        OptionError: ``streams`` is no whole number above 0.
    """
    if not isinstance(streams, int) or isinstance(streams, bool) or streams < 1:
        raise OptionError(f"streams is {streams!r}", where="generate_many", fix="a whole number above 0")
    longest = rounded_capacity(max(stream.tokens for stream in waiting))
    slots = min(streams, len(waiting))
    return slots, slots * longest, longest


def stop_tokens(model: Any, asked: int | Sequence[int] | str | None) -> frozenset[int]:
    """The token ids that end a sequence; "model" takes the generation config's.

    Raises:
        OptionError: ``asked`` is another word.
    """
    ids: Any = asked
    if isinstance(asked, str):
        if asked != "model":
            raise OptionError(f"eos_token_id is {asked!r}", where="generate_many", fix="token ids, None, or 'model'")
        ids = model.generation_config.eos_token_id
    return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)


class ManyPrompts:
    """The loop: fill free slots from the queue, step all slots, give out what is finished.

    Args:
        model: A compiled model, which runs the prompts.
        step: The same for decoding, compiled or not.
        cache: Slots, all free.
        sampling: How tokens are chosen.
        eos: Token ids that end a sequence.

    Raises:
        CacheError: A slot is taken.
    """

    def __init__(
        self, model: Any, step: Callable[..., Any], cache: SlotCache, sampling: Sampling, eos: frozenset[int]
    ) -> None:
        # Of a prompt's logits only the last row is wanted, where the model can leave the others out.
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._prefill, self._step = functools.partial(model, **last), step
        self.cache, self.sampling, self.eos = cache, sampling, eos
        self._running: dict[int, Stream] = {}
        self._device = cache.lengths.device
        self._check_alone()

    def run(self, waiting: Sequence[Stream]) -> Iterator[tuple[int, Tensor]]:
        """(index, tokens) of the sequences, in the order they finish.

        Raises:
            CacheError: One does not fit even into the empty cache; before anything is run.
        """
        for sequence in waiting:
            if not self.cache.fits(sequence.tokens):
                raise CacheError(
                    f"prompt {sequence.index} needs {sequence.tokens} tokens, the cache holds {self.cache.capacity} "
                    f"and {self.cache.max_length} in one slot",
                    where="generate_many",
                    fix="cache=fast.lamp.slots(tokens=..., max_length=...) with more, or fewer max_new_tokens",
                )
        return self._finished(deque(waiting))

    def _finished(self, waiting: deque[Stream]) -> Iterator[tuple[int, Tensor]]:
        try:
            while waiting or self._running:
                self._check_alone()
                while waiting and self.cache.fits(waiting[0].tokens):
                    yield from self._start(waiting.popleft())
                if self._running:
                    yield from self._advance()
        finally:  # also when the caller stops early
            for slot in list(self._running):
                self._finish(slot)

    def _check_alone(self) -> None:
        """A step adds tokens to all slots, so all must be this loop's."""
        others = [str(slot) for slot in self.cache.taken() if slot not in self._running]
        if others:
            raise CacheError(
                f"slots {', '.join(others)} are taken, and a step would add tokens to them",
                where="generate_many",
                fix="a cache for each loop; cache.free(slot) or cache.reset() when a sequence is done",
            )

    def _start(self, sequence: Stream) -> Iterator[tuple[int, Tensor]]:
        slot = self.cache.admit(sequence.tokens)
        self._running[slot] = sequence
        logits = self._forward(self._prefill, sequence.prompt[None], self.cache.view(slot))
        yield from self._take([slot], logits)

    def _advance(self) -> Iterator[tuple[int, Tensor]]:
        fed = [UNUSED_TOKEN] * self.cache.streams
        for slot, sequence in self._running.items():
            fed[slot] = sequence.made[-1]
        logits = self._forward(self._step, torch.tensor(fed)[:, None], self.cache)
        yield from self._take(sorted(self._running), logits)

    @torch.no_grad()
    def _forward(self, call: Callable[..., Any], ids: Tensor, cache: Any) -> Tensor:
        """Logits ``[B, V]`` of the last position."""
        out = call(input_ids=ids.to(self._device), past_key_values=cache, use_cache=True)
        last: Tensor = out.logits[:, -1]
        return last

    @torch.no_grad()
    def _take(self, slots: list[int], logits: Tensor) -> list[tuple[int, Tensor]]:
        """Choose the next token of these slots (all rows of the logits, or the one); gives back what is finished."""
        rows = slots if logits.shape[0] > 1 else [0]
        chosen = self.sampling.choose(logits, self._draws(rows, slots, logits.shape[0])).tolist()
        done = []
        for row, slot in zip(rows, slots, strict=True):
            sequence = self._running[slot]
            sequence.made.append(chosen[row])
            if chosen[row] in self.eos or len(sequence.made) == sequence.most:
                done.append(self._finish(slot).result())
        return done

    def _draws(self, rows: list[int], slots: list[int], batch: int) -> Tensor | None:
        """A random number for each row that a slot of ours has."""
        if self.sampling.greedy:
            return None
        uniform = [0.0] * batch
        for row, slot in zip(rows, slots, strict=True):
            uniform[row] = self._running[slot].draws.random()
        return torch.tensor(uniform, dtype=torch.float64, device=self._device)

    def _finish(self, slot: int) -> Stream:
        self.cache.free(slot)
        return self._running.pop(slot)
