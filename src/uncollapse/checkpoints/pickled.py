"""Pickles read as data: no name in them is ever looked up, nothing is called, and nothing but new containers is filled.

Python's unpickler, however restricted, builds what a pickle asks for out of real classes, and a real class can be
misused: numpy's lay arrays over any bytes, a path class can be changed for the whole process. Here a pickle's few dozen
instructions are carried out on plain containers. A name stays a name, and calling one gives a `Record` of the call,
unless the caller has a function of its own for it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

PROTOCOL = 5
_MOST_BITS = 4096
"""Of a whole number: a generator's state has 128 or 256. Beyond 14,000 Python refuses to write one out."""

Maker = Callable[..., Any]
"""Turns the arguments of a call into data; ours, never the file's."""


class Damaged(ValueError):
    """No pickle, a cut-off one, or one that does what no pickle of data does."""


class Refused(ValueError):
    """A name that is not on the list; the message is the name."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names: ``torch.FloatStorage``."""

    full: str


@dataclass(eq=False, slots=True)
class Record:
    """A call that a pickle asks for, not made; hashable, because an index has such keys."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    """What the object made would have been filled with: a dict of its fields, mostly."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.state.get(name, default) if isinstance(self.state, dict) else default


@dataclass(eq=False, slots=True)
class _Opaque:
    """Takes the place of a key that could not be one safely."""


_PUSHED = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}


def load(file: BinaryIO, names: Mapping[str, Maker | None], stored: Callable[[Any], Any] | None = None) -> Any:
    """The content of the pickle at the file's position, which is then behind it.

    Args:
        names: every full name that may occur, and what makes data of a call's arguments; None: a `Record`.
        stored: makes data of a persistent id, such as torch's storages. None: there are none.

    Returns:
        Plain values, lists (sets too), tuples, dicts, `Name` and `Record`, and what the makers return.

    Raises:
        Refused: a name that is not in ``names``. Damaged: anything else that is wrong. Others: from the makers.
    """
    machine = _Machine(names, stored)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.do(opcode.name, argument)
    except (IndexError, KeyError, UnicodeError) as error:
        raise Damaged(f"an instruction without its operands ({type(error).__name__})") from None
    if len(machine.stack) != 1:
        raise Damaged("an end in the middle")
    return machine.stack[0]


class _Machine:
    def __init__(self, names: Mapping[str, Maker | None], stored: Callable[[Any], Any] | None) -> None:
        self.names, self.stored = names, stored
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def do(self, what: str, argument: Any) -> None:
        stack = self.stack
        if what in _PUSHED:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                raise Damaged(f"a whole number of {argument.bit_length():,} bits")
            stack.append(argument)
        elif what in _EMPTY:
            stack.append(_EMPTY[what]())
        elif what in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif what in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif what == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif what == "PROTO":
            if argument > PROTOCOL:
                raise Damaged(f"pickle protocol {argument}, newer than the {PROTOCOL} that is known here")
        elif what not in ("FRAME", "STOP"):
            act = _ACTIONS.get(what)
            if act is None:
                raise Damaged(f"the instruction {what}, which no pickle of data has")
            act(self, argument)

    def marked(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        above, self.stack = self.stack, self.below.pop()
        return above

    def named(self, module: str, name: str) -> Name:
        module = _MOVED.get(module, module)
        if module.startswith("numpy.core"):  # as numpy 2 calls it
            module = "numpy._core" + module.removeprefix("numpy.core")
        full = f"{module}.{name}"
        if full not in self.names:
            raise Refused(full.removeprefix("builtins."))
        return Name(full)

    def called(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise Damaged("a call of what is no name")
        make = self.names[name.full]
        if make is None:
            return Record(name.full, arguments)
        try:
            return make(*arguments)
        except TypeError as error:
            raise Damaged(f"{name.full} with arguments that it does not take ({error})") from None

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, value: Any) -> None:
        self.stack.append(value)

    def fill(self, items: list[Any]) -> None:
        """A list's items, or keys and values of a dict, into what is on the stack; a record keeps none."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is dict:
            if len(items) % 2:
                raise Damaged("a key without a value")
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif not isinstance(target, Record):
            raise Damaged(f"items for a {type(target).__name__}")

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's own attributes say nothing that is needed
            raise Damaged(f"a state for a {type(target).__name__}")

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise Damaged("a tuple of what is not there")
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(taken)

    def reduce(self, _: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        self.put(self.called(name, arguments))

    def new_with_words(self, _: Any) -> None:
        words, arguments, name = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if words:
            raise Damaged("a call with named arguments")
        self.put(self.called(name, arguments))

    def stack_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("a name that is no text")
        self.put(self.named(module, name))

    def old_object(self, _: Any) -> None:
        name, *arguments = self.marked()
        self.put(self.called(name, tuple(arguments)))

    def old_instance(self, argument: str) -> None:
        arguments = tuple(self.marked())
        self.put(self.called(self.named(*argument.split(" ", 1)), arguments))

    def persistent(self, _: Any) -> None:
        if self.stored is None:
            raise Damaged("an object kept elsewhere")
        self.put(self.stored(self.stack.pop()))


def _key(value: Any) -> Any:
    """A key that costs nothing to hash: those of nested tuples and of chosen numbers can take for ever."""
    if type(value) in (str, bool, bytes, type(None), float, Record, Name):
        return value
    return value if type(value) is int and value.bit_length() < 64 else _Opaque()


_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": _Machine.mark,
    "POP": lambda m, _: m.stack.pop() if m.stack else m.marked(),
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.put(m.stack[-1]),
    "LIST": lambda m, _: m.put(m.marked()),
    "FROZENSET": lambda m, _: m.put(m.marked()),
    "TUPLE": lambda m, _: m.put(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "DICT": lambda m, _: _dict(m),
    "APPEND": lambda m, _: m.fill([m.stack.pop()]),
    "APPENDS": lambda m, _: m.fill(m.marked()),
    "ADDITEMS": lambda m, _: m.fill(m.marked()),
    "SETITEM": lambda m, _: m.fill([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.fill(m.marked()),
    "GLOBAL": lambda m, argument: m.put(m.named(*argument.split(" ", 1))),
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_words,
    "OBJ": _Machine.old_object,
    "INST": _Machine.old_instance,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _dict(machine: _Machine) -> None:
    items = machine.marked()
    machine.put({})
    machine.fill(items)
