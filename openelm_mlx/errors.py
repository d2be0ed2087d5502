"""The errors that a user can mend.

Every class here derives from `OpenELMError`: the command line prints its text in one line, without
a traceback, and exits with status 2. Anything else that escapes is a bug of this project.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OpenELMError(Exception):
    """A user's mistake. Its text says what was given, what is allowed and what to do next."""


class ConfigError(OpenELMError):
    """A model's configuration is malformed, contradictory or beyond what OpenELM is."""


class CheckpointError(OpenELMError):
    """Weights are missing, superfluous, of the wrong shape, not finite or cut short."""


class ConversionError(OpenELMError):
    """A source cannot be read as OpenELM, or a target cannot be written."""


class TokenizerError(OpenELMError):
    """A tokenizer is missing, damaged, or does not belong to the model."""


class MLXError(OpenELMError, ImportError):
    """MLX is installed in part, or not for this machine."""


class OptionError(OpenELMError):
    """An option is outside its range, unknown, or not valid together with another."""


class PromptError(OpenELMError):
    """A prompt is empty or too long, or a conversation is out of order."""


class ContextError(PromptError):
    """A prompt has more tokens than the model's context holds."""


class CacheError(OpenELMError):
    """A key/value cache cannot do what was asked without giving wrong tokens."""


class BusyError(OpenELMError):
    """A request came when as many were waiting as may wait."""


class HubError(OpenELMError):
    """A model could not be found, downloaded or verified."""


class EvaluationError(OpenELMError):
    """A task cannot be evaluated as asked, or its data are missing or damaged."""


class FinetuneError(OpenELMError):
    """Data cannot be trained, or a run of fine-tuning cannot go on."""


class BenchmarkError(OpenELMError):
    """A benchmark cannot be run as asked, or a result file is damaged or of another kind."""


@contextmanager
def naming(*paths: object) -> Iterator[None]:
    """Put the first path before the text of an `OpenELMError` that names none of them."""
    try:
        yield
    except OpenELMError as error:
        if any(str(path) in str(error) for path in paths if path is not None):
            raise
        raise type(error)(f"{paths[0]}: {error}") from None


def reason(error: BaseException) -> str:
    """Return in one line what an error of Python or of a library says, without its class."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    if mark := getattr(error, "problem_mark", None):  # of YAML, whose first line is the context
        text = f"line {mark.line + 1}: {getattr(error, 'problem', None)}"
    return text.partition("\n")[0].strip() or "it gave no reason"
