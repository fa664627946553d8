"""Builds pyops with gcc's AddressSanitizer and UndefinedBehaviorSanitizer, and runs the tests on that build.

``python tests/sanitize.py [arguments of pytest]`` runs the tests that reach the kernels if there are no arguments. Only
pyops' own code is checked, but all of its reads and writes are, because the whole process uses the sanitizer's
allocator. The build is in build/, next to the ordinary one. ATEN_CPU_CAPABILITY selects the instruction set, as usual.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "sanitized"

# libstdc++ is preloaded because the sanitizer looks up the functions that throw exceptions when it is loaded itself,
# which is before torch loads libstdc++.
PRELOADED = ("libasan.so", "libubsan.so", "libstdc++.so")
OPTIONS = {
    # Python frees little of its memory when it exits, and one test asks for more memory than there is.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
TESTS = [
    *(f"ops/test_{stem}.py" for stem in ("relu", "linear", "linear_batched", "conv2d", "max_pool2d", "fused")),
    *(f"ops/test_{stem}.py" for stem in ("algorithms", "threads", "errors")),
    *("package/test_lenet.py", "composing/test_fast_call.py", "cuda"),
    "--every=3",
    "--hypothesis-profile=thin",
]


def build() -> None:
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", LIBRARY]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYOPS_SANITIZE": "1"}, check=True)


def sanitized_environment() -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    paths = (subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in PRELOADED)
    environment = {"LD_PRELOAD": ":".join(paths), "PYTHONPATH": str(LIBRARY)}
    return os.environ | OPTIONS | environment | {"PYOPS_SANITIZE": "1"}  # for the emulated CUDA kernels too


def main() -> None:
    build()
    environment = sanitized_environment()
    # test_memory.py runs this program on another checking allocator; here the sanitizer's replaces it.
    subprocess.run([sys.executable, "programs/memory.py"], cwd=ROOT / "tests", env=environment, check=True)
    pytest = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *(sys.argv[1:] or TESTS)]
    sys.exit(subprocess.run(pytest, cwd=ROOT / "tests", env=environment).returncode)


if __name__ == "__main__":
    main()
