"""The stories that `tales` learned from: `story(random.Random(7))` tells one, and always the same one.

A story is a title, an opening, a plot and an ending, told of one cast: what `cast.py` lists fills the fields of
what `plots.py` tells. The cast is chosen once, before the first word, so that what was lost in the second sentence
is what is found in the ninth.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace

from common.models.training.cast import CHARACTERS, HELPERS, LOOKS, PLACES, SEASONS, THINGS
from common.models.training.plots import ENDINGS, HABITS, OPENINGS, PLOTS, Plot

Fields = dict[str, object]

_INNERMOST_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])n? (?=(hour|[A-Za-z]))")


def choose(rng: random.Random, template: str) -> str:
    """`template` with one part taken of every "[this|that]"; choices may be nested."""
    while match := _INNERMOST_CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match.group(1).split("|")) + template[match.end() :]
    return template


def tell(rng: random.Random, template: str, fields: Mapping[str, object]) -> str:
    """`template` with choices taken, fields filled in, and each paragraph on one line. KeyError: no such field."""
    paragraphs = re.split(r"\n\s*\n", choose(rng, template).strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).format_map(fields)


def with_articles(text: str) -> str:
    """Every "a" and "an" as the next word asks for.

    That word's first letter is enough here, but for "hour": no story has a unicorn in it.
    """

    def article(match: re.Match) -> str:
        before_vowel = match[2] == "hour" or match[2] in "aeiouAEIOU"
        return match[1] + ("n " if before_vowel else " ")

    return _ARTICLE.sub(article, text)


def cast(rng: random.Random, plot: Plot) -> Fields:
    """Who, where, when and with what: the fields that every template may use."""
    place = rng.choice(PLACES)
    season = rng.choice([season for season in SEASONS if season.name in plot.seasons])
    hero = rng.choice([one for one in CHARACTERS if plot.machines or not one.machine])
    friend = rng.choice([one for one in CHARACTERS if one.female != hero.female and (plot.machines or not one.machine)])
    things = [one for one in THINGS if not (plot.hard and one.soft)]
    looks = zip(rng.sample(things, 2), rng.sample(LOOKS, 2), strict=True)
    thing, other = (replace(one, look=look) for one, look in looks)
    day = rng.choice(season.days)
    fields: Fields = {
        "hero": hero,
        "friend": friend,
        "helper": rng.choice(HELPERS),
        "thing": thing,
        "other": other,
        "place": place,
        "day": day,
        "Day": day[0].upper() + day[1:],
        "weather": rng.choice(season.weather),
    }
    fields.update(zip(("spot1", "spot2", "spot3"), rng.sample(place.spots, 3), strict=True))
    for name, template in rng.choice(plot.cases).items():
        fields[name] = tell(rng, template, fields)
    return fields


def story(rng: random.Random) -> str:
    """One story: its title, and its paragraphs, each after an empty line. about 270 words."""
    plot = rng.choice(PLOTS)
    fields = cast(rng, plot)

    habit, closing, options = rng.choice(HABITS)
    fields["it"] = rng.choice(options)
    fields["habit"] = tell(rng, habit, fields)
    fields["closing"] = tell(rng, closing, fields)

    openings = [opening for opening in OPENINGS if not (plot.strangers and "{friend}" in opening)]
    title = tell(rng, plot.title, fields)
    beginning = tell(rng, rng.choice(openings), fields)
    middle = tell(rng, plot.text, fields)
    ending = tell(rng, rng.choice(ENDINGS), fields)
    return with_articles(f"{title}\n\n{beginning} {middle}\n\n{ending}")


if __name__ == "__main__":
    print(story(random.Random()))
