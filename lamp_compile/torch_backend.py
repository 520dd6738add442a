"""``torch.compile(model, backend="lamp")``, and ``backend(...)`` for settings that can be changed while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from lamp_compile import driver
from lamp_compile.errors import OptionError
from lamp_compile.options import Options
from lamp_compile.passes.hot_tensors import HotTensors
from lamp_compile.report import Report
from lamp_compile.runtime.controls import Controls


class LampBackend:
    """A ``torch.compile`` backend. For inference: the compiled model records no gradients.

    Use one object per model: settings and guard state belong to site names.

    Attributes:
        options: What was asked for, checked.
        reports: One per call of the backend, in order; torch may call it twice for one compile.
    """

    __name__ = "lamp"

    def __init__(self, options: Options, controls: Controls | None = None) -> None:
        self.options = options
        self.reports: list[Report] = []
        self._hot = HotTensors(controls)

    def __deepcopy__(self, memo: dict[int, Any]) -> LampBackend:
        """Itself: transformers copies the configuration that a backend sits in, and the settings are to be shared."""
        return self

    @property
    def controls(self) -> Controls:
        """tau, floor level and error budget of every compiled site; changing them recompiles nothing."""
        return self._hot.controls

    def guard_state(self, site: str) -> tuple[Any, Any]:
        """The guard's state ``[1, G, 4]`` and statistics ``[1, G, 7]`` (``runtime.guard``) of a site without a cache.

        Raises:
            OptionError: No such site was compiled.
        """
        states = self._hot.states
        if site not in states:
            raise OptionError(
                f"unknown site {site!r}", where="guard_state", fix=f"one of {', '.join(states) or 'none compiled yet'}"
            )
        return states[site]

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Called by Dynamo with its graph."""
        if options:
            raise OptionError(
                "options given twice", where="torch.compile(options=...)", fix="give them to lamp_compile.backend(...)"
            )
        asked = self.options if mode is None else replace(self.options, mode=mode)
        compiled, report = driver.compile_graph(gm, example_inputs, asked, self._hot)
        self.reports.append(report)
        return compiled


def backend(*, controls: Controls | None = None, **options: Any) -> LampBackend:
    """A backend for ``torch.compile(model, backend=lamp_compile.backend(tau=0.02))``; options are checked here and now.

    Args:
        controls: Hot settings to share, such as those of a KV cache.
        **options: See ``Options.parse``: preset, plan, fuel, lower, mode, join_linears, fields of a plan's row,
            ``guard_<field>``, ``inductor.<key>`` (by ``**{...}``).

    Raises:
        OptionError, PlanError: Unknown or impossible options.
    """
    return LampBackend(Options.parse(options), controls)


def lamp(
    gm: GraphModule, example_inputs: Sequence[Any], mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend called "lamp" (an entry point); options arrive by ``torch.compile(options={...})``.

    Every graph gets its own settings, fixed by the options; use ``backend(...)`` to change them while the model runs.
    """
    given = dict(options or {})
    if mode is not None:
        given["mode"] = mode
    return backend(**given)(gm, example_inputs)
