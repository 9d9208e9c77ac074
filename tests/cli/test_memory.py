"""Memory that is freed and allocated again costs no new pages, unless the user has chosen otherwise."""

import os
import subprocess
import sys

import pytest

from denim.cli import certify, memory

CODE = """
import resource, sys
from denim.cli.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block) // 4096)
    del block
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (64 << 20) // os.sysconf("SC_PAGESIZE")


def run(mode, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in memory.CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", CODE, mode],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="glibc alone has these parameters"
)
def test_freed_memory_is_used_again():
    kept, faults = run("keep")
    assert kept == "True"
    # Huge pages are fewer, of either way.
    assert faults < PAGES * 3 / 2
    assert faults < run("leave")[1] / 5


@pytest.mark.parametrize("name", sorted(memory.CHOSEN))
def test_what_the_user_has_chosen_stays(name):
    value = "glibc.malloc.mmap_threshold=65536" if name == "GLIBC_TUNABLES" else "65536"
    assert run("keep", **{name: value})[0] == "False"


def test_another_c_library_is_left_alone(monkeypatch):
    for name in memory.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "confstr_names", {})
    assert not memory.keep_freed_memory()


def test_a_certification_on_a_cpu_keeps_it(monkeypatch):
    class KeptError(Exception):
        pass

    def keep():
        raise KeptError

    monkeypatch.setattr(memory, "keep_freed_memory", keep)
    with pytest.raises(KeptError):
        certify.main(classifier="nothing", device="cpu")
