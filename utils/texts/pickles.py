"""A pickled list of strings, read without ever running a pickle."""

import pickletools

from utils.cli import UsageError


def read_pickled_strings(data: bytes) -> list[str]:
    """Read a pickled list of strings.

    A pickle is a program, and `pickle.load` runs it. Here only the dozen opcodes that build lists
    and strings are understood; everything that could name a class, call it, or ask for memory
    that the file does not itself hold is unknown.

    Raises:
        UsageError: anything but a list of strings.
    """
    stack: list = []
    memo: dict[object, object] = {}
    marks: list[int] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "EMPTY_LIST":
                    stack.append([])
                case "MARK":
                    marks.append(len(stack))
                case "LIST":
                    start = marks.pop()
                    stack[start:] = [stack[start:]]
                case "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "APPEND":
                    item = stack.pop()
                    stack[-1].append(item)
                case "APPENDS":
                    start = marks.pop()
                    stack[start - 1].extend(stack[start:])
                    del stack[start:]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "STOP":
                    break
                case name:
                    raise UsageError(
                        "a .pkl may hold a list of strings and nothing else; this one has the "
                        f"opcode {name}. Save it as .json instead"
                    )
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the .pkl is damaged: {error}") from None
    if len(stack) != 1 or not isinstance(stack[0], list):
        raise UsageError("a .pkl must hold one list of strings")
    for number, text in enumerate(stack[0], start=1):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UsageError(f"a .pkl must hold one list of strings; entry {number} is a {kind}")
    return stack[0]
