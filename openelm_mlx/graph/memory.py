"""The memory that a graph takes while MLX evaluates it, from shapes alone.

`peak` does what MLX does, without the numbers: it takes the primitives in MLX's order, gives each
output a buffer, or that of an input which nobody else reads, and frees a buffer when the last work
that reads it is done. MLX prepares work ahead of what is done (`Pace`), which holds buffers longer.

The rules are those of MLX 0.32: mlx/transforms.cpp for the order, mlx/backend/cpu for buffers and
for the pace of a processor. A test holds them against `mx.get_peak_memory`. Metal's kernels choose
their copies and temporary buffers in other ways, and its pace is that of command buffers; neither
was measured.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterator
from typing import NamedTuple

from openelm_mlx.graph.layout import VIEWS, Layout, after, views
from openelm_mlx.graph.trace import FUSABLE, Graph, Node
from openelm_mlx.settings import Limits

WIDTH = 20  # MLX_BFS_MAX_WIDTH: primitives that wait at a time
COPIES_FIRST = {"Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate", "AddMM"}
"""They write onto a copy of one input, or onto that input itself."""


class Pace(NamedTuple):
    """How far MLX is ahead: so many groups of commands have been prepared and are not done."""

    commands: int = 10  # of a group: DISPATCHES_PER_TASK of mlx/backend/cpu/encoder.h
    groups: int = 10  # MAX_ACTIVE_TASKS of mlx/transforms.cpp
    releases: int = 1  # commands of a primitive that only free its inputs (cpu/eval.cpp)
    elements: int | None = None  # that the commands of a group read and write at most

    @classmethod
    def of_metal(cls, limits: Limits) -> Pace:
        """Return the pace of a GPU whose command buffers have these limits."""
        return cls(limits.operations, 10, 0, limits.elements)


class Buffer:
    """The memory of one array, and of the views of it."""

    __slots__ = ("holders", "size")

    def __init__(self, size: int) -> None:
        self.size, self.holders = size, 0  # arrays, and work that is not done


def evaluation_order(graph: Graph) -> list[Node]:
    """Return the primitives in the order of MLX's `eval_impl`: from the outputs back, by breadth,
    but by depth as soon as `WIDTH` of them wait.
    """
    made = {out.name: number for number, node in enumerate(graph.nodes) for out in node.outputs}
    reads = [[made[a.name] for a in node.inputs if a.name in made] for node in graph.nodes]
    reads.append([made[out.name] for out in graph.outputs if out.name in made])
    left = Counter(reads[-1])  # how often each is still read by what is not in its place yet
    found, stack = set(left), list(left)
    while stack:
        for number in reads[stack.pop()]:
            left[number] += 1
            if number not in found:
                found.add(number)
                stack.append(number)
    tape, at = [len(graph.nodes)], 0
    later: list[tuple[int, int]] = []
    while at < len(tape) or later:
        if at < len(tape):
            number, first = tape[at], 0
            at += 1
        else:
            number, first = later.pop()
        for place in range(first, len(reads[number])):
            if len(tape) - at >= WIDTH:
                later.append((number, place))
                break
            read = reads[number][place]
            left[read] -= 1
            if not left[read]:
                tape.append(read)
    return [graph.nodes[number] for number in tape[:0:-1]]


def peak(graph: Graph, given: Container[str] = (), pace: Pace | None = None) -> int:
    """Return the most bytes that an evaluation of the graph holds, its outputs among them.

    Inputs and constants are not counted, but for those `given`, which nobody else holds: MLX
    writes into their buffers or frees them. Without a `pace` each primitive is done at once.
    """
    return Evaluation(graph, given, pace).run()


class Evaluation:
    """One evaluation: which arrays and buffers live, and which work is not done yet."""

    def __init__(self, graph: Graph, given: Container[str], pace: Pace | None) -> None:
        self.order, self.pace = evaluation_order(graph), pace
        self.active = self.most = 0  # bytes
        self.commands = self.ended = self.done = self.touched = 0
        self.groups: deque[int] = deque()  # the last command of each that is not done
        self.waiting: deque[tuple[int, list[Buffer]]] = deque()
        self.layouts: dict[str, Layout] = {}
        self.buffers: dict[str, Buffer] = {}
        self.readers = Counter(array.name for node in self.order for array in node.inputs)
        self.readers.update(out.name for out in graph.outputs)  # the caller reads them
        made = {out.name for node in self.order for out in node.outputs}
        for array in (array for node in self.order for array in node.inputs):
            if array.name not in made and array.name not in self.layouts:
                own = array.name in given
                self.layouts[array.name] = Layout.rows(array.shape)
                self.buffers[array.name] = self.new(array.nbytes if own else 0)
                self.buffers[array.name].holders = 1
                self.readers[array.name] += not own

    def run(self) -> int:
        for node in self.order:
            self.evaluate(node)
        return self.most

    def evaluate(self, node: Node) -> None:
        inputs = [self.layouts[array.name] for array in node.inputs]
        read = [self.buffers[array.name] for array in node.inputs]
        outputs = after(node, inputs)
        made = self.made(node, inputs, outputs)
        copied = [self.new(size) for size in copies(node, inputs)]
        for out, layout, buffer in zip(node.outputs, outputs, made, strict=True):
            self.layouts[out.name], self.buffers[out.name] = layout, buffer
            buffer.holders += 1
        held = [*({*read, *made} - {made[0]}), *copied]
        for buffer in held:
            buffer.holders += 1
        self.submit(node, held, 0 if is_view(node, inputs) else len(copied) + written(node))
        for array in node.inputs:
            self.readers[array.name] -= 1
            if not self.readers[array.name]:
                self.release(self.buffers.pop(array.name))
        for out in node.outputs:
            if not self.readers[out.name]:
                self.release(self.buffers.pop(out.name))

    def made(self, node: Node, inputs: list[Layout], outputs: list[Layout]) -> list[Buffer]:
        """Return the buffers of the outputs: those of inputs where MLX takes these, or new ones."""
        read = [self.buffers[array.name] for array in node.inputs]
        if is_view(node, inputs):
            if node.name == "CustomTransforms":  # arguments, and what was made of them
                return read[-len(outputs) :]
            return read[: len(outputs)] if node.name == "Depends" else read[:1] * len(outputs)
        found: list[Buffer] = []
        for number in writes_over(node, inputs, outputs[0]):
            out = node.outputs[len(found)]
            name = node.inputs[number].name
            # `is_donatable` of mlx/array.h: nobody else reads the array, or its buffer
            free = self.readers[name] == read[number].holders == 1
            if free and node.inputs[number].dtype.size == out.dtype.size:
                found.append(read[number])
                if len(found) == len(outputs):
                    return found
        sizes = zip(node.outputs[len(found) :], outputs[len(found) :], strict=True)
        return found + [self.new(layout.elements * out.dtype.size) for out, layout in sizes]

    def submit(self, node: Node, held: list[Buffer], commands: int) -> None:
        """Give a primitive to the device, which holds these buffers until it has computed it."""
        pace = self.pace
        if pace is None:
            self.done = self.commands = self.commands + 1
        else:
            self.commands += commands + pace.releases
            self.touched += sum(array.size for array in (*node.inputs, *node.outputs))
            while self.commands - self.ended >= pace.commands:
                self.end(self.ended + pace.commands)
            if pace.elements is not None and self.touched > pace.elements:
                self.end(self.commands)
            while len(self.groups) > pace.groups:
                self.done = self.groups.popleft()
        self.waiting.append((self.commands, held))
        while self.waiting and self.waiting[0][0] <= self.done:
            for buffer in self.waiting.popleft()[1]:
                self.release(buffer)

    def end(self, command: int) -> None:
        """End a group of commands: it can be computed."""
        self.groups.append(command)
        self.ended, self.touched = command, 0

    def new(self, size: int) -> Buffer:
        self.active += size
        self.most = max(self.most, self.active)
        return Buffer(size)

    def release(self, buffer: Buffer) -> None:
        buffer.holders -= 1
        if not buffer.holders:
            self.active -= buffer.size


# --- the rules of single primitives


def is_view(node: Node, inputs: list[Layout]) -> bool:
    return node.name in VIEWS and bool(inputs) and views(node, inputs[0]) is not None


def writes_over(node: Node, inputs: list[Layout], output: Layout) -> Iterator[int]:
    """Yield the inputs into whose buffers a primitive writes if nobody else reads them."""
    if node.name in COPIES_FIRST:  # cpu/copy.cpp
        number = 2 if node.name == "AddMM" else 0
        if inputs[number].row_contiguous:
            yield number
    elif node.name in FUSABLE or node.name in ("Compiled", "Softmax"):
        # common/compiled.cpp, binary.h, unary.h, ternary.h: written as the inputs lie, or in rows
        alike = output.strides != Layout.rows(output.shape).strides
        for number, x in enumerate(inputs):
            fits = x.contiguous and x.distinct == output.elements > 1
            if fits and (alike or x.row_contiguous):
                yield number


def written(node: Node) -> int:
    """Return how many commands a primitive is, besides copies of its inputs."""
    if node.name == "Concatenate":
        return len(node.inputs)
    return 1 + (node.name in COPIES_FIRST)


def copies(node: Node, inputs: list[Layout]) -> list[int]:
    """Return the bytes of each input that is copied so that it can be read."""
    if node.name in ("Matmul", "AddMM"):  # cpu/matmul.cpp: rows or columns without gaps
        pairs = zip(node.inputs[:2], inputs[:2], strict=True)
        return [array.nbytes for array, x in pairs if not reads_matrix(x)]
    if node.name == "QuantizedMatmul":  # cpu/quantized.cpp
        pairs = zip(node.inputs, inputs, strict=True)
        return [array.nbytes for array, x in pairs if not x.row_contiguous]
    return []


def reads_matrix(x: Layout) -> bool:
    rows, columns = x.shape[-2:]
    return x.strides[-2:] in ((columns, 1), (1, rows))
