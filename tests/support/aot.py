"""Compile a Triton kernel for Hopper without a GPU, and read what came out.

``compile_sm90a`` sends the kernel's name to one worker process, started on
first use, since Triton compiles only where ``TRITON_INTERPRET`` is off. They
talk in lines of JSON. The tools that read the result are in Triton's wheel.
"""

import atexit
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel; sizes are in bytes."""

    registers: int  # a thread
    spills: int  # stored and loaded by a thread for want of registers
    stack: int  # a thread
    shared: int
    threads: int  # a block
    opcodes: dict[str, int]  # of SASS, as "LDG.E.128": 8
    ptx: str


def compile_sm90a(kernel, signature, constexprs, num_warps=4, num_stages=3):
    """Compile a kernel as a launch with these arguments would.

    Args:
        kernel: ``"package.module:name"``.
        signature: A type for every other argument, as ``"*bf16"``, ``"i32"``,
            ``"i64"``, ``"fp32"``. A launch notices pointers and integers that
            16 divides: write ``"*bf16:16"`` and ``"i32:16"``. The order does
            not matter.
        constexprs: A value for every ``tl.constexpr``.

    Raises:
        RuntimeError: With the worker's message, if it does not compile.
    """
    job = [kernel, signature, constexprs, num_warps, num_stages]
    worker = _worker()
    try:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        _worker.cache_clear()
        raise RuntimeError(f"{kernel}: the worker died, code {worker.wait()}")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(f"{kernel}: {answer['error']}")
    return Compiled(**answer)


def compile_cuda(file):
    """Compile a ``.cu`` file for Hopper: what became of each kernel in it.

    Needs nvcc: mark the test ``nvcc``.

    Returns:
        ``Compiled`` by kernel name; ``threads`` is 0 and ``ptx`` "".

    Raises:
        RuntimeError: With nvcc's message, if it does not compile.
    """
    import triton

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        arch = "-gencode=arch=compute_90a,code=sm_90a"
        command = ["nvcc", "-std=c++17", arch, "-cubin", file, "-o", cubin]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{file}: {done.stderr}")
        usage = _run(tools.cuobjdump, "--dump-resource-usage", cubin)
        sass = _run(tools.nvdisasm, "-c", cubin)
    used = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
    )
    code = dict(
        re.findall(
            r"\.section\s+\.text\.(\w+),(.*?)(?=\.section|\Z)", sass, re.S
        )
    )
    return {
        name: Compiled(
            **_opcodes(code[name]),
            registers=int(registers),
            stack=int(stack),
            shared=int(shared),
            threads=0,
            ptx="",
        )
        for name, registers, stack, shared in used
    }


@functools.cache
def _worker():
    """The worker process, ended with this one."""
    worker = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
    )
    atexit.register(worker.kill)
    return worker


def _compile(name, signature, constexprs, num_warps, num_stages):
    """In the worker: compile, then ask ptxas and nvdisasm."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, attribute = name.partition(":")
    kernel = getattr(importlib.import_module(module), attribute)
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # autotuned, or with heuristics

    given, expected = {*signature, *constexprs}, {*kernel.arg_names}
    if given != expected:
        raise ValueError(f"the arguments {sorted(given ^ expected)} differ")
    types = {a: signature.get(a, "constexpr") for a in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature={a: t.removesuffix(":16") for a, t in types.items()},
        constexprs=constexprs,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, t in enumerate(types.values())
            if t.endswith(":16")
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools.cuobjdump, "--dump-resource-usage", cubin)
        sass = _run(tools.nvdisasm, "-c", cubin)

    return {
        **_opcodes(sass),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "ptx": compiled.asm["ptx"],
    }


def _opcodes(sass):
    """The instructions of a disassembly, counted, and what they spill."""
    # an instruction: its address in a comment, perhaps a predicate, its name
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    opcodes = Counter(re.findall(instruction, sass))
    return {
        "opcodes": opcodes,
        "spills": sum(n * _local_bytes(op) for op, n in opcodes.items()),
    }


def _local_bytes(opcode):
    """What an instruction moves to or from a thread's local memory."""
    name, *modifiers = opcode.split(".")
    if name not in ("LDL", "STL"):
        return 0
    return max([4] + [int(m) // 8 for m in modifiers if m in ("64", "128")])


def _run(tool, *args):
    command = [tool.path, *map(str, args)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
    return result.stdout + result.stderr


def _serve():
    """Answer jobs until the parent goes."""
    # what compilers print must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _compile(*json.loads(line))
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
