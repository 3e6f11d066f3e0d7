"""The stories and the two models that were trained on them: common/models/training/ and common/models/."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from common.models.training import cast, plots, stories
from common.models.training.stories import choose, story, with_articles
from common.models.training.train import (
    DRAFT,
    MODELS,
    TARGET,
    batched_attend,
    batched_logits,
    held_out_story,
    model_config,
    training_story,
)
from common.tokenizer import load_tokenizer
from solutions.llama_pytorch import causal_attend, load

NAMES = (TARGET.name, DRAFT.name)


@pytest.fixture(scope="module")
def two_hundred() -> list[str]:
    return [story(random.Random(seed)) for seed in range(200)]


@pytest.fixture
def one_plot(monkeypatch):
    """Tell stories of one plot only."""
    return lambda plot: monkeypatch.setattr(stories, "PLOTS", (plot,))


# --- The generator ----------------------------------------------------------------------------------------------------


def test_a_seed_is_a_story():
    assert story(random.Random(7)) == story(random.Random(7))
    assert training_story(4) == training_story(4) != held_out_story(4)


def test_the_stories_are_those_that_the_models_learned():
    """Editing the tables would leave models behind that tell other stories than the generator does."""
    told = "".join(training_story(index) for index in range(200))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "3b3a880be75d73ff", (
        "The generator tells other stories than those that the committed models learned: take the change back, or run "
        "`python -m common.models.training.train` and write the new number into this test."
    )


def test_the_stories_vary(two_hundred):
    assert len(set(two_hundred)) == 200
    assert len({text.split("\n\n")[1] for text in two_hundred}) > 190, "openings"
    assert len({text.partition("\n\n")[0] for text in two_hundred}) > 100, "titles"
    assert len(plots.PLOTS) >= 12
    words = Counter(word for text in two_hundred for word in re.findall(r"[a-z]+", text.lower()))
    assert len(words) > 1200


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.title)
def test_correct_english(plot, one_plot):
    one_plot(plot)
    for seed in range(60):
        text = story(random.Random(seed))
        assert not re.search(r"[{}\[\]|<>_]", text), f"unfilled: {text}"
        assert not re.search(r"  |\n\n\n| \n|\n |^\s|\s$", text), f"spaces: {text}"
        assert not re.search(r"\ba [aeiou]|\ba hour|\ban (?!hour)[^aeiouAEIOU]", text), f"article: {text}"
        assert not re.search(r"[.,] ?[.,]|\?\.|!\.|\s[.,!?]", text), f"punctuation: {text}"
        assert not re.search(r"(?:^|[^,] |\n)\"[a-z]", text), f"a speech without a capital: {text}"
        assert not re.search(r"(?:^|\n|\.\"? )[a-z]", text), f"a sentence without a capital: {text}"
        assert not re.search(r"\b([A-Za-z]+) \1\b", text.lower()), f"a word twice: {text}"
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n\n")), f"quotes: {text}"
        assert 150 <= len(text.split()) <= 340


def test_hero_and_friend_never_share_a_pronoun():
    for seed in range(300):
        rng = random.Random(seed)
        fields = stories.cast(rng, rng.choice(plots.PLOTS))
        assert fields["hero"].he != fields["friend"].he
        assert len({fields["spot1"], fields["spot2"], fields["spot3"]}) == 3


def test_what_was_lost_is_what_is_found(one_plot):
    one_plot(plots.PLOTS[0])
    for seed in range(50):
        text = story(random.Random(seed))
        lost = re.search(r'"My (\w+ \w+)," said', text)[1]
        (job,) = (thing.job for thing in cast.THINGS if thing.noun == lost.split()[1])
        assert with_articles(f"was using it as {job}.") in text


def test_choices_may_be_nested():
    rng = random.Random(0)
    assert {choose(rng, "[a|b [c|d]]!") for _ in range(50)} == {"a!", "b c!", "b d!"}


def test_articles():
    assert with_articles("A owl and an hen. a Owl, half a hour") == "An owl and a hen. an Owl, half an hour"


# --- The models -------------------------------------------------------------------------------------------------------


def test_the_models_are_small():
    files = [path for name in NAMES for path in (MODELS / name).iterdir()]
    assert {path.name for path in files} >= {"model.safetensors", "tokenizer.model", "config.json", "loss.json"}
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize("recipe", [TARGET, DRAFT], ids=NAMES)
def test_the_shapes_allow_two_ranks_and_a_draft(recipe):
    config = json.loads((MODELS / recipe.name / "config.json").read_text(encoding="utf-8"))
    assert config == model_config(recipe), "config.json is not what the training command writes"
    assert config["num_attention_heads"] % 2 == 0
    assert config["num_key_value_heads"] >= 2
    assert config["num_attention_heads"] > config["num_key_value_heads"], "grouped-query attention is not exercised"
    assert config["num_hidden_layers"] == 8 if recipe is TARGET else config["num_hidden_layers"] <= 2


def test_one_tokenizer_for_both():
    first, second = ((MODELS / name / "tokenizer.model").read_bytes() for name in NAMES)
    assert first == second


def test_the_tokenizer_round_trips(two_hundred):
    tokenizer = load_tokenizer(MODELS / TARGET.name)
    assert tokenizer.vocab_size == 1024
    for text in [*two_hundred[:50], "a 🙂 and a 👩‍🚀", "Zoë\n\n  naïve\t№ 42", "", "日本語"]:
        token_ids = tokenizer.encode(text)
        assert token_ids[0] == tokenizer.bos_token_id == 1
        assert max(token_ids) < 1024 and 0 not in token_ids, "<unk> loses text"
        assert tokenizer.decode(token_ids) == text


def test_rows_do_not_see_each_other():
    model, _ = load(TARGET.name, device="cpu")
    rows = torch.randint(3, 1024, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = batched_logits(model, rows)
        alone = [model.logits(model(row, torch.arange(20), causal_attend)) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=1e-3)
    q, kv = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    assert batched_attend(2)(0, q, kv, kv).shape == q.shape


@pytest.mark.parametrize("name, bound", [(TARGET.name, 1.5), (DRAFT.name, 1.6)])
def test_held_out_stories_surprise_the_models_little(name, bound):
    """Chance is 1024, the size of the vocabulary."""
    model, tokenizer = load(name, device="cpu")
    surprise = total = 0
    with torch.inference_mode():
        for index in range(6):
            token_ids = torch.tensor(tokenizer.encode(held_out_story(index)))
            logits = batched_logits(model, token_ids[None, :-1])
            surprise += F.cross_entropy(logits, token_ids[1:], reduction="sum").item()
            total += len(token_ids) - 1
    assert math.exp(surprise / total) < bound


def test_the_measured_draft_is_cheap_and_agrees():
    measured = json.loads((MODELS / DRAFT.name / "measurements.json").read_text(encoding="utf-8"))
    assert measured["decode_step"]["draft_share_of_target"] <= 0.2
    assert measured["held_out"]["greedy_agreement"] > 0.9
    assert measured["held_out"]["target_perplexity"] < measured["held_out"]["draft_perplexity"]
