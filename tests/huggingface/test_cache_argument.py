"""The cache goes by two names, ``cache`` and ``past_key_values``; a version of transformers knows one or both."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamp_compile
from lamp_compile.errors import CacheError, ModelError
from lamp_compile.runtime import cache_argument

BOTH = (cache_argument.NEW, cache_argument.OLD)


class New(nn.Module):
    def forward(self, input_ids: Tensor, cache: Any = None) -> Any: ...


class Old(nn.Module):
    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Any: ...


class Neither(nn.Module):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any: ...


def test_a_forward_says_its_name() -> None:
    assert cache_argument.name_for(New()) == "cache"
    assert cache_argument.name_for(Old()) == "past_key_values"
    assert cache_argument.name_for(Neither()) == cache_argument.NAME
    assert cache_argument.given(Old(), 7) == {"past_key_values": 7}


def test_the_name_of_the_installed_version(model: Any) -> None:
    assert cache_argument.name_for(model) == cache_argument.NAME


def test_outputs_by_either_name() -> None:
    assert cache_argument.of(SimpleNamespace(cache=1)) == 1
    assert cache_argument.of(SimpleNamespace(past_key_values=2)) == 2


@pytest.mark.parametrize("name", BOTH)
def test_arguments_are_renamed(name: str) -> None:
    other = next(one for one in BOTH if one != name)
    assert cache_argument.renamed({"use_cache": True, other: 1}, name) == {"use_cache": True, name: 1}
    assert cache_argument.renamed({other: 1, name: 2}, name) == {other: 1, name: 2}  # whose model says why
    assert cache_argument.renamed({"use_cache": True}, name) == {"use_cache": True}


@pytest.mark.parametrize("name", BOTH)
def test_a_compiled_model_takes_either(model: Any, ids: Tensor, name: str) -> None:
    fast = lamp_compile.compile(model, mode="eager")
    wanted = fast(ids, use_cache=True).logits
    cache = fast.lamp.cache(ids.shape[1] + 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert torch.equal(fast(ids, use_cache=True, **{name: cache}).logits, wanted)
        assert cache.get_seq_length() == ids.shape[1]
        again = fast.lamp.cache(ids.shape[1] + 8)
        fast.generate(ids, max_new_tokens=3, do_sample=False, **{name: again})
    assert again.get_seq_length() == ids.shape[1] + 2


@pytest.mark.parametrize("name", BOTH)
def test_a_cache_of_another_model_is_refused_by_either(model: Any, ids: Tensor, name: str) -> None:
    fast, other = (lamp_compile.compile(model, mode="eager") for _ in range(2))
    with pytest.raises(CacheError, match=f"where: {cache_argument.NAME}"):
        fast(ids, **{name: other.lamp.cache()})


def test_a_forward_that_takes_neither_is_refused(model: Any) -> None:
    from lamp_compile.frontends.huggingface.hooks import attach

    with pytest.raises(ModelError, match="takes no cache by name"):
        attach(Neither(), SimpleNamespace())  # type: ignore[arg-type]
