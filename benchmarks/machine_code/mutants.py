"""Mutants: the Triton kernels with one mistake each, and which proof notices it (`make mutants`).

The proofs are those of the tests, on one case per mutant:

- interpreter: the Triton source in Triton's interpreter, against the definition in float64;
- invariants and budgets: the machine code that is built for one target, counted;
- executed: the PTX that is built, run on the machine in `ptx`, against the definition in float64.

Every mutant must be caught by one of them, and the kernels as they are must pass all of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from denim.benchmarks.case import BACKWARD, FORWARD, Case
from denim.benchmarks.cases import CASES, AttackStep
from denim.benchmarks.machine_code.last_program import LastProgram, reserved
from denim.kernels import attack_step, dispatch

__all__ = ["MUTANTS", "PROOFS", "Mutant", "faults", "page", "prove"]

PROOFS = ("interpreter", "invariants", "budgets", "executed")
KERNELS = Path(dispatch.__file__).parent
PTX = "PTX"
# An attack on samples of three elements each, whose last one lies beyond 2^31.
HUGE = "attack_step beyond 2^31 elements"
HUGE_SHAPE = (2**30 + 2, 3)

NOISE = "noise_patchify, uint8, patch 16, bf16"
PLANES = "noise_patchify, fp32 planes, patch 16, bf16"
SWEEP = "noise_patchify, uint8, patch 16, bf16, 4 levels of 2 draws"
LOSS = "patch_loss, uint8, patch 16, bf16"
DECODE = "decode_patches, input, fp32 planes, patch 16, bf16"
STEP = "attack_step, fp32"
START = "attack_start, fp32"
CLAMP = "    moved = tl.minimum(moved, 1.0, propagate_nan=tl.PropagateNan.ALL)\n    tl.store(out + start + offset"


class Mutant(NamedTuple):
    """One mistake."""

    name: str
    case: str
    """Operation and name of a case of `denim.benchmarks.cases`, or `HUGE`."""
    file: str
    """In kernels/, without ".py"; or `PTX`: the text that Triton's compiler hands to ptxas."""
    edits: tuple[tuple[str, str], ...] = ()
    """(what stands there once, what stands there instead); of PTX a pattern of `re`, whose first match is replaced."""
    part: str = FORWARD
    target: str = "sm_90"


MUTANTS = (
    Mutant(
        "sine and cosine exchanged, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("cos.approx', '_ptx("COS.approx'), ('_ptx("sin.approx', '_ptx("cos.approx'), ('"COS.', '"sin.')),
    ),
    Mutant(
        "half the angle of sine and cosine, on NVIDIA alone",
        NOISE,
        "noise_triton",
        tuple(
            (
                f'_ptx("{name}.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-31))',
                f'_ptx("{name}.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-32))',
            )
            for name in ("sin", "cos")
        ),
    ),
    Mutant(
        "the sine with the wrong sign, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("sin.approx.ftz.f32 $0, $1;", word', '_ptx("sin.approx.ftz.f32 $0, $1;", -word'),),
    ),
    Mutant(
        "the logarithm to base e for that to base 2, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("lg2.approx.ftz.f32 $0, $1;", x)', '_ptx("lg2.approx.ftz.f32 $0, $1;", x) * 0.6931472'),),
    ),
    Mutant(
        "Triton's accurate cosine, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("cos.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-31))', "tl.cos(word * (math.pi * 2.0**-31))"),),
    ),
    Mutant(
        "no wait state behind the sine, on AMD alone",
        NOISE,
        "noise_triton",
        (('_gcn("v_sin_f32 $0, $1\\ns_nop 0"', '_gcn("v_sin_f32 $0, $1"'),),
        target="gfx942",
    ),
    Mutant("nine rounds of Philox", NOISE, "noise_triton", (("tl.static_range(10)", "tl.static_range(9)"),)),
    Mutant(
        "the group of four in the wrong word of the counter",
        NOISE,
        "noise_patchify_triton",
        (("philox(group, zero, zero, zero,", "philox(zero, group, zero, zero,"),),
    ),
    Mutant(
        "every bfloat16 truncated",
        NOISE,
        "noise_patchify_triton",
        (
            (
                "(clean + noise * (scale * amount)).to(out.dtype.element_ty)",
                '(clean + noise * (scale * amount)).to(out.dtype.element_ty, fp_downcast_rounding="rtz")',
            ),
        ),
    ),
    Mutant("one pair of bfloat16 truncated by the compiler", NOISE, PTX, ((r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2"),)),
    Mutant(
        "the level in float64",
        NOISE,
        "noise_patchify_triton",
        (
            (
                "only_amount = tl.load(sigma + sample).to(tl.float32)",
                "only_amount = tl.load(sigma + sample).to(tl.float64)",
            ),
        ),
    ),
    Mutant(
        "no mask where the last program stores",
        NOISE,
        "noise_patchify_triton",
        (("chunks(noisy, STORE), mask=kept)", "chunks(noisy, STORE))"),),
    ),
    Mutant("a store that lost its mask in the compiler", NOISE, PTX, ((r"@%p\d+ (st\.global)", r"\1"),)),
    Mutant(
        "patches one column further right",
        NOISE,
        "noise_patchify_triton",
        (("(y // PATCH * columns + x) * (WIDTH", "(y // PATCH * columns + x + 1) * (WIDTH"),),
    ),
    Mutant(
        "planes that lie one element closer",
        PLANES,
        "noise_patchify_triton",
        (("channel * (count // CHANNELS)\n", "channel * (count // CHANNELS - 1)\n"),),
    ),
    Mutant(
        "programs of one warp for the work of four",
        NOISE,
        "noise_patchify_triton",
        (
            (
                "            **tile(patch_size, channels),\n            num_warps=max(1, threads // gpu.warp_size),",
                "            **tile(patch_size, channels),\n            num_warps=1,",
            ),
        ),
    ),
    Mutant(
        "levels and samples exchanged where sigma is read",
        SWEEP,
        "noise_patchify_triton",
        (("sigma + level * samples + sample", "sigma + sample * levels + level"),),
    ),
    Mutant(
        "the next level stored where the next draw belongs",
        SWEEP,
        "noise_patchify_triton",
        (("destination += draws * samples * size", "destination += samples * size"),),
    ),
    Mutant(
        "the gradient of every channel divided by the std of the first",
        PLANES,
        "noise_patchify_triton",
        (("(total[e] * inverse_std[e % CHANNELS],)", "(total[e] * inverse_std[0],)"),),
        part=BACKWARD,
    ),
    Mutant(
        "a mean over one element too few",
        LOSS,
        "patch_loss_triton",
        (("_patch_sum(squares, PATCHES) * (1.0 / SIZE)\n", "_patch_sum(squares, PATCHES) * (1.0 / (SIZE - 1))\n"),),
    ),
    Mutant(
        "a sum by atomic additions",
        LOSS,
        "patch_loss_triton",
        (("tl.store(partials + program, tl.sum", "tl.atomic_add(partials + program, tl.sum"),),
    ),
    Mutant(
        "a shuffle from the wrong lane", LOSS, PTX, ((r"(shfl\.sync\.bfly\.b32[^;]*), 16, 31, -1;", r"\1, 8, 31, -1;"),)
    ),
    Mutant("no barrier before shared memory is read", LOSS, PTX, ((r"bar\.sync\s+0;", ""),)),
    Mutant(
        "the variance of n for that of n - 1",
        DECODE,
        "decode_patches_triton",
        (("PATCHES, RUNS) * (1.0 / (SIZE - 1))\n    slope", "PATCHES, RUNS) * (1.0 / SIZE)\n    slope"),),
    ),
    Mutant(
        "a gradient for saturated pixels",
        DECODE,
        "decode_patches_triton",
        (("tl.where((pixel >= 0) & (pixel <= 1), upstream[e], 0.0)", "upstream[e]"),),
        part=BACKWARD,
    ),
    Mutant(
        "threads without pixels in a patch's mean",
        "decode_patches, input, fp32 planes, patch 14, bf16",
        "decode_patches_triton",
        (
            (
                "_over_patch(tl.where(inside, total, 0.0), PATCHES, RUNS) * (1.0 / SIZE)",
                "_over_patch(total, PATCHES, RUNS) * (1.0 / SIZE)",
            ),
        ),
    ),
    Mutant(
        "no clamp to one",
        STEP,
        "attack_step_triton",
        ((CLAMP, CLAMP.partition("\n")[2]),),
    ),
    Mutant(
        "a step up where the gradient is negative",
        STEP,
        "attack_step_triton",
        (("tl.where(slope < 0, -1.0, slope)", "tl.where(slope < 0, 1.0, slope)"),),
    ),
    Mutant(
        "a number for NaN",
        STEP,
        "attack_step_triton",
        ((CLAMP, CLAMP.replace(", propagate_nan=tl.PropagateNan.ALL", "")),),
    ),
    Mutant(
        "accesses of one element at a time",
        STEP,
        "attack_step_triton",
        (
            (
                'do_not_specialize=["tiles", "step_stride", "epsilon_stride"]',
                'do_not_specialize=["tiles", "step_stride", "epsilon_stride", "elements"]',
            ),
        ),
    ),
    Mutant(
        "offsets of samples in 32 bits",
        HUGE,
        "attack_step_triton",
        (
            (
                "sample = (program // tiles).to(tl.int64)\n    first = (program % tiles).to(tl.int64) * BLOCK",
                "sample = program // tiles\n    first = (program % tiles).to(tl.int64) * BLOCK",
            ),
        ),
    ),
    Mutant(
        "the start from the stream of the seeds",
        START,
        "attack_step_triton",
        (("STREAM=int(Stream.START)", "STREAM=int(Stream.SEED)"),),
    ),
    Mutant(
        "product and sum of the start rounded once",
        START,
        "attack_step_triton",
        (("            enable_fp_fusion=False,\n", ""),),
    ),
)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def _edited(text: str, mutant: Mutant) -> str:
    for before, after in mutant.edits:
        found = re.search(before, text) if mutant.file == PTX else text.count(before) == 1
        if not found:
            raise ValueError(f"mutant {mutant.name!r}: {before!r} is not in {mutant.file} (once): adapt the mutant")
        text = re.sub(before, after, text, count=1) if mutant.file == PTX else text.replace(before, after)
    return text


@contextlib.contextmanager
def _mutated(mutant: Mutant | None) -> Iterator[None]:
    """Inside, the launchers launch the mutant's kernels; without one, fresh copies of the kernels as they are."""
    with contextlib.ExitStack() as stack:
        kept = {name: sys.modules[name] for name in sys.modules if re.fullmatch(r"denim\.kernels\.\w+_triton", name)}
        for name in kept:
            del sys.modules[name]
        dispatch._triton_module.cache_clear()
        stack.callback(sys.modules.update, kept)
        stack.callback(dispatch._triton_module.cache_clear)
        if mutant is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if mutant.file == PTX:
                _mutate_ptx(stack, mutant, folder)
            else:
                _load(mutant, folder)
        yield


def _load(mutant: Mutant, folder: Path) -> None:
    """The edited module under its own name. It is a file, since Triton reads the source of kernels."""
    path, name = folder / f"{mutant.file}.py", f"denim.kernels.{mutant.file}"
    path.write_text(_edited((KERNELS / path.name).read_text(), mutant))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _mutate_ptx(stack: contextlib.ExitStack, mutant: Mutant, folder: Path) -> None:
    """ptxas and the machine get the edited text, in a cache of the mutant's own: its source is that of the kernel."""
    from triton.backends.nvidia.compiler import CUDABackend

    make = CUDABackend.make_ptx

    def edited(self: Any, *given: Any, **options: Any) -> str:
        return _edited(make(self, *given, **options), mutant)

    stack.enter_context(mock.patch.object(CUDABackend, "make_ptx", edited))
    stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder)))


# --- proofs -----------------------------------------------------------------------------------------------------------


def _case(name: str) -> Case:
    (case,) = (case for case in CASES if f"{case.operation}, {case.name}" == name)
    return case


def _executed(mutant: Mutant) -> str:
    from denim.benchmarks.machine_code.ptx.check import resized, run_case

    if mutant.case == HUGE:
        return _end_of_huge(interpreted=False)
    case = _case(mutant.case)
    return _fault(run_case(resized(case) if case.built else case, (mutant.part,), 90))


def _interpreted(mutant: Mutant) -> str:
    """In a process of its own: the interpreter follows any address, so that a mutant may crash it."""
    context = multiprocessing.get_context("fork")
    answers, ours = context.Pipe(duplex=False)
    process = context.Process(target=lambda: ours.send(_interpret(mutant)))
    process.start()
    ours.close()
    try:
        return str(answers.recv())
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGSEGV:
            raise RuntimeError(f"mutant {mutant.name!r}: its interpreter ended with {process.exitcode}") from None
        return "segmentation fault"
    finally:
        process.join()


def _interpret(mutant: Mutant) -> str:
    from denim.benchmarks.machine_code.ptx.check import interpret_case

    return (
        _end_of_huge(interpreted=True)
        if mutant.case == HUGE
        else _fault(interpret_case(_case(mutant.case), (mutant.part,)))
    )


def _fault(outcome: Any) -> str:
    """In a few words; empty if all is well."""
    if outcome.failure:
        trap, _, _ = outcome.failure.partition(":")
        return str(trap)
    wrong = sum(agreement.outside for agreement in outcome.agreements)
    return f"{wrong} wrong of {sum(agreement.values for agreement in outcome.agreements)}" if wrong else ""


def _end_of_huge(interpreted: bool) -> str:
    """The last program of an attack on tensors that no memory holds, against the reference on the last sample."""
    from denim.benchmarks.machine_code.cases import launch
    from denim.benchmarks.machine_code.ptx.launch import run_on_cpu
    from denim.benchmarks.machine_code.ptx.traps import Trap

    dtype = torch.float16  # which the interpreter rounds to
    ends = [torch.linspace(0.1 + 0.1 * k, 0.9, HUGE_SHAPE[1]).to(dtype) for k in range(3)]
    tensors = []
    for end in ends:
        tensors.append(reserved(HUGE_SHAPE, dtype=dtype))
        tensors[-1][-1] = end
    step_size, epsilon = torch.tensor(0.1), torch.tensor(0.5)
    module = importlib.import_module("denim.kernels.attack_step_triton")
    gpu = dispatch.GPU("plain" if interpreted else "ptx", 32)
    with contextlib.ExitStack() as stack:
        if interpreted:
            stack.enter_context(mock.patch.object(module, "attack_step_kernel", LastProgram(module.attack_step_kernel)))
        else:
            stack.enter_context(run_on_cpu(90, programs=lambda total: [total - 1]))
        stack.enter_context(mock.patch.object(torch, "empty", reserved))
        try:
            got = launch(AttackStep(), FORWARD, (*tensors, step_size, epsilon), gpu)
        except Trap as trap:
            return type(trap).__name__
        wrong = int((got[-1] != attack_step(*(end[None] for end in ends), step_size=step_size, epsilon=epsilon)).sum())
    return f"{wrong} wrong of {HUGE_SHAPE[1]}" if wrong else ""


def _counted(mutant: Mutant) -> tuple[str, str]:
    """What the invariants and the budgets say."""
    from denim.benchmarks.machine_code.budgets import compare, read_budgets
    from denim.benchmarks.machine_code.cases import BUILDS
    from denim.benchmarks.machine_code.invariants import broken_invariants
    from denim.benchmarks.machine_code.report import build_and_count

    if mutant.case == HUGE:
        mutant = mutant._replace(case=STEP)
    (one,) = (build for build in BUILDS if (build.case, build.part) == (_case(mutant.case), mutant.part))
    entry = build_and_count(one.name, mutant.target)
    start = f"{one.name}, {mutant.target}: "
    broken = [text.removeprefix(start).partition(":")[0] for text in broken_invariants(one, mutant.target, entry)]
    worse, _ = compare(read_budgets()[1], {one.name: {mutant.target: entry}}, complete=False)
    return "; ".join(broken), "; ".join(text.removeprefix(start) for text in worse)


def prove(mutant: Mutant, changed: bool, interpreted: bool) -> dict[str, str]:
    """Run the proofs of one kind on a mutant, or on the kernel as it is.

    Args:
        mutant: of `MUTANTS`.
        changed: whether the mistake is made.
        interpreted: the interpreter alone; else all others. For a process that has imported Triton with
            TRITON_INTERPRET=1, or without.

    Returns:
        {proof: what it found in a few words; empty if nothing}.
    """
    torch.set_num_threads(1)
    given = mutant if changed else None
    if interpreted:
        with _mutated(None if mutant.file == PTX else given):
            return {"interpreter": _interpreted(mutant)}
    with _mutated(given):
        found = {"executed": _executed(mutant)}
    with _mutated(given):  # anew: a build replaces the functions of the kernels
        found["invariants"], found["budgets"] = _counted(mutant)
    return found


# --- the table --------------------------------------------------------------------------------------------------------

Found = dict[tuple[str, bool], dict[str, str]]
"""By the name of a mutant, and whether its mistake was made."""


def prove_all(mutants: Sequence[Mutant] = MUTANTS, workers: int | None = None) -> Found:
    """All proofs on mutants, and on the kernels as they are; each kernel and case once.

    Args:
        mutants: of `MUTANTS`.
        workers: processes; by default as many as there are processors.
    """
    originals = {(mutant.case, mutant.part, mutant.target): mutant for mutant in mutants}
    jobs = [*((mutant, True) for mutant in mutants), *((mutant, False) for mutant in originals.values())]
    found: Found = {(mutant.name, changed): {} for mutant, changed in jobs}
    context = multiprocessing.get_context("spawn")
    for interpreted in (True, False):
        # Triton decides between interpreter and compiler when it is imported.
        with (
            mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(interpreted)), DENIM_NOISE="eager"),
            concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool,
        ):
            answers = pool.map(functools.partial(prove, interpreted=interpreted), *zip(*jobs, strict=True))
            for (mutant, changed), answer in zip(jobs, answers, strict=True):
                found[mutant.name, changed] |= answer
    return found


def faults(found: Mapping[tuple[str, bool], Mapping[str, str]]) -> list[str]:
    """What is wrong with the proofs: kernels that fail one as they are, and mutants that pass all."""
    texts = []
    for (name, changed), answer in found.items():
        caught = {proof: text for proof, text in answer.items() if text}
        if changed and not caught:
            texts.append(f"{name}: no proof notices it")
        if not changed:
            texts += [f"the kernel of {name!r} as it is, {proof}: {text}" for proof, text in caught.items()]
    return texts


INTRODUCTION = """# Mutants of the kernels

Each row is a Triton kernel with one mistake, made in a copy of its source or in the PTX that goes to ptxas. The columns
are proofs that need no GPU:

- **interpreter**: the Triton source in Triton's interpreter, against the definition in float64;
- **invariants**, **budgets**: the machine code that the mutant is built to, counted ([Kernels](kernels.md));
- **executed**: the mutant's PTX, executed on a CPU, against the definition in float64.

A cell says what the proof found, and "-" if nothing. The kernels as they are pass all proofs in the same run. The torch
reference shares no code with the kernels, so it passes whatever is wrong with them; the other proofs compare with it or
with the definition.

`make mutants` runs the proofs and writes this page. It fails where a mutant passes all proofs, and where a kernel
without a mistake fails one.
"""


def _cell(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...") or "-"


def page(mutants: Sequence[Mutant], found: Mapping[tuple[str, bool], Mapping[str, str]]) -> str:
    """The page of the documents, in Markdown."""
    lines = ["| mutant | case | " + " | ".join(PROOFS) + " |", "| --- " * (2 + len(PROOFS)) + "|"]
    alone = 0
    for mutant in mutants:
        answer = found[mutant.name, True]
        alone += [proof for proof in PROOFS if answer[proof]] == ["executed"]
        where = f"{mutant.case}, {mutant.part}" + (f", {mutant.target}" if mutant.target != "sm_90" else "")
        where += ", edited PTX" if mutant.file == PTX else ""
        lines.append("| " + " | ".join([mutant.name, where, *(_cell(answer[proof]) for proof in PROOFS)]) + " |")
    summary = f"{len(mutants)} mutants, all caught; {alone} of them by execution alone."
    return f"{INTRODUCTION}\n{summary}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run mutants of the kernels through the proofs that need no GPU.")
    parser.add_argument("--page", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--only", nargs="+", default=[], help="words; mutants with one of them in their names are run")
    parser.add_argument("--workers", type=int, help="processes; by default one per processor")
    given = parser.parse_args()
    mutants = [one for one in MUTANTS if not given.only or any(word in one.name for word in given.only)]
    if not mutants:
        raise SystemExit(
            "no mutant has such a word in its name; these are the mutants:\n  "
            + "\n  ".join(one.name for one in MUTANTS)
        )
    found = prove_all(mutants, given.workers)
    for (name, changed), answer in found.items():
        said = "; ".join(f"{proof}: {answer[proof]}" for proof in PROOFS if answer[proof])
        print(f"{name if changed else f'(as it is: {name})'}: {said or 'passes'}")
    if wrong := faults(found):
        raise SystemExit("\n".join(wrong))
    if given.page:
        given.page.write_text(page(mutants, found))


if __name__ == "__main__":
    main()
