"""Who and what the stories are about: characters, helpers, things, places and seasons.

Only data, and the few words that a template may ask of it: `{hero.he}`, `{thing.the}`, `{place.at}`. Every
character is he or she, and a story's two main characters never share a pronoun, so that "she" is never in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Character:
    """Somebody who can be the hero of a story, or the hero's friend."""

    name: str
    kind: str  # "small brown mouse": goes behind an article
    full: str  # how others call them at first sight: "Pip the mouse"
    female: bool
    hands: str  # what they hold things with, plural
    machine: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"

    @property
    def himself(self) -> str:
        return "herself" if self.female else "himself"

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()


def child(name: str, kind: str, full: str) -> Character:
    return Character(name, kind, full, "girl" in kind, "hands")


def animal(name: str, kind: str, pronoun: str, hands: str = "paws") -> Character:
    return Character(name, kind, f"{name} the {kind.split()[-1]}", pronoun == "she", hands)


def machine(name: str, kind: str, pronoun: str, hands: str) -> Character:
    return Character(name, kind, f"{name} the {kind.split()[-1]}", pronoun == "she", hands, machine=True)


CHARACTERS = (
    child("Mila", "girl with muddy boots", "Mila from next door"),
    child("Kofi", "boy with a loud laugh", "Kofi from next door"),
    child("Nora", "girl who asked too many questions", "Nora from over the hill"),
    child("Ravi", "boy with deep pockets", "Ravi from across the lane"),
    child("Ines", "girl with two long plaits", "Ines from the corner house"),
    child("Oskar", "boy who was never in a hurry", "Oskar from the corner house"),
    child("Yuki", "girl with quick feet", "Yuki from over the hill"),
    child("Sami", "boy with a gap in his teeth", "Sami from across the lane"),
    child("Ada", "girl who could whistle", "Ada from next door"),
    child("Bruno", "boy with a very big coat", "Bruno from over the hill"),
    animal("Pip", "small brown mouse", "he"),
    animal("Hazel", "red squirrel", "she"),
    animal("Bramble", "round hedgehog", "he"),
    animal("Clover", "grey rabbit", "she"),
    animal("Juniper", "young fox", "she"),
    animal("Otto", "cheerful otter", "he"),
    animal("Olive", "short-sighted owl", "she", "wings"),
    animal("Moss", "thoughtful toad", "he", "feet"),
    animal("Gus", "proud goose", "he", "wings"),
    animal("Marigold", "speckled hen", "she", "wings"),
    animal("Thistle", "stubborn donkey", "he", "hooves"),
    animal("Pebble", "slow tortoise", "she", "feet"),
    animal("Biscuit", "shaggy dog", "he"),
    animal("Fern", "long-legged fawn", "she", "hooves"),
    animal("Barnaby", "sleepy bear", "he"),
    animal("Tansy", "black kitten", "she"),
    animal("Mungo", "muddy mole", "he"),
    animal("Pearl", "little duck", "she", "wings"),
    animal("Basil", "tall heron", "he", "wings"),
    animal("Dilly", "woolly lamb", "she", "hooves"),
    machine("Bolt", "little tin robot", "he", "metal hands"),
    machine("Dot", "tiny cleaning robot", "she", "rubber hands"),
    machine("Clank", "rusty garden robot", "he", "iron hands"),
    machine("Tilda", "wind-up robot", "she", "brass hands"),
    machine("Chug", "puffing steam robot", "he", "copper hands"),
    machine("Ruby", "polite kitchen robot", "she", "steel hands"),
)


@dataclass(frozen=True)
class Helper:
    """A grown-up or an elder: always called by name, never he or she."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def Name(self) -> str:
        return self.name[0].upper() + self.name[1:]


HELPERS = tuple(
    Helper(name)
    for name in (
    "old Mrs Plum", "the baker", "the postman", "Captain Sorrel", "Grandmother Teasel", "the night watchman",
    "Mr Finch the gardener", "the ferryman", "Aunt Willow", "the clockmaker", "Miss Thimble", "Doctor Sedge",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """Something to own, lose, lend or give. `job` is what a small creature would take it for."""

    noun: str
    job: str
    look: str = ""

    @property
    def soft(self) -> bool:
        return self.noun in SOFT

    def __str__(self) -> str:
        return f"{self.look} {self.noun}"

    @property
    def the(self) -> str:
        return f"the {self}"

    @property
    def a(self) -> str:
        return f"a {self}"

    @property
    def A(self) -> str:
        return f"A {self}"

    @property
    def Noun(self) -> str:
        return self.noun.title()


SOFT = ("scarf", "hat", "mitten", "ribbon", "blanket", "cushion", "slipper", "flag", "ball", "kite")

LOOKS = ("red", "blue", "green", "yellow", "striped", "spotted", "silver", "orange", "little", "old", "purple", "shiny")

THINGS = tuple(
    Thing(noun, job)
    for noun, job in {
        "kite": "a roof", "teacup": "a bath", "scarf": "a bed", "hat": "a nest", "umbrella": "a tent",
        "mitten": "a sleeping bag", "spoon": "a bridge", "lantern": "a house", "drum": "a table",
        "boat": "a cradle", "marble": "a moon", "button": "a plate", "ribbon": "a curtain", "bell": "a doorbell",
        "blanket": "a carpet", "train": "a bus", "key": "a coat hook", "mirror": "a pond", "basket": "a boat",
        "bottle": "a window", "cushion": "a mountain", "slipper": "a sofa", "whistle": "a chimney", "box": "a castle",
        "jug": "a tower", "flag": "a sail", "ball": "a chair", "bucket": "a swimming pool",
    }.items()
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a story happens: `at` says where its people live, `spots` where something may lie hidden."""

    name: str
    at: str
    spots: tuple[str, str, str, str]
    creature: str

    def __str__(self) -> str:
        return self.name

    @property
    def At(self) -> str:
        return self.at[0].upper() + self.at[1:]


PLACES = (
    Place(
        "the harbour",
        "by the harbour",
        ("under an upturned boat", "behind the fish crates", "beneath the fishing nets", "at the end of the pier"),
        "crab",
    ),
    Place(
        "the wood",
        "at the edge of a wood",
        ("inside a hollow log", "under a heap of leaves", "between the roots of the oak", "behind the brambles"),
        "dormouse",
    ),
    Place(
        "the village",
        "in a village with crooked chimneys",
        ("behind the bakery", "under the market stalls", "beside the well", "on the school steps"),
        "sparrow",
    ),
    Place(
        "the farm",
        "on a farm among the hills",
        ("in the hayloft", "under the cart", "behind the barn door", "beside the pond"),
        "duckling",
    ),
    Place(
        "the river bank",
        "beside a slow green river",
        ("among the reeds", "under the stone bridge", "behind the water wheel", "in the soft mud"),
        "frog",
    ),
    Place(
        "the station",
        "near a station where few trains stopped",
        ("under the long bench", "behind the ticket window", "beside the old signal", "on the far platform"),
        "pigeon",
    ),
    Place(
        "the lighthouse",
        "next to a lighthouse",
        ("on the winding stairs", "among the rock pools", "under the rowing boat", "behind the oil barrels"),
        "gull",
    ),
    Place(
        "the orchard",
        "in an old apple orchard",
        ("under the ladder", "in the long grass", "behind the beehives", "inside an empty barrel"),
        "robin",
    ),
    Place(
        "the mountain",
        "high on a mountain",
        ("behind the woodpile", "under a flat stone", "beside the goat path", "at the foot of the waterfall"),
        "marmot",
    ),
    Place(
        "the town",
        "in the middle of a busy town",
        ("behind the clock tower", "under the park bench", "beside the fountain", "on the library steps"),
        "pigeon",
    ),
    Place(
        "the garden",
        "in a garden with high walls",
        ("under the rhubarb leaves", "behind the watering cans", "inside a flower pot", "beside the sundial"),
        "snail",
    ),
    Place(
        "the island",
        "on a very small island",
        ("in a pile of driftwood", "under the palm tree", "behind the tallest rock", "among the sea grass"),
        "turtle",
    ),
    Place(
        "the canal",
        "beside a quiet canal",
        ("behind the lock gate", "under the low bridge", "inside a coil of rope", "beside the coal sacks"),
        "moorhen",
    ),
    Place(
        "the windmill",
        "in the shadow of a windmill",
        ("behind the flour sacks", "under the millstone", "on the highest step", "beside the oat bin"),
        "field mouse",
    ),
)


@dataclass(frozen=True)
class Season:
    """A time of year: `days` name a day in it, `weather` says a sentence about that day."""

    name: str
    days: tuple[str, ...]
    weather: tuple[str, ...]


SEASONS = (
    Season(
        "spring",
        ("one bright spring morning", "one showery day in April", "on the first warm day of spring"),
        (
            "The hedges were full of birds.",
            "Rain had washed the sky clean.",
            "Small green leaves were opening everywhere.",
            "The air smelled of wet earth.",
        ),
    ),
    Season(
        "summer",
        ("one hot summer afternoon", "one long day in July", "early one summer morning"),
        (
            "The bees were busy and everybody else was slow.",
            "There was not a cloud to be seen.",
            "Even the shadows looked for shade.",
            "The sun had got up before everybody.",
        ),
    ),
    Season(
        "autumn",
        ("one windy autumn morning", "one golden day in October", "late one autumn afternoon"),
        (
            "The wind chased the leaves in circles.",
            "The first chestnuts were falling.",
            "There was a smell of apples and smoke.",
            "A thin mist lay over everything.",
        ),
    ),
    Season(
        "winter",
        ("one snowy winter morning", "one cold day in January", "on the shortest day of the year"),
        (
            "The snow squeaked under every step.",
            "Every window had flowers of ice.",
            "The puddles had turned to glass.",
            "Smoke stood straight up from the chimneys.",
        ),
    ),
)
