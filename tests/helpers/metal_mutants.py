"""Break the source of a kernel in every way that a list of operators knows.

A mutant is named by its operator and the line that it makes:

    bound moved: if (first + i <= uint(D)) {
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SOME = "thread_index_in_simdgroup"  # a condition on it parts the threads of a SIMD group
BARRIER = r"(?:threadgroup|simdgroup)_barrier\([^()]*\);"
REDUCTION = r"\bsimd_\w+(?=\()"
WORDS = r"(?:const |device |threadgroup |constant )*(?:T|float|bool|u?int|size_t|half|\w+_t)\b"
KEPT = f"const|return|using|for|{WORDS}[ *]"  # without a declaration nothing compiles
ARM = r"(?:[^:;?()\n]|\([^()\n]*\))+"
SETS = r"[-+*|&]?="

Edit = tuple[int, int, str]  # from, to, and what stands there instead
Operator = Callable[[str], Iterator[Edit]]


@dataclass(frozen=True)
class Mutant:
    name: str
    source: str


def closing(source: str, at: int) -> int:
    """Return where the bracket that opens at `at` closes.

    >>> closing("a[b[1] + 2] = 3", 1)
    10
    """
    depth = 0
    for place in range(at, len(source)):
        depth += (source[place] in "([") - (source[place] in ")]")
        if depth == 0:
            return place
    raise ValueError(f"no end of {source[at:]!r}")


def replaced(pattern: str, by: str) -> Operator:
    """Return the operator that replaces each match by `by`, which may name its groups."""

    def edits(source: str) -> Iterator[Edit]:
        for found in re.finditer(pattern, source):
            yield found.start(), found.end(), found.expand(by)

    return edits


def bracketed(pattern: str, by: str, where: Callable[[str], bool] = bool) -> Operator:
    """Return the operator that replaces the brackets after each match by `by.format(inside)`."""

    def edits(source: str) -> Iterator[Edit]:
        for found in re.finditer(pattern, source):
            end = closing(source, found.end())
            line = source[source.rfind("\n", 0, found.start()) + 1 : found.end()]
            if where(line):
                inside, name = source[found.end() + 1 : end], found.group()
                yield found.start(), end + 1, by.format(name=name, inside=inside)

    return edits


def not_declared(line: str) -> bool:
    """Tell an index from the size of an array that is declared, by the line up to its bracket."""
    return re.fullmatch(rf"\s*{WORDS} (?:\w+(?:\[\w+\])?, )*\w+", line) is None


def narrowed(source: str) -> Iterator[Edit]:
    """Declare a float in the type of the arrays. A source that does not name it, as that of the
    kernel that draws, has nothing to be narrowed to: its floats are not tried.
    """
    if re.search(r"\bT\b", source):
        yield from replaced(r"\bfloat (?=\w+(?:\[\w+\])?(?: =|;|,))", "T ")(source)


OPERATORS: dict[str, Operator] = {
    "barrier dropped": replaced(BARRIER, ""),
    "barrier in a branch": replaced(BARRIER, rf"if ({SOME} < 16) \g<0>"),
    "early return": replaced(
        rf"\n(?=[^\n]*(?:{BARRIER}|{REDUCTION}))", rf"\nif ({SOME} == 7) return;"
    ),
    "reduction dropped": bracketed(REDUCTION, "({inside})"),
    "reduction in a branch": bracketed(
        REDUCTION, f"({SOME} < 9 ? {{name}}({{inside}}) : ({{inside}}))"
    ),
    "index up": bracketed(r"\b\w+(?=\[)", "{name}[({inside}) + 1]", not_declared),
    "index down": bracketed(r"\b\w+(?=\[)", "{name}[({inside}) - 1]", not_declared),
    "value shifted": replaced(
        r"(\n\s*(?:const )?(?:u?int|size_t) \w+ = )([^;,]*);", r"\1(\2) + 1;"
    ),
    "bound moved": replaced(r" (<|>) ", r" \1= "),
    "bound moved inwards": replaced(r" (<|>)= ", r" \1 "),
    "comparison turned": replaced(r" (==|!=) ", " >= "),
    "condition true": bracketed(r"\bif (?=\()", "if (true)"),
    "condition false": bracketed(r"\bif (?=\()", "if (false)"),
    "narrowed": narrowed,
    "not rounded": bracketed(r"(?<=float\()T(?=\()", "({inside})"),
    "plus for minus": replaced(r" - (?!=)", " + "),
    "minus for plus": replaced(r" \+ (?!=)", " - "),
    "plus for times": replaced(r" \* ", " + "),
    "times for over": replaced(r" / ", " * "),
    "over for remainder": replaced(r" % ", " / "),
    "not accumulated": replaced(r" [-+*|&]= ", " = "),
    "other way": replaced(r" (\+|-)= ", r" *= "),
    "statement dropped": replaced(
        rf"(?<=\n)( *)(?! |{KEPT})[^\n;{{}}]*[\w\])] {SETS} [^\n;{{}}]*;", r"\1;"
    ),
    "constant up": replaced(r"(?<![\w.\[])(\d+)(?![\w.])(?!\])", r"(\1 + 1)"),
    "or for and": replaced(r" && ", " || "),
    "and for or": replaced(r" \|\| ", " && "),
    "arms swapped": replaced(rf" \? ({ARM}) : ({ARM})", r" ? \2 : \1"),
    "most for least": replaced(r"\b(simd_)?min(?=\()", r"\1max"),
    "least for most": replaced(r"\b(simd_)?max(?=\()", r"\1min"),
    "magnitude dropped": replaced(r"\bfabs(?=\()", ""),
    "floor for rint": replaced(r"\b(rint|nearest)(?=\()", "floor"),
    "sign dropped": replaced(r"(?<=[=:(] )-(?=\w)|(?<=\()-(?=\w)|(?<=: )-(?=\w)", ""),
    "function dropped": bracketed(r"\bmetal::precise::\w+(?=\()", "({inside})"),
}


def without_comments(source: str) -> str:
    return re.sub(r"\s*//[^\n]*", "", source)


def mutants(source: str, after: str = "") -> list[Mutant]:
    """Return all that the operators make of a source, or of what follows `after`, each once."""
    source, known = without_comments(source), len(without_comments(after))
    found: dict[str, Mutant] = {}
    names: Counter[str] = Counter()
    for operator, edits in OPERATORS.items():
        for start, end, text in edits(source):
            made = source[:start] + text + source[end:]
            if start < known or made == source or made in found:
                continue
            first = source.rfind("\n", 0, start + 1 if source[start] == "\n" else start) + 1
            shown = source if re.search("dropped|condition", operator) else made
            line = shown[first : shown.find("\n", start + 1)].strip()
            name = f"{operator}: {' '.join(line.split())}"
            names[name] += 1
            number = f" ({names[name]})" if names[name] > 1 else ""
            found[made] = Mutant(name + number, made)
    return list(found.values())
