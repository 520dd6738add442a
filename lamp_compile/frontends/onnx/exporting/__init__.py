"""torch to ONNX.

``export`` puts an artifact in place; ``decoder`` and ``build_decoder``, or ``modules`` and ``build_module``, make it
with ``trace``, ``translate``, ``torch_ops``, ``kept_logits`` and ``finish``; ``targets`` lints it, ``verify`` runs it,
``describe`` and ``report`` say what it is.
"""
