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
from typing import Any
from unittest import mock

import torch

from denim.benchmarks.case import FORWARD, Case
from denim.benchmarks.cases import CASES, AttackStep
from denim.benchmarks.machine_code.last_program import LastProgram, reserved
from denim.benchmarks.machine_code.mistakes import HUGE, HUGE_SHAPE, MUTANTS, PTX, STEP, Mutant
from denim.kernels import attack_step, dispatch

__all__ = ["MUTANTS", "PROOFS", "Mutant", "faults", "page", "prove"]

PROOFS = ("interpreter", "invariants", "budgets", "executed")
KERNELS = Path(dispatch.__file__).parent


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
