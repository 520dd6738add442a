"""Exported programs and FX graphs: files as they lie, writes in place in their order, names and sizes."""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lamp_compile
from lamp_compile.diff import reporters
from lamp_compile.errors import InputError
from tests.backends.modules import stack, tokens


class Written(nn.Module):
    """A branch, a split, a buffer that is written, sizes that are computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("shift", torch.ones(8), persistent=False)
        self.scale = torch.arange(4.0)

    def forward(self, x: Tensor, *, z: Tensor) -> dict[str, Tensor]:
        y = self.linear(x) + self.shift
        y = torch.cond(y.sum() > 0, lambda a: a.sin() + x.sum(), lambda a: a.cos() * 2, (y,))
        self.count.add_(1)
        a, b = torch.split(y, 4, dim=-1)
        flat = y.reshape(x.shape[0] * x.shape[1], 8)
        return {"o": torch.cat([a, b * self.scale[:1]], 1), "flat": flat, "z": z + self.count.sum()}


def written() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    dims = {"x": {0: Dim("b", min=4, max=64), 1: Dim.DYNAMIC}, "z": None}
    return torch.export.export(Written().eval(), (torch.randn(6, 4, 8),), {"z": torch.ones(2)}, dynamic_shapes=dims)


def rewritten(**options) -> torch.export.ExportedProgram:
    with torch.no_grad():
        program = torch.export.export(stack(kv_heads=2), (tokens(40),), strict=True)
        return lamp_compile.rewrite(program, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    torch.export.save(written(), folder / "written.pt2")
    torch.export.save(rewritten(), folder / "rewritten.pt2")
    return folder


@pytest.mark.parametrize(("name", "make"), [("written", written), ("rewritten", rewritten)])
def test_a_file_reads_as_the_program_does(name: str, make, files: Path) -> None:
    program = make()
    found = lamp_compile.snapshot(files / f"{name}.pt2", weights=True)
    assert found == lamp_compile.snapshot(program, weights=True)
    assert lamp_compile.diff.snapshot.Snapshot.parse(found.text()) == found
    assert found.nodes() > 10


def test_nothing_is_loaded(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.export.load would unpickle or evaluate is never opened."""
    pickle = importlib.import_module("pickle")

    def no(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in ((torch, "load"), (torch.export, "load"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(owner, name, no)
    opened = []
    original = zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile, "open", lambda self, name, *a, **k: opened.append(str(name)) or original(self, name, *a, **k)
    )
    lamp_compile.snapshot(files / "written.pt2", weights=True)
    assert opened
    assert not [name for name in opened if "sample_inputs" in name]


def test_what_is_in_it(files: Path) -> None:
    found = lamp_compile.snapshot(files / "written.pt2")
    assert found.inputs == {"x": "float32[d0,d1,8]", "z": "float32[2]"}
    assert found.ranges["d0"] == "4..64"
    assert found.facts["out_spec"] == '{"o": *, "flat": *, "z": *}'
    text = found.text()
    assert "block then(&then1.0, &then1.1)" in text
    assert "[(d0*d1),8]" in text
    assert "s77" not in text  # the symbols' own names
    (write,) = (line for line in text.splitlines() if "!effect" in line)
    assert write.startswith("  %add_1 = aten.add_.Tensor($count) {other=1} !effect")
    assert "aten.sum(%add_1)" in text


def test_order_of_a_write_and_a_read_matters() -> None:
    """The same operations; what is read before the write and after it differ."""

    class First(nn.Module):
        def __init__(self, late: bool) -> None:
            super().__init__()
            self.late = late
            self.register_buffer("state", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            view = self.state.view(3)
            if self.late:
                self.state.add_(x)
            y = view * 2
            if not self.late:
                self.state.add_(x)
            return y

    early, late = (torch.export.export(First(late).eval(), (torch.ones(3),)) for late in (False, True))
    found = lamp_compile.compare(early, late)
    (change,) = found.changes
    assert change.text == "aten.mul.Tensor: 1 operands became 2"
    assert "after=" not in change.before
    assert "aten.mul.Tensor(%view1, after=[%add_1]) {other=2}" in change.after
    assert lamp_compile.compare(early, early).same


def test_plan_of_a_rewritten_program() -> None:
    with torch.no_grad():
        before, after = rewritten(), rewritten()
    after.state_dict["lamp_layers_1_tau"].fill_(0.02)
    (change,) = lamp_compile.compare(before, after).changes
    assert (change.tier, change.text) == ("precision", "layer 1 (layers.1): tau 0.01 -> 0.02 (refines less)")


def test_formats_are_said_once_per_site(reference_only) -> None:
    found = lamp_compile.compare(rewritten(), rewritten(k_format="fp8"))
    assert [c.text for c in found.changes if c.tier == "precision"] == [
        f"layer {i} (layers.{i}): key format nested8 -> fp8" for i in (0, 1)
    ]
    assert not [c for c in found.changes if c.tier in ("attributes", "structure")]
    assert {c.tier for c in found.changes} <= {"precision", "types"}


def test_against_its_own_plan(files: Path) -> None:
    """A graph and the plan that made it say the same of each site."""
    plan = rewritten().graph_module.meta["lamp_report"].plan
    found = lamp_compile.compare(plan, files / "rewritten.pt2")
    assert found.same
    assert "only precision plans were compared" in found.notes[-1]
    assert reporters.render(found, "text", 0).endswith("the same precision plan\n")
    other = rewritten(tau=0.5).graph_module.meta["lamp_report"].plan
    assert [c.subject for c in lamp_compile.compare(other, files / "rewritten.pt2").changes] == ["tau", "tau"]


def test_fx_graphs() -> None:
    """Of any tracer: the same modules under other names of values are the same graph."""
    from torch.fx import symbolic_trace

    a, b = (symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) for _ in range(2))
    for node in b.graph.nodes:
        if node.op != "placeholder":
            node.name = f"other_{node.name}"
    b.recompile()
    assert lamp_compile.compare(a, b).same
    found = lamp_compile.compare(a, symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.GELU())))
    assert [c.text for c in found.changes] == ["module.ReLU became module.GELU"]


def test_a_default_left_out_is_the_default_written_down() -> None:
    def graph(*more, **named):
        made = torch.fx.Graph()
        x = made.placeholder("x")
        made.output(made.call_function(torch.ops.aten.gelu.default, (x, *more), named))
        return torch.fx.GraphModule(nn.Module(), made)

    assert lamp_compile.compare(graph(), graph(approximate="none")).same
    (change,) = lamp_compile.compare(graph(), graph(approximate="tanh")).changes
    assert change.text == 'aten.gelu: approximate the default -> "tanh"'


def test_dynamo_graphs(reference_only) -> None:
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(stack(1), backend=keep)(tokens(40))
    before = lamp_compile.snapshot(graphs[0])
    after = lamp_compile.snapshot(lamp_compile.rewrite(graphs[0], example_inputs=None))
    assert before.nodes() > 5
    assert not before.sites
    assert next(iter(after.sites.values()))["k_format"] == "nested8"


def broken(source: Path, target: Path, edit) -> Path:
    """A copy of an archive with its model's JSON edited."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("models/model.json"):
                data = edit(data)
            new.writestr(info.filename, data)
    return target


def swap(**values):
    def edit(data: bytes) -> bytes:
        model = json.loads(data)
        model.update(values)
        return json.dumps(model).encode()

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda data: data[:2000], "broken archive: JSONDecodeError"),
        (lambda data: b"[" * 100_000, "broken archive: RecursionError"),
        (swap(schema_version={"major": 7}), "schema is 7"),
        (swap(graph_module={}), "broken archive: KeyError"),
        (lambda data: data.replace(b"Symbol('", b"__import__('os').system('"), "cannot read the size"),
    ],
)
def test_broken_archives(edit, says: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        lamp_compile.snapshot(broken(files / "written.pt2", tmp_path / "broken.pt2", edit))


def test_zip_files_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt2"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(InputError, match="0 exported programs in it"):
        lamp_compile.snapshot(path)
    buffer = io.BytesIO(b"PK\x03\x04 and nothing more")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="broken archive"):
        lamp_compile.snapshot(path)
