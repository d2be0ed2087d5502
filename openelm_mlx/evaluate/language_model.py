"""OpenELM as a model of lm-eval: its requests become token ids, and are answered by `score`.

Texts are encoded as Apple had it for the published figures (lm-evaluation-harness at dc90fec,
`add_bos_token=True`): the start token, then context and continuation by SentencePiece together, so
that a token lies in the continuation if it begins beyond the context. Two things differ, in what
Apple's command did with an empty context and with a whole text: it scored `</s> <s> text`, the
start token's own probability included; here, as in lm-eval since, a text follows one `<s>`.

In a chat the turns' ends are part of the prompt, but a prompt of lm-eval is a text, and a text
never is control tokens. So `TURN` marks the ends, and `ANSWER` the place where the model goes on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from openelm_mlx import device
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.loading import Engine, load
from openelm_mlx.engine.options import ModelOptions
from openelm_mlx.engine.prompts import check_messages
from openelm_mlx.engine.ranks import Ranks
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import EvaluationError, OptionError
from openelm_mlx.evaluate.options import EvaluateOptions
from openelm_mlx.evaluate.plan import Request
from openelm_mlx.evaluate.run import Progress, answers, texts
from openelm_mlx.evaluate.score import Answer
from openelm_mlx.evaluate.store import Store, identity
from openelm_mlx.fields import check_count, nearest
from openelm_mlx.model.decoder import parameters

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    what = "tasks and metrics are those of lm-eval, which is not installed"
    raise EvaluationError(f"{what}; pip install 'openelm-mlx[evaluate]'") from None

TURN, ANSWER = "\ufdd0", "\ufdd1"  # Unicode's noncharacters: no text that is exchanged has them
CHUNK = 400  # characters that are encoded together at least
SEAM = re.compile(r"[\w.,:;?!]( )(?=\w)", re.ASCII)
# settings of generation that change nothing while the choice is greedy
IDLE = ("do_sample", "temperature", "top_k", "top_p", "min_p")


@register_model("openelm")
class OpenELMLM(TemplateLM):  # type: ignore[misc]  # lm-eval's classes have no types
    """A model of lm-eval: `lm_eval.simple_evaluate(OpenELMLM("270m"), tasks=["arc_easy"])`.

    `model` is an `Engine` or what `load` takes, `loading` are the arguments of `load`. A pass of
    the model takes `batch_tokens`, with padding. lm-eval's own command line always gives a
    `batch_size` and a `device` of PyTorch, which have no meaning here. Raises the errors of `load`.
    """

    def __init__(
        self,
        model: str | Path | Engine = "openelm-tiny",
        *,
        batch_tokens: int = EvaluateOptions.batch_tokens,
        store: Store | None = None,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        if batch_size not in (None, 1, "1", "auto") or max_batch_size is not None:
            what = "the size of a batch is decided by the tokens in it"
            raise OptionError(f"{what}; give batch_tokens with the model's arguments")
        check_count("batch_tokens", batch_tokens, 1)
        known = ["model", "batch_tokens", *(item.name for item in fields(ModelOptions))]
        for name in loading.keys() - {*known}:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise OptionError(f"unknown argument {name!r} of the model; {hint}")
        if isinstance(model, Engine) and loading:
            raise OptionError(f"{min(loading)} is for loading a model, and this one is loaded")
        self.engine = model if isinstance(model, Engine) else load(model, **loading)
        self.arguments = {"model": self.engine.name, **loading}
        self.batch_tokens, self.progress = batch_tokens, progress
        self.store, self.ranks = store, ranks
        self.truncated: dict[str, set[int]] = {}  # numbers of questions, by task
        # A question comes once for each of its choices, and solved examples before many questions.
        # A suite has 25 million tokens, and each would be an object in the request of each choice.
        self.ids_of = lru_cache(256)(self.engine.tokenizer.encode)
        self.chunked = may_be_cut(self.engine.tokenizer)
        self.same: Callable[[tuple[int, ...]], tuple[int, ...]] = lru_cache(4)(lambda ids: ids)
        self.numbers = list(range(self.engine.tokenizer.vocab_size))

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.engine.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.engine.config.max_context_length

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, or of a conversation that `apply_chat_template` wrote.

        The start token comes first unless `add_special_tokens` is false.
        """
        tokenizer = self.engine.tokenizer
        ids = [] if add_special_tokens is False else [tokenizer.bos_id]
        chat = string.startswith(TURN)
        *turns, rest = string.removeprefix(TURN).split(TURN) if chat else (string,)
        for turn in turns:
            ids += [*self.in_chunks(turn), tokenizer.eos_id]
        if chat:
            rest = rest.replace(ANSWER, "", 1)
        check_marks(rest)
        return ids + self.in_chunks(rest)

    def in_chunks(self, text: str) -> list[int]:
        """Return the ids of a text without the start token, each piece of it encoded once."""
        ids: list[int] = []
        for number, chunk in enumerate(chunks(text) if self.chunked else (text,)):
            ids += self.ids_of(chunk, False, number > 0)
        return ids

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as a text: `tok_encode` makes the ids of `encode_messages` of it.

        Without `add_generation_prompt` the last message is an answer that has begun, and stays
        open. Raises `PromptError` for roles out of order.
        """
        check_messages(chat_history)
        messages = [(message["role"], message["content"]) for message in chat_history]
        for _, content in messages:
            check_marks(content)
        if messages[0][0] != "system":
            messages.insert(0, ("system", ""))
        begun = "" if add_generation_prompt else messages.pop()[1]
        turns = "\n".join(f"<|{role}|>\n{content}{TURN}" for role, content in messages)
        return f"{TURN}{turns}\n<|assistant|>\n{ANSWER}{begun}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return what stands for the Instruct format in lm-eval's records."""
        if not chat_template:
            return None
        example = [{"role": "user", "content": "{{ message }}"}]
        return self.apply_chat_template(example)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding gives it."""
        asked = []
        for request in requests:
            context, continuation = request.args
            check_marks(continuation)
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                before = [self.prefix_token_id]
                after = self.tok_encode(continuation, add_special_tokens=False)
            asked.append(self.fitting(before, after, request))

        def keep(number: int, answer: Answer) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[number].args, tuple(answer))

        found = answers(self.engine, asked, each=keep, **self.how)
        return [(answer.logprob, answer.greedy) for answer in found]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self.fitting(before, after) for _, before, after in requests]
        found = answers(self.engine, asked, **self.how)
        return [(answer.logprob, answer.greedy) for answer in found]

    def fitting(self, before: list[int], after: list[int], request: Any = None) -> Request:
        """Return a request of what fits into the model's context: the end, as lm-eval has it.

        Raises `EvaluationError` if there is nothing to score, or if it does not fit.
        """
        most = self.max_length
        if not 0 < len(after) <= most:
            what = "the continuation has no token of its own"
            if after:
                what = f"the continuation has {len(after)} tokens; the model's context is {most}"
            raise EvaluationError(f"{place(request)}{what}")
        beyond = len(before) + len(after) - (most + 1)  # the last token is not fed
        if beyond > 0 and request is not None:
            self.truncated.setdefault(request.task_name, set()).add(request.doc_id)
        parts = before[max(beyond, 0) :], after
        context, continuation = (tuple(map(self.numbers.__getitem__, part)) for part in parts)
        return Request(self.same(context), continuation)

    @property
    def how(self) -> dict[str, Any]:
        names = ("batch_tokens", "store", "ranks", "progress")
        return {name: getattr(self, name) for name in names}

    def get_model_info(self) -> dict[str, Any]:
        """Return facts about the model and this machine, for lm-eval's results."""
        engine, facts = self.engine, device.facts()
        bits = (engine.quantization or {}).get("bits")
        return {
            "model_num_parameters": engine.num_parameters,
            "model_dtype": name_of(parameters(engine.model)["transformer.norm.weight"].dtype),
            "model_revision": self.arguments.get("revision"),
            "model_sha": identity(engine, self.batch_tokens)["weights"],
            "instruct": engine.instruct,
            "bits": bits,
            "adapter": None if engine.adapter is None else engine.adapter.name,
            "context": self.max_length,
            "batch_tokens": self.batch_tokens,
            **{key: facts[key] for key in ("openelm_mlx", "mlx", "backend", "chip", "system")},
        }

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text after the start token.

        A text that is longer than the context is cut into windows, as lm-eval does: each token is
        predicted once, after as many others as fit.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        asked, counts = [], []
        for request in requests:
            check_marks(request.args[0])
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [Request(*map(tuple, make_disjoint_window(window))) for window in windows]
            asked += own
            counts.append(len(own))
        rest = iter(answers(self.engine, asked, **self.how))
        return [math.fsum(next(rest).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that greedy decoding gives after each context, without leading space.

        Raises `EvaluationError` for a task that samples, or whose answers leave no room for a
        question.
        """
        prompts, stops, limits = [], [], []
        for request in requests:
            context, settings = request.args
            most, stop = asked_of_generation(settings, place(request))
            room = self.max_length - most
            if room < 1:
                what = f"answers have up to {most} tokens; the model's context is {self.max_length}"
                raise EvaluationError(f"{place(request)}{what}. Set a lower max_gen_toks")
            ids = self.tok_encode(context)
            if len(ids) > room:
                self.truncated.setdefault(request.task_name, set()).add(request.doc_id)
            prompts.append(ids[-room:])
            stops.append(stop)
            limits.append(most)

        def keep(number: int, text: str) -> None:
            answer = text.removeprefix(" ")
            self.cache_hook.add_partial("generate_until", requests[number].args, answer)

        found = texts(self.engine, prompts, stops, limits, each=keep, **self.how)
        return [text.removeprefix(" ") for text in found]


def asked_of_generation(settings: Mapping[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
    """Return the most tokens of an answer, and the texts that end it, from lm-eval's settings."""
    from lm_eval.models.utils import normalize_gen_kwargs

    given = normalize_gen_kwargs(dict(settings), 256)
    if given["do_sample"]:
        what = f"it samples, with a temperature of {given['temperature']}; answers here are greedy"
        raise EvaluationError(f"{where}{what}. Set do_sample to false")
    if unknown := given.keys() - {"until", "max_gen_toks", *IDLE}:
        known = "until and max_gen_toks"
        raise EvaluationError(f"{where}{min(unknown)} is not known here; allowed are {known}")
    return given["max_gen_toks"], tuple(text for text in given["until"] if text)


def chunks(text: str) -> Iterator[str]:
    """Yield a text in pieces of `CHUNK` characters or some more, cut before single spaces.

    Where texts begin alike, so do their pieces.
    """
    start = 0
    while cut := SEAM.search(text, start + CHUNK):
        yield text[start : cut.start(1)]
        start = cut.start(1)
    yield text[start:]


def may_be_cut(tokenizer: Tokenizer) -> bool:
    """Return whether pieces of a text have the tokens of the whole: none goes beyond a seam.

    It would have a space after another character. LLaMA's tokenizer has no such token, and spaces
    in a text stay as they are.
    """
    beyond = any(SEAM.search(piece.decode(errors="replace")) for piece in tokenizer.pieces)
    whole, rest = tokenizer.encode("a, b"), tokenizer.encode(" b", bos=False, continued=True)
    return not beyond and whole == tokenizer.encode("a,") + rest


def check_marks(text: str) -> None:
    """Raise `EvaluationError` for a text that has one of the characters that mark turns."""
    for mark in (TURN, ANSWER):
        if mark in text:
            what = f"a text has the noncharacter U+{ord(mark):04X}, which marks turns of a chat"
            raise EvaluationError(f"{what} here; remove it from the task's data")


def place(request: Any) -> str:
    """Return where a request of lm-eval comes from, as the beginning of an error."""
    if request is None or request.task_name is None:
        return ""
    return f"task {request.task_name}, question {request.doc_id + 1}: "
