"""Everything a compiled model needs to run. Never imports ``lamp_compile.passes``."""

if __name__ != "lamp_compile.runtime":
    raise ImportError(
        f"this package is lamp_compile.runtime, imported here as {__name__!r}\n"
        "  where: the links `passes` and `runtime` at the repository root are for reading, not for importing\n"
        "  try:   from lamp_compile import runtime"
    )
