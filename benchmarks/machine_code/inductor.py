# mypy: disable-error-code="arg-type, assignment"
"""Counts the baselines as the report counts kernels: those of `torch.compile`, the naive kernel, and eager PyTorch.

`torch.compile` needs a GPU to compile for one. Here its parts are driven one by one on tensors without memory and a
stand-in for an H100: AOTAutograd separates forward and backward, Inductor writes Triton kernels for both and chooses
their launch configurations, and Triton builds them. This uses private modules of torch 2.14, so other versions are
refused, and only the report uses it.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import importlib.util
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import ASTSource
from triton.runtime import driver

from denim.benchmarks.baselines_triton import naive_noise_patchify_kernel
from denim.benchmarks.case import BACKWARD, FORWARD, SIDE, Case
from denim.benchmarks.cases import CASES
from denim.benchmarks.machine_code.builds import TARGETS, Built, NoDevice, build
from denim.benchmarks.machine_code.cases import BATCH, Build, Work
from denim.benchmarks.machine_code.ptx.launch import Launch, execute
from denim.benchmarks.machine_code.ptx.traps import Trap
from denim.benchmarks.machine_code.report import analyse, report

__all__ = ["COMPARED", "baselines", "compiled", "eager", "executed", "naive", "unavailable"]

TARGET = "sm_90"
TORCH = "2.14"
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
)


# The rows of the case table whose baselines are counted.
COMPARED = tuple(case for case in CASES if case.compared)


def _chain(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The baseline of a case as a function of a list of tensors, and the tensors, in the sizes of real work."""
    inputs = case.inputs("meta")
    for name in case.leaves:
        # A gradient is taken if the report has a kernel for it.
        inputs[name].requires_grad_(BACKWARD in case.built)
    tensors = {name: value for name, value in inputs.items() if name != "seeds"} | case.constants("meta")

    def chain(*values: Tensor) -> Tensor:
        return case.counted_chain(**dict(zip(tensors, values, strict=True)))

    return chain, list(tensors.values())


def unavailable() -> str | None:
    """Why `compiled` does not work here; None if it does."""
    if torch.__version__.split("+")[0].rsplit(".", 1)[0] != TORCH:
        return f"written for the private modules of torch {TORCH}, this is {torch.__version__}"
    return None


class _Driver(NoDevice):
    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def _pretend(multiprocessors: int = H100.multi_processor_count) -> Iterator[None]:
    """Inside, torch answers Inductor's questions about the GPU as an H100 would be answered, or a piece of one."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton

    gpu = SimpleNamespace(**vars(H100) | {"multi_processor_count": multiprocessors})
    # Torch keeps the first answer, which may have been given before, when there was no GPU.
    has_triton.cache_clear()
    driver.set_active(_Driver(TARGETS[TARGET]))
    with contextlib.ExitStack() as stack:
        for name, value in {
            "get_device_properties": gpu,
            "is_available": True,
            "current_device": 0,
            "device_count": 1,
            "get_device_capability": (9, 0),
            "synchronize": None,
        }.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, value=value, **__: value))
        stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"))
        properties = staticmethod(lambda *_, **__: gpu)
        for owner in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(mock.patch.object(owner, "get_device_properties", properties))
        yield


def _graphs(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[tuple[Any, list[Tensor]]]:
    """The forward graph and, if an input demands it, the backward graph, separated as by `torch.compile`."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: list[tuple[Any, list[Tensor]]] = []

    def keep(graph: Any, given: list[Tensor]) -> Any:
        found.append((graph, given))
        return graph

    traced = aot_function(
        function,
        fw_compiler=keep,
        bw_compiler=keep,
        inference_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    # On CPU tensors, since a backward pass on CUDA tensors needs a GPU.
    result = traced(*inputs)
    if result.requires_grad:
        result.backward(torch.ones_like(result))
    return found


def _source(graph: Any, given: Sequence[Tensor]) -> str:
    """Inductor's output code for a graph, moved to a GPU."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, config.patch(profile_bandwidth=True):
        moved = [torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda") for value in given]
        traced = make_fx(graph)(*moved)
        with V.set_fake_mode(fake):
            replace_random_passes(traced)
            view_to_reshape(traced)
        lowering = GraphLowering(traced, example_inputs=moved)
        with V.set_graph_handler(lowering), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
            lowering.run(*moved)
            code = lowering.codegen()
    code = code[0] if isinstance(code, tuple) else code
    return str(getattr(code, "value", code))


def _kernels(source: str) -> Iterator[tuple[str, str, list[str]]]:
    """(name, source, arguments of the call) of every Triton kernel that the output code calls, in its order."""
    tree = ast.parse(source)
    texts = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            name, text = (ast.literal_eval(argument) for argument in node.args[:2])
            texts[name] = text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "run":
            name = ast.unparse(node.func.value)
            yield name, texts[name], [ast.unparse(argument) for argument in node.args]


class _Kernel:
    """One of Inductor's kernels, compiled with the first of its launch configurations.

    Args:
        name: of the kernel.
        text: its source, which Inductor wrote.
    """

    def __init__(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            tuner = getattr(module, name)
            # Inductor has one choice of a configuration unless it is told to measure.
            self.choice = tuner.configs[0]
            meta = tuner._create_compile_meta(self.choice)
            options = tuner._create_compile_options(self.choice, meta)
            self.compiled = triton.compile(
                ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
                target=TARGETS[TARGET],
                options=options,
            )
        self.names = tuner.fn.arg_names
        self.blocks = {key: value for key, value in meta["constants"].items() if key.endswith("BLOCK")}
        # Inductor's own estimate of the bytes that a kernel has to move. It does not separate reads and writes.
        self.moved = round(tuner.inductor_meta["kernel_num_gb"] * 1e9)

    def grid(self, numels: Mapping[str, int]) -> list[int]:
        """Programs in each dimension, for the sizes that a call names (xnumel, ynumel, ...)."""
        axes = [axis for axis in "xyz" if f"{axis}numel" in numels and f"{axis.upper()}BLOCK" in self.blocks]
        return [math.ceil(numels[f"{axis}numel"] / self.blocks[f"{axis.upper()}BLOCK"]) for axis in axes]


def _build(name: str, text: str, arguments: Sequence[str], images: int, elements: int) -> dict[str, Any]:
    kernel = _Kernel(name, text)
    named = zip(kernel.names, arguments, strict=False)  # the last ones are the configuration's
    numels = {argument: int(value) for argument, value in named if argument.endswith("numel")}
    trips = tuple(
        math.ceil(size / kernel.blocks[f"{axis[:2].upper()}_BLOCK"])
        for axis, size in numels.items()
        if axis[0] == "r" and f"{axis[:2].upper()}_BLOCK" in kernel.blocks
    )
    moved = kernel.moved
    built = Built(kernel.compiled.asm, kernel.compiled.metadata, math.prod(kernel.grid(numels)))
    entry = analyse(built, TARGET, Work(images, elements, moved, moved, moved, tuple(n for n in trips if n > 1)))
    return {"kernel": name, "launch": {**kernel.blocks, "num_warps": kernel.choice.num_warps}} | entry


def _sources(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], multiprocessors: int = H100.multi_processor_count
) -> dict[str, tuple[str, list[Tensor]]]:
    """Of the forward and, where there is one, the backward pass: Inductor's output code, and tensors for it."""
    if reason := unavailable():
        raise ValueError(f"torch.compile's kernels cannot be had: {reason}")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).requires_grad_(value.requires_grad)
            for value in inputs
        ]
        graphs = _graphs(function, given)
    with _pretend(multiprocessors):
        return {
            part: (_source(graph, values), values)
            for part, (graph, values) in zip((FORWARD, BACKWARD), graphs, strict=False)
        }


def compiled(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], images: int, elements: int
) -> dict[str, list[dict[str, Any]]]:
    """The kernels that `torch.compile` would run on an H100, with its first launch configuration of each.

    Args:
        function: of `inputs`.
        inputs: without memory (device "meta"). A backward pass is compiled if one of them requires a gradient.
        images: in the batch.
        elements: output elements, which instructions are counted for.

    Returns:
        {"forward" and, where there is one, "backward": `report.analyse` of each kernel}; `launch` holds the
        configuration.

    Raises:
        ValueError: torch is of another version.
    """
    passes = {}
    sources = _sources(function, inputs)
    with _pretend():
        for part, (source, _) in sources.items():
            passes[part] = [_build(*kernel, images, elements) for kernel in _kernels(source)]
    return passes


class _Executed:
    """Stands for one of Inductor's kernels in its output code: compiled, and executed on the CPU."""

    def __init__(self, name: str, text: str, launches: list[Launch]) -> None:
        self.kernel, self.launches = _Kernel(name, text), launches

    def run(self, *arguments: Any, stream: int) -> None:
        named = dict(zip(self.kernel.names, arguments, strict=False))
        numels = {name: int(value) for name, value in named.items() if name.endswith("numel")}
        # The lanes of a warp that add up mean and variance in pairs end with bits that differ, and all store theirs.
        launch = execute(self.kernel.compiled, named, self.kernel.grid(numels), count=True, unordered=True)
        self.launches.append(launch)


def executed(case: Case) -> dict[str, list[Launch] | str]:
    """The kernels of `compiled` for a case, executed on the CPU with everything counted, on random values.

    Inductor splits sums that are too few for the multiprocessors of the GPU. It is told of fewer, in proportion to the
    smaller batch, so that it makes the kernels of real work.

    Args:
        case: in the size to execute.

    Returns:
        {"forward" and, where there is one, "backward": the launches, or the trap that stopped them}.

    Raises:
        ValueError: torch is of another version.
    """
    passes: dict[str, list[Launch] | str] = {}
    sources = _sources(*_chain(case), multiprocessors=max(1, H100.multi_processor_count * case.batch // BATCH))
    with _pretend(), torch.random.fork_rng([]):
        for part, (source, values) in sources.items():
            launches: list[Launch] = []
            names = {name: _Executed(name, text, launches) for name, text, _ in _kernels(source)}
            try:
                _caller(source, names)([_random(value) for value in values])
                passes[part] = launches
            except Trap as trap:
                passes[part] = f"{type(trap).__name__}: {trap}"
    return passes


def _caller(source: str, kernels: Mapping[str, _Executed]) -> Callable[[list[Tensor]], object]:
    """The function of Inductor's output code that launches its kernels, on CPU tensors."""
    (call,) = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    call.args.args = call.args.args[1:]  # It is a method that does not use its object.
    # What it asks of a device, and checks of its arguments.
    nothing = ("start_graph", "end_graph", "assert_size_stride_grouped", "assert_size_stride", "assert_alignment")
    cuda = SimpleNamespace(_DeviceGuard=lambda *_: contextlib.nullcontext(), set_device=lambda *_: None)
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    names: dict[str, Any] = {
        **kernels,
        **dict.fromkeys(nothing, lambda *_: None),
        "torch": SimpleNamespace(cuda=cuda, **dtypes),
        "aten": torch.ops.aten,
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "reinterpret_tensor": torch.as_strided,
        "get_raw_stream": lambda device: 0,
    }
    exec(compile(ast.Module([call], []), "inductor", "exec"), names)
    return names["call"]  # type: ignore[no-any-return]


def _random(like: Tensor) -> Tensor:
    """A tensor of the shape, strides and dtype of one without memory."""
    tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    if tensor.is_floating_point():
        return tensor.uniform_(0.1, 0.9)
    return tensor.random_(0, 2 if tensor.dtype == torch.bool else 100)


# Operations that are not views and still move nothing.
FREE = ("aten::empty", "aten::_reshape_alias", "aten::_unsafe_view", "aten::detach")


class _Traffic(TorchDispatchMode):
    """Counts what every operation reads and writes. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(FREE):
            given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            made = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
            # An expanded operand is read in its own size.
            self.kernels += 1
            self.moved += sum(
                math.prod(n for n, stride in zip(value.shape, value.stride(), strict=True) if stride or n == 1)
                * value.element_size()
                for value in (*given, *made)
            )
        return result


def eager(function: Callable[..., Tensor], inputs: Sequence[Tensor], images: int) -> dict[str, dict[str, float]]:
    """Kernels and bytes per image of the chain as eager PyTorch runs it: each operation reads and writes memory.

    Args:
        function: of `inputs`.
        inputs: without memory (device "meta").
        images: in the batch.

    Returns:
        {"forward" and, if an input requires a gradient, "backward": {"kernels", "moved"}}.
    """
    with _Traffic() as forward:
        result = function(*inputs)
    passes = {"forward": {"kernels": forward.kernels, "moved": forward.moved / images}}
    if result.requires_grad:
        upstream = torch.empty_like(result)
        with _Traffic() as backward:
            result.backward(upstream)
        passes["backward"] = {"kernels": backward.kernels, "moved": backward.moved / images}
    return passes


def naive(case: Case) -> dict[str, Any] | None:
    """The kernel written naively, counted, if the case has one.

    Args:
        case: in the sizes of real work. Its forward pass reads the inputs once and writes the result once.
    """
    inputs = case.inputs("meta")
    call = case.naive(**inputs)
    if call is None or case.outer > 1:  # for several levels or draws the naive kernel runs once for each
        return None
    (built,) = build(TARGETS[TARGET], [naive_noise_patchify_kernel], call)
    result = case.fused(**inputs)
    moved = inputs["images"].nbytes + result.nbytes
    work = Work(BATCH, result.numel(), moved, moved, result.nbytes)
    return {"kernel": built.metadata.name} | analyse(built, TARGET, work)


def _sum(kernels: Sequence[dict[str, Any]], elements: float) -> dict[str, Any]:
    """The sum over kernels that run one after another. Their bounds add, since no kernel overlaps with the next."""
    return {
        "kernels": len(kernels),
        "moved": sum(kernel["moved"] for kernel in kernels),
        "instructions": sum(kernel["instructions"] * kernel["elements"] for kernel in kernels) / elements,
        "slow": sum(kernel["slow"] * kernel["elements"] for kernel in kernels) / elements,
        "local": sum(kernel["local"] for kernel in kernels),
        "rooflines": [kernel["roofline"] for kernel in kernels],
        "bound": sum(kernel["roofline"][kernel["roofline"]["binds"]] for kernel in kernels),
    }


def _count_baselines(name: str) -> dict[str, Any]:
    (case,) = (case.resized(BATCH, SIDE) for case in COMPARED if f"{case.operation}, {case.name}" == name)
    chain, tensors = _chain(case)
    chains: dict[str, Any] = {part: {"eager": moved} for part, moved in eager(chain, tensors, BATCH).items()}
    if unavailable() is None:
        for part, kernels in compiled(chain, tensors, BATCH, BATCH * 3 * SIDE * SIDE).items():
            chains[part]["compiled"] = kernels
    if found := naive(case):
        chains[FORWARD]["naive"] = [found]
    return chains


def baselines(workers: int | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Every compared case as fused kernels and as what a user would run without them, on an H100.

    Args:
        workers: processes; by default as many as there are processors.

    Returns:
        {operation and name of the case: {"forward" or "backward": {"fused", "naive", "compiled", "eager"}}}, each with
        the number of `kernels` and the bytes `moved` per image; all but "eager" also `instructions` per element of the
        image, `local`-memory instructions, `rooflines` of the kernels and `bound`, their sum in microseconds per image.
        "compiled" is missing where `unavailable`, "naive" where there is no naive kernel.
    """
    names = [f"{case.operation}, {case.name}" for case in COMPARED]
    builds = {name: [Build(case, part) for part in case.built] for name, case in zip(names, COMPARED, strict=True)}
    fused = report([one.name for several in builds.values() for one in several], [TARGET], workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        chains = dict(zip(names, pool.map(_count_baselines, names), strict=True))
    elements = 3.0 * SIDE * SIDE
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, several in builds.items():
        table[name] = {}
        for part, others in chains[name].items():
            # A backward pass may begin with the kernel of the forward pass.
            started = several[0].case.launched(part == BACKWARD)
            kernels = [fused[one.name][TARGET] for one in several if one.case.triton_kernels[one.part] in started]
            table[name][part] = {
                "fused": _sum(kernels, elements),
                **{
                    what: found if what == "eager" else _sum(found, elements) | {"entries": found}
                    for what, found in others.items()
                },
            }
    return table
