"""What changed between two graphs: canonical snapshots, a comparison in tiers, rules for expected changes, reports.

``lamp_compile.snapshot(x)`` and ``lamp_compile.compare(a, b)`` are the way in; ``lamp-compile snapshot`` and
``lamp-compile diff`` the same from a shell. Readers turn an ONNX file, a ``torch.export`` archive, an FX graph or a
plan into
one neutral ``graph.Program``; ``canonical`` gives it an order and names that depend on nothing but its structure.
"""
