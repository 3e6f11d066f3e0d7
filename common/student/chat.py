"""`make run`: the engine answers several prompts at once, or the one that is given. `make chat`: a conversation.

Both use only what lesson 5 teaches: encode, `add_request`, `step`, and show the text as it comes. With MINE=0-5 the
model, the cache, the scheduler and the engine are the student's own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click

from common.checkpoints import CheckpointError
from common.course import CourseError, files_used
from common.options import engine_options, mine, number, option, several, threads
from common.sampling import SamplingParams
from common.start import OptionError, option_errors, start_engine

HELP = """\
/reset         forget the conversation
/system TEXT   tell the model who it is, and start again; without TEXT: show what it was told
/help          this list
/quit          leave; so does Ctrl-D. Ctrl-C stops an answer."""


class Reply(NamedTuple):
    """One answer. summary: its counts and times, in words."""

    text: str
    summary: str
    is_interrupted: bool = False


@dataclass
class Talker:
    """A model that answers, with `generate(prompt_token_ids, params, on_text)`."""

    name: str
    context: int  # the largest number of tokens of a prompt and its answer together
    tokenizer: Any
    generate: Callable[..., Any]
    params: Any

    @property
    def max_prompt_tokens(self) -> int:
        """The largest number of tokens of a prompt after which an answer still fits into the context."""
        return self.context - min(self.params.max_tokens, self.context // 2)

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def begin(self, system: str = "") -> Conversation | Story:
        """An empty conversation; an empty story, if the model has no chat template."""
        return Conversation(self, system) if self.has_template else Story(self)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt without earlier turns. Raises OptionError if it does not fit into the context."""
        token_ids, dropped = self.begin().ask(prompt)
        if dropped:
            raise OptionError(f"The prompt is {dropped} tokens too long for a model that sees {self.context}.")
        return token_ids

    def reply(self, prompt_token_ids: Sequence[int], on_text: Callable[[str], None]) -> Reply:
        """Answer. If Ctrl-C ends the answer, the reply has the text so far."""
        pieces: list[tuple[float, str]] = []
        start = time.perf_counter()

        def show(piece: str) -> None:
            pieces.append((time.perf_counter() - start, piece))
            on_text(piece)

        try:
            output = self.generate(prompt_token_ids, self.params, show)
        except KeyboardInterrupt:
            output = None
        seconds, text = time.perf_counter() - start, "".join(piece for _, piece in pieces)
        if output is None:
            return Reply(text, f"stopped after {seconds:.1f} s", True)
        num_tokens, metrics = len(output.token_ids), output.metrics
        parts = [f"{len(prompt_token_ids)} + {num_tokens} tokens in {seconds:.1f} s"]
        parts.append(f"{num_tokens / seconds:.1f} tokens/s")
        if pieces:
            parts.append(f"first text after {pieces[0][0]:.2f} s")
        if metrics.num_cached_tokens:
            parts.append(f"{metrics.num_cached_tokens} of the prompt's tokens were in the cache")
        if metrics.num_draft_tokens:
            parts.append(f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} draft tokens were right")
        if output.finish_reason == "length":
            parts.append("cut off at the length limit")
        return Reply(text, ", ".join(parts))


def answer_with(engine) -> Callable[..., Any]:
    """A `generate` that asks the engine. The request's blocks are freed even if it is interrupted."""

    def generate(prompt_token_ids: Sequence[int], params, on_text: Callable[[str], None]):
        with option_errors():
            request_id = engine.add_request(prompt_token_ids, params)
        output, num_shown = engine.output(request_id), 0
        try:
            while output.finish_reason is None:
                engine.step()
                if len(output.text) > num_shown:
                    on_text(output.text[num_shown:])
                    num_shown = len(output.text)
        finally:
            engine.abort(request_id)
        if output.error:
            raise OptionError(f"The answer failed: {output.error}")
        return output

    return generate


def talker_of(engine, name: str, params: SamplingParams) -> Talker:
    """A talker that asks the engine. Its context fits into max_model_len and into the pool."""
    config = engine.config
    context = min(config.max_model_len, config.num_blocks * config.block_size + 1)  # the last token takes no slot
    return Talker(name, context, engine.tokenizer, answer_with(engine), params)


# --- The prompt for the next answer -----------------------------------------------------------------------------------


@dataclass
class Conversation:
    """The turns so far of a model with a chat template, oldest first."""

    talker: Talker
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)  # user and assistant in turn

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add the user's turn. Returns the prompt and the number of turns that were dropped.

        The oldest turns, a question with its answer, are dropped until an answer fits into the context. The system turn
        stays. Raises OptionError, and adds nothing, if the new turn is too long by itself.
        """
        most = self.talker.max_prompt_tokens
        turns = [*self.turns, {"role": "user", "content": text}]
        dropped = 0
        while len(token_ids := self.encode(turns)) > most:
            if len(turns) == 1:
                raise OptionError(f"That is {len(token_ids)} tokens; this model takes {most}. Make it shorter.")
            turns, dropped = turns[2:], dropped + 2
        self.turns = turns
        return token_ids, dropped

    def encode(self, turns: list[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = self.talker.tokenizer.apply_chat_template([*system, *turns])
        # The template writes the special tokens itself.
        return self.talker.tokenizer.encode(text, add_special_tokens=False)

    def answered(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})


@dataclass
class Story:
    """For a model without a chat template: one text, which the user and the model continue in turn."""

    talker: Talker
    text: str = ""

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add to the text. Returns the prompt, and the number of tokens that were dropped at the text's beginning."""
        joint = " " if self.text and not self.text[-1].isspace() else ""
        self.text += joint + text
        token_ids = self.talker.tokenizer.encode(self.text)
        dropped = max(0, len(token_ids) - self.talker.max_prompt_tokens)
        begins = token_ids[:1] == [self.talker.tokenizer.bos_token_id]
        return [*token_ids[:begins], *token_ids[dropped + begins :]], dropped

    def answered(self, text: str) -> None:
        self.text += text


# --- The terminal -----------------------------------------------------------------------------------------------------


def quiet(text: str) -> str:
    """The text in dim letters, if the output is a terminal that supports them."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[2m{text}\033[0m"


def write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def answer(talker: Talker, prompt: str) -> int:
    """Answer one prompt, and show the text as it comes. Raises OptionError if the prompt is empty or too long."""
    if not prompt.strip():
        raise OptionError("The prompt is empty.")
    token_ids = talker.encode(prompt)
    if not talker.has_template:
        write(prompt)  # the model continues this very text
    reply = talker.reply(token_ids, write)
    print("\n\n" + quiet(f"{talker.name}: {reply.summary}. {files_used()}"))
    return 130 if reply.is_interrupted else 0


def converse(talker: Talker, system: str = "") -> int:
    """Read and answer the user's lines until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives `input` line editing and history)
    conversation = talker.begin(system)
    print(quiet(f"{talker.name}. {files_used()} /help lists the commands; Ctrl-D leaves."))
    if not talker.has_template:
        print(quiet("This model was not trained to converse: write a beginning, and it continues the text."))
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n" + quiet("Ctrl-D or /quit leaves."))
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        elif command == "/quit":
            return 0
        elif command == "/help":
            print(HELP)
        elif command == "/reset":
            conversation = talker.begin(system)
            print(quiet("The conversation is empty again."))
        elif command == "/system" and not talker.has_template:
            print(quiet("This model has no system turn."))
        elif command == "/system" and rest.strip():
            system = rest.strip()
            conversation = talker.begin(system)
            print(quiet("The system turn is set, and the conversation starts again."))
        elif command == "/system":
            print(quiet(system or "There is no system turn. The model's template may have a default."))
        elif command.startswith("/"):
            print(quiet(f"There is no command {command}. /help lists all commands."))
        else:
            take_turn(talker, conversation, line)


def take_turn(talker: Talker, conversation: Conversation | Story, line: str) -> None:
    try:
        token_ids, dropped = conversation.ask(line)
    except OptionError as error:
        print(quiet(str(error)))
        return
    if dropped:
        what = "turns" if isinstance(conversation, Conversation) else "tokens"
        print(quiet(f"The context is full: the oldest {dropped} {what} are no longer seen."))
    reply = talker.reply(token_ids, write)
    conversation.answered(reply.text)
    print("\n" + quiet(f"[{reply.summary}]"))


# --- The commands -----------------------------------------------------------------------------------------------------


def run_many(talker: Talker, engine) -> int:
    """Answer eight prompts at once."""
    from common.student.serve import BEGINNINGS, QUESTIONS, serve

    prompts = list(QUESTIONS if talker.has_template else BEGINNINGS)
    print(quiet(f"{talker.name}. {files_used()} PROMPT='...' asks one question of your own."))
    with option_errors():
        return serve(engine, prompts, list(map(talker.encode, prompts)), talker.params)


def speaker(length: int, temperature: float, top_p: float) -> Callable:
    """The options of `run` and `chat`, with these defaults for sampling."""
    return several(
        click.option("--max-tokens", type=number(), default=length, help="of an answer"),
        click.option("--temperature", type=float, default=temperature),
        click.option("--top-p", type=float, default=top_p),
        click.option("--seed", type=int, help="the same seed, the same answers"),
        mine(),
        engine_options,
        threads,
        option("--verbose", "VERBOSE", is_flag=True, help="show the traceback of an error"),
    )


@click.command("run")
@option("--prompt", "PROMPT", help="a prompt; default: eight prompts at once")
@speaker(length=96, temperature=0.0, top_p=1.0)
def run_command(prompt: str | None, **settings) -> int:
    """Answer eight prompts at once, or the one that is given."""
    return speak(settings, run_many if prompt is None else lambda talker, engine: answer(talker, prompt))


@click.command("chat")
@click.option("--system", default="", help="the system turn, which tells the model how to answer")
@speaker(length=256, temperature=0.6, top_p=0.9)
def chat_command(system: str, **settings) -> int:
    """A conversation with a model."""
    return speak(settings, lambda talker, engine: converse(talker, system))


def speak(settings: dict[str, Any], act: Callable[[Talker, Any], int]) -> int:
    """Load the model that the options ask for, and call `act` with its talker and its engine. Returns its result."""
    for stream in (sys.stdin, sys.stdout):  # a model's text may have characters that the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sampling = {name: settings.pop(name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    mine, threads, is_verbose = (settings.pop(name) for name in ("mine", "threads", "verbose"))
    try:
        with option_errors():
            params = SamplingParams(**sampling)
        with start_engine(settings, mine, threads) as engine:
            return act(talker_of(engine, settings["model"], params), engine)
    except (CheckpointError, CourseError):
        if is_verbose:
            traceback.print_exc()
        raise
    except RuntimeError as error:
        from common.workers import WorkerError

        if is_verbose or not isinstance(error, WorkerError):
            raise
        print(error, file=sys.stderr)
        return 1
