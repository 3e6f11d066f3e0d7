"""`make run` and `make chat`, with a model that costs nothing: the conversation is what is tested."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from common.course import ROOT
from common.student import chat
from common.student.chat import Conversation, OptionError, Story, Talker
from common.tests.typed import typed


class FakeTokenizer:
    """A token is a character; the template puts a letter for the role before each turn."""

    bos_token_id = 0

    def __init__(self, template: bool = True):
        self.chat_template = "yes" if template else None

    def encode(self, text, add_special_tokens=True):
        return [self.bos_token_id] * add_special_tokens + [ord(character) for character in text]

    def apply_chat_template(self, messages):
        return "".join(f"<{message['role'][0]}>{message['content']}" for message in messages) + "<a>"


class FakeGenerate:
    """Says `replies` one after the other, in two pieces each, and keeps what it was shown."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.prompts: list[str] = []

    def __call__(self, prompt_token_ids, params, on_text):
        self.prompts.append("".join(chr(token_id) if token_id else "^" for token_id in prompt_token_ids))
        reply = self.replies.pop(0)
        for piece in (reply[:2], reply[2:]):
            on_text(piece)
            if piece == "!!":
                raise KeyboardInterrupt
        metrics = SimpleNamespace(num_cached_tokens=0, num_draft_tokens=0, num_accepted_tokens=0)
        return SimpleNamespace(token_ids=list(reply), text=reply, finish_reason="stop", metrics=metrics)


def talker(*replies, template=True, context=1000, max_tokens=10) -> Talker:
    params = SimpleNamespace(max_tokens=max_tokens)
    return Talker("fake", context, FakeTokenizer(template), FakeGenerate(*replies), params)


def converse(talker: Talker, typed: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert chat.converse(talker) == 0
    return capsys.readouterr().out


def test_the_model_sees_the_whole_conversation(monkeypatch, capsys):
    model = talker("Hello.", "Ada.")
    out = converse(model, "I am Ada\n\n  \nWho am I?\n", monkeypatch, capsys)
    assert model.generate.prompts == ["<u>I am Ada<a>", "<u>I am Ada<a>Hello.<u>Who am I?<a>"]
    assert "Hello.\n" in out and "Ada.\n" in out and "4 tokens" in out and "tokens/s" in out
    assert "\033" not in out  # no colours where the output is no terminal


def test_commands(monkeypatch, capsys):
    model = talker("A1", "B2", "C3")
    typed = "one\n/reset\ntwo\n/system Be  brief. \nthree\n/system\n/nonsense\n/help\n/quit\nnever asked\n"
    out = converse(model, typed, monkeypatch, capsys)
    assert model.generate.prompts == ["<u>one<a>", "<u>two<a>", "<s>Be  brief.<u>three<a>"]
    assert "Be  brief." in out and "no command /nonsense" in out and "Ctrl-D" in out


def test_ctrl_c_ends_the_answer_and_not_the_program(monkeypatch, capsys):
    model = talker("So!!", "Yes.")
    out = converse(model, "long story\ngo on\n", monkeypatch, capsys)
    assert model.generate.prompts[1] == "<u>long story<a>So!!<u>go on<a>"  # what was said stands
    assert "stopped after" in out


def test_ctrl_c_at_the_prompt_does_not_leave(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "hi", EOFError])

    def type_next(prompt):
        what = next(typed)
        if isinstance(what, str):
            return what
        raise what

    monkeypatch.setattr("builtins.input", type_next)
    model = talker("Hello.")
    assert chat.converse(model) == 0
    assert model.generate.prompts == ["<u>hi<a>"] and "leaves" in capsys.readouterr().out


def test_the_oldest_turns_are_dropped_and_it_is_said(monkeypatch, capsys):
    model = talker(*["abcdefgh"] * 5, context=70, max_tokens=10)
    out = converse(model, "/system S\n" + "".join(f"question {n}\n" for n in range(5)), monkeypatch, capsys)
    last = model.generate.prompts[-1]
    assert last.startswith("<s>S<u>question") and last.endswith("<u>question 4<a>") and "question 0" not in last
    assert all(len(prompt) <= 60 for prompt in model.generate.prompts)
    assert out.count("no longer seen") >= 2


def test_a_turn_too_long_by_itself_is_refused_and_forgotten(monkeypatch, capsys):
    model = talker("Fine.", context=70, max_tokens=10)
    out = converse(model, "x" * 80 + "\nshort\n", monkeypatch, capsys)
    assert "Make it shorter" in out and model.generate.prompts == ["<u>short<a>"]
    conversation = Conversation(model)
    with pytest.raises(OptionError, match="takes 60"):
        conversation.ask("x" * 61)
    assert conversation.turns == []


def test_room_is_left_even_if_max_tokens_fills_the_context():
    token_ids, _ = Conversation(talker(context=40, max_tokens=1000)).ask("hello there")
    assert len(token_ids) <= 20


def test_a_model_without_a_template_continues_the_text(monkeypatch, capsys):
    model = talker(" was a fox", " It slept.", template=False)
    out = converse(model, "There\nOne day\n/system x\n", monkeypatch, capsys)
    assert model.generate.prompts == ["^There", "^There was a fox One day"]
    assert "not trained to converse" in out and "no system turn" in out


def test_a_story_too_long_loses_its_beginning_and_keeps_the_first_token():
    story = Story(talker(template=False, context=20, max_tokens=10))
    assert story.ask("abcdefgh") == ([0, *map(ord, "abcdefgh")], 0)
    token_ids, dropped = story.ask("ijkl")
    assert "".join(map(chr, token_ids)) == "\0efgh ijkl" and dropped == 4


@pytest.mark.parametrize("prompt", ['say "hi" & $HOME; `id` \\', "two\nlines", "ünï 🙂"])
def test_run_shows_the_prompt_to_the_model_as_it_was_given(prompt, capsys):
    model = talker("Hi.")
    assert chat.answer(model, prompt) == 0
    assert model.generate.prompts == [f"<u>{prompt}<a>"]
    out = capsys.readouterr().out
    assert out.startswith("Hi.") and "fake: " in out and "The reference's lessons" in out


def test_run_refuses_an_empty_prompt_and_reports_an_interrupt():
    with pytest.raises(OptionError, match="empty"):
        chat.answer(talker(), " \n")
    assert chat.answer(talker("So!!"), "x") == 130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "tales", "--mine", "17-19"], "lesson 17"),
        (["--model", "tales", "--temperature", "-1"], "temperature"),
        (["--model", "tales", "--threads", "none"], "--threads: 'none' is not a valid integer"),
        (["--model", "tales", "--num-speculative-tokens", "2"], "there is no source of draft tokens"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, words, monkeypatch, capsys):
    for variable in ("MODEL", "MINE", "THREADS", "VERBOSE", "COURSE_MODULES"):
        monkeypatch.setenv(variable, "")  # and `activate` is undone
    assert typed("run", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.fixture(scope="module")
def small_engine():
    from solutions.batching import load_engine

    return load_engine("tales", num_blocks=12, block_size=4, max_num_seqs=3)


def serve(engine, terminal: bool, width: int) -> str:
    from rich.console import Console

    from common.student import serve
    from solutions.llama_pytorch import SamplingParams

    prompts = list(serve.BEGINNINGS[:5])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    token_ids = [engine.tokenizer.encode(prompt) for prompt in prompts]
    assert serve.serve(engine, prompts, token_ids, SamplingParams(max_tokens=8, ignore_eos=True), console) == 0
    return console.file.getvalue()


def test_many_prompts_at_once(small_engine):
    """Where the output is no terminal: whole answers, each behind its prompt, no control codes, and the metrics."""
    out = serve(small_engine, terminal=False, width=100)
    from common.student.serve import BEGINNINGS

    assert "\033" not in out and all(f"] {prompt}\n" in out for prompt in BEGINNINGS[:5])
    told = " ".join(out.split())
    assert "40 tokens in" in told and "slots held for each token stored" in told and told.count("length") == 5


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_busy_machine_is_named(small_engine, share, monkeypatch):
    """As the reason of a slow run, after a run that had to wait for its cores, and only then."""
    monkeypatch.setattr("common.machine.seconds_without_core", lambda: share * time.perf_counter())
    out = " ".join(serve(small_engine, terminal=False, width=100).split())
    assert ("Other processes had the cores for 50% of this time" in out and "THREADS=1" in out) == (share > 0.2)


@pytest.mark.parametrize("width", [60, 100])
def test_the_live_table_fits_its_terminal(small_engine, width):
    out = serve(small_engine, terminal=True, width=width)
    lines = re.sub(r"\033\[[^a-zA-Z]*[a-zA-Z]", "", out).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    for word in ("writes", "waits", "done", "3 run, 2 wait", "blocks held"):
        assert word in out
    assert small_engine.manager.pool.num_free_blocks == 12


def test_an_interrupt_while_serving_shows_what_there_is(small_engine, monkeypatch):
    steps, step = [0], small_engine.step

    def interrupted():
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(small_engine, "step", interrupted)
    from rich.console import Console

    from common.student import serve
    from solutions.llama_pytorch import SamplingParams

    console = Console(file=io.StringIO(), width=100)
    ids = [small_engine.tokenizer.encode(prompt) for prompt in serve.BEGINNINGS[:2]]
    assert serve.serve(small_engine, list(serve.BEGINNINGS[:2]), ids, SamplingParams(max_tokens=20), console) == 130
    assert "Stopped." in console.file.getvalue() and "abort" in console.file.getvalue()
    assert small_engine.manager.pool.num_free_blocks == 12 and not small_engine.has_unfinished_requests


def test_what_can_never_be_served_begins_nothing(small_engine):
    from common.student import serve
    from solutions.llama_pytorch import SamplingParams

    with pytest.raises(ValueError, match="the pool has num_blocks=12"):
        serve.serve(small_engine, ["a", "b"], [[5, 6], [5] * 40], SamplingParams(max_tokens=20))
    assert not small_engine.has_unfinished_requests and not small_engine.processor.states


def test_the_engine_behind_a_conversation(small_engine):
    """The second turn finds the first in the cache; an answer that is broken off leaves no block behind."""
    from common.student.chat import answer_with
    from solutions.llama_pytorch import SamplingParams

    generate, pieces = answer_with(small_engine), []
    prompt, params = small_engine.tokenizer.encode("There was once a small owl"), SamplingParams(max_tokens=6)
    output = generate(prompt, params, pieces.append)
    assert "".join(pieces) == output.text
    again = generate([*prompt, *output.token_ids, 300], params, pieces.append)
    assert again.metrics.num_cached_tokens >= len(prompt) // 4 * 4

    def broken_off(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(prompt, params, broken_off)
    assert small_engine.manager.pool.num_free_blocks == 12 and not small_engine.has_unfinished_requests


def test_a_conversation_goes_on_after_it_has_filled_the_pool(small_engine, monkeypatch, capsys):
    """48 tokens, far less than the model's context."""
    from solutions.llama_pytorch import SamplingParams

    talker = chat.talker_of(small_engine, "tales", SamplingParams(max_tokens=12, ignore_eos=True))
    out = converse(talker, "There was once a small owl\nOne day\nThen\nAnd\n", monkeypatch, capsys)
    assert out.count("12 tokens in") == 4 and "no longer seen" in out


def test_tales_through_the_front_door():
    """From the command line to the committed model and back, in a process of its own."""
    command = f"{sys.executable} -m common run --here --model tales --max-tokens 4 --threads 1 --prompt".split()
    result = subprocess.run([*command, "Once upon"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Once upon") and "+ 4 tokens" in result.stdout
