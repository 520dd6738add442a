"""Generating for many prompts at once: one decode step for all slots, and slots that finish are refilled.

The host runs ahead of the device: chosen tokens are fed from where they are, and read some launches later, while the
device is at the next. So nothing waits for the host but an end-of-sequence token, which costs its slot as many steps.
"""

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
from lamp_compile.runtime import cache_argument
from lamp_compile.runtime.growable_layer import ordinary_tensors, rounded_capacity
from lamp_compile.runtime.slot_cache import SlotCache
from lamp_compile.runtime.slot_table import upload

UNREAD = 2
"""Launches whose tokens the host has not read when it prepares the next. To launch a prompt takes the host longer than
a step takes the device, so that one is too few. On a CPU, where nothing runs beside the host, it is 1."""


@dataclass
class Stream:
    """One prompt on its way."""

    index: int
    prompt: Tensor
    """int64 ``[n]`` on the CPU."""
    most: int
    """New tokens at most."""
    draws: random.Random
    chosen: int = 0
    """New tokens, read by the host or not."""
    made: list[int] = field(default_factory=list)
    """Those that were read."""
    ended: bool = False

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


class Chosen:
    """Tokens ``[rows]`` on their way to the host, and whose they are: (row, slot, stream)."""

    def __init__(self, tokens: Tensor, owners: list[tuple[int, int, Stream]]) -> None:
        self.owners, self._tokens = owners, tokens
        self._arrived: Any = None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tokens.device).record_event()

    def read(self) -> list[int]:
        """The tokens, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class ManyPrompts:
    """The loop: fill free slots from the queue, step all slots, give out what is finished.

    Args:
        model: A compiled model, which runs the prompts.
        step: The same for decoding, compiled or not.
        cache: Slots, all free.
        sampling: How tokens are chosen.
        eos: Token ids that end a sequence.

    Attributes:
        behind: Launches whose tokens are not read when the next is prepared.

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
        self._argument = cache_argument.name_for(model)
        self._running: dict[int, Stream] = {}
        self._unread: deque[Chosen] = deque()
        self._device = cache.lengths.device
        self.behind = 1 if self._device.type == "cpu" else UNREAD
        with ordinary_tensors():
            # What slots are fed. Of a slot outside the step it is of no meaning, and nothing of it is stored.
            self._fed = torch.zeros(cache.streams, 1, dtype=torch.int64, device=self._device)
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
            while waiting or self._running or self._unread:
                self._check_alone()
                while waiting and self.cache.fits(waiting[0].tokens):
                    self._start(waiting.popleft())
                    yield from self._read(self.behind)
                if self._running:
                    self._advance()
                yield from self._read(self.behind if self._running else 0)
        finally:  # also when the caller stops early
            self._unread.clear()
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

    def _start(self, sequence: Stream) -> None:
        """Read a prompt into a free slot, with pages for all that it may become, and choose its first token."""
        slot = self.cache.admit(sequence.tokens)
        self._running[slot] = sequence
        view = self.cache.view(slot, upto=len(sequence.prompt))
        logits = self._forward(self._prefill, upload(sequence.prompt[None], self._device), view)
        self._choose([slot], logits)

    def _advance(self) -> None:
        """One step of all slots."""
        logits = self._forward(self._step, self._fed, self.cache)
        self._choose(sorted(self._running), logits)

    @torch.no_grad()
    def _forward(self, call: Callable[..., Any], ids: Tensor, cache: Any) -> Tensor:
        """Logits ``[B, V]`` of the last position."""
        last: Tensor = call(input_ids=ids, use_cache=True, **{self._argument: cache}).logits[:, -1]
        return last

    @torch.no_grad()
    def _choose(self, slots: list[int], logits: Tensor) -> None:
        """Choose the next token of these slots (all rows of the logits, or the one) and feed it. A slot whose sequence
        is as long as it may be is free from here on: what was launched is done with its pages before anything later
        gets them."""
        rows = slots if logits.shape[0] > 1 else [0]
        tokens = self.sampling.choose(logits, self._draws(rows, slots, logits.shape[0]))
        if logits.shape[0] == self.cache.streams:
            self._fed.copy_(tokens[:, None])
        else:
            self._fed[slots[0]] = tokens
        streams = [self._running[slot] for slot in slots]
        self._unread.append(Chosen(tokens, list(zip(rows, slots, streams, strict=True))))
        for slot, stream in zip(slots, streams, strict=True):
            stream.chosen += 1
            if stream.chosen == stream.most:
                self._finish(slot)

    def _draws(self, rows: list[int], slots: list[int], batch: int) -> Tensor | None:
        """A random number for each row that a slot of ours has."""
        if self.sampling.greedy:
            return None
        uniform = [0.0] * batch
        for row, slot in zip(rows, slots, strict=True):
            uniform[row] = self._running[slot].draws.random()
        return upload(torch.tensor(uniform, dtype=torch.float64), self._device)

    def _read(self, left: int) -> list[tuple[int, Tensor]]:
        """Read the tokens of all launches but the newest ``left``; gives back what is finished."""
        done = []
        while len(self._unread) > left:
            chosen = self._unread.popleft()
            tokens = chosen.read()
            for row, slot, stream in chosen.owners:
                if stream.ended:  # by the token before, which had not been read when this one was chosen
                    continue
                stream.made.append(tokens[row])
                if tokens[row] in self.eos or len(stream.made) == stream.most:
                    stream.ended = True
                    done.append(stream.result())
                    if self._running.get(slot) is stream:
                        self._finish(slot)
        return done

    def _finish(self, slot: int) -> None:
        self.cache.free(slot)
        del self._running[slot]
