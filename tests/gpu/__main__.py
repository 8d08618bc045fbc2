"""One check, which says so where a package is missing: python -m tests.gpu CHECK [ARGUMENTS]

As `python -m tests.gpu.CHECK`, but for the end: "not run: no PACKAGE" and exit code 77 in place of a traceback.
"""

from __future__ import annotations

import runpy
import sys

from tests.gpu.runner import CANNOT_RUN

# Distributions by the module that is imported, where the names differ.
_DISTRIBUTIONS = {"megatron": "megatron-core", "pynvml": "nvidia-ml-py", "yaml": "pyyaml"}
_OURS = ("megatron_apo", "tests")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    check = sys.argv.pop(1)
    try:
        runpy.run_module(f"tests.gpu.{check}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _OURS:
            raise
        print(f"tests/gpu: not run: no {_DISTRIBUTIONS.get(package, package.replace('_', '-'))}", file=sys.stderr)
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main()
