"""The plots: each a short text with choices, `[this|that]`, and fields, `{hero}`, that a story fills in.

An opening introduces the hero and a habit and ends in the middle of a sentence; a plot goes on from there and
follows from its first line to its last; an ending comes back to the habit. A plot's `cases` are fields that belong
together: which noise was heard, and what had made it. Articles are always written "a": the story's last touch turns
them into "an" where English wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# What the opening says of the hero, what the ending says, and what `{it}` may be.
HABITS = (
    (
        "{hero.He} said good morning to {it} every day, and never got an answer.",
        "The next morning {hero} told the whole story to {it}. There was still no answer, but it was a good silence.",
        ("the kettle", "the front door", "the oldest tree in the lane", "the garden gate", "the weathercock"),
    ),
    (
        "{hero.He} kept a list of {it}, and it was already very long.",
        "That evening {hero} took out the list of {it} and wrote one more line at the bottom: {friend}.",
        ("good days", "things to remember", "surprises", "small adventures"),
    ),
    (
        "{hero.He} was never seen without a {it}.",
        "And from that day on there was room for two under the {it}.",
        ("very large hat", "patched umbrella", "blanket that reached the floor"),
    ),
    (
        "{hero.He} believed that a {it} brought good luck.",
        'And did the {it} bring good luck? "Of course not," said {hero}. "Good friends do."',
        ("bent nail", "grey pebble", "blue feather", "odd sock", "broken button"),
    ),
    (
        "{hero.He} had always wanted to see {it}.",
        "{hero.He} had still not seen {it}. But that could wait until [tomorrow|next week|Saturday].",
        ("a whale", "the other side of the hill", "a shooting star", "the king", "an elephant"),
    ),
    (
        "{hero.He} was good at {it}, and not so good at waiting.",
        "{hero.He} was still good at {it}. And now {hero.he} was a little better at waiting, too.",
        ("climbing", "counting", "singing", "making soup", "asking questions", "finding things"),
    ),
    (
        "{hero.He} slept with the window open, to hear {it}.",
        "That night {hero} lay by the open window and listened to {it}, and fell asleep before the end.",
        ("the trains", "the owls", "the rain", "the wind", "the frogs"),
    ),
    (
        "{hero.He} thought that {hero.he} was too small for {it}.",
        '"Perhaps I am not too small for {it} after all," thought {hero}, and smiled in the dark.',
        ("important things", "great adventures", "difficult questions", "big plans"),
    ),
    (
        "{hero.He} liked the smell of {it} more than anything in the world.",
        "And when {hero} came home, the whole house smelled of {it}. It was the best end that a day could have.",
        ("pancakes", "warm bread", "plum cake", "apple pie", "pea soup"),
    ),
    (
        "{hero.He} had one wish: to have a story to tell {it}.",
        "So {hero} had a story at last, and told it {it}. It was the one that you have just heard.",
        ("by the fire", "at bedtime", "on rainy days", "to the stars"),
    ),
    (
        "{hero.He} had never been further than {it}.",
        "{hero} had still not been further than {it}. But the world seemed larger than it had been that morning.",
        ("the second bridge", "the last house", "the crooked signpost", "the end of the wall"),
    ),
    (
        "{hero.He} always asked the same question: {it}",
        'That evening {hero} did not ask {it} For once, {hero.he} knew the answer.',
        ('"What comes next?"', '"Are we there yet?"', '"Who did that?"', '"Why not?"'),
    ),
)  # fmt: skip

OPENINGS = (
    "Once there was a {hero.kind}, and {hero.his} name was {hero}. {hero.He} lived {place.at}. {habit}\n\n{Day}, ",
    (
        "There was once a {hero.kind}. [Everybody called {hero.him} {hero}|{hero.His} name was {hero}]. [Home"
        " was a small house|The house was small and stood] {place.at}. {habit}\n\n{weather} {Day}, "
    ),
    "{hero} was a {hero.kind}, and lived {place.at}. {habit}\n\n{Day}, ",
    (
        "Do you know {hero}? {hero.He} is a {hero.kind}. {hero.He} lives {place.at}. And this is what "
        "happened {day}.\n\n{habit} {weather} That day "
    ),
    (
        "{Day}, {hero}, a {hero.kind}, was looking out of the window of a little house {place.at}. {weather} "
        "{habit}\n\nThat day "
    ),
    (
        '"[Something is going to happen today|Today is not like other days|I can feel it in my nose]," said '
        '{hero}. {hero} was a {hero.kind}, and nobody {place.at} [woke up earlier|had better ideas]. '
        '{habit}\n\n{weather} That day '
    ),
    (
        "Nobody {place.at} knew [how old {hero} was|where {hero} had come from], but everybody liked "
        "{hero.him}. {hero.He} was a {hero.kind}. {habit}\n\n{Day}, "
    ),
    (
        "This is the story of {hero} and {friend}. {hero} was a {hero.kind}. {friend} was a {friend.kind}. "
        "They lived {place.at}, side by side. {habit}\n\n{weather} {Day}, "
    ),
    (
        "{place.At} there stood a house with a [round|green|crooked] door. A {hero.kind} lived in it. "
        "{hero.His} name was {hero}. {habit}\n\n{Day}, "
    ),
)  # fmt: skip

ENDINGS = (
    "{closing}",
    "{closing}",
    "{closing} [Good night, {hero}.|Good night, {hero}. Good night, {friend}.|The end.|And that is all.]",
    "They [both slept well|talked about it for a week|still laugh about it]. {closing}",
    "{helper.Name} heard about it and [nodded|smiled|laughed out loud]. {closing}",
)


@dataclass(frozen=True)
class Plot:
    """One way for a story to go. `title` and `text` are templates; one of `cases` is taken for each story."""

    title: str
    text: str
    cases: tuple[Mapping[str, str], ...] = ({},)
    seasons: tuple[str, ...] = ("spring", "summer", "autumn", "winter")
    machines: bool = True  # may a machine be the hero or the friend? Not where somebody is hungry
    hard: bool = False  # is the thing broken, or knocked on? Then it is none of the soft ones
    strangers: bool = False  # the two meet in the plot, so no opening may speak of the friend


PLOTS = (
    Plot(
        title="[The Lost {thing.Noun}|Where Is the {thing.Noun}?|{hero} and the {thing.Noun}]",
        text="""
            [{hero} could not find {hero.his} {thing}. It had been there [the evening before|at breakfast], and now it
            was gone.|the {thing} of {hero} was gone. {hero.He} had held it only [the evening before|an hour
            ago].|{hero} wanted to play with {hero.his} {thing}. But where was it?]

            {hero.He} looked {spot1}. There was nothing but [dust|an old newspaper|a surprised spider]. [{hero.He}
            looked {spot2}. There was nothing but [a puddle|last year's leaves|a very cross beetle].|]

            "What are you looking for?" asked {friend.full}.

            "My {thing}," said {hero}. "[I have looked everywhere.|I am sure that it walked away.|It was a present.]"

            "Not everywhere," said {friend}. "Where did you [laugh|run|rest] last?"

            {hero} thought about it, and then {hero.he} began to run. And there it was, {spot3}! [But it was not empty
            and it was not alone.|] A small {place.creature} had found it first, and was using it as {thing.job}.

            [[{hero} opened {hero.his} mouth, and closed it again.|{hero} was cross for as long as it takes to count
            to three.]|] "Is it yours?" asked the {place.creature}. "I have never had anything so [fine|beautiful]."

            {hero} looked at {friend}, and {friend} looked at {hero}. "[You may use it on Mondays|You may have it
            until spring|We can share it]," said {hero}. {friend} found a [shoe box|flower pot|broken basket] that did
            just as well for the other days, and the {place.creature} [sang them a song|danced a little dance|bowed
            twice].
        """,
    ),
    Plot(
        title="[{hero} and the Noise|The Noise in the Night|What Was That?]",
        text="""
            {hero} heard a strange noise. {sound} It came from somewhere {spot1}.

            {hero} ran to {friend.full}. "[Come quickly|Wake up|Listen]!" {hero.he} whispered. "There is {guess} near
            my house."

            "How do you know?" asked {friend}.

            ["[It sounds like one.|What else could it be?|I have read about them.]"|"Believe me," said {hero}. "I know
            a lot about such things."|"Nothing else is so loud," said {hero}.]

            {friend} was not [brave|sure], but {friend.he} took a lantern and {thing.a}. "What is the {thing.noun}
            for?" asked {hero}. "I do not know yet," said {friend}.

            [They went on tiptoe. {sound} It was louder now. {hero} held on to {friend}, and {friend} held the lantern
            up high. And what did they see?|Side by side they crept on. {sound} They turned a corner. And what did
            they see?|They came nearer, one step at a time. {sound} {friend} lifted the lantern. And what was it?] It
            was only {cause}.

            [They laughed until they had to sit down.|{hero} went red up to the ears.|For a moment nobody said a word.
            Then both of them began to laugh.] "{guess_again} is much smaller than I thought," said {hero}.

            They {remedy}, and then it was quiet. {friend} put down the {thing.noun}. "[It was for this|Now I know
            what it was for]," {friend.he} said, and gave it to {hero}. "[Whoever is afraid at night should have
            something to hold.|Then we can both be brave, even when I am at home.|Keep it by your bed.]"
        """,
        cases=(
            {
                "sound": "Tap, tap, tap.",
                "guess": "a giant with one shoe",
                "guess_again": "My giant",
                "cause": "a branch that the wind was knocking against a bucket",
                "remedy": "moved the bucket",
            },
            {
                "sound": "Hoo, hoo, hoo.",
                "guess": "a ghost",
                "guess_again": "My ghost",
                "cause": "the wind, blowing over the neck of a bottle",
                "remedy": "laid the bottle on its side",
            },
            {
                "sound": "Rattle, rattle, bump.",
                "guess": "a robber",
                "guess_again": "My robber",
                "cause": "a baby {place.creature} that was stuck in a jam jar",
                "remedy": "pulled until the jar came off with a pop",
            },
            {
                "sound": "Grrr, grrr, grrr.",
                "guess": "a dragon",
                "guess_again": "My dragon",
                "cause": "{helper}, asleep on a chair and snoring",
                "remedy": "laid a blanket over the sleeper",
            },
            {
                "sound": "Squeak, squeak, squeak.",
                "guess": "a monster with a hundred teeth",
                "guess_again": "My monster",
                "cause": "a little gate that needed a drop of oil",
                "remedy": "put one drop of oil on it",
            },
            {
                "sound": "Drip, drop, drip.",
                "guess": "a sea serpent",
                "guess_again": "My sea serpent",
                "cause": "the rain barrel, which had a tiny hole",
                "remedy": "closed the hole with a bit of wax",
            },
        ),
    ),
    Plot(
        title="[The Last {food_title}|One {food_title} Is Not Much|{hero} Shares]",
        machines=False,
        text="""
            {hero} had made {food}, and it had turned out very well. {hero.He} had just sat down to it when there was
            a knock at the door.

            It was {friend.full}. "[I smelled something|My nose brought me here]," said {friend}. "I have had nothing
            since yesterday."

            [{hero} sighed, but only a little, and cut it in two. Before anybody could take a bite, there was another
            knock.|"Then we shall share," said {hero}, and cut it in two. But there was another knock.|{hero} looked
            at {hero.his} plate, and at {friend}, and cut it in two. Just then there was another knock.] It was
            {helper}, who was [wet through|cold and tired|on the way home]. So {hero} cut it in four.

            Then came a small {place.creature} with three [brothers|sisters|cousins]. {hero} cut and cut. [In the end
            there was so little left that {hero} got [one crumb|the smell|a clean plate].|At last everybody had a
            piece, but {hero} had only [one crumb|a clean plate].]

            ["[That was the best that I ever ate|I have never eaten better]," said {helper}. "But what about
            you?"|"And you?" asked {helper}. "Do you not want any?"]

            "[I am not so hungry|I can wait]," said {hero}, and {hero.his} stomach growled. [Everybody heard it.|]

            The guests looked at one another, and then they went out, all of them. {hero} [washed up alone|sat in the
            empty kitchen] and felt a bit sad. But a little later there was a knock, and then another. {friend} had
            brought [honey|carrots|cheese], {helper} had brought [bread|plums|a pot of soup], and the {place.creature}
            had brought a single, perfect [berry|nut|pea].

            [They put it all on the table. It was the largest [supper|dinner] that the little house had ever seen, and
            this time {hero} was served first.|There was hardly room for it on the table. And the first piece, and the
            second, went to {hero}.]
        """,
        cases=(
            {"food": "a pancake", "food_title": "Pancake"},
            {"food": "a small plum cake", "food_title": "Plum Cake"},
            {"food": "an apple pie", "food_title": "Apple Pie"},
            {"food": "a cheese tart", "food_title": "Cheese Tart"},
            {"food": "a round loaf of bread", "food_title": "Loaf"},
            {"food": "a berry bun", "food_title": "Berry Bun"},
        ),
    ),
    Plot(
        title="[The {thing.Noun} That Broke|{hero} Tells the Truth|Two Halves of a {thing.Noun}]",
        hard=True,
        seasons=("spring", "summer", "autumn"),
        text="""
            {hero} borrowed {thing.a} from {friend.full}. "Be careful with it," said {friend}. "[It was my
            grandmother's.|I have only one.|It is older than both of us.]"

            [{hero} was careful all morning. {hero.He} was careful at noon. But then|All went well until a little
            after noon. Then|{hero} used both {hero.hands} and hardly dared to breathe. But then] a [bee|wasp|big fly]
            came and sat on {hero.his} nose, and {hero} jumped, and the {thing.noun} fell. Crack! It lay there in two
            pieces.

            {hero} hid the pieces {spot1}. When {friend} came by, {hero} talked about the weather. [{hero.He} talked
            about [soup|clouds|shoes].|] {hero.He} talked so much that {friend} asked, "Are you ill?"

            That night {hero} could not sleep. [The pieces were far away, {spot1}, but it felt as if they lay under
            the pillow.|{hero.He} turned to the left and {hero.he} turned to the right, and saw the pieces on either
            side.|] As soon as it was light, {hero.he} fetched them and carried them to {friend}.

            "I broke it," said {hero}, very quietly. "And then I hid it, and that was worse."

            {friend} [looked at the pieces for a long time|said nothing at first]. "[I am sad about the
            {thing.noun}|It is a pity]," {friend.he} said. "But I am glad that you told me. Hold this end."

            [They worked with [glue and string|wire and wax|needle and thread] until evening. There was a crooked line
            where it had been broken.|It took [glue and string|wire and wax], and all their patience. One could still
            see where it had been broken.] "[Now it has a smile|It looks like a river on a map]," said {friend}. "I
            like it better than before. [But you still may not juggle with it.|Only keep it away from bees.|And I like
            you better than before, too.]"
        """,
    ),
    Plot(
        title="[The Great Race|{hero} Comes Last|Faster, {hero}!]",
        text="""
            there was a race round {place}, and everybody wanted to win. {friend.full} wanted it most. ["I am faster
            than the wind," said {friend}. "[You will only see my back.|Please wave when I pass you.]"|"The rest of
            you need not even start," said {friend}.|]

            {hero} was not fast. {hero.He} [only wanted to finish|had come because of the lemonade].

            {helper.Name} rang a bell, and off they went. {friend} was out of sight at once. {hero} went on at
            {hero.his} own pace, past the [pump|old fence|tall poplar], and looked about. That is why {hero} saw what
            the others had not seen: a little {place.creature} that was stuck {spot1}.

            "[Help|Oh, please help]!" it cried. "They all ran by so fast!"

            [{hero} looked at the road. Then {hero.he} stopped, and pushed|{hero} did not think about the race any
            more. {hero.He} pushed|"Hold still," said {hero}, and pushed] and pulled until the {place.creature} was
            free. [It took [a long time|half an hour].|]

            A little further on, {friend} was sitting at the side of the road and [rubbing {friend.his} knee|holding
            {friend.his} foot]. "I looked behind me to see how far ahead I was," said {friend}, "and I ran into a
            [post|wall|tree]."

            "Lean on me," said {hero}.

            [So they finished together, after everybody else, with the {place.creature} riding on top.|That is how
            they came in, long after the others: {hero}, {friend} and the {place.creature}.] {helper.Name} had kept
            three glasses of lemonade. "[Who won?|And who was first?]" asked {friend}. [Nobody could remember. But
            they all remembered who had been last, and they cheered.|"Somebody or other," said {helper}. "But you two
            came in last best."]
        """,
    ),
    Plot(
        title="[The Machine That Would Not Go|{hero} Mends the {engine_title}|The Missing Part]",
        text="""
            the {engine} stood still. [{hero} pressed every button, and {friend.full} gave it a little kick, but the
            {engine} did not even [cough|hum|blink].|{hero} and {friend.full} walked round it twice. It did not even
            [cough|hum|blink].]

            "It is broken for ever," said {friend}.

            "Nothing is broken for ever," said {hero}. {hero.He} opened the lid and looked inside. "There is a part
            missing. It was about so big, and round. {why}"

            They tried [a biscuit|a potato], but it crumbled. [They tried a [coin|cork], but it was too small.|] They
            tried {thing.a}, which was {friend.his} idea, and the less we say about that, the better.

            "[Let us ask {helper}|{helper.Name} may know]," said {friend}. But {helper} only smiled and said, "[The
            best spare part is often closer than you think.|Look at what you carry every day.]"

            [{hero} sat down to think, and put {hero.his} [chin|head] in {hero.his} {hero.hands}. Then {hero.he} saw
            it.|{hero} thought so hard that {hero.his} head hurt. Then {hero.he} looked up.|"Hm," said {hero}. And
            then, "Aha!"] On {friend.his} old coat there was one big round button. {friend} saw it, too. It was
            {friend.his} favourite button.

            Snip! [It fitted as if it had been made for the {engine}. There was a click, and a whirr, and {result}.|In
            it went, and it fitted. There was a cough, and a hum, and {result}.]

            "[I shall be cold in winter|Now my coat hangs open]," said {friend}, but {friend.he} was smiling. And when
            {friend} came home, {hero} had sewn on a new button. [It was made of [wood|silver paper|a walnut shell],
            and it shone.|It did not match the others at all, and {friend} liked it best.]
        """,
        cases=(
            {
                "engine": "clock on the tower",
                "engine_title": "Clock",
                "why": "Without it the time cannot turn.",
                "result": "it struck twelve, although it was only four",
            },
            {
                "engine": "little ferry boat",
                "engine_title": "Ferry",
                "why": "Without it the wheel cannot turn.",
                "result": "the wheel began to splash",
            },
            {
                "engine": "music box",
                "engine_title": "Music Box",
                "why": "Without it the tune cannot turn.",
                "result": "it played the tune that it had been saving up for weeks",
            },
            {
                "engine": "bread oven",
                "engine_title": "Oven",
                "why": "Without it the fire gets no air.",
                "result": "soon there was a smell of fresh rolls",
            },
            {
                "engine": "old merry-go-round",
                "engine_title": "Merry-Go-Round",
                "why": "Without it the horses cannot turn.",
                "result": "the wooden horses set off at a gallop",
            },
            {
                "engine": "watering machine",
                "engine_title": "Watering Machine",
                "why": "Without it the pump cannot turn.",
                "result": "everybody within ten steps got wet",
            },
        ),
    ),
    Plot(
        title="[The Seed|What Will It Be?|{hero} Waits]",
        seasons=("spring",),
        text="""
            {helper} gave {hero} a seed. It was [small and black|striped|as round as a bead]. "What will it be?" asked
            {hero}. "[Wait and see|That is the seed's secret]," said {helper}.

            {hero} planted it {spot1}, gave it water, and sat down to watch. Nothing happened. {hero.He} [sang to
            it|read it a story|told it to hurry]. Nothing happened.

            "It does not work," said {hero} to {friend.full}. "I have waited for [an hour|a whole morning]."

            ["[You must wait with your eyes shut|Seeds are shy|It is busy under the ground]," said {friend}. "Come and
            play."|"Does a cake rise when you look at it?" asked {friend}. "Come and play."]

            [So they played, and many days went by, and {hero} watered the spot each evening. At last there was a
            green tip. Then there were two leaves.|A week went by, and another. {hero} almost forgot to be in a hurry.
            Then, one morning, there were two leaves.] Then there was a stem as tall as {hero}, and on top of it sat a
            fat bud.

            ["[I think that it is a tree|I hope that it is a cake]," said {friend}. "I think that it is an umbrella,"
            said {hero}.|"It is going to be something big," said {friend}.|]

            In the night it opened. It was {grown}. [{hero} and {friend} stood before it and did not say a
            word.|{hero} called {friend}, and they looked and looked.|] {wonder}

            "Was it worth the wait?" asked {helper}. {hero} nodded. Then {hero.he} picked up what had fallen from it:
            [seven|nine|twelve] new seeds. {hero.He} kept one and gave one to {friend}. "What will they be?" asked
            {friend}. {hero} smiled. "Wait and see."
        """,
        cases=(
            {"grown": "a sunflower, as tall as a door", "wonder": "It turned its head to the sun, and they did, too."},
            {"grown": "a blue bell that rang in the wind", "wonder": "Every hour a bee came and rang it."},
            {"grown": "a pumpkin as big as a chair", "wonder": "Then they both sat down on it."},
            {"grown": "a red poppy, thin as paper", "wonder": "It was the only red thing for miles."},
            {"grown": "a white flower that smelled of honey", "wonder": "Soon all the bees had heard about it."},
        ),
    ),
    Plot(
        title="[The Flood|Rain, Rain, Rain|{hero} Builds a Boat]",
        seasons=("spring", "summer", "autumn"),
        text="""
            it began to rain, and it did not stop. [It rained on [Monday|Friday], it rained the day after, and on the
            third day the water stood at the doors.|By noon the path was a stream, and by evening the water stood at
            the doors.] All that {hero} had saved was {thing.a}.

            "[What do you want with that|That is no use now]?" said {friend.full}. "You cannot eat it, and you cannot
            swim on it."

            ["[You never know|It may be good for something]," said {hero}.|"I do not know," said {hero}. "I could not
            leave it behind."]

            Then they heard a thin voice. On a [chimney|fence post|floating plank], with water all round, sat a young
            {place.creature}. It was much too frightened to move.

            "We need a boat," said {friend}.

            "We have a [door|table|bathtub]," said {hero}. They pushed it into the water and climbed on. {friend}
            paddled with [a broom|a frying pan|both feet], and {hero} held up the {thing.noun} so that the
            {place.creature} could see it through the rain. ["Look at the {thing.noun}!" called {hero}. "Do not look
            at the water!"|]

            [It was [slow work|a wild ride], and twice they turned in a circle.|The waves were high, and their boat
            was not very good.] But the {place.creature} looked at the {thing} and was not afraid, and when they came
            near, it jumped.

            By evening the rain had stopped. {helper.Name} hung their wet things by the stove and made
            [cocoa|tea|onion soup]. "Well," said {friend}, and looked at the {thing.noun}. "I was wrong about that."

            "[What was it good for in the end?|What was it for?]" asked {helper}.

            "For looking at," said the {place.creature}, and yawned.
        """,
    ),
    Plot(
        title="[The Letter in the Bottle|A Letter for Nobody|{hero} Gets a Letter]",
        strangers=True,
        text="""
            {hero} found a letter {spot1}. It had no name on it. Inside there was only one line: "{line}"

            ["Who wrote it?" {hero.he} wondered. {hero.He} asked|{hero} turned it over. There was nothing on the back.
            {hero.He} asked] {helper}, who could not read without glasses. {hero.He} asked the {place.creature}, who
            could not read at all. Nobody knew.

            So {hero} wrote an answer on the back: "{answer}" And {hero.he} put the letter back {spot1}.

            [The next day there was a new letter. {hero} answered that one, too. This went on for a week.|In the
            morning it was gone, and there was another in its place. So it went on, day after day, for a week.] They
            wrote about [clouds and cheese|boats and bad dreams|the best kind of soup]. [But they never wrote their
            names.|]

            On the seventh day {hero} [got up early|hid {spot2}] to see who would come. [Somebody came on tiptoe,
            looked left, looked right, and pulled out a letter. It was {friend.full}!|There were steps, and they
            stopped, and came nearer. And who pulled out a letter? {friend.full}!]

            "You?" said {hero}. "But I see you every day! You always walk by without a word."

            {friend} looked at the ground. "[When I open my mouth, the words run away|The words get stuck],"
            {friend.he} said. "In a letter they come out."

            {hero} thought about it. Then {hero.he} took a pencil, wrote something on a piece of paper, and held it
            out. {friend} read it and laughed. It said: "Come in. There is [cake|toast|tea]. You need not say a word."

            [{friend} came in. And then {friend} talked all afternoon.|And {friend} came in, and did not say a word,
            and it was a very fine visit.|{friend} came in, and said just one: "Thanks."]
        """,
        cases=(
            {"line": "Is anybody there?", "answer": "Yes. I am."},
            {"line": "I have a secret, and nobody to tell it to.", "answer": "You can tell it to me."},
            {"line": "What do you do when it rains?", "answer": "I count the drops. What do you do?"},
            {"line": "I wish that I had a friend.", "answer": "I wish so, too. Let us begin."},
            {"line": "Do you know a good joke?", "answer": "Not yet. But I am looking for one."},
        ),
    ),
    Plot(
        title="[The Star in the Jar|{hero} Catches a Star|A Light for {hero}]",
        seasons=("spring", "summer"),
        text="""
            {hero} saw a tiny light {spot1}. "A star has fallen down!" {hero.he} cried, and caught it in a jar, and
            screwed the lid on tight.

            {hero} showed it to {friend.full}. ["It is mine," {hero.he} said. "Now I shall never need a lamp
            again."|"I found it, so it is mine," {hero.he} said.]

            "[It is beautiful|How it shines]," said {friend}. "But does it like it in there?"

            "Stars do not like or dislike things," said {hero}. But that evening the light was weaker, and when it was
            quite dark, it was only a small green dot. {hero} put {hero.his} ear to the jar. "[Please|Excuse me],"
            said a voice. "I am not a star. I am a firefly, and {wish}."

            [{hero} felt hot and cold. {hero.He} had wanted the light so much that {hero.he} had not asked.|"Oh," said
            {hero}. "I did not know." And that was true, but it did not help.|{hero} was ashamed.] {hero.He} carried
            the jar outside and took off the lid. [The firefly climbed to the rim, shook its wings, and was gone.|It
            rose up over the roof, and {hero} looked after it for a long time.]

            The next night {hero} and {friend} stayed out too long. A fog came up, thick as [wool|porridge], and they
            could not see the path. ["[We are lost|I cannot see my own feet]," said {friend}.|]

            Then a light went on in the fog, and another, and then there were a hundred. They made a line, all the way
            to {hero.his} door.

            "[Is that your star?|Do you know them?]" whispered {friend}. "It is not mine," said {hero}. "It is my
            friend."
        """,
        cases=(
            {"wish": "my sister is waiting for me"},
            {"wish": "I can only shine when I can fly"},
            {"wish": "I should like to go home"},
            {"wish": "tonight is the summer dance"},
            {"wish": "I miss the grass"},
        ),
    ),
    Plot(
        title="[{hero} and {friend} Change Places|The Easy Job|A Day of Mistakes]",
        text="""
            {hero} was tired of {job1}. "You have it easy, {friend}," {hero.he} said to {friend.full}. "You only have
            to {do2} all day."

            ["Easy?" said {friend}. "You only have to {do1}! Let us change places, and we shall see."|"And I am tired
            of it, too," said {friend}. "Shall we change places for a day?"]

            So they did. {friend} went to {do1}, and {trouble1}. ["[That can happen to anybody|It is only the
            beginning]," said {friend}, and tried again. It happened again.|"Nobody saw that," said {friend}. But
            everybody had.|]

            {hero}, meanwhile, went to {do2}, and {trouble2}. [{hero.He} [said a word that cannot be written down
            here|sat down and counted to twenty].|]

            [At noon {helper} came by, looked at the one, looked at the other, and [asked no questions|went away again
            very quickly].|At noon {helper} came to see how it was going. It was not going well.|"Is this a new way to
            do it?" asked {helper}.]

            In the evening they met {spot1}. {hero} had [flour|mud|soot] on {hero.his} ears. {friend} had a bandage on
            {friend.his} foot.

            "How was it?" asked {hero}.

            "[Very nice|Oh, quite easy]," said {friend}. "And yours?"

            "[Very nice|Nothing to it]," said {hero}. [Then they looked at each other, and neither could keep a
            straight face.|Then {friend} sneezed, and {hero} snorted, and they both laughed until they cried.]

            "Tomorrow I shall be glad of {job1} again," said {hero}. "And when I am tired of it, I shall come and
            watch you. You are really very good at it, you know."

            "So are you," said {friend}.
        """,
        cases=(
            {
                "job1": "baking",
                "do1": "bake the bread",
                "trouble1": "the dough rose, and rose, and went out of the window",
                "do2": "look after the goats",
                "trouble2": "the goats ate {hero.his} hat and then looked after {hero.him}",
            },
            {
                "job1": "painting fences",
                "do1": "paint the fence",
                "trouble1": "at the end more paint was on the painter than on the fence",
                "do2": "ring the bell on time",
                "trouble2": "{hero} rang it at ten, at half past ten, and once by sitting on the rope",
            },
            {
                "job1": "sweeping the yard",
                "do1": "sweep the yard",
                "trouble1": "the wind carried every leaf back again",
                "do2": "carry the letters",
                "trouble2": "all the letters came to the wrong doors",
            },
            {
                "job1": "washing clothes",
                "do1": "wash the clothes",
                "trouble1": "one red sock turned everything pink",
                "do2": "catch the fish",
                "trouble2": "a big fish pulled until it nearly caught {hero}",
            },
        ),
    ),
    Plot(
        title="[A Present for {friend}|The Long Way Round|{hero} Makes a Swap]",
        text="""
            {hero} remembered that it was the birthday of {friend.full}, and {hero.he} had no present. All that
            {hero.he} had was {thing.a}, which {hero.he} loved.

            {hero} took it and went to see {helper}. "Will you give me something for it?" {hero.he} asked.
            {helper.Name} needed a {thing.noun}, as it happened, and gave {hero.him} a [ball of wool|bag of nuts|pot
            of honey] instead.

            [But {friend} did not care for such things. So {hero} went on, and met|"That is not quite it," thought
            {hero}, and walked on. Then {hero.he} met|It was not the right present yet. On the way {hero} met] a
            {place.creature} who wanted nothing else in the world, and who gave {hero.him} {other.a} for it. It was
            perfect. {friend} had always wanted {other.a}!

            [{hero} ran all the way.|] {friend} opened the door, and [was holding something behind {friend.his}
            back|looked excited, too].

            "Happy birthday!" said {hero}, and held out {other.the}.

            "Oh!" said {friend}. "And I have something for you. I saw it today on the table of {helper}, and I thought
            of you at once. I gave my best [hat|book|blanket] for it."

            It was {thing.the}.

            {hero} looked at the {thing.noun}, and {friend} looked at the {other.noun}, [and then {hero} told
            {friend.him} how it had come about.|and then it all came out.] They [laughed until the cups rattled|had to
            sit down on the step]. "[So you got your own thing back|You walked in a big circle]," said {friend}.

            "Yes," said {hero}. "But now it is a present. That makes it new."
        """,
    ),
    Plot(
        title="[The New One|{hero} and the Stranger|Somebody Moves In]",
        strangers=True,
        text="""
            a cart stopped at the empty house next door to {hero}. Down climbed a {friend.kind}, with [one
            suitcase|three boxes] and {thing.a}. {friend.His} name was {friend}.

            "Do you want to play?" called {hero}. {friend} went inside and shut the door.

            ["[Not friendly, that one|How rude]," said the {place.creature}.|The curtains were drawn as well.|]

            But {hero} had seen {friend.his} face. [It had not been a rude face. It had been a worried one. So {hero}
            did not knock. {hero.He} sat down|It had been a worried face. So {hero} did not call again. {hero.He} sat
            down] {spot1}, where one could be seen from the window, and played alone. {hero.He} played [marbles|a game
            with pebbles|hopscotch], and played it as badly as possible.

            [On the first day the curtain moved. On the second day the window was open. On the third day a voice
            said,|After an hour the curtain moved. After another hour the window was open. At last a voice said,]
            "[You are doing it wrong|That is not how it goes]."

            "Am I?" said {hero}. "Then how does it go?"

            {friend} came out, with the {thing} under one arm. [At first {friend.he} only pointed. Then {friend.he}
            explained. Then {friend.he} won,|{friend.He} showed how it was done, and won,] [four|five|six] times.

            "Where I come from, everybody plays this," said {friend}. "[I thought that nobody here would know it.|I
            thought that nobody would want me to join in.]"

            "[We know it now|You have to stay and teach us]," said {hero}.

            {friend} put the {thing.noun} down {spot1}. "Then I can leave this here," {friend.he} said, "for
            tomorrow."
        """,
    ),
    Plot(
        title="[The Map|X Marks the Spot|The Red Cross on the Map]",
        text="""
            {hero} found an old map {spot1}. There was a dotted line on it, and a big red cross.

            "[Treasure|Gold and silver]!" said {friend.full}. "Let us go at once. What shall we take?"

            [They took a spade, a bag of [nuts|biscuits|apples], and {thing.a}, for luck.|They took a spade and
            {thing.a}, and set out without breakfast.]

            The line led past [a split tree|three white stones|a dry well], and round a [pond|haystack|ruined tower].
            [It led through a hedge, where {friend} lost a [sock|tail feather of a hat|glove].|] It led up a slope so
            steep that they had to [crawl|rest six times]. And at the top, where the cross was, stood a bench.

            It was only a bench. [They dug beneath it, and they dug behind it. They found [an old spoon|a rusty
            nail|one worm].|They dug until there was a deep hole on every side of it, and found [an old spoon|a rusty
            nail|one worm].] "Somebody has been here before us," said {friend}, and threw down the spade.

            They were tired, so they sat down on the bench. And then they saw it. Below them lay {place}, small as a
            toy, with its lights going on one by one. Beyond it was the [sea|plain], and the whole sky was [gold|red
            and gold].

            [Neither of them spoke for a long time.||"Oh," said {friend}. That was all.] Then steps came up the path.
            It was {helper}. "Ah," said {helper}, "so you have found my map. And did you find the treasure?"

            "Yes," said {hero}, and made room on the bench. "We are looking at it."
        """,
    ),
    Plot(
        title="[The Surprise|Everybody Has Forgotten|{hero} Has a Birthday]",
        text="""
            {hero} had a birthday, and nobody seemed to know. [{helper.Name} only said, "Nice weather," and went on.
            The {place.creature} was in a hurry.|"Good day," said {helper}, and not a word more.]

            {hero} went to see {friend.full}. The door was shut, and behind it somebody said "Ssh!" "I have no time,"
            called {friend} through the keyhole. "I am {excuse}."

            {hero} walked about alone. {hero.He} sat down {spot1} and gave {hero.himself} [a daisy|a smooth stone].
            "Happy birthday," {hero.he} said, and it sounded rather thin.

            Then something funny happened. {thing.A} [rolled|came] down the path, all by itself. [There was a string
            tied to it. {hero} picked up the string and followed it. It went past|It was tied to a string, and
            somebody was pulling. {hero} ran after it, past] the [pump|woodpile|garden wall], twice round a [tree|lamp
            post], and then {spot2}.

            "[Surprise|Happy birthday]!" cried everybody. There were lanterns, and there was a cake with {hero.his}
            name on it, spelled almost right.

            "I thought that you had forgotten," said {hero}.

            "[I have thought of nothing else for a week|It is hard work to forget you so loudly]," said {friend}.
            ["And I am sorry about the keyhole. I am no good at telling lies."|"Did you believe me?"]

            "No," said {hero}. "{reply}" [And then they cut the cake.|"Now cut the cake," said the {place.creature}.]
        """,
        cases=(
            {"excuse": "talking to a pudding", "reply": "Nobody talks to a pudding for so long."},
            {"excuse": "washing my ears", "reply": "You never wash your ears."},
            {"excuse": "sorting my socks", "reply": "You have only two socks."},
            {"excuse": "teaching a spider to count", "reply": "That spider counts better than you do."},
            {"excuse": "asleep", "reply": "Nobody answers when they are asleep."},
        ),
    ),
    Plot(
        title="[The Band|One Note|{hero} Plays a Part]",
        hard=True,
        text="""
            everybody was to play in the band. {helper.Name} had the trumpet, and {friend.full} had the fiddle. Even
            the {place.creature} had a comb and paper. Only {hero} could not play anything.

            "[You can clap|You can carry the chairs]," said {friend}. [{hero} wanted to do more than that.|But {hero}
            did not want to clap.|] {hero.He} tried the trumpet, and the milk went sour. [{hero.He} tried the fiddle,
            and a dog fainted.|{hero.He} tried to sing, and {friend} ran to shut the windows.|]

            So {hero} went away and sat down {spot1}, with nothing but {thing.a}. {hero.He} gave it a little knock.
            Tock, it said. It was not much, but it was a good, round note, and it always came when it was called.

            [The evening of the concert arrived. The lamps were lit, and the benches were full.|Then came the concert,
            and all the benches were full.] But the players were [so nervous|so proud] that each one began at a
            different time. The trumpet ran ahead, the fiddle fell behind, and the comb got lost in the middle.

            Then there was a sound from the last row. Tock. Tock. Tock. It was {hero}, with the {thing.noun}. [One
            after another the players heard it. One after another they fell into step. And suddenly it was music.|The
            fiddle heard it first, and then the trumpet, and then they all fell into step. It was music!]

            The people [stamped|threw their hats into the air]. "[Who kept us together|What was that]?" asked
            {helper}.

            {friend} pulled {hero} to the front. "It was only one note," said {hero}.

            "Yes," said {friend}, "but it was the one that we needed."
        """,
    ),
    Plot(
        title="[The Riddle at the Bridge|The Goose Who Asked Riddles|{hero} Finds the Answer]",
        text="""
            {hero} and {friend.full} wanted to cross the bridge. They were bringing {thing.a} to {helper}. But in the
            middle of the bridge stood a large white goose.

            "Nobody crosses without an answer," said the goose. "{riddle}"

            "[That is easy|I know]!" said {friend}. "It is {wrong}."

            "Wrong," said the goose. "You may try again tomorrow."

            [They went back and sat down {spot1}. {friend} guessed a potato. {friend} guessed a king. {hero} said
            nothing, and turned|They sat down {spot1} to think. "A potato?" said {friend}. "A king?" But {hero} only
            turned] the {thing.noun} round and round. "[Why are you so quiet|Are you asleep]?" asked {friend}.

            "I am looking," said {hero}. And while {hero.he} was looking, {clue}. "Oh!" said {hero}. "Of course!"

            The next morning the goose was there again. "Well?" it said.

            "It is {solution}," said {hero}.

            [The goose was silent. Then it lifted one foot, and then the other.|The goose stood quite still. Then it
            put its head under its wing and out again.|] "[Nobody has guessed it in nine years|You are the first]," it
            said. "I am so glad. [Do you know how boring it is on a bridge?|Now I need not stand here any longer.]"

            "Then come with us," said {hero}. "{helper.Name} always has [soup|cake|tea]."

            So the goose came, too, and carried the {thing}. And on the way it asked {friend} [three|seven] more
            riddles, and {friend} guessed a potato every time. The last time it was right.
        """,
        cases=(
            {
                "riddle": "What runs all day and never gets tired?",
                "wrong": "a horse",
                "clue": "{hero.he} heard the water under the bridge",
                "solution": "a river",
            },
            {
                "riddle": "What follows you in the sun and leaves you in the dark?",
                "wrong": "a dog",
                "clue": "the sun came out, and something dark lay down at {hero.his} feet",
                "solution": "my shadow",
            },
            {
                "riddle": "What gets bigger, the more you take away?",
                "wrong": "a debt",
                "clue": "a mole came by and dug itself into the ground",
                "solution": "a hole",
            },
            {
                "riddle": "What can you break without touching it?",
                "wrong": "an egg",
                "clue": "{hero.he} noticed how still it was, until {friend} sneezed",
                "solution": "silence",
            },
            {
                "riddle": "What has teeth and never bites?",
                "wrong": "a tired crocodile",
                "clue": "{friend} began to tidy up after the wind, with something out of a pocket",
                "solution": "a comb",
            },
        ),
    ),
    Plot(
        title="[How High Is the {goal_title}?|{hero} Goes Up|Nearly There]",
        seasons=("spring", "summer"),
        machines=False,
        text="""
            {hero} decided to {aim}. ["Nobody as small as you has ever done it," said {helper}.|"It cannot be done,"
            said {helper}. "I tried it myself, a long time ago."]

            "[Then I shall be the first|Somebody has to be the first]," said {hero}. {hero.He} packed {thing.a} and a
            [sandwich|slice of cake], and set out.

            The first try ended {spot1}, because {hero} had looked up all the time and not where {hero.he} was going.
            [The second try ended in a [nettle bush|ditch|very deep puddle]. {hero} ate|The second try ended the same
            way, only faster. {hero} ate|The second try is better not described. {hero} ate] the whole [lunch|packed
            lunch] and wanted to go home.

            Then {friend.full} came by. "What are you doing down there?" asked {friend}.

            "[Failing|Resting]," said {hero}. "I want to {aim}, and I am too small."

            {friend} thought about it. "I am too small as well," said {friend}. "But perhaps two times too small is
            big enough." And {friend.he} sat down, so that {hero} could climb on {friend.his} shoulders.

            [{hero} was heavy, and {friend} was ticklish. They wobbled, and they [giggled|shrieked], and they
            used|"Keep still," said {friend}. "I am still," said {hero}. "You are the one who wobbles." They used] the
            {thing.noun} to keep their balance. And then, all at once, {reached}.

            "[What is it like up there?|What do you see?]" called {friend} from below.

            {hero} told {friend.him} everything. Then {hero.he} climbed down. "Now it is your turn," said {hero}, and
            sat down on the ground. ["It is too good for one."|"You have to see it for yourself."|]
        """,
        cases=(
            {
                "aim": "touch the lowest cloud",
                "goal_title": "Cloud",
                "reached": "a cool grey mist ran through {hero.his} {hero.hands}",
            },
            {
                "aim": "look over the great wall",
                "goal_title": "Wall",
                "reached": "{hero} saw what was on the other side: a pear tree, and a cat who was just as surprised",
            },
            {
                "aim": "ring the big bell",
                "goal_title": "Bell",
                "reached": "the bell said bong, so loudly that all the pigeons flew up",
            },
            {
                "aim": "pick the highest cherry",
                "goal_title": "Cherry Tree",
                "reached": "{hero} had it, and on the same stem there was a second one",
            },
            {
                "aim": "look into the swallow's nest",
                "goal_title": "Nest",
                "reached": "four yellow beaks opened at once",
            },
        ),
    ),
)  # fmt: skip
