"""export_onnx on tiny models: what is in the file, what it computes, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from onnx import inliner
from onnx.reference import ReferenceEvaluator

import lamp_compile
from lamp_compile.errors import ExportError, InputError, LimitError, ModelError, OptionError
from lamp_compile.frontends.onnx.exporting import targets, verify
from lamp_compile.frontends.onnx.exporting.decoder import DecoderGraph
from lamp_compile.frontends.onnx.form import Form
from tests.tolerances import ONNX

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
HEADS = {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "head_dim": 16}
ENCODER = {**SMALL, "num_attention_heads": 2}
TEXT = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    return one_thread


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **HEADS)).eval()


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def relative(got, wanted) -> float:
    return float(np.linalg.norm(np.asarray(got) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Llama of one layer: model, compiled model, export."""
    folder = tmp_path_factory.mktemp("first")
    model = llama()
    fast = lamp_compile.compile(model, mode="eager")
    return model, fast, lamp_compile.export_onnx(fast, TEXT, folder / "model.onnx")


def step(run, ids, positions, cache, **settings):
    """One call; gives logits and the cache by its past names."""
    names = [value.name for value in run.get_outputs()]
    feeds = {"input_ids": ids.numpy(), "positions": np.asarray(positions), **cache, **settings}
    found = dict(zip(names, run.run(None, feeds), strict=True))
    return found["logits"], {n.replace("present", "past"): x for n, x in found.items() if n != "logits"}


def empty(fast, batch: int, capacity: int):
    graph = DecoderGraph(fast)
    tensors = graph.empty_cache(batch, capacity)
    return {f"past.{n}": t.numpy() for n, t in zip(graph.cache_names(), tensors, strict=True)}


def test_the_file_says_what_it_is(exported) -> None:
    _, fast, made = exported
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node if n.domain == "ai.lamp"] == ["Append", "FusedAttention"]
    functions = {f.name for f in model.functions}
    assert functions >= {"Append", "FusedAttention", "LookAhead", "Select", "Attend", "Guard"}
    attend = next(f for f in model.functions if f.name == "Attend")
    assert sum(node.op_type == "If" for node in attend.node) == 1
    properties = {item.key: item.value for item in model.metadata_props}
    assert lamp_compile.Plan.from_json(properties["lamp.plan"]) == fast.lamp.plan
    assert json.loads(properties["lamp.versions"])["lamp_compile"] == lamp_compile.__version__
    assert len(properties["lamp.plan_sha256"]) == 64
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert dims["input_ids"] == ["batch", "tokens"]
    assert dims["past.0.k_high"] == ["batch", 2, "tiles", 32, 8]
    assert dims["past.0.v_scale"] == ["batch", 2, "capacity"]
    assert not any(
        v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for v in model.graph.input if "_high" in v.name
    )
    assert model.ir_version <= 13


def test_logits_of_all_tokens_or_from_one_on(exported) -> None:
    """The default are all; what is left out is not computed, and the rest is the same."""
    _, fast, made = exported
    run = session(made.path)
    assert [x.name for x in run.get_overridable_initializers() if x.type == "tensor(int64)"] == ["logits_from"]
    every, cache = step(run, TEXT, [0, 0], empty(fast, 2, 48))
    assert every.shape[:2] == (2, 48)
    for first in (-1, 47, -5, 0):
        some, same = step(run, TEXT, [0, 0], empty(fast, 2, 48), logits_from=np.array([first]))
        assert np.array_equal(some, every[:, first:])
        assert all(np.array_equal(same[name], x) for name, x in cache.items())
    about = json.loads(run.get_modelmeta().custom_metadata_map["ai.lamp"])
    assert about["logits_from"] == "logits_from"


def test_a_model_that_cannot_choose_logits_computes_all(tmp_path, monkeypatch) -> None:
    original = transformers.LlamaForCausalLM.forward

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **rest):
        places = {"position_ids": position_ids, "past_key_values": past_key_values}
        return original(self, input_ids=input_ids, **places, **rest)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    made = lamp_compile.export_onnx(llama(), TEXT[:, :16], tmp_path / "m.onnx")
    assert "logits_from" not in {x.name for x in onnx.load(made.path).graph.input}
    opened = lamp_compile.OrtSession(made.path, native=False)
    assert opened.artifact.logits_from == ""
    opened.start(2)
    assert opened.step(TEXT[:, :16].numpy()).shape == (2, 64)


def test_a_session_computes_the_last_logits_alone(exported) -> None:
    opened = lamp_compile.OrtSession(exported[2].path, native=False)
    opened.start(2)
    last = opened.step(TEXT.numpy())
    assert opened._bound.binding.get_outputs()[-1].shape() == [2, 1, 64]
    every, _ = step(session(exported[2].path), TEXT, [0, 0], empty(exported[1], 2, 64))
    assert relative(last, every[:, -1]) < ONNX["node"].relative


def test_no_folder_is_in_it(exported, root) -> None:
    data = exported[2].path.read_bytes() + exported[2].report_path.read_bytes()
    for where in (str(root), "site-packages", str(Path.home()), str(exported[2].path.parent)):
        assert where.encode() not in data


def test_exporting_twice_from_two_folders_gives_the_same_bytes(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = lamp_compile.export_onnx(llama(), TEXT, "model.onnx")
    assert again.path.read_bytes() == exported[2].path.read_bytes()
    assert again.report_path.read_bytes() == exported[2].report_path.read_bytes()


def test_report_and_verification(exported) -> None:
    _, _, made = exported
    text = made.report_path.read_text()
    assert text.startswith("# model.onnx\n\nPassed")
    assert "model.layers.0.self_attn" in text
    assert made.verification.passed
    logits = made.verification.outputs[0]
    assert 0 < logits.drift < ONNX["decoder"].relative
    assert logits.own > 1e-4, "LAMP should differ from float"
    assert f"{made.verification.against_float.kl:.2e}" in text


def test_prefill_and_steps_of_any_batch_length_and_capacity(exported) -> None:
    """Three sequences of different lengths, in one graph, against the compiled model one by one."""
    _, fast, made = exported
    run, lengths = session(made.path), [40, 17, 33]
    ids = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(5))
    _, cache = step(run, ids, [0, 0, 0], empty(fast, 3, 96))
    more = torch.tensor([[1], [2], [3]])
    logits, cache = step(run, more, lengths, cache)
    logits2, _ = step(run, more, [n + 1 for n in lengths], cache)
    for row, length in enumerate(lengths):
        tokens = torch.cat((ids[row : row + 1, :length], more[row : row + 1], more[row : row + 1]), 1)
        with torch.no_grad():
            wanted = fast(tokens).logits[0]
        assert relative(logits[row, 0], wanted[length]) < 5 * ONNX["decoder"].relative
        assert relative(logits2[row, 0], wanted[length + 1]) < 5 * ONNX["decoder"].relative


def test_settings_are_inputs(exported) -> None:
    _, fast, made = exported
    run = session(made.path)
    results, refined = {}, {}
    for name, settings in {
        "default": {},
        "floor": {"lamp.0.floor": np.ones(2, np.float32)},
        "tau 0": {"lamp.0.tau": np.zeros(2, np.float32)},
        "coarse": {"lamp.0.tau": np.full(2, 1e9, np.float32)},
    }.items():
        results[name], cache = step(run, TEXT, [0, 0], empty(fast, 2, 64), **settings)
        stats = cache["past.0.stats"].sum((0, 1))
        refined[name] = stats[2] / stats[1]
    assert refined["floor"] == refined["tau 0"] == 1.0
    assert refined["coarse"] == 0.0
    assert np.array_equal(results["floor"], results["tau 0"])
    assert not np.array_equal(results["floor"], results["coarse"])


def test_guard_raises_the_floor_within_the_artifact(exported) -> None:
    _, fast, made = exported
    run = session(made.path)
    tight = {"lamp.0.budget": np.full(2, 1e-6, np.float32), "lamp.0.tau": np.full(2, 1e9, np.float32)}
    _, cache = step(run, TEXT[:, :40], [0, 0], empty(fast, 2, 64), **tight)
    before = cache["past.0.stats"].copy()
    assert (cache["past.0.state"][..., 1] == 1).all()
    _, cache = step(run, TEXT[:, 40:41], [40, 40], cache, **tight)
    assert (cache["past.0.stats"][..., 2] > before[..., 2]).all(), "a raised floor refines"


def test_reference_evaluator_runs_the_whole_model(exported) -> None:
    _, fast, made = exported
    model = onnx.load(made.path)
    names = [value.name for value in model.graph.output]
    evaluator = ReferenceEvaluator(inliner.inline_local_functions(model))
    feeds = {"input_ids": TEXT[:1, :24].numpy(), "positions": np.array([0]), **empty(fast, 1, 32)}
    defaults = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name.startswith("lamp.0.")}
    found = dict(zip(names, evaluator.run(None, feeds | defaults), strict=True))
    wanted, _ = step(session(made.path), TEXT[:1, :24], [0], empty(fast, 1, 32))
    assert relative(found["logits"], wanted) < ONNX["decoder"].relative


def test_a_layer_without_planes_stays_in_float_and_windows_hold(tmp_path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**{**SMALL, "num_hidden_layers": 2}, **HEADS, sliding_window=20)
    model = transformers.MistralForCausalLM(config).eval()
    fast = lamp_compile.compile(model, mode="eager", fuel=1)
    made = lamp_compile.export_onnx(fast, TEXT, tmp_path / "m.onnx")
    names = [value.name for value in onnx.load(made.path).graph.input]
    assert {"past.0.k_high", "past.1.keys", "past.1.values"} <= set(names)
    assert made.report.rewritten == ("model.layers.0.self_attn",)
    assert "kept: beyond fuel" in made.report_path.read_text()
    nodes = [node for node in onnx.load(made.path).graph.node if node.op_type == "FusedAttention"]
    assert [a.i for node in nodes for a in node.attribute if a.name == "window"] == [20]


def test_qwen3_without_control_flow_for_migraphx(tmp_path) -> None:
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **HEADS)).eval()
    made = lamp_compile.export_onnx(model, TEXT, tmp_path / "m.onnx", target="migraphx", tau=0.02)
    proto = onnx.load(made.path)
    assert made.guard == "select"
    assert not targets.lint(proto, targets.TARGETS["migraphx"])
    flat = inliner.inline_local_functions(proto)
    assert not {"If", "NonZero", "Attention"} & {node.op_type for node in flat.graph.node}
    assert proto.opset_import[0].version == 18
    assert made.report.plan.sites[0].tau == 0.02


def test_gpt2_for_cuda_over_the_users_limit(tmp_path) -> None:
    """The limit is looked at once the artifact has passed; nothing is written."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(LimitError, match=r"min_agreement is 1\.1 and agreement is"):
        lamp_compile.export_onnx(model, TEXT, tmp_path / "m.onnx", target="cuda", min_agreement=1.1)
    assert not list(tmp_path.iterdir())


def test_bert_with_padding(tmp_path) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=64, **ENCODER)).eval()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 30:] = 0
    given = {"input_ids": torch.randint(64, (2, 40)), "attention_mask": mask}
    made = lamp_compile.export_onnx(model, given, tmp_path / "m.onnx")
    assert [item.name for item in made.verification.outputs] == ["last_hidden_state", "pooler_output"]
    assert all(item.drift < ONNX["encoder"].relative for item in made.verification.outputs)
    run = session(made.path)
    site = made.report.rewritten[0]
    other = {"input_ids": np.random.randint(0, 64, (3, 57)), "attention_mask": np.ones((3, 57), np.int64)}
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(x) for name, x in other.items()}).last_hidden_state
    # Level 2 takes K and V as they are, so that is the float model again; level 1 is not.
    got = {}
    for floor in (1, 2):
        settings = {f"lamp.{site}.floor": np.full(2, floor, np.float32)}
        got[floor] = relative(run.run(["last_hidden_state"], {**other, **settings})[0], wanted)
    assert 5 * got[2] < got[1]
    assert got[2] < ONNX["encoder"].relative / 50


def test_vit(tmp_path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, **ENCODER)
    made = lamp_compile.export_onnx(
        transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}, tmp_path / "m.onnx"
    )
    state = [value.name for value in onnx.load(made.path).graph.output if value.name.startswith("lamp.")]
    assert [name.rpartition(".")[2] for name in state] == ["state_new", "stats_new"]
    assert all(item.drift < ONNX["encoder"].relative for item in made.verification.outputs)


def test_an_artifact_that_is_the_float_model_fails() -> None:
    """Where precision was to be reduced, equality bit for bit is not success."""
    logits = torch.randn(2, 5)
    same = verify.Differences("logits")
    same.add(logits, logits, logits)
    assert verify.failures_of([same], reduced=True) == [
        "the artifact equals the float model bit for bit: its low precision is not real"
    ]
    assert not verify.failures_of([same], reduced=False)
    far = verify.Differences("logits")
    far.add(logits * 1.1, logits, logits * 1.01)
    assert "differs from torch" in verify.failures_of([far], reduced=True)[0]
    broken = verify.Differences("logits")
    broken.add(logits * float("nan"), logits, logits)
    assert "differs from torch" in verify.failures_of([broken], reduced=True)[0]


def test_a_wrong_body_is_noticed_and_nothing_is_written(tmp_path, monkeypatch) -> None:
    from lamp_compile.frontends.onnx.bodies import scores

    right, wrong = "factor = Mul(step, scale)", "factor = Identity(step)"
    original = scores.prepare_query
    assert right in original(Form())
    monkeypatch.setattr(scores, "prepare_query", lambda form: original(form).replace(right, wrong))
    with pytest.raises(ExportError, match="logits differs from torch"):
        lamp_compile.export_onnx(llama(), TEXT, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda every: every[:, :1], r"logits_from=\[-1\]: the last token's logits alone differ"),
        (lambda every: every, r"logits_from=\[-1\] gives logits \[2, 8, 64\], the last token's are \[2, 1, 64\]"),
    ],
    ids=["another row", "all rows"],
)
def test_a_wrong_choice_of_logits_is_noticed(tmp_path, monkeypatch, pick, message) -> None:
    """Sessions ask for the last row alone, the other runs of verification for all."""

    class Wrong:
        def __init__(self, path: str) -> None:
            self._run = session(path)

        def __getattr__(self, name: str):
            return getattr(self._run, name)

        def run(self, names, given):
            found = self._run.run(names, {name: x for name, x in given.items() if name != "logits_from"})
            return [pick(found[0]), *found[1:]] if "logits_from" in given else found

    monkeypatch.setattr(verify, "session", Wrong)
    with pytest.raises(ExportError, match=message):
        lamp_compile.export_onnx(llama(), TEXT[:, :32], tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_lint_finds_what_the_target_lacks() -> None:
    from onnx import parser

    model = parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[3] x, bool c) => (float[3] y) {
      y = If (c) <then_branch = a () => (u) { h = Cast<to = 10>(x) u = Cast<to = 1>(h) },
                  else_branch = b () => (v) { i = Cast<to = 7>(x) v = Cast<to = 1>(i) }>
    }""")
    assert targets.lint(model, targets.TARGETS["migraphx"]) == ["Cast there and back (u)"]
    assert not targets.lint(model, targets.TARGETS["cuda"])
    model.graph.node.append(onnx.helper.make_node("BitwiseAnd", ["x", "x"], ["z"]))
    assert targets.lint(model, targets.TARGETS["cuda"]) == ["BitwiseAnd (z)"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": "rocm"}, OptionError, "migraphx"),
        ({"guard": "maybe"}, OptionError, "if, select"),
        ({"path": "model.txt"}, InputError, "does not end in .onnx"),
        ({"path": "missing/model.onnx"}, InputError, "cannot be written"),
        ({"example_inputs": torch.full((1, 16), 64)}, InputError, "token 64 of 64"),
        ({"example_inputs": torch.zeros(1, 16)}, InputError, "token ids"),
        ({"example_inputs": torch.zeros(1, 4, dtype=torch.long)}, InputError, "at least 8"),
        ({"dynamic_shapes": {}}, OptionError, "leave it out"),
        ({"k_format": "fp8"}, ModelError, "k_format 'fp8' has no"),
        ({"rule": "mass"}, ModelError, "rule 'mass' has no ONNX functions"),
        ({"model": torch.nn.Linear(2, 2).eval(), "example_inputs": (torch.ones(2, 2),)}, ModelError, "no attention"),
        ({"model": torch.nn.Linear(2, 2).eval()}, InputError, "tuple or dict"),
        ({"model": torch.nn.Linear(2, 2).eval(), "max_kl": 1.0}, OptionError, "no decoder"),
        ({"model": torch.nn.Linear(2, 2).half().eval()}, ModelError, "float16"),
        ({"model": "a name"}, ModelError, "torch.nn.Module"),
    ],
)
def test_bad_input(change, error, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model": llama(), "example_inputs": None, "path": "model.onnx", **change}
    with pytest.raises(error, match=message):
        lamp_compile.export_onnx(given.pop("model"), given.pop("example_inputs"), given.pop("path"), **given)
    assert not os.listdir(tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch) -> None:
    from lamp_compile.frontends.onnx.exporting import export

    monkeypatch.setattr(export, "PACKAGES", ("a_package_that_is_not_there",))
    with pytest.raises(InputError, match=r"lamp_compile\[onnx-cpu\]"):
        lamp_compile.export_onnx(llama(), None, tmp_path / "m.onnx")
