"""Compile kernels of openelm_mlx/model/kernels for the processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

import mlx.core as mx

from openelm_mlx.model.kernels.kernel import Kernel, Launch

HERE = Path(__file__).parent
NAMES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.bool_: "bool",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
    mx.int64: "int64_t",
    mx.uint64: "uint64_t",
    mx.uint16: "uint16_t",
    mx.complex64: "complex64_t",
}
# Arithmetic and indices that Metal leaves undefined end the run; variables do not start as zeros.
TRAPS = "bounds,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow"
FLAGS = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
KERNEL_FLAGS = [
    "-fno-exceptions",
    "-fno-asynchronous-unwind-tables",
    "-ftrivial-auto-var-init=pattern",
    f"-fsanitize={TRAPS}",
    "-fsanitize-undefined-trap-on-error",
]
POINTER = r"\bthreadgroup\b(?=(?:\s+\w+)+\s*[*&])"  # to threadgroup memory


class Wrong(Exception):
    """What a kernel does that no GPU promises to allow."""


class NotCompiled(Wrong):
    """A source that the compiler refuses."""


@dataclass(frozen=True)
class Variant:
    """A kernel for some types of its arguments, as MLX compiles one library for each."""

    kernel: Kernel
    inputs: tuple[tuple[mx.Dtype, bool], ...]  # the type, and whether it is a single number
    outputs: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, object], ...]  # an integer's value is None where a run brings it


@dataclass(frozen=True)
class Program:
    """A compiled kernel, and the integers of the template that a run brings."""

    address: int
    numbers: tuple[int, ...]


def program(kernel: Kernel, inputs: Sequence[mx.array], launch: Launch) -> Program:
    """Return a kernel compiled for these inputs. Raises `NotCompiled`."""
    wanted = form(variant(kernel, inputs, launch))
    found = compiled(wanted)
    if isinstance(found, str):
        raise NotCompiled(f"{kernel.name} does not compile:\n{found[:3000]}")
    return Program(found, tuple(int(v) for _, v in launch.template if isinstance(v, int)))


@cache
def form(exact: Variant) -> Variant:
    """Return the variant to compile: for integers of any value where the source allows it, so that
    fewer have to be compiled.
    """
    kernel = exact.kernel
    if re.search(rf"{POINTER}|if constexpr|\btemplate\b", kernel.header + kernel.source):
        return exact
    template = [(name, None if isinstance(v, int) else v) for name, v in exact.template]
    return replace(exact, template=tuple(template))


def variant(kernel: Kernel, inputs: Sequence[mx.array], launch: Launch) -> Variant:
    kinds = tuple((array.dtype, array.ndim == 0) for array in inputs)
    return Variant(kernel, kinds, tuple(launch.dtypes), launch.template)


_compiled: dict[Variant, int | str] = {}


def compiled(wanted: Variant) -> int | str:
    """Return the address of a program, or what the compiler says of it."""
    if wanted not in _compiled:
        compile_together([wanted])
    return _compiled[wanted]


def compile_together(wanted: Sequence[Variant]) -> None:
    """Compile many variants at once, which costs little more than one."""
    left = {number: one for number, one in enumerate(wanted) if one not in _compiled}
    flags = (
        [*KERNEL_FLAGS, "-O0"] if len(wanted) > 1 else KERNEL_FLAGS
    )  # compiled in a third of the time
    while left:
        texts = [cpp(number, one) for number, one in left.items()]
        try:
            made = ctypes.CDLL(str(library("\n".join([BEFORE, *texts]), flags)))
        except NotCompiled as error:
            said = str(error)
            faulty = {int(number) for number in re.findall(r"^kernel_(\d+):", said, re.M)}
            if not faulty and len(left) > 1:  # the compiler does not say which
                each = list(left.values())
                compile_together(each[: len(each) // 2])
                compile_together(each[len(each) // 2 :])
                return
            for number in faulty or list(left):
                _compiled[left.pop(number)] = said
            continue
        for number, one in left.items():
            _compiled[one] = ctypes.addressof(ctypes.c_char.in_dll(made, f"program_{number}"))
        return


@cache
def threads() -> ctypes.CDLL:
    """Return the library that runs threads. Kernels find its symbols when they are loaded."""
    path = library((HERE / "metal_threads.cpp").read_text(), [])
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def library(text: str, flags: Sequence[str]) -> Path:
    """Compile a text once, also over runs: the library's name is a hash of its text."""
    if flags:
        threads()
    shim = (HERE / "metal_shim.h").read_text()
    name = hashlib.sha256("".join([text, shim, *flags]).encode()).hexdigest()[:24]
    target = Path(tempfile.gettempdir()) / f"openelm-mlx-metal-{os.getuid()}" / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        source = target.with_name(f"{name}-{os.getpid()}.cpp")
        source.write_text(text)
        made = source.with_suffix(".so")
        command = ["g++", *FLAGS, *flags, "-I", str(HERE), "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        source.unlink()
        if done.returncode:
            raise NotCompiled(done.stderr)
        made.replace(target)
    return target


def cpp(number: int, one: Variant) -> str:
    """Return the C++ of a kernel, as MLX makes Metal of it."""
    kernel = one.kernel
    place = "" if "template" in kernel.header else f' __attribute__((section("memory_{number}")))'
    lines = [
        f"#undef threadgroup\n#define threadgroup static{place}",
        f"namespace kernel_{number} {{ using namespace metal;",
        checked(kernel.header),
        "void body() {",
    ]
    at = count()
    for name, value in one.template:
        if isinstance(value, mx.Dtype):
            lines.append(f"  using {name} = {NAMES[value]};")
        elif value is None:
            lines.append(f"  const int {name} = numbers[{next(at)}];")
        else:
            type_ = "bool" if isinstance(value, bool) else "int"
            lines.append(f"  constexpr {type_} {name} = {str(value).lower()};")
    buffer = count()
    for name, (dtype, single) in zip(kernel.inputs, one.inputs, strict=True):
        type_, where = f"const {NAMES[dtype]}", f"buffers[{next(buffer)}]"
        star, value = ("&", "*") if single else ("*", "")
        lines.append(f"  {type_}{star} {name} = {value}({type_}*){where};")
    for name, dtype in zip(kernel.outputs, one.outputs, strict=True):
        type_ = NAMES[dtype]
        lines.append(f"  {type_}* {name} = ({type_}*)buffers[{next(buffer)}];")
    source = checked(kernel.source)
    if any(value is None for _, value in one.template):
        source = re.sub(r"\bconstexpr\b", "const", source)
    lines += [f'#line 1 "kernel_{number}"', source, "}", "}", PROGRAM.replace("_N", f"_{number}")]
    return "\n".join(lines)


def checked(source: str) -> str:
    """Let arrays in threadgroup memory check who uses them. Where pointers to them are taken they
    are ordinary arrays, and only the order of threads shows a missing barrier.
    """
    source = re.sub(r"\n *(?:T|float|u?int) (\w+\[[^;=(]*\]);", poisoned, source)
    if re.search(POINTER, source):
        return re.sub(POINTER, "", source)
    declaration = r"\bthreadgroup (?!atomic)(\w+) (\w+)\[([^\]]+)\];"

    def declared(found: re.Match[str]) -> str:
        type_, name, size = found.groups()
        room = f"static shim::Cell<{type_}> room_{name}[shim::MOST_MEMORY / sizeof({type_})];"
        array = f"threadgroup shim::Shared<{type_}> {name}; {name}.set({size}, room_{name});"
        return room + array

    return re.sub(declaration, declared, source)


def poisoned(declaration: re.Match[str]) -> str:
    """Let arrays of a thread start as numbers that are none, which the compiler does not do."""
    names = re.findall(r"(\w+)\[", declaration[1])
    fills = [f" memset({name}, 0xff, sizeof {name});" for name in names]
    return "".join([declaration[0], *fills])


BEFORE = """
#include "metal_shim.h"
#define device
#define constant
#define thread
"""
PROGRAM = """
extern "C" {
extern char __start_memory_N[] __attribute__((weak));
extern char __stop_memory_N[] __attribute__((weak));
Program program_N = {kernel_N::body, __start_memory_N, __stop_memory_N};
}
"""
