"""What can go wrong in a way the user can mend.

Every class here derives from `OpenELMError`: the command line prints its text in one line, without
a traceback, and exits with status 2. Anything else that escapes is a bug of this project.
"""

from __future__ import annotations


class OpenELMError(Exception):
    """A mistake the user can fix; its text says what was given, what is allowed and what to do
    next.
    """


class ConfigError(OpenELMError):
    """A model configuration that is malformed, contradictory or beyond what OpenELM is."""


class CheckpointError(OpenELMError):
    """Weights that are missing, superfluous, of the wrong shape, not finite or cut short."""


class ConversionError(OpenELMError):
    """A source that cannot be read as OpenELM, or a target that cannot be written."""


class TokenizerError(OpenELMError):
    """No tokenizer, a damaged one, or one that does not belong to the model."""


class OptionError(OpenELMError):
    """An option outside its range, unknown, or not valid together with another."""


class PromptError(OpenELMError):
    """A prompt that is empty, too long for the context, or a conversation out of order."""


class CacheError(OpenELMError):
    """A key/value cache that cannot do what was asked without giving wrong tokens."""


class BusyError(OpenELMError):
    """A request that came when as many were waiting as may wait."""


class HubError(OpenELMError):
    """A model that could not be found, downloaded or verified."""


class BenchmarkError(OpenELMError):
    """A benchmark that cannot be run as asked, or a result file that is damaged or of another
    kind.
    """


def reason(error: Exception) -> str:
    """Return in one line what an error of Python or of a library says, without its class."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return text.partition("\n")[0].strip() or "it gave no reason"
