"""Write the items of the embedded suite: `python -m mmpeft.tasks.retention.generate`.

Four small multiple-choice tasks built from the word lists below, and two that are answered in
words. Nothing is random: every choice of words is settled by a hash of what it is for, so any
Python writes the same bytes. A multiple-choice item is `{"kind", "context", "choices", "answer"}`;
`answer` is an index into `choices`. README.md describes the other two.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).parent


def pick(key: str, options: list, k: int) -> list:
    """k of the options in an order settled by `key` (the same in every Python)."""

    def rank(option) -> str:
        return hashlib.sha256(f"{key}\t{option}".encode()).hexdigest()

    return sorted(options, key=rank)[:k]


def item(kind: str, context: str, right: str, wrong: list[str]) -> dict:
    """One item, its choices in an order that does not give the answer away."""
    choices = pick(f"{kind}\t{context}\t{right}", [right, *wrong], 1 + len(wrong))
    return {"kind": kind, "context": context, "choices": choices, "answer": choices.index(right)}


# --- grammar: which of two sentences is English -------------------------------------------------

PEOPLE = [
    ("teacher", "teachers"), ("doctor", "doctors"), ("farmer", "farmers"), ("driver", "drivers"),
    ("child", "children"), ("singer", "singers"), ("student", "students"), ("nurse", "nurses"),
    ("baker", "bakers"), ("guest", "guests"), ("painter", "painters"), ("soldier", "soldiers"),
    ("neighbor", "neighbors"), ("visitor", "visitors"), ("lawyer", "lawyers"), ("cook", "cooks"),
    ("pilot", "pilots"), ("artist", "artists"), ("writer", "writers"), ("waiter", "waiters"),
]  # fmt: skip
THINGS = [
    ("key", "keys"), ("box", "boxes"), ("letter", "letters"), ("picture", "pictures"),
    ("chair", "chairs"), ("window", "windows"), ("bottle", "bottles"), ("knife", "knives"),
    ("book", "books"), ("shelf", "shelves"), ("lamp", "lamps"), ("cup", "cups"),
    ("coat", "coats"), ("ticket", "tickets"), ("basket", "baskets"), ("bicycle", "bicycles"),
    ("blanket", "blankets"), ("clock", "clocks"), ("mirror", "mirrors"), ("shirt", "shirts"),
]  # fmt: skip
THING_STATES = ["broken", "old", "new", "expensive", "clean", "missing", "heavy", "very small"]
PEOPLE_STATES = ["tired", "happy", "late", "hungry", "from Spain", "very kind", "at home", "angry"]
COLOURS = ["red", "green", "yellow", "black", "white", "brown", "blue"]
WOMEN = ["Anna", "Maria", "Susan", "Linda", "Emily", "Laura", "Julia", "Helen", "Alice", "Sarah"]
MEN = ["Tom", "Peter", "David", "Robert", "James", "Paul", "George", "Daniel", "Frank", "Henry"]
WOMAN_WORDS = ["mother", "queen", "actress", "girl", "aunt", "grandmother", "princess", "waitress"]
MAN_WORDS = ["father", "king", "actor", "boy", "uncle", "grandfather", "prince", "waiter"]
SELF_VERBS = [
    "hurt", "blamed", "saw", "taught", "introduced", "described", "dressed", "prepared",
    "surprised", "protected",
]  # fmt: skip
SELF_TAILS = [
    "during the game", "for the mistake", "in the mirror", "before the meeting", "last summer",
    "after the show", "at the party", "on the stairs",
]  # fmt: skip
PARTICIPLES = [
    ("written", "wrote", "a long letter"), ("eaten", "ate", "all the bread"),
    ("taken", "took", "the last train"), ("broken", "broke", "the window"),
    ("spoken", "spoke", "to the manager"), ("forgotten", "forgot", "the password"),
    ("stolen", "stole", "the painting"), ("chosen", "chose", "a new leader"),
    ("driven", "drove", "to the coast"), ("given", "gave", "away the money"),
    ("seen", "saw", "that movie"), ("hidden", "hid", "the treasure"),
    ("worn", "wore", "the same shoes"), ("drawn", "drew", "a map of the town"),
    ("fallen", "fell", "off the roof"), ("known", "knew", "the answer for years"),
]  # fmt: skip
PAST = [
    ("went", "goes", "to the market"), ("bought", "buys", "a new coat"),
    ("caught", "catches", "three fish"), ("met", "meets", "an old friend"),
    ("built", "builds", "a small boat"), ("sold", "sells", "the house"),
    ("wrote", "writes", "two letters"), ("found", "finds", "a gold coin"),
    ("lost", "loses", "the keys"), ("made", "makes", "a cake"),
    ("told", "tells", "us a story"), ("drove", "drives", "to the city"),
]  # fmt: skip
CASE_VERBS = [
    "followed", "called", "helped", "visited", "thanked", "invited", "watched", "trusted",
    "remembered", "questioned", "pushed", "joined",
]  # fmt: skip
CASE_PRONOUNS = [("him", "he"), ("them", "they"), ("us", "we"), ("me", "I")]
CASE_TAILS = ["on the way home", "last night", "in front of the school", "without a reason"]
MASS = ["water", "money", "furniture", "traffic", "rice", "noise", "sugar", "information", "snow"]
MASS_PLACES = [
    "in the kitchen", "in this town", "on the street", "in the report", "outside today",
]  # fmt: skip
EVER = [
    "been to Africa", "eaten snails", "seen a whale", "read this book", "climbed that mountain",
    "broken a bone", "flown a plane", "told a lie", "missed a class", "owned a horse",
    "won a prize", "lived abroad",
]  # fmt: skip
VERB_FORMS = [
    ("wants to leave", "wants leave"), ("enjoys swimming", "enjoys swim"),
    ("decided to stay", "decided stay"), ("stopped smoking", "stopped smoke"),
    ("hopes to win", "hopes win"), ("finished cooking", "finished cook"),
    ("refused to pay", "refused pay"), ("avoids driving", "avoids drive"),
    ("promised to help", "promised help"), ("kept talking", "kept talk"),
    ("learned to read", "learned read"), ("practiced singing", "practiced sing"),
    ("agreed to wait", "agreed wait"), ("denied lying", "denied lie"),
    ("can swim", "can swims"), ("should wait", "should waits"),
    ("must work", "must works"), ("might come", "might comes"),
    ("did not know", "did not knew"), ("does not care", "does not cares"),
]  # fmt: skip
QUESTIONS = [
    ("Where did the {p} go", "Where the {p} did go"),
    ("Why is the {p} laughing", "Why the {p} is laughing"),
    ("When will the {p} arrive", "When the {p} will arrive"),
    ("What has the {p} done", "What the {p} has done"),
    ("How can the {p} know", "How the {p} can know"),
]


def number_agreement() -> Iterator[dict]:
    for i in range(22):
        (head, heads), (other, others) = pick(f"attractor {i}", THINGS, 2)
        place = pick(f"place {i}", ["near", "behind", "under", "next to"], 1)[0]
        state = pick(f"state {i}", THING_STATES, 1)[0]
        subject = (
            f"The {heads} {place} the {other}" if i % 2 else f"The {head} {place} the {others}"
        )
        right, wrong = ("are", "is") if i % 2 else ("is", "are")
        yield item("attractor", "", f"{subject} {right} {state}.", [f"{subject} {wrong} {state}."])
    for i in range(22):
        (head, heads), (other, others) = pick(f"relative {i}", PEOPLE, 2)
        verb = pick(f"verb {i}", ["know", "like", "help", "remember", "trust"], 1)[0]
        state = pick(f"mood {i}", PEOPLE_STATES, 1)[0]
        subject = (
            f"The {heads} that the {other} {verb}s"
            if i % 2
            else f"The {head} that the {others} {verb}"
        )
        right, wrong = ("were", "was") if i % 2 else ("was", "were")
        yield item("relative", "", f"{subject} {right} {state}.", [f"{subject} {wrong} {state}."])
    for i in range(20):
        buyer = pick(f"buyer {i}", WOMEN + MEN, 1)[0]
        one, many = pick(f"bought {i}", THINGS, 1)[0]
        colour = pick(f"colour {i}", COLOURS, 1)[0]
        near = i % 4 < 2
        plural, singular = ("these", "this") if near else ("those", "that")
        noun, right, wrong = (many, plural, singular) if i % 2 else (one, singular, plural)
        verb = pick(f"got {i}", ["bought", "found", "sold", "cleaned"], 1)[0]
        start, end = f"{buyer} {verb}", f"{colour} {noun}."
        yield item("determiner", "", f"{start} {right} {end}", [f"{start} {wrong} {end}"])


def pronouns() -> Iterator[dict]:
    for i in range(20):
        women = i % 2 == 0
        subject = pick(f"self {i}", WOMEN if women else MEN, 1)[0]
        if i % 4 < 2:
            subject = "The " + pick(f"self word {i}", WOMAN_WORDS if women else MAN_WORDS, 1)[0]
        verb, tail = pick(f"did {i}", SELF_VERBS, 1)[0], pick(f"tail {i}", SELF_TAILS, 1)[0]
        right, wrong = ("herself", "himself") if women else ("himself", "herself")
        yield item(
            "gender", "", f"{subject} {verb} {right} {tail}.", [f"{subject} {verb} {wrong} {tail}."]
        )
    for i in range(18):
        one, many = pick(f"selves {i}", PEOPLE, 1)[0]
        verb, tail = pick(f"they did {i}", SELF_VERBS, 1)[0], pick(f"end {i}", SELF_TAILS, 1)[0]
        subject, right, wrong = (
            (f"The {many}", "themselves", "himself")
            if i % 2
            else (f"The {one}", "himself", "themselves")
        )
        yield item(
            "reflexive number", "",
            f"{subject} {verb} {right} {tail}.", [f"{subject} {verb} {wrong} {tail}."],
        )  # fmt: skip
    for i, verb in enumerate(CASE_VERBS):
        right, wrong = CASE_PRONOUNS[i % 4]
        who = pick(f"case {i}", PEOPLE, 1)[0][0]
        tail = pick(f"case tail {i}", CASE_TAILS, 1)[0]
        yield item(
            "case", "", f"The {who} {verb} {right} {tail}.", [f"The {who} {verb} {wrong} {tail}."]
        )


def verb_forms() -> Iterator[dict]:
    for i, (right, wrong, rest) in enumerate(PARTICIPLES):
        who = pick(f"participle {i}", PEOPLE, 1)[0][0]
        yield item(
            "participle", "", f"The {who} has {right} {rest}.", [f"The {who} has {wrong} {rest}."]
        )
    for i, (right, wrong, rest) in enumerate(PAST):
        who = pick(f"past {i}", WOMEN + MEN, 1)[0]
        when = pick(f"when {i}", ["Yesterday", "Last week", "Two years ago", "Last winter"], 1)[0]
        yield item("tense", "", f"{when} {who} {right} {rest}.", [f"{when} {who} {wrong} {rest}."])
    for i, (right, wrong) in enumerate(VERB_FORMS):
        who = pick(f"form {i}", PEOPLE, 1)[0][0]
        yield item("verb form", "", f"The old {who} {right}.", [f"The old {who} {wrong}."])


def structure() -> Iterator[dict]:
    for i, (who, _) in enumerate(pick("question", PEOPLE, 20)):
        right, wrong = QUESTIONS[i % len(QUESTIONS)]
        yield item("question", "", right.format(p=who) + "?", [wrong.format(p=who) + "?"])
    for i in range(16):
        who = pick(f"order {i}", WOMEN + MEN, 1)[0]
        thing = pick(f"order thing {i}", THINGS, 1)[0][0]
        colour = pick(f"order colour {i}", COLOURS, 1)[0]
        verb = pick(f"order verb {i}", ["washed", "opened", "painted", "carried", "dropped"], 1)[0]
        yield item(
            "adjective order", "",
            f"{who} {verb} the {colour} {thing}.", [f"{who} {verb} the {thing} {colour}."],
        )  # fmt: skip
    for i, done in enumerate(EVER):
        people = pick(f"ever {i}", PEOPLE, 1)[0][1]
        yield item(
            "polarity", "", f"No {people} have ever {done}.", [f"Some {people} have ever {done}."]
        )
    for i, mass in enumerate(MASS):
        place = pick(f"mass {i}", MASS_PLACES, 1)[0]
        yield item(
            "mass noun",
            "",
            f"There is too much {mass} {place}.",
            [f"There is too many {mass} {place}."],
        )


def grammar() -> Iterator[dict]:
    """Minimal pairs: two sentences that differ in what makes one of them wrong."""
    yield from number_agreement()
    yield from pronouns()
    yield from verb_forms()
    yield from structure()


# --- commonsense: what comes next in the everyday world -----------------------------------------

COMMONSENSE = """
cause | The glass fell from the table onto the stone floor, so it | broke | melted | grew
cause | It rained all day and she had no umbrella, so she got | wet | rich | hungry
cause | He had not eaten since morning, so he was very | hungry | tall | famous
cause | The ice cream was left in the hot sun, so it | melted | froze | burned
cause | She worked all night without any sleep, so she felt | tired | married | green
cause | The water was put in the freezer, so it turned into | ice | steam | wood
cause | The car ran out of gas, so it | stopped | flew | sang
cause | He touched the hot stove and | burned his hand | froze his hand | washed his hand
cause | The baby was hungry, so she began to | cry | drive | vote
cause | The plant was not watered for a month, so it | died | danced | slept
cause | The joke was very funny, so everybody | laughed | cried | slept
cause | He drank too much coffee in the evening, so he could not | sleep | speak | see
cause | The battery was empty, so the phone | turned off | rang loudly | fell asleep
cause | She studied hard for the exam, so she | passed | failed | forgot
cause | He did not set his alarm clock, so he woke up | late | early | twice
cause | The lights went out, so the room became | dark | bright | warm
cause | He forgot to close the window, so in winter the room became | cold | hot | larger
cause | The soup had too much salt, so nobody wanted to | eat it | wear it | read it
cause | The bridge was closed, so the drivers had to take | another road | another name | a photo
cause | The boy fell off his bike and | hurt his knee | ate his knee | painted his knee
cause | The movie was boring, so many people | left early | came again | sang along
cause | The knife was not sharp, so it was hard to | cut the meat | see the meat | smell the meat
cause | The wind was very strong, so his hat | blew away | caught fire | got longer
cause | She won the lottery and became | rich | poor | short
cause | The dog saw a stranger at the gate and started to | bark | read | cook
cause | There was a lot of snow on the road, so the cars drove | slowly | quickly | underwater
cause | He lost his glasses, so he could not | read the sign | hear the music | smell the food
cause | The milk stood outside for two weeks, so it smelled | bad | sweet | fresh
cause | The stone was thrown into the lake and it | sank | floated | burned
cause | The balloon touched the needle and | popped | melted | grew
cause | It was her birthday, so her friends gave her | presents | homework | medicine
cause | The shoes were too small, so his feet | hurt | grew | slept
cause | The music was very loud, so the neighbors | complained | swam | melted
cause | The fire alarm rang, so all the people | left the building | went to sleep | ordered a pizza
cause | The banana was old, so its skin turned | brown | blue | silver
cause | She put on sunscreen because she did not want to | get sunburned | get wet | get lost
cause | He took an aspirin because he had | a headache | a bicycle | a holiday
cause | They opened the windows because the room was too | hot | empty | clean
cause | She whispered because the baby was | sleeping | shouting | driving
cause | He wore a thick coat because it was | cold | Tuesday | cheap
cause | The children stayed home because the school was | closed | yellow | tasty
cause | The cat climbed the tree because it was chased by a | dog | fish | leaf
cause | She called the plumber because the sink was | leaking | singing | laughing
cause | He brought a ladder because the shelf was too | high | sweet | young
cause | The streets were wet because it had | rained | slept | spoken
cause | The police stopped him because he was driving too | fast | politely | deep
cause | We turned on the lamp because it was getting | dark | loud | salty
cause | They celebrated because their team had | won | lost | sat
tool | To cut the bread, she used a | knife | pillow | candle
tool | To open the locked door, he needed the | key | spoon | flower
tool | To eat the soup, you need a | spoon | fork | comb
tool | To drive a nail into the wall, use a | hammer | towel | sponge
tool | To clean her teeth, she used a | toothbrush | hammer | ladder
tool | To keep dry in the rain, take an | umbrella | orange | envelope
tool | To sweep the floor, he took a | broom | phone | plate
tool | To cut the paper, the child used | scissors | socks | glasses
tool | To see the stars better, he looked through a | telescope | pillow | blanket
tool | To dry her hands, she took a | towel | stone | candle
tool | To write on the blackboard, the teacher used | chalk | butter | soap
tool | To catch fish, he went to the lake with a | net | piano | carpet
tool | To tell the time, she looked at her | watch | shoe | plate
tool | To dig a hole in the garden, use a | shovel | violin | newspaper
tool | To measure the table, the carpenter used a | ruler | lemon | sock
tool | To wash the dishes, you need water and | soap | sand | paint
tool | To keep the food cold, put it in the | refrigerator | oven | closet
tool | To bake the cake, put it in the | oven | bathtub | drawer
tool | To climb onto the roof, he used a | ladder | spoon | letter
tool | To buy the bread, she paid with | money | leaves | snow
tool | To send the letter, you need a | stamp | hammer | pillow
tool | To light the candle, she used a | match | glass | brick
tool | To take a picture of the lake, he used his | camera | wallet | bread
tool | To hear the patient's heart, the doctor used a | stethoscope | saucepan | bicycle
tool | To find north in the forest, the hikers used a | compass | blanket | sandwich
tool | To sew the button on the shirt, you need a needle and | thread | honey | coal
tool | To cross the river, they took a | boat | bed | book
tool | To paint the wall, he bought a brush and some | paint | bread | wool
tool | To carry the groceries home, she used a | bag | ring | pencil
tool | To look up the meaning of a word, use a | dictionary | calculator | toaster
place | He went to the library to borrow | a book | a sandwich | a haircut
place | She went to the bakery to buy | bread | shoes | gasoline
place | They went to the beach to | swim | ski | vote
place | He went to the dentist because of his | teeth | car | taxes
place | She went to the airport to catch a | plane | cow | cold
place | We went to the cinema to watch a | movie | cow | river
place | They drove to the gas station to | fill the tank | feed the ducks | wash the baby
place | He went to the barber to get a | haircut | passport | burger
place | You sleep in a | bed | oven | bottle
place | You wear shoes on your | feet | ears | elbows
place | Fish live in the | water | sky | fire
place | The bird laid its eggs in the | nest | mailbox | river
place | The pilot sat down in the | cockpit | kitchen | garden
place | The judge walked into the | courtroom | bathtub | oven
place | The farmer drove his tractor across the | field | ceiling | ocean
place | The sailor spent three months at | sea | noon | church
place | The bride wore a beautiful white | dress | truck | fence
place | The chef is cooking dinner in the | kitchen | bedroom | swimming pool
place | Snow covered the top of the | mountain | sun | fire
place | The patient was taken by ambulance to the | hospital | circus | museum
place | She planted the seeds in the | soil | air | mirror
place | The train arrived at the | station | kitchen | island
place | He hung the picture on the | wall | water | spoon
place | He put the dirty clothes in the | washing machine | refrigerator | envelope
place | She kept her money in the | bank | oven | pond
place | The fans cheered loudly in the | stadium | library | elevator
place | The lion slept in its cage at the | zoo | office | bank
place | The astronaut traveled in a rocket to the | moon | supermarket | basement
place | She poured the tea into a | cup | shoe | book
place | They pitched their tent in the | forest | bathroom | drawer
nature | In winter the lake is covered with | ice | flowers | sand
nature | In autumn the leaves of the trees | fall | sing | boil
nature | At night we can see the moon and the | stars | rainbow | sun
nature | Cows eat | grass | meat | stones
nature | Bees collect nectar from | flowers | cars | stones
nature | A fire needs wood and | oxygen | sugar | glass
nature | When water boils, it turns into | steam | ice | salt
nature | After the storm, a rainbow appeared in the | sky | soup | ground
nature | Plants need water and | sunlight | coffee | music
nature | The sun rises in the | east | west | north
nature | The river flows down to the | sea | moon | cloud
nature | The dog wagged its | tail | wing | horn
nature | The bird flapped its | wings | hands | wheels
nature | The spider caught the fly in its | web | nest | shoe
nature | In spring many trees are covered with | blossoms | snow | coins
nature | Sugar tastes sweet and lemons taste | sour | loud | soft
nature | A feather is light, but a brick is | heavy | fast | sweet
nature | Rabbits are fast, but turtles are | slow | loud | blue
nature | Fire is hot and ice is | cold | dry | round
nature | An elephant is much bigger than a | mouse | house | whale
nature | A day has twenty-four | hours | weeks | years
nature | People breathe with their | lungs | knees | ears
nature | We hear with our | ears | toes | eyes
nature | Most birds can | fly | read | drive
nature | Wool comes from | sheep | fish | trees
nature | Paper is made from | wood | milk | sand
nature | Cheese is made from | milk | sand | apples
nature | Bread is made from | flour | glass | leather
nature | Wine is made from | grapes | potatoes | rice
nature | Eggs are laid by | hens | cows | dogs
people | When he heard the sad news, he started to | cry | dance | cook
people | She smiled because she was | happy | angry | afraid
people | He apologized because he had made a | mistake | cake | friend
people | After the long run he was out of | breath | paper | love
people | When the guests arrived, she opened the | door | river | egg
people | He said thank you because she had | helped him | robbed him | ignored him
people | The child was afraid of the | dark | cake | toy
people | The students raised their hands to | ask a question | catch a train | cook an egg
people | He shook hands with his new boss to | greet him | wash him | feed him
people | She blew out the candles on her birthday | cake | car | coat
people | The audience clapped after the | concert | funeral | earthquake
people | He yawned because he was | tired | rich | tall
people | The thief ran away when he saw the | police | money | window
people | The winner of the race received a gold | medal | fish | onion
people | She kissed her children good night and turned off the | light | moon | river
people | He asked for directions because he was | lost | asleep | famous
people | After the wedding, the couple went on their | honeymoon | homework | diet
people | She crossed the street when the light turned | green | sour | wooden
people | He went on a diet because he wanted to lose | weight | money | time
people | The boss was pleased with her work, so he gave her a | raise | fever | ticket
"""


def commonsense() -> Iterator[dict]:
    """Everyday situations with one sensible ending and two that are not."""
    for line in COMMONSENSE.strip().splitlines():
        kind, context, right, *wrong = (part.strip() for part in line.split("|"))
        yield item(kind, context, right, wrong)


# --- facts: what most people learn at school ----------------------------------------------------

CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon,
Russia Moscow, Japan Tokyo, China Beijing, Egypt Cairo, Greece Athens, Turkey Ankara,
Austria Vienna, Poland Warsaw, Hungary Budapest, Ireland Dublin, Norway Oslo, Sweden Stockholm,
Denmark Copenhagen, Finland Helsinki, Belgium Brussels, Canada Ottawa, Cuba Havana, Peru Lima,
Kenya Nairobi, Iran Tehran, Iraq Baghdad, Syria Damascus, Thailand Bangkok, Ukraine Kyiv,
Argentina Buenos_Aires, Chile Santiago, Colombia Bogotá, Vietnam Hanoi, Australia Canberra,
Indonesia Jakarta, Afghanistan Kabul"""
CONTINENTS = """Brazil South_America, Nigeria Africa, India Asia, Germany Europe,
Mexico North_America, Ethiopia Africa, Japan Asia, France Europe, Peru South_America,
Ghana Africa, Pakistan Asia, Poland Europe, Bolivia South_America, Mali Africa, Nepal Asia,
Sweden Europe"""
LANGUAGES = """France French, Germany German, Italy Italian, Mexico Spanish, Japan Japanese,
Brazil Portuguese, Russia Russian, China Chinese, Poland Polish, Egypt Arabic, Greece Greek,
Turkey Turkish, Australia English, Israel Hebrew, Hungary Hungarian, Korea Korean"""
CURRENCIES = """Japan yen, India rupee, Russia ruble, Germany euro, Mexico peso, China yuan,
Britain pound, Switzerland franc, Canada dollar"""
OPPOSITES = """hot cold, big small, day night, up down, left right, rich poor, young old,
happy sad, black white, open closed, early late, fast slow, hard soft, high low, wet dry,
strong weak, clean dirty, empty full, light dark, love hate, war peace, begin end, buy sell,
win lose, push pull, inside outside, always never, true false, first last, sweet bitter,
thick thin, near far, loud quiet, male female, life death, question answer"""
YOUNG = """dog puppy, cat kitten, cow calf, sheep lamb, duck duckling, horse foal, lion cub,
chicken chick, pig piglet, goat kid, deer fawn, frog tadpole"""
PLURALS = """child children, man men, foot feet, tooth teeth, mouse mice, goose geese, leaf leaves,
woman women, knife knives, ox oxen, wolf wolves, person people"""
JOBS = """teacher school, doctor hospital, farmer farm, chef restaurant, judge court, priest church,
pilot airplane, actor theater, scientist laboratory, sailor ship, baker bakery, soldier army,
miner mine, librarian library, banker bank, astronaut space_station"""
COLOURED = """grass green, snow white, blood red, coal black, chocolate brown, lemon yellow,
carrot orange, ocean blue, banana yellow, milk white, emerald green, ruby red"""
SYMBOLS = """oxygen O, hydrogen H, carbon C, iron Fe, gold Au, silver Ag, sodium Na, helium He,
nitrogen N, calcium Ca, potassium K, zinc Zn"""
BODY = """see eyes, hear ears, smell nose, taste tongue, think brain, walk legs, breathe lungs,
chew teeth, digest stomach, write hand"""
AUTHORS = """Hamlet Shakespeare, Oliver_Twist Dickens, War_and_Peace Tolstoy, Faust Goethe,
The_Odyssey Homer, Don_Quixote Cervantes, Pride_and_Prejudice Austen, The_Divine_Comedy Dante,
Les_Misérables Hugo, Robinson_Crusoe Defoe, Crime_and_Punishment Dostoevsky,
The_Trial Kafka"""
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
RELATIONS = [
    ("capital", "The capital of {} is", CAPITALS),
    ("continent", "The country of {} lies on the continent of", CONTINENTS),
    ("language", "The most spoken language in {} is", LANGUAGES),
    ("currency", "The money that people use in {} is called the", CURRENCIES),
    ("opposite", 'The opposite of "{}" is', OPPOSITES),
    ("young", "A young {} is called a", YOUNG),
    ("plural", 'The plural of the word "{}" is', PLURALS),
    ("job", "A {} usually works in a", JOBS),
    ("colour", "The color of {} is usually", COLOURED),
    ("symbol", "The chemical symbol for {} is", SYMBOLS),
    ("body", "The part of the body that we use to {} is the", BODY),
    ("author", "The famous work {} was written by", AUTHORS),
]


def facts() -> Iterator[dict]:
    """General knowledge; the three wrong answers come from the same kind of fact."""
    for kind, template, table in RELATIONS:
        pairs = [[word.replace("_", " ") for word in pair.split()] for pair in table.split(",")]
        answers = sorted({answer for _, answer in pairs})
        for subject, right in pairs:
            others = [answer for answer in answers if answer not in (right, subject)]
            wrong = pick(f"{kind} {subject}", others, 3)
            yield item(kind, template.format(subject), right, wrong)
    for kind, names, word in (("month", MONTHS, "month"), ("day", DAYS, "day")):
        for i, name in enumerate(names):
            right = names[(i + 1) % len(names)]
            others = [other for other in names if other not in (right, name)]
            context = f"The {word} that comes right after {name} is"
            yield item(kind, context, right, pick(f"{kind} {name}", others, 3))


# --- reading: the answer stands in the text -----------------------------------------------------

NAMES = [*WOMEN, *MEN]
OBJECTS = [thing for thing, _ in THINGS]
PLACES = [
    "park", "museum", "market", "beach", "library", "zoo", "theater", "station", "hospital",
    "bakery", "church", "forest", "bank", "airport", "school", "castle",
]  # fmt: skip
DISHES = [
    "soup", "pizza", "rice", "pasta", "salad", "chicken", "fish", "pancakes", "cake", "beans",
]  # fmt: skip
CITIES = [
    "London", "Paris", "Chicago", "Berlin", "Tokyo", "Rome", "Boston", "Madrid", "Dublin",
    "Toronto", "Moscow", "Seattle",
]  # fmt: skip
# (kind, words, passage, question, index of the answer); {a} {b} are people, {0} {1} {2} words
PASSAGES = [
    ("instead", DISHES, "{a} does not like {0}, so at the restaurant {a} ordered {1} instead.",
     "A few minutes later the waiter came and gave {a} the", 1),
    ("first", OBJECTS, "{a} bought a {0} and {b} bought a {1}.",
     "Question: What did {a} buy? Answer: {a} bought a", 0),
    ("second", OBJECTS, "{a} bought a {0} and {b} bought a {1}.",
     "Question: What did {b} buy? Answer: {b} bought a", 1),
    ("help", NAMES, "{0} asked {1} for help with the homework.",
     "After an hour they were done, and {0} thanked", 1),
    ("letter", NAMES, "{0} wrote a long letter to {1}.",
     "Three days later the letter arrived, and it was read by", 1),
    ("house", NAMES, "{0} sold the house to {1}.", "The new owner of the house is", 1),
    ("age", NAMES, "{0} is older than {1}.", "The younger one of the two is", 1),
    ("closed", PLACES, "{a} wanted to go to the {0}, but it was closed. So {a} went to the {1}.",
     "{a} spent the whole afternoon at the", 1),
    ("walls", COLOURS, "The walls used to be {0}, but last week {a} painted them. Now they are "
     "{1}.", "{a} looked at the walls and said: I like that they are now", 1),
    ("moved", CITIES, "{a} was born in {0} but moved to {1} many years ago.",
     "When people ask {a} for the address, the answer is a street in", 1),
    ("train", CITIES, "The train leaves from {0} at nine and arrives in {1} at noon.",
     "At noon the passengers got off the train and walked through the streets of", 1),
    ("dinner", DISHES, "{a} cooked {0} for the children and {1} for the parents.",
     "The children were hungry and ate all of the", 0),
    ("found", OBJECTS, "{a} had lost a {0}. {b} found it in the park next to an old {1} and took "
     "it home.", "The next day {b} called {a} and said: I have found your", 0),
    ("visit", CITIES, "{a} lives in {0}, {b} lives in {1} and my brother lives in {2}.",
     "Next week I am going to visit my brother, so I bought a train ticket to", 2),
]  # fmt: skip


def reading() -> Iterator[dict]:
    """Short passages; one wrong answer at least stands in the passage too."""
    for kind, words, passage, question, right in PASSAGES:
        for i in range(14):
            a, b = pick(f"{kind} who {i}", NAMES, 2)
            options = pick(f"{kind} what {i}", words, 3)
            context = f"{passage} {question}".format(*options, a=a, b=b)
            yield item(kind, context, options.pop(right), options)


# --- facts in words: the same knowledge without the choices -------------------------------------

SAID = ["capital", "continent", "language", "opposite", "plural"]  # kinds with one usual answer


def facts_in_words() -> Iterator[dict]:
    """Every second item of some kinds of `facts`; `source` is its row there, from 0."""
    rows = list(enumerate(facts()))
    for kind in SAID:
        for source, row in [pair for pair in rows if pair[1]["kind"] == kind][::2]:
            wrong = [choice for choice in row["choices"] if choice != row["choices"][row["answer"]]]
            yield {
                "kind": kind,
                "prompt": f"Complete the sentence: {row['context']}",
                "answer": row["choices"][row["answer"]],
                "wrong": wrong,
                "source": source,
            }


# --- instructions: what a reply has to look like ------------------------------------------------

# a request, and two words that fit it
REQUESTS = """
Tell me about dogs. | friend | run
Describe a sunny day at the beach. | sand | water
What is bread? | flour | oven
Why do people like music? | song | happy
Write about a rainy day. | umbrella | cloud
How do birds fly? | wings | air
Describe an old house. | door | window
What is a school? | teacher | children
Tell me about the moon. | night | sky
Give me a tip for sleeping well. | bed | quiet
What do farmers do? | field | animals
Write about a walk in the forest. | tree | path
Tell me about cats. | mouse | sleep
Describe a busy market. | fruit | people
What is a bicycle? | wheel | road
Why do people read books? | story | learn
Write about the first day of winter. | snow | cold
How do fish breathe? | water | gills
Describe a big city. | street | noise
What is a hospital? | doctor | help
Tell me about the sun. | light | warm
Give me a tip for saving money. | bank | week
What do nurses do? | patient | care
Write about a trip by train. | station | window
Tell me about horses. | farm | strong
Describe a birthday party. | cake | friends
What is a river? | sea | flow
Why do people travel? | world | culture
Write about a garden. | flower | green
How do plants grow? | soil | sun
Describe a kitchen. | table | knife
What is a library? | book | quiet
Tell me about the ocean. | fish | deep
Give me a tip for cooking rice. | salt | pot
What do pilots do? | plane | safe
Write about a night at the theater. | stage | actor
Tell me about elephants. | large | trunk
Describe a mountain. | rock | high
What is a museum? | art | history
Why do people dance? | music | body
Write about a lost key. | pocket | house
How do bees make honey? | flower | hive
Describe a winter morning. | snow | quiet
What is a bridge? | river | cars
Tell me about tea. | cup | leaves
Give me a tip for learning a language. | words | practice
What do teachers do? | students | class
Write about an old friend. | letter | smile
"""
# what is asked for, and the instructions of IFEval it stands for; {0} {1} are the two words
INSTRUCTIONS: list[tuple[str, list[tuple[str, dict]]]] = [
    ("Write only one sentence.",
     [("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 2})]),
    ("Use fewer than 15 words.",
     [("length_constraints:number_words", {"relation": "less than", "num_words": 15})]),
    ("End your answer with the words: That is all.",
     [("startend:end_checker", {"end_phrase": "That is all."})]),
    ("Start with a title in double angular brackets, such as <<my title>>.",
     [("detectable_format:title", {})]),
    ("Highlight at least one part with asterisks, such as *this part*.",
     [("detectable_format:number_highlighted_sections", {"num_highlights": 1})]),
    ('Use the words "{0}" and "{1}".', [("keywords:existence", {"keywords": ["{0}", "{1}"]})]),
    ("Do not use any commas.", [("punctuation:no_comma", {})]),
    ("Answer with exactly 3 bullet points. Start each of them with *.",
     [("detectable_format:number_bullet_lists", {"num_bullets": 3})]),
    ('Use the word "{0}" at least 2 times.',
     [("keywords:frequency", {"relation": "at least", "keyword": "{0}", "frequency": 2})]),
    ("Use at least 2 placeholders in square brackets, such as [name].",
     [("detectable_content:number_placeholders", {"num_placeholders": 2})]),
    ('Write only one sentence with the words "{0}" and "{1}".',
     [("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 2}),
      ("keywords:existence", {"keywords": ["{0}", "{1}"]})]),
    ("Use fewer than 20 words and no commas.",
     [("length_constraints:number_words", {"relation": "less than", "num_words": 20}),
      ("punctuation:no_comma", {})]),
]  # fmt: skip


def instructions() -> Iterator[dict]:
    """A request and what the reply has to look like, as rows of IFEval. Each request comes once."""
    for i, line in enumerate(REQUESTS.strip().splitlines()):
        request, *words = (part.strip() for part in line.split("|"))
        asked, parts = INSTRUCTIONS[(i + i // len(INSTRUCTIONS)) % len(INSTRUCTIONS)]
        filled = json.loads(json.dumps(parts).replace("{0}", words[0]).replace("{1}", words[1]))
        yield {
            "request": request,
            "prompt": f"{request} {asked.format(*words)}",
            "instruction_id_list": [name for name, _ in filled],
            "kwargs": [arguments for _, arguments in filled],
        }


TASKS: dict[str, Callable[[], Iterator[dict]]] = {
    "grammar": grammar,
    "commonsense": commonsense,
    "facts": facts,
    "reading": reading,
    "facts_in_words": facts_in_words,
    "instructions": instructions,
}


def text(name: str) -> str:
    """The JSONL of one task."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TASKS[name]())


def main(folder: Path = FOLDER) -> None:
    for name in TASKS:
        (folder / f"{name}.jsonl").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
