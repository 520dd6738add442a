"""One ``ai.lamp`` node as a model of its own, and the torch reference beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch import Tensor

from lamp_compile.frontends.onnx import functions
from lamp_compile.frontends.onnx.form import Form
from lamp_compile.runtime import fused_ops, guard, rotation  # noqa: F401  (registers the operators)

PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")


def node_model(op: str, form: Form, inputs: dict[str, np.ndarray], outputs: list[str], **attributes: Any) -> Any:
    """A checked model with one node."""
    node = functions.make_node(op, form, {name: name for name in inputs}, outputs, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in inputs.items()
    ]
    graph = helper.make_graph([node], "node", infos, [helper.make_empty_tensor_value_info(name) for name in outputs])
    imports = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(functions.DOMAIN, functions.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=functions.IR_VERSION)
    model.functions.extend(functions.functions_for([form]))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def session(model: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rotations(form: Form, dim: int, value_dim: int) -> dict[str, np.ndarray]:
    if not form.rotation:
        return {}
    like = torch.zeros(1)
    return {
        "rotate_k": rotation.matrix(dim, "hadamard", like).numpy(),
        "rotate_v": rotation.matrix(value_dim, "hadamard", like).numpy(),
    }


def numpy(tensors: dict[str, Tensor | None]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
