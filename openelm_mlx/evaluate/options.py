"""Options of an evaluation: Python, the command line and lm-eval's arguments build the same object.

Nothing here needs MLX or lm-eval, so that `openelm --help` can list every option.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.suites import SUITES
from openelm_mlx.fields import check_fields, check_unset, encodable, explained, option, shown


@explained()
@dataclass(frozen=True)
class EvaluateOptions:
    """Options that decide which questions a model is asked, and how they are put to it.

    Without a suite and tasks, a model of a published size is asked the zero-shot suite, and any
    other the questions about fairy tales that come with the package.
    """

    suite: str | None = option(
        None, "the tasks and shots of a table that Apple published", choices=tuple(SUITES)
    )
    tasks: tuple[str, ...] = option(
        (),
        "tasks or groups of lm-eval, by name; fairy_tales comes with the package",
        commas=True,
        nargs="+",
        metavar="TASK",
    )
    shots: int | None = option(
        None, "with tasks: solved examples before each question; by default the task's own", 0
    )
    limit: int | None = option(None, "ask only this many questions of each task", 1)
    include: Path | None = option(
        None, "a folder of tasks of your own, as lm-eval's YAML", metavar="FOLDER"
    )
    chat_template: bool = option(
        False, "put each question as a message of a chat, which Apple did not do"
    )
    system: str | None = option(None, "with chat_template: the system message")
    batch_tokens: int = option(
        4096,
        "tokens of a pass of the model, with padding; a longer question has one of its own; memory "
        "beyond the weights grows with it",
        1,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.suite is not None:
            own = f"the suite {self.suite} has its own"
            check_unset(self, "tasks", f"{own}; give a suite or tasks")
            check_unset(self, "shots", f"{own}; name its tasks instead of it")
        elif not self.tasks:
            check_unset(self, "shots", "no task is named; give tasks too")
        if not self.chat_template:
            check_unset(self, "system", "there is no chat to put it into; give chat_template too")
        if self.system is not None and not encodable(self.system):
            raise OptionError(f"system is {shown(self.system)}; allowed is a text in UTF-8")


@explained()
@dataclass(frozen=True)
class TextOptions:
    """Options that decide in which windows a model reads a text; each begins with BOS."""

    context: int | None = option(
        None, "tokens of a window, BOS included; by default 512, or the model's context if less", 2
    )
    stride: int | None = option(
        None,
        "begin a window this many tokens after the one before, and score only its last ones: each "
        "token then has context - stride tokens before it; by default windows do not overlap",
        1,
    )
    batch_tokens: int = option(
        EvaluateOptions.batch_tokens, "tokens of a pass of the model, with padding", 1
    )

    def __post_init__(self) -> None:
        check_fields(self)
