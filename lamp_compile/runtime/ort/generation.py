"""Generating with a session: prompts of several lengths, each prefilled by itself, then all in one batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.errors import InputError, OptionError
from lamp_compile.runtime.ort.sampling import Sampling, draws

if TYPE_CHECKING:
    from lamp_compile.runtime.ort.session import OrtSession

AHEAD = 64
"""New tokens that room is made for at once where the artifact's own bodies run, which compute over all the room."""


@dataclass(frozen=True)
class Request:
    """What to generate, checked.

    Attributes:
        prompts: Token ids, int64.
        most: New tokens of each at most.
        sampling: How tokens are chosen.
        seed: Of the draws.
        stop: Tokens that end a sequence.
        progress: Called with tokens made and tokens to be made at most.
        rows: Tokens of a prompt that go through the artifact at a time.
    """

    prompts: tuple[NDArray[np.int64], ...]
    most: int
    sampling: Sampling
    seed: int
    stop: frozenset[int]
    progress: Callable[[int, int], None]
    rows: int

    @staticmethod
    def of(session: OrtSession, prompts: Sequence[Any], **options: Any) -> Request:
        """From the arguments of ``OrtSession.generate``.

        Raises:
            InputError: A prompt is no row of token ids, or longer than the model was made for.
            OptionError: An option is impossible or unknown.
        """
        rows = _rows_of(prompts)
        about = session.artifact
        given = dict(options)
        try:
            most = given.pop("max_new_tokens")
        except KeyError:
            raise OptionError("max_new_tokens is missing", where="generate", fix="max_new_tokens=64") from None
        sampling = Sampling(given.pop("temperature", 0.0), given.pop("top_k", 0), given.pop("top_p", 1.0))
        stop = given.pop("eos_token_id", about.stop)
        stop = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
        most = _positive("max_new_tokens", most)
        made = Request(
            rows, most, sampling, given.pop("seed", 0), frozenset(map(int, stop)),
            _progress(given.pop("progress", None)), _positive("prefill_rows", given.pop("prefill_rows", 512)),
        )  # fmt: skip
        if given:
            known = "max_new_tokens temperature top_k top_p seed eos_token_id progress prefill_rows on_token"
            raise OptionError(
                f"unknown option {', '.join(map(repr, given))}",
                where="generate",
                fix=f"one of {known.replace(' ', ', ')}",
            )
        draws(made.seed, 0)
        longest = max(len(row) for row in rows) + made.most
        if about.max_length is not None and longest > about.max_length:
            raise InputError(
                f"{longest} tokens with the new ones, the model was made for {about.max_length}",
                where="generate",
                fix="a shorter prompt or a smaller max_new_tokens",
            )
        vocabulary = about.about.get("vocab")
        if isinstance(vocabulary, int) and any(row.min() < 0 or row.max() >= vocabulary for row in rows):
            raise InputError(f"a token id outside the vocabulary of {vocabulary}", where="generate")
        return made


def stream(session: OrtSession, request: Request) -> Iterator[tuple[int, int]]:
    """(index of the prompt, token) as they are made; the session begins anew."""
    count = len(request.prompts)
    longest = max(len(row) for row in request.prompts)
    whole = session.native or session.graph  # a graph would be recorded anew at each growth
    session.start(count, longest + (request.most if whole else min(request.most, AHEAD)))
    sources = draws(request.seed, count)
    logits = session.prefill(request.prompts, request.rows)
    going, made = np.ones(count, bool), 0
    for step in range(request.most):
        tokens = request.sampling.choose(logits, np.array([source.random() for source in sources]))
        for which in np.flatnonzero(going).tolist():
            made += 1
            yield which, int(tokens[which])
        request.progress(made, count * request.most)
        going &= ~np.isin(tokens, list(request.stop))
        if not going.any():
            return
        if step + 1 < request.most:
            logits = session.step(tokens[:, None])


def _rows_of(prompts: Any) -> tuple[NDArray[np.int64], ...]:
    try:
        found = list(prompts)
        if not found:
            raise ValueError("none")
        rows = [np.asarray(found)] if np.ndim(found[0]) == 0 else [np.asarray(row) for row in found]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"prompts cannot be read: {error}", where="generate", fix="a list of token ids, or of such lists"
        ) from error
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            raise InputError(
                f"prompt {index} is {row.dtype} {list(row.shape)}", where="generate", fix="token ids, at least one"
            )
    return tuple(row.astype(np.int64) for row in rows)


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} is {value!r}", where="generate", fix="a whole number above 0")
    return value


def _progress(wanted: Any) -> Callable[[int, int], None]:
    if callable(wanted):
        call: Callable[[int, int], None] = wanted
        return call
    if not wanted:
        return lambda made, total: None
    from tqdm import tqdm

    bar = tqdm(desc="tokens", leave=False, disable=not sys.stderr.isatty())

    def show(made: int, total: int) -> None:
        bar.total = total
        bar.update(made - bar.n)
        if made >= total:
            bar.close()

    return show
