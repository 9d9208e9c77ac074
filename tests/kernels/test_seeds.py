"""Seeds as operators: shapes, devices, launches, and the Triton kernels. The hash itself is in `test_noise.py`."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from denim.kernels import Domain, Stream, derive_seeds, draw_seeds, noise_words

EDGES = torch.tensor([0, 1, -1, 2**32, 2**32 - 1, -(2**63), 2**63 - 1])
EDGE_STEPS = ((0, 0), (-1, 2**32 - 1), (2**63 - 1, 5))


class Count(TorchDispatchMode):
    """Names of the operations that launch something on a GPU: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_each_is_one_launch():
    """As torch operations, a seed took 338 and its words 169."""
    ids, seed = torch.arange(8), torch.tensor(5)
    for call, names in (
        (lambda: derive_seeds(5, Domain.TRAINING, ids, step=3), ["denim.derive_seeds.default"]),
        (lambda: derive_seeds(seed, Domain.TRAINING, ids, step=ids, draw=seed), ["denim.derive_seeds.default"]),
        (lambda: draw_seeds(5, Domain.SCORE, ids, 4), ["aten.arange.default", "denim.derive_seeds.default"]),
        (lambda: noise_words(ids, 196, Stream.MASK), ["denim.noise_words.default"]),
    ):
        with Count() as count:
            call()
        assert count.names == names


@pytest.mark.parametrize(
    ("samples", "run", "step", "draw"),
    [
        ((), (), (), ()),
        ((5,), (1,), (), (5,)),
        ((1, 5), (), (5,), (3, 1)),
        ((2, 1), (3, 1, 1), (4,), (2, 4)),
        ((0,),) * 4,
    ],
)
def test_parts_broadcast(samples, run, step, draw):
    tensors = [torch.arange(torch.Size(shape).numel()).reshape(shape) for shape in (run, samples, step, draw)]
    run_seed, ids, steps, draws = tensors
    seeds = derive_seeds(run_seed, Domain.ATTACK, ids, steps, draws)
    full = torch.broadcast_tensors(*tensors)
    assert seeds.shape == full[0].shape
    assert seeds.is_contiguous()
    expected = [
        derive_seeds(r, Domain.ATTACK, torch.tensor(i), s, d).item()
        for r, i, s, d in zip(*(tensor.flatten().tolist() for tensor in full), strict=True)
    ]
    assert seeds.flatten().tolist() == expected


def test_few_words_are_those_of_many(monkeypatch):
    """On a CPU NumPy draws few words and torch draws many: the same bits, at either end of int64 too."""

    def draw():
        rows = EDGES[:, None]
        seeds = [
            derive_seeds(run, Domain.SCORE, EDGES, step, draw) for run in (-(2**63), 3) for step, draw in EDGE_STEPS
        ]
        seeds += [
            derive_seeds(EDGES, Domain.ATTACK, rows, EDGES[2], EDGES.abs() & 0xFFFFFFFF),
            derive_seeds(1, 2, rows[0, 0]),
        ]
        return [*seeds, *(noise_words(rows, count, stream) for count in (0, 1, 7) for stream in Stream)]

    few = draw()
    for module in ("noise", "seeds"):
        monkeypatch.setattr(f"denim.kernels.{module}.FEW", -1)
    for left, right in zip(few, draw(), strict=True):
        assert left.shape == right.shape
        assert torch.equal(left, right)
        assert left.is_contiguous()


def test_scalars_of_the_host_are_taken_and_other_devices_are_not():
    ids, on_meta = torch.arange(3), torch.zeros(3, dtype=torch.int64, device="meta")
    assert derive_seeds(torch.tensor(4), Domain.SCORE, on_meta, step=torch.tensor(1)).device.type == "meta"
    for name in ("run_seed", "step", "draw"):
        given = {"run_seed": 0, name: on_meta}
        with pytest.raises(ValueError, match=f"{name} is on meta and samples are on cpu"):
            derive_seeds(domain=Domain.SCORE, samples=ids, **given)


@pytest.mark.parametrize("name", ["run_seed", "step", "draw"])
def test_a_number_that_is_no_int64_is_named(name):
    given = {"run_seed": 0, "domain": Domain.SCORE, "samples": EDGES}
    for number in (-(2**63), 2**63 - 1):
        derive_seeds(**{**given, name: number})
    for number in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=rf"^{name} must be an int64, from -2\^63 to 2\^63 - 1, got {number}$"):
            derive_seeds(**{**given, name: number})


def calls() -> dict[str, list[tuple]]:
    columns, rows = torch.arange(130), torch.tensor([[3], [-5], [2**40]])
    strided = torch.stack([EDGES, EDGES.flip(0)], dim=1)
    derive = [
        (EDGES, 0, 0, 0, 0, None, None, None),
        (EDGES, 11, -(2**63), 2**63 - 1, 2**32 - 1, None, None, None),
        (EDGES, 3, 0, 0, 0, EDGES.flip(0), torch.tensor(7), None),
        (columns, 2, 5, 0, 0, None, None, rows),
        (columns[None, :, None], 2, 0, 0, 1, rows[..., None], torch.tensor([1, 2]), None),
        (strided[:, 0], 2, 1, 0, 0, None, strided[:, 1], strided.T[0]),
        (torch.tensor(9), 9, 1, 2, 3, None, None, None),
        (columns[:0], 9, 1, 2, 3, None, None, rows),
    ]
    words = [
        *((EDGES, count, stream) for stream in (0, 2) for count in (1, 4, 7, 520)),
        (strided, 5, 3),
        (strided[:, 1], 9, 1),
        (torch.tensor(9), 3, 4),
        (EDGES, 0, 0),
        (EDGES[:0], 4, 0),
    ]
    return {"derive_seeds": derive, "noise_words": words}


@pytest.mark.parametrize("how", ["interpreted", pytest.param("compiled", marks=pytest.mark.slow)])
def test_triton_gives_the_bits_of_the_reference(tmp_path, run_script, how):
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
    torch.save(calls(), tmp_path / "given.pt")
    run_script("kernels/triton_seeds.py", tmp_path / "given.pt", tmp_path / "got.pt", how)
    got = torch.load(tmp_path / "got.pt", weights_only=True)
    for name, cases in calls().items():
        for arguments, result in zip(cases, got[name], strict=True):
            expected = getattr(torch.ops.denim, name)(*arguments)
            assert result.shape == expected.shape
            assert result.is_contiguous()
            assert torch.equal(result, expected), arguments


@pytest.mark.slow
def test_the_machine_code_keeps_everything_in_registers(tmp_path, run_script):
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
    run_script("kernels/build_seeds.py", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert "sm_90" in report
    for target, kernels in report.items():
        assert [kernel["spills"] + kernel["local"] + kernel["shared"] for kernel in kernels] == [0, 0], target
