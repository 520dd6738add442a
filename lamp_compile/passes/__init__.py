"""The compiler: readers that find attention in graphs and passes that rewrite it."""

if __name__ != "lamp_compile.passes":
    raise ImportError(
        f"this package is lamp_compile.passes, imported here as {__name__!r}\n"
        "  where: the links `passes` and `runtime` at the repository root are for reading, not for importing\n"
        "  try:   from lamp_compile import passes"
    )
