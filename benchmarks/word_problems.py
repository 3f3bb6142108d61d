"""Small arithmetic word problems that the demo checkpoint knows, for benchmarks in its process and over HTTP."""

import random

NAMES = ("Anna", "Mia", "Sara", "Lily", "Tom", "Ben", "Max", "Leo")
THINGS = ("apples", "pencils", "books", "marbles", "stickers", "cookies", "shells", "coins")


def draw_problem(rng: random.Random) -> str:
    """The prompt of a word problem, to be completed."""
    return f"Question: {draw_question(rng)}\nAnswer:"


def draw_question(rng: random.Random) -> str:
    """A word problem in a sentence pattern of the demo checkpoint, with new names and numbers."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    a, b, c = rng.randint(20, 60), rng.randint(2, 12), rng.randint(2, 9)
    questions = (
        f"{name} has {a} {things}. {other} gives them {b} more. How many {things} does {name} have now?",
        f"{name} had {a} {things} and lost {b}. How many {things} are left?",
        f"There are {b} boxes with {c} {things} in each. How many {things} are there in total?",
        f"A train travels {b} miles every hour. How far does it travel in {c} hours?",
        f"{name} buys {b} {things} for ${c} each. How much does {name} spend in total?",
        f"{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
        f"{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they have together?",
        f"A farm has {b} chickens and {c} cows. How many legs do the animals have in total?",
    )
    return rng.choice(questions)
