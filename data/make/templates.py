"""Short sentences with numbers, dates, names and letters, and questions, that are made from patterns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import ascii_lowercase

N_SHORT = 12_000


def items(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


FIRST_NAMES = items(
    "Anna James Maria Peter Laura David Emma John Sarah Paul Julia Robert Linda Michael Susan Thomas Karen Daniel "
    "Nancy Mark Helen George Alice Henry Rose Frank Grace Jack Ruth Oliver Lucy Samuel Clara Walter Ellen Simon"
)
#: Country, its capital, its continent.
COUNTRIES = [
    tuple(country.split("/"))
    for country in items(
        "France/Paris/Europe, Germany/Berlin/Europe, Italy/Rome/Europe, Spain/Madrid/Europe, Portugal/Lisbon/Europe, "
        "England/London/Europe, Scotland/Edinburgh/Europe, Ireland/Dublin/Europe, Norway/Oslo/Europe, "
        "Sweden/Stockholm/Europe, Finland/Helsinki/Europe, Denmark/Copenhagen/Europe, Poland/Warsaw/Europe, "
        "Greece/Athens/Europe, Austria/Vienna/Europe, Belgium/Brussels/Europe, Hungary/Budapest/Europe, "
        "Romania/Bucharest/Europe, Ukraine/Kiev/Europe, China/Beijing/Asia, Japan/Tokyo/Asia, India/Delhi/Asia, "
        "Thailand/Bangkok/Asia, Vietnam/Hanoi/Asia, Iran/Tehran/Asia, Iraq/Baghdad/Asia, Nepal/Kathmandu/Asia, "
        "Egypt/Cairo/Africa, Morocco/Rabat/Africa, Kenya/Nairobi/Africa, Nigeria/Abuja/Africa, Ghana/Accra/Africa, "
        "Canada/Ottawa/North America, Mexico/Mexico City/North America, Cuba/Havana/North America, "
        "Brazil/Brasilia/South America, Argentina/Buenos Aires/South America, Chile/Santiago/South America, "
        "Peru/Lima/South America, Colombia/Bogota/South America",
        separator=", ",
    )
]
PLACES = [country for country, _, _ in COUNTRIES]
CITIES = items(
    "London Paris Berlin Madrid Rome Vienna Moscow Tokyo Boston Chicago Toronto Sydney Dublin Lisbon Athens Cairo"
)
MONTHS = items("January February March April May June July August September October November December")
DAYS = items("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLOURS = items("red blue green yellow black white brown grey orange purple pink")
SIZES = items("big small little large old new heavy light clean broken beautiful cheap strange empty wooden")
#: Two words that mean the opposite of each other.
OPPOSITES = items(
    "hot cold, big small, fast slow, light dark, early late, happy sad, rich poor, strong weak, open closed, "
    "full empty, hard soft, high low, old young, easy difficult, near far, loud quiet, wet dry, thick thin, "
    "good bad, clean dirty, right wrong, up down, day night, love hate, buy sell, push pull",
    separator=", ",
)
GROUPS = items(
    "fruits vegetables animals birds colors countries cities rivers planets sports languages trees flowers insects "
    "metals drinks tools toys jobs months seasons oceans continents instruments vehicles dances games hobbies"
)
JOBS = items(
    "doctor teacher farmer pilot baker nurse lawyer painter carpenter driver cook writer scientist singer dentist "
    "soldier sailor judge gardener plumber engineer waiter musician librarian photographer mechanic tailor"
)
ANIMALS = items(
    "dogs cats horses cows elephants lions bears birds fish snakes frogs bees ants whales penguins rabbits monkeys "
    "wolves foxes owls sharks turtles spiders camels goats sheep ducks eagles kangaroos butterflies crocodiles"
)
SUBJECTS = items(
    "the sun, the moon, the ocean, the weather, music, history, football, cooking, space, the brain, the heart, "
    "gravity, electricity, water, rain, winter, friendship, money, school, sleep, the internet, computers, books, "
    "dreams, mountains, deserts, volcanoes, dinosaurs, ancient Rome, the human body, coffee, tea, bread, chess",
    separator=", ",
)
#: A question and the one right answer.
FACTS = items(
    "What color is the sky?/blue, What color is grass?/green, What color is snow?/white, What color is blood?/red, "
    "What color is a banana?/yellow, What color is coal?/black, What color is a ripe tomato?/red, "
    "How many days are in a week?/seven, How many months are in a year?/twelve, How many hours are in a day?/24, "
    "How many minutes are in an hour?/60, How many seconds are in a minute?/60, How many legs does a spider have?/eight, "
    "How many legs does a dog have?/four, How many wheels does a bicycle have?/two, How many eyes do people have?/two, "
    "How many fingers are on one hand?/five, How many sides does a triangle have?/three, "
    "Which planet do we live on?/Earth, Which planet is the largest?/Jupiter, Which star is closest to the Earth?/sun, "
    "What is frozen water called?/ice, What do bees make?/honey, What do cows give us to drink?/milk, "
    "What is a young dog called?/puppy, What is a young cat called?/kitten, What is the largest ocean?/Pacific, "
    "What is the tallest animal?/giraffe, What is the largest animal?/whale, What is the longest river in Africa?/Nile, "
    "What is the highest mountain in the world?/Everest, What gas do we need to breathe?/oxygen, "
    "Who wrote Romeo and Juliet?/Shakespeare, What do we call a person who flies a plane?/pilot, "
    "What metal is a gold ring made of?/gold, What do we use to cut paper?/scissors, What comes out of a volcano?/lava",
    separator=", ",
)
WISHES = items(
    "learn a new language, sleep better, cook rice, make tea, save money, make friends, stay healthy, bake bread, "
    "write a letter, learn to swim, plant a tree, clean a window, draw a cat, find a job, tie a knot, fix a bicycle, "
    "train a dog, grow tomatoes, boil an egg, paint a wall, read faster, become a doctor, stop worrying, run faster",
    separator=", ",
)
PHRASES = (
    "Yes. No. Maybe. Thank you. Good morning. Good evening. Good night. See you later. Of course. Not yet. "
    "Come in. Sit down. Wait a minute. I do not know. That is right. Never mind. Excuse me. You are welcome. "
    "Be careful. Hurry up. Look at this. Listen to me. Well done. Help me, please. How much is it? Where is it? "
    "What time is it? Who is there? What happened? Why not? Let us go. I am tired. I am hungry. It is late. "
    "It is raining. Turn left. Turn right. Stop here. Go on. Once more, please. Speak slowly, please."
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Words for the patterns.

    Attributes:
        nouns: concrete things, animals and people.
    """

    nouns: tuple[str, ...]


def ordinal(number: int) -> str:
    """`3` -> `3rd`."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def short_sentences(rng: random.Random, vocabulary: Vocabulary, n: int = N_SHORT) -> list[str]:
    """Numbers, dates, times, names, letters and phrases; the same for the same `rng`."""
    patterns: tuple[Callable[[random.Random, Vocabulary], str], ...] = (_number, _date, _name, _thing, _letters)
    made = [rng.choice(patterns)(rng, vocabulary) for _ in range(n)]
    return [*made, *(phrase + end for phrase, end in _phrases())]


def _phrases() -> Iterable[tuple[str, str]]:
    for phrase in PHRASES.replace("? ", "?|").replace(". ", ".|").split("|"):
        yield phrase[:-1], phrase[-1]


def _number(rng: random.Random, vocabulary: Vocabulary) -> str:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    big = rng.randint(100, rng.choice([999, 9999, 99_999]))
    digits = " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(3, 7)))
    noun = rng.choice(vocabulary.nouns)
    return rng.choice(
        [
            f"{a}.",
            f"{big:,}.",
            f"{digits}.",
            f"The number is {big:,}.",
            f"My number is {digits}.",
            f"{a} plus {b} is {a + b}.",
            f"{a + b} minus {b} is {a}.",
            f"It costs {rng.randint(2, 990)} dollars.",
            f"The {noun} costs {rng.randint(2, 99)} dollars and {rng.randint(2, 99)} cents.",
            f"It is {a} degrees in {rng.choice(CITIES)}.",
            f"He is {rng.randint(2, 99)} years old.",
            f"Page {rng.randint(2, 400)}, line {rng.randint(2, 40)}.",
            f"About {rng.randint(2, 99)}% of them came by {rng.choice(['bus', 'train', 'car', 'plane', 'boat'])}.",
            f"It is {rng.randint(2, 900)} miles from {rng.choice(CITIES)} to {rng.choice(CITIES)}.",
            f"This is the {ordinal(rng.randint(1, 31))} {noun}.",
        ]
    )


def _date(rng: random.Random, vocabulary: Vocabulary) -> str:
    month, day, year = (
        rng.choice(MONTHS),
        rng.choice(range(1, 31)),
        rng.randint(1700, 2030),
    )
    hour, minute = rng.randint(1, 12), rng.randint(10, 59)
    name = rng.choice(FIRST_NAMES)
    return rng.choice(
        [
            f"{month} {ordinal(day)}, {year}.",
            f"It was in {month} {year}.",
            f"{name} was born on the {ordinal(day)} of {month}.",
            f"{name} moved to {rng.choice(CITIES)} in {year}.",
            f"The train leaves at {hour} {minute}.",
            f"It is {minute} minutes past {hour}.",
            f"We meet on {rng.choice(DAYS)} at half past {hour}.",
            f"See you on {rng.choice(DAYS)}, the {ordinal(day)}.",
            f"The shop is closed on {rng.choice(DAYS)} and {rng.choice(DAYS)}.",
            f"The year {year} was a good one.",
        ]
    )


def _name(rng: random.Random, vocabulary: Vocabulary) -> str:
    one, other = rng.sample(FIRST_NAMES, 2)
    noun, city, place = rng.choice(vocabulary.nouns), rng.choice(CITIES), rng.choice(PLACES)
    return rng.choice(
        [
            f"My name is {one}.",
            f"{one} and {other} live in {city}.",
            f"{one} gave {other} {with_article(noun)}.",
            f"{one} has never been to {place}.",
            f"Have you seen {one}?",
            f"Good morning, {one}.",
            f"{one}, this is {other}.",
            f"Please tell {one} to call {other} in {place}.",
            f"{one} is looking for {with_article(noun)}.",
            f"Where did {one} put the {noun}?",
        ]
    )


def _thing(rng: random.Random, vocabulary: Vocabulary) -> str:
    one, other = rng.sample(vocabulary.nouns, 2)
    colour, size, number = rng.choice(COLOURS), rng.choice(SIZES), rng.randint(2, 20)
    return rng.choice(
        [
            f"{with_article(one)}.",
            f"{with_article(colour)} {one}.",
            f"The {size} {one}.",
            f"{one}, {other}.",
            f"The {one} is {colour}.",
            f"There is {with_article(one)} behind the {other}.",
            f"I can see {with_article(size)} {colour} {one}.",
            f"The {one} is next to the {size} {other}.",
            f"She bought {with_article(one)} and {with_article(other)}.",
            f"We need {with_article(one)} for {number} people.",
        ]
    )


def _letters(rng: random.Random, vocabulary: Vocabulary) -> str:
    """Letters by name. A is left out: voices read it as the article."""
    word = rng.choice([noun for noun in vocabulary.nouns[rng.randrange(9) :: 9] if "a" not in noun] or ["river"])
    some = rng.choices(ascii_lowercase[1:], k=rng.randint(1, 6))
    return rng.choice([", ".join(some) + ".", f"{word} is spelled {', '.join(word)}.", f"{some[0]} as in {word}."])


def questions(vocabulary: Vocabulary) -> list[str]:
    """Questions and small tasks for a small language model, most of them open."""
    jobs, nouns = map(with_article, JOBS), map(with_article, vocabulary.nouns)
    fillings: tuple[tuple[Iterable[str], tuple[str, ...]], ...] = (
        (PLACES, _PLACE_QUESTIONS), (GROUPS, _GROUP_QUESTIONS), (jobs, _JOB_QUESTIONS), (ANIMALS, _ANIMAL_QUESTIONS),
        (SUBJECTS, _SUBJECT_QUESTIONS), (WISHES, _WISH_QUESTIONS), (nouns, _NOUN_QUESTIONS),
    )  # fmt: skip
    return [pattern.format(word) for words, patterns in fillings for word in words for pattern in patterns]


def closed_questions() -> dict[str, str]:
    """Questions that have one right answer, and that answer."""
    answers = dict(fact.split("/") for fact in FACTS)
    for pair in OPPOSITES:
        for word, opposite in (pair.split(), pair.split()[::-1]):
            answers[f"What is the opposite of {word}?"] = opposite
            answers[f"What is the antonym of {word}?"] = opposite
    for country, capital, continent in COUNTRIES:
        answers[f"What is the capital of {country}?"] = capital
        answers[f"What is the capital city of {country}?"] = capital
        answers[f"Which country has the capital {capital}?"] = country
        answers[f"Which continent is {country} in?"] = continent
    for names in (DAYS, MONTHS):
        for name, following in zip(names, [*names[1:], names[0]], strict=True):
            answers[f"What comes after {name}?"] = following
            answers[f"What comes before {following}?"] = name
    for a in range(1, 11):
        for b in range(1, 11):
            answers[f"What is {a} plus {b}?"] = str(a + b)
    return answers


_PLACE_QUESTIONS = (
    "Where is {}?", "What language do people speak in {}?", "What is {} famous for?", "What do people eat in {}?",
    "Tell me something about {}.", "What is the weather like in {}?",
)  # fmt: skip
_GROUP_QUESTIONS = (
    "Can you name three {}?", "Name five {}.", "Give me a list of {}.", "What are your favorite {}?",
    "Which {} do you know?", "Tell me about {}.",
)  # fmt: skip
_JOB_QUESTIONS = (
    "What does {} do?", "Where does {} work?", "How do I become {}?", "What tools does {} use?",
    "Is it hard to be {}?", "Write a sentence about {}.",
)  # fmt: skip
_ANIMAL_QUESTIONS = (
    "What do {} eat?", "Where do {} live?", "How long do {} live?", "How big are {}?", "What sound do {} make?",
    "Can {} swim?", "Are {} dangerous?", "Tell me a fact about {}.", "Why do people like {}?",
)  # fmt: skip
_SUBJECT_QUESTIONS = (
    "Tell me about {}.", "What do you know about {}?", "Why is {} important?", "Can you explain {}?",
    "Write a short poem about {}.", "Tell me a short story about {}.", "Give me an interesting fact about {}.",
)  # fmt: skip
_WISH_QUESTIONS = (
    "How do I {}?", "How can I {}?", "What do I need to {}?", "I want to {}. What should I do first?",
    "Give me some advice, I would like to {}.", "Is it easy to {}?",
)  # fmt: skip
_NOUN_QUESTIONS = ("What is {}?", "What does {} look like?", "Can you describe {}?", "Use {} in a sentence, please.")
