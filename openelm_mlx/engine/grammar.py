"""Constrained answers: they follow a JSON schema, a regular expression or a list of choices.

llguidance parses the text and knows which tokens may come next; `sampling.draw` applies its masks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import GenerationOptions

Format = tuple[str, Any]  # of an answer: the option that sets it, and its value
# the advice for each option if its value cannot be followed
ADVICE = {
    "json_schema": "Leave out what is not supported, or say it in another way",
    "regex": (
        "Allowed is what most languages have, without look-around, word boundaries and references"
    ),
    "choices": "Give texts that the model's tokens can spell",
}
# Without no_forcing, text that the grammar leaves no choice in is allowed only in the tokenizer's
# own spelling.
HEADER = '%llguidance {"no_forcing": true}\nstart: '
# The text is laid out as by json.dumps. A small model that may write white space never stops.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LIMITS: dict[str, Any] = {}  # llguidance's own, which end what would take forever
LITERAL = {"const", "default", "enum", "examples"}  # keys of a schema whose values are not schemas
# keys beside which an object may have more properties, its own or those of joined schemas
OPENING = {"patternProperties", "minProperties", "allOf", "anyOf", "oneOf", "$ref"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_vocabularies: WeakKeyDictionary[Tokenizer, dict[int, Any]] = WeakKeyDictionary()


def constraint(engine: Engine, options: GenerationOptions) -> Constraint | None:
    """Return the constraint of one answer, or None if the options do not set a format.

    The format is that of the answer's entire text, as a `StreamingDecoder` without a prompt shows
    it. Raises `OptionError` if this model's tokens cannot spell any text in the format.
    """
    if not options.constrained:
        return None
    ends = {*engine.config.eos_token_ids, *options.stop_tokens}
    return Constraint(engine.tokenizer, engine.vocab, ends, format_of(options))


def format_of(options: GenerationOptions) -> Format:
    """Return the format that constrained options set.

    Raises `OptionError` for several, for one that cannot be followed, and without llguidance.
    """
    given = [name for name in ADVICE if getattr(options, name) not in (None, ())]
    if len(given) > 1:
        what = f"{' and '.join(given)} are given"
        raise OptionError(f"{what}; an answer has one format, so leave one out")
    if options.ignore_eos:
        what = f"{given[0]} and ignore_eos are given"
        raise OptionError(f"{what}; a constrained answer has an end, so leave one out")
    name, value = given[0], getattr(options, given[0])
    grammar(name, value)
    return name, value


@lru_cache(maxsize=64)
def grammar(name: str, value: Any) -> str:
    """Return the grammar of an answer's tokens in llguidance's dialect of Lark.

    The tokens may begin with one space more than the text, because the first token of a word has
    one; those of a text that begins with a space begin with two. Raises `OptionError`.
    """
    try:
        from llguidance import LLMatcher, regex_to_lark
    except ImportError:
        advice = "pip install 'openelm-mlx[grammar]'"
        raise OptionError(f"{name} needs the package llguidance; {advice}") from None
    try:
        " ".join((value,) if isinstance(value, str) else value).encode()
    except UnicodeEncodeError:
        why = "that is not valid UTF-8, so no text has it"
        raise OptionError(f"{name} is {value!a}; {why}") from None
    if name == "json_schema":
        schemas = (json.dumps({"x-guidance": LAYOUT} | schema) for schema in schemas_of(value))
        texts = [f'SPACE? answer\nSPACE: " "\nanswer: %json {schema}' for schema in schemas]
    else:
        choices = (json.dumps(choice, ensure_ascii=False) for choice in value)
        choice = f"/{regex_to_lark(value, '')}/" if name == "regex" else " | ".join(choices)
        texts = [f'ANSWER\nANSWER: (" " TEXT) | (TEXT & ~/ (?s:.)*/)\nTEXT: {choice}']
    for text in texts:
        wrong, reports = LLMatcher.validate_grammar_with_warnings(HEADER + text)
        if not wrong:
            return HEADER + text
    raise refusal(name, value, reports[0])


def limited(schema: Any) -> Any:
    """Return a narrower schema whose documents come to an end, as a small model may go on forever.

    Where the schema leaves it open, numbers lie within 2**53 (RFC 8259, section 6), with at most
    nine digits after the point and no exponent, and objects have only the properties it lists.
    """
    if isinstance(schema, list):
        return [limited(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: part if key in LITERAL else limited(part) for key, part in schema.items()}
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "integer" in kinds or "number" in kinds:
        made = {"minimum": -(2**53), "maximum": 2**53} | made
    bounds = [made[key] for key in BOUNDS & made.keys()]
    tiny = any(isinstance(bound, float) and 0 < abs(bound) < 1e-6 for bound in bounds)
    if "number" in kinds and not tiny:
        made = {"multipleOf": 1e-9} | made
    if schema.get("properties") and not OPENING & schema.keys():
        made = {"additionalProperties": False} | made
    return made


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return a schema as JSON. Raises `OptionError` for a value that JSON cannot express."""
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise OptionError(f"json_schema is {shown(schema)}; that is not JSON: {error}") from None


def schemas_of(text: str) -> list[dict[str, Any]]:
    """Return the JSON schema of a text twice: `limited`, unless it joins others, and as it is.

    Raises `OptionError`.
    """
    try:
        schema = json.loads(text)
        schemas = [schema if '"allOf"' in text else limited(schema), schema]
    except ValueError as error:
        raise OptionError(f"json_schema is {shown(text)}; that is not JSON: {error}") from None
    except RecursionError:
        raise OptionError(f"json_schema is {shown(text)}; it is nested too deeply") from None
    if not isinstance(schema, dict):
        raise OptionError(f"json_schema is {shown(text)}; allowed is a schema that is an object")
    return schemas


def refusal(name: str, value: Any, report: str) -> OptionError:
    """Return an error whose one line has the essence of llguidance's report."""
    cause = re.search(r"^error: (.*)", report, re.M) or re.search(
        r"(?:JSON schema: |\(in regex\): |^)(?!at \d)(.*?)(?: in regex /.*)?$", report, re.M
    )
    why = f"it cannot be followed: {cause[1] if cause else report}"
    if "NoExtension" in report:
        why = "this model's tokens cannot spell such a text"
    return OptionError(f"{name} is {shown(value)}; {why}. {ADVICE[name]}")


class Constraint:
    """The tokens with which one answer may continue.

    A mask is a row of bits, the lowest of a word first: 1 for a token that is allowed, ends of text
    included where the text may end. Arrays from `mask` and `along` are valid until the next call.
    If the format becomes too complex to be followed, the constraint is `broken` and the text ends.
    Raises `OptionError` if the tokens cannot spell any text in the format.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab: int, ends: Iterable[int], wanted: Format
    ) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._words = (vocab + 31) // 32
        self._ends, self._eos = frozenset(ends), tokenizer.eos_id
        self._on = bits(self._ends, self._words)  # set where the text may end
        self._off = ~bits({*self._ends, self._eos}, self._words)  # cleared elsewhere
        self._masks, self._address = buffer(1, self._words)
        self.broken = False
        limits = LLParserLimits(verbose_errors=False, **LIMITS)
        known = vocabulary(tokenizer, vocab)
        self._matcher = LLMatcher(known, grammar(*wanted), log_level=0, limits=limits)
        self.mask()
        if self.broken:
            raise refusal(*wanted, self._matcher.get_error())

    def mask(self) -> NDArray[np.uint32]:
        """Return the mask of the next token, [ceil(vocab / 32)] uint32."""
        return self._fill(0)

    def along(self, drafts: Sequence[int]) -> tuple[NDArray[np.uint32], int]:
        """Return the masks along a draft, and how many of its tokens are usable.

        A draft is usable up to the first token that is not allowed or ends the text. The masks, one
        before each usable token and one after the last, are [usable + 1, ceil(vocab / 32)] uint32.
        The constraint stays where it was.
        """
        if len(drafts) >= len(self._masks):
            self._masks, self._address = buffer(len(drafts) + 1, self._words)
        mask, usable = self._fill(0), 0
        try:
            for token in drafts:
                if token in self._ends or not contains(mask, token):
                    break
                self.accept(token)
                usable += 1
                mask = self._fill(usable)
        finally:  # also after an interrupt
            if usable:
                self._matcher.rollback(usable)
        return self._masks[: usable + 1], usable

    def accept(self, token: int) -> None:
        """Go on with a token that was drawn; a token that ends the text changes nothing."""
        if token not in self._ends:
            self.broken = not self._matcher.consume_token(token)

    def _fill(self, row: int) -> NDArray[np.uint32]:
        mask: NDArray[np.uint32] = self._masks[row]
        self._matcher.unsafe_compute_mask_ptr(self._address + row * mask.nbytes, mask.nbytes)
        self.broken = self._matcher.is_error()
        may_end = contains(mask, self._eos)  # and nothing else may come once it is broken
        mask &= self._off
        if may_end:
            mask |= self._on
        return mask


def contains(mask: NDArray[np.uint32], token: int) -> bool:
    """Return whether a mask allows a token."""
    return bool(int(mask[token >> 5]) >> (token & 31) & 1)


def bits(tokens: Iterable[int], words: int) -> NDArray[np.uint32]:
    """Return the mask of these tokens, [words] uint32; ids beyond it are left out."""
    import numpy as np

    flags = np.zeros(words * 32, dtype=np.uint8)
    flags[[token for token in tokens if token < len(flags)]] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)


def buffer(rows: int, words: int) -> tuple[NDArray[np.uint32], int]:
    """Return an array of masks and its address, as asking for it takes longer than filling one."""
    import numpy as np

    masks = np.empty((rows, words), dtype=np.uint32)
    return masks, masks.ctypes.data


def vocabulary(tokenizer: Tokenizer, vocab: int) -> Any:
    """Return llguidance's index of a tokenizer's first `vocab` pieces, made once.

    32,000 pieces take 50 ms.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    built = _vocabularies.setdefault(tokenizer, {})
    if vocab not in built:
        built[vocab] = LLTokenizer(TokenizerWrapper(Pieces(tokenizer, vocab)), n_vocab=vocab)
    return built[vocab]


class Pieces:
    """The pieces of a tokenizer in the interface that llguidance wants.

    It does not refer to the tokenizer, so both can be freed together.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokens = [tokenizer.piece_bytes(token) for token in range(vocab)]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        return []  # it would spell forced text, and HEADER forces none
