"""`python -m denim.cli`: the `denim` command of this interpreter."""

from denim.cli import run

run()
