"""The part of pickle that torch's state dicts use, read without running code or filling memory.

Python's own unpickler obeys any file: a memo index of ten digits makes it allocate for all indices
below, a tuple of tuples used as a key is hashed for ever. Here each opcode (as `pickletools`
decodes it) is a few lines that check what they get, and the number of opcodes is bounded.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from openelm_mlx.dtypes import BY_STORAGE
from openelm_mlx.errors import ConversionError, reason

MAX_OPCODES = 400_000  # the 3B's takes 10,000
MAX_NUMBER = 1 << 62


class StorageRecord(NamedTuple):
    """A storage in the archive: the type of its elements, its key, and how many they are."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it: a strided window (in elements) on a storage."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool = False  # torch's negative bit: the numbers stand for their opposites


class Global(NamedTuple):
    """A name that the pickle imports, one of those below."""

    name: str


class Mark:
    """Marks where a run of items begins on the stack."""


REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
ORDERED_DICT = "collections.OrderedDict"
STORAGES = {f"torch.{name}": dtype.name for name, dtype in BY_STORAGE.items()}
GLOBALS = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGES}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PLAIN = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
PLAIN |= {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
IGNORED = {"PROTO", "FRAME"}


def read_state(data: bytes, where: str) -> Any:
    """Return what the pickle describes, tensors as `TensorRecord`. Raises `ConversionError`."""
    machine = Machine(where)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_OPCODES:
                raise ConversionError(
                    f"{where}: data.pkl has more than {MAX_OPCODES} opcodes; no state dict needs "
                    "as many"
                )
            if opcode.name != "STOP":  # after which there is no more
                machine.run(opcode.name, argument)
        return machine.pop()
    except (ValueError, IndexError, TypeError, UnicodeError, OverflowError) as error:
        raise ConversionError(f"{where}: data.pkl is damaged ({reason(error):.100})") from None


class Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: Mapping[str, Callable[[Any], None]] = {
            "EMPTY_DICT": lambda _: self.push({}),
            "EMPTY_LIST": lambda _: self.push([]),
            "EMPTY_TUPLE": lambda _: self.push(()),
            "MARK": lambda _: self.push(Mark),
            "TUPLE": lambda _: self.push(tuple(self.items())),
            "TUPLE1": lambda _: self.push(self.last(1)),
            "TUPLE2": lambda _: self.push(self.last(2)),
            "TUPLE3": lambda _: self.push(self.last(3)),
            "BINGET": self.get,
            "LONG_BINGET": self.get,
            "BINPUT": self.put,
            "LONG_BINPUT": self.put,
            "MEMOIZE": lambda _: self.put(len(self.memo)),
            "GLOBAL": lambda argument: self.find(argument.replace(" ", ".", 1)),
            "STACK_GLOBAL": lambda _: self.find_pair(*self.last(2)),
            "BINPERSID": lambda _: self.push(self.storage(self.pop())),
            "REDUCE": lambda _: self.push(self.call()),
            "BUILD": lambda _: self.drop(),
            "SETITEM": lambda _: self.set_items(self.last(2)),
            "SETITEMS": lambda _: self.set_items(self.items()),
            "APPEND": lambda _: self.extend(self.last(1)),
            "APPENDS": lambda _: self.extend(self.items()),
        }

    def run(self, name: str, argument: Any) -> None:
        if name in PLAIN:
            self.push(argument)
        elif name in CONSTANTS:
            self.push(CONSTANTS[name])
        elif name in self.steps:
            self.steps[name](argument)
        elif name not in IGNORED:
            raise ConversionError(
                f"{self.where}: data.pkl uses pickle's opcode {name}, which no state dict needs: "
                "refused"
            )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.stack[-1] is Mark:
            raise ValueError("an item is missing")
        return self.stack.pop()

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple(self.pop() for _ in range(count))[::-1]

    def items(self) -> list[Any]:
        found = []
        while self.stack[-1] is not Mark:
            found.append(self.stack.pop())
        self.stack.pop()
        return found[::-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"memo {index} was never stored")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        if self.stack[-1] is Mark:
            raise ValueError("a mark is stored")
        self.memo[index] = self.stack[-1]

    def drop(self) -> None:
        """Discard the state of an object (a state dict's _metadata): nothing here has any."""
        self.pop()

    def set_items(self, pairs: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items are set in what is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError("a key is neither text nor a number")
            target[key] = value

    def extend(self, values: Any) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items are appended to what is not a list")
        self.stack[-1].extend(values)

    def find(self, name: str) -> None:
        if name not in GLOBALS:
            raise ConversionError(
                f"{self.where} asks for the global {name[:100]}, which no state dict of tensors "
                "needs: refused. Save it again as torch.save(model.state_dict(), path)"
            )
        self.push(Global(name))

    def find_pair(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global has no name")
        self.find(f"{module}.{name}")

    def storage(self, pid: Any) -> StorageRecord:
        """Read torch's tuple of one: ("storage", type, key, location, number of elements)."""
        problem = f"{self.where}: data.pkl refers to a storage in a way that torch does not"
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ConversionError(problem)
        kind, key, elements = pid[1], pid[2], pid[4]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        named = isinstance(key, (str, int)) and re.fullmatch(r"\w{1,64}", str(key), re.ASCII)
        if not dtype or not named or type(elements) is not int or not 0 <= elements < MAX_NUMBER:
            raise ConversionError(problem)
        return StorageRecord(dtype, str(key), elements)

    def call(self) -> Any:
        function, arguments = self.last(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("what is called is not a function")
        if function.name == ORDERED_DICT and not arguments:
            return {}
        if function.name == REBUILD_TENSOR and len(arguments) >= 4:
            tensor = self.tensor(*arguments[:4])
            return replace(tensor, negated=self.negated(*arguments[6:7]))
        if function.name == REBUILD_PARAMETER and isinstance(
            next(iter(arguments), 0), TensorRecord
        ):
            return arguments[0]
        raise ConversionError(
            f"{self.where}: data.pkl calls {function.name} in a way that torch does not"
        )

    def negated(self, metadata: Any = None) -> bool:
        """Return torch's negative bit. Its other bit, of conjugates, only complex numbers have."""
        bits = metadata or {}
        allowed = isinstance(bits, dict) and bits.keys() <= {"neg", "conj"}
        if not allowed or any(type(bit) is not bool for bit in bits.values()) or bits.get("conj"):
            raise ConversionError(
                f"{self.where}: data.pkl describes a tensor with the metadata {bits!r:.60}; only "
                "torch's negative bit is read. Save a clone() of each tensor"
            )
        return bool(bits.get("neg"))

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRecord:
        problem = f"{self.where}: data.pkl describes a tensor"
        tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
        if not isinstance(storage, StorageRecord) or not tuples:
            raise ConversionError(f"{problem} without a storage, a shape or strides")
        if len(shape) > 8 or len(strides) > 8:
            raise ConversionError(f"{problem} of {len(shape)} dimensions")
        numbers = (offset, *shape, *strides)
        if any(type(number) is not int or abs(number) > MAX_NUMBER for number in numbers):
            raise ConversionError(f"{problem} whose shape, strides or offset are not whole numbers")
        return TensorRecord(storage, offset, shape, strides)
