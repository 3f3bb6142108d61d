"""Story templates of the arithmetic word problems: data only, drawn and solved by `word_problems`.

A template is a question, the lines of its solution and the ranges of its numbers.

* `{name} {other}`: two people; `{he} {his}`: pronouns of the first; `{things} {extras}`: two kinds of objects;
  `{group}`: a kind of container. A capital first letter (`{He}`) gives a capital word.
* `{a} {b} {c} {d}`: the numbers given in the question, each drawn from its range.
* `(one|two)`: one of the alternatives, chosen anew in every draw. Only questions use it.
* `[a*b]` in a solution line: one step of arithmetic, written as GSM8K does; the results of the steps are called `x`,
  `y`, `z` in order. The last result is the answer.
"""

from dataclasses import dataclass

GIRLS = ("Anna", "Mia", "Sara", "Lily", "Emma", "Nora", "Zoe", "Ruth", "Julia", "Kate", "Maria", "Lena")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Omar", "Paul", "Noah", "Ivan", "Luis", "Carl")
THINGS = (
    "apples", "pencils", "books", "marbles", "stickers", "cookies", "cards", "shells", "coins", "eggs", "oranges",
    "balloons", "stamps", "flowers", "stones", "toys", "buttons", "candles", "muffins", "beads", "pens", "lemons",
)  # fmt: skip
GROUPS = ("boxes", "bags", "baskets", "jars", "packs", "crates", "trays", "cartons")

RANGES = {
    "pair": range(2, 5),
    "few": range(2, 10),
    "table": range(2, 13),
    "even": range(4, 100, 2),
    "tens": range(10, 41),
    "wide": range(5, 61),
    "hundred": range(20, 100),
    "share": range(4, 145),
}


@dataclass(frozen=True)
class Story:
    """One template.

    Attributes:
        question: text with placeholders and alternatives.
        solution: one line per arithmetic step, each with exactly one `[left op right]`.
        numbers: per given number, in the order a, b, c, d, a key of `RANGES`.
    """

    question: str
    solution: tuple[str, ...]
    numbers: str


STORIES = (
    # One step.
    Story(
        "{name} has {a} {things}. {He} (buys|finds|gets) {b} more {things}. "
        "How many {things} does {name} have (now|in total)?",
        ("{name} has [a+b] {things}.",),
        "wide wide",
    ),
    Story(
        "{name} had {a} {things}. {He} (gave {b} {things} to {other}|lost {b} of them|sold {b} of them). "
        "How many {things} does {name} have left?",
        ("{name} has [a-b] {things} left.",),
        "hundred wide",
    ),
    Story(
        "There are {a} {group} with {b} {things} in each. How many {things} are there (in total|altogether)?",
        ("There are [a*b] {things}.",),
        "table table",
    ),
    Story(
        "{name} (shares|splits|divides) {a} {things} equally among {b} (friends|children). "
        "How many {things} does each get?",
        ("Each gets [a/b] {things}.",),
        "share few",
    ),
    Story(
        "A (train|bus|car|bike) travels {a} miles (each|every) hour. How (many miles|far) does it travel in {b} hours?",
        ("It travels [a*b] miles.",),
        "table few",
    ),
    Story(
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        ("{name} has [a-b] more {things}.",),
        "hundred wide",
    ),
    Story(
        "{name} has {a} {group} (with {b} {things} in each|of {b} {things}|with {b} {things} each). "
        "How many {things} does {name} have(| in total| altogether)?",
        ("{name} has [a*b] {things}.",),
        "table table",
    ),
    Story(
        "How many {things} are in {a} {group} (of {b} {things}|with {b} {things} each)?",
        ("There are [a*b] {things}.",),
        "table table",
    ),
    Story(
        "{name} had {a} {things} and (gave away {b}|lost {b}|sold {b}|gave {b} to {other}). "
        "How many {things} (are left|does {he} have now|does {name} have left)?",
        ("{name} has [a-b] {things} left.",),
        "hundred wide",
    ),
    Story(
        "{name} has {a} {things}. {other} gives {him} {b} more(| {things}). How many {things} does {name} have now?",
        ("{name} has [a+b] {things}.",),
        "wide wide",
    ),
    Story(
        "{name} has {a} {things} and {other} has {b}(| {things}). "
        "How many {things} do they have (together|in total|altogether)?",
        ("Together they have [a+b] {things}.",),
        "hundred wide",
    ),
    Story(
        "{name} buys {a} {things} for ${b} each. How much does {he} (pay|spend)(| in total)?",
        ("{name} pays $[a*b].",),
        "table table",
    ),
    # Two steps.
    Story(
        "{name} (sold|found|picked|made) {a} {things} (in April|on Monday|last week) "
        "and half as many (in May|on Tuesday|this week). How many {things} is that (in total|altogether)?",
        ("The second time it was [a/2] {things}.", "Altogether it was [a+x] {things}."),
        "even",
    ),
    Story(
        "{name} has {a} {things}. {He} (buys|finds|gets) {b} more and (gives {c} to {other}|loses {c}|sells {c}). "
        "How many {things} does {name} have (now|left)?",
        ("First {name} has [a+b] {things}.", "Then {he} has [x-c] {things}."),
        "wide wide few",
    ),
    Story(
        "{name} has {a} {things}. {He} buys {b} {group} with {c} {things} (each|in each). "
        "How many {things} does {name} have now?",
        ("{He} buys [b*c] {things}.", "{He} has [a+x] {things} now."),
        "wide few few",
    ),
    Story(
        "{name} has {a} {group} of {b} {things}. "
        "{He} (gives {c} {things} to {other}|loses {c} {things}|sells {c} {things}). "
        "How many {things} are left?",
        ("{name} starts with [a*b] {things}.", "There are [x-c] {things} left."),
        "few table wide",
    ),
    Story(
        "{name} has {a} {things}. {other} has {b} (more|more {things}) than {name}. "
        "How many {things} do they have together?",
        ("{other} has [a+b] {things}.", "Together they have [a+x] {things}."),
        "tens wide",
    ),
    Story(
        "{name} has {a} {things}. {other} has {b} fewer {things} than {name}. "
        "How many {things} do they have (together|in total)?",
        ("{other} has [a-b] {things}.", "Together they have [a+x] {things}."),
        "hundred wide",
    ),
    Story(
        "{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have (together|in total)?",
        ("{other} has [b*a] {things}.", "Together they have [a+x] {things}."),
        "table few",
    ),
    Story(
        "{name} has {a} {things} and {other} has half as many. How many {things} do they have together?",
        ("{other} has [a/2] {things}.", "Together they have [a+x] {things}."),
        "even",
    ),
    Story(
        "A book has {a} pages. {name} reads {b} pages (a|each|every) day for {c} days. How many pages are left?",
        ("{name} reads [b*c] pages.", "There are [a-x] pages left."),
        "hundred table few",
    ),
    Story(
        "{name} earns ${a} (an|each|every) hour. "
        "{He} works {b} hours and (spends|then spends) ${c} on {things}. How much money does {he} have left?",
        ("{name} earns $[a*b].", "{He} has $[x-c] left."),
        "table table wide",
    ),
    Story(
        "{name} saves ${a} (a|each|every) week for {b} weeks. "
        "{His} (mother|father|uncle|aunt) gives {him} ${c} more. How much money does {name} have?",
        ("{name} saves $[a*b].", "{He} has $[x+c]."),
        "table table wide",
    ),
    Story(
        "{name} has {a} {things} and (buys|finds|gets) {b} more. {He} puts them equally into {c} {group}. "
        "How many {things} are in each?",
        ("{name} has [a+b] {things}.", "Each holds [x/c] {things}."),
        "wide wide few",
    ),
    Story(
        "{name} has {a} {things}. {He} keeps {b} and shares the rest equally among {c} friends. "
        "How many {things} does each friend get?",
        ("{name} shares [a-b] {things}.", "Each friend gets [x/c] {things}."),
        "hundred wide few",
    ),
    Story(
        "A (hall|bus|theater) has {a} rows of {b} seats. {c} (people sit down|seats are taken). "
        "How many seats are (empty|free)?",
        ("There are [a*b] seats.", "There are [x-c] empty seats."),
        "table table wide",
    ),
    Story(
        "{name} is {a} years old. {His} (mother|father|uncle|aunt) is {b} times as old. "
        "How old will {his} \\1 be in {c} years?",
        ("Now the age is [b*a].", "In the future it will be [x+c]."),
        "table pair few",
    ),
    Story(
        "{name} wants a game that costs ${a}. {He} has ${b} and saves ${c} (a|each|every) week. "
        "How many weeks must {he} save?",
        ("{name} needs $[a-b] more.", "It takes [x/c] weeks."),
        "hundred wide table",
    ),
    Story(
        "{name} packs {a} {things} into {group} of {b}. Each of the {group} sells for ${c}. "
        "How much money does {name} get?",
        ("There are [a/b] {group}.", "{name} gets $[x*c]."),
        "share few few",
    ),
    Story(
        "{name} buys {a} {group} with {b} {things} each. Every one of the {things} costs ${c}. "
        "How much does {name} pay?",
        ("{name} buys [a*b] {things}.", "{He} pays $[x*c]."),
        "few few pair",
    ),
    # Three steps.
    Story(
        "{name} buys {a} {things} for ${b} each and {c} {extras} for ${d} each. "
        "How much does {he} (pay|spend) in total?",
        ("The {things} cost $[a*b].", "The {extras} cost $[c*d].", "In total {he} pays $[x+y]."),
        "few table few table",
    ),
    Story(
        "A farm has {a} (chickens|ducks|geese) and {b} (cows|pigs|sheep|goats). "
        "How many legs do the animals have in total?",
        ("The \\1 have [a*2] legs.", "The \\2 have [b*4] legs.", "In total there are [x+y] legs."),
        "table table",
    ),
    Story(
        "{name} bakes {a} trays of {b} cookies. "
        "{He} eats {c} cookies and puts the rest equally into {d} {group}. How many cookies are in each?",
        ("{name} bakes [a*b] cookies.", "There are [x-c] cookies left.", "Each holds [y/d] cookies."),
        "few table few few",
    ),
    Story(
        "On Monday {name} (sold|picked|made|found) {a} {things}. "
        "On Tuesday {he} \\1 {b} more than on Monday. On Wednesday {he} \\1 {c}. "
        "How many {things} is that in total?",
        ("On Tuesday it was [a+b] {things}.", "In two days it was [a+x] {things}.", "In total it was [y+c] {things}."),
        "tens few wide",
    ),
    Story(
        "{name} drives {a} miles an hour for {b} hours and then {c} miles an hour for {d} hours. "
        "How many miles does {he} drive in total?",
        ("First {name} drives [a*b] miles.", "Then {he} drives [c*d] miles.", "In total {he} drives [x+y] miles."),
        "table few table few",
    ),
    Story(
        "{name} has ${a}. {He} buys {b} {things} for ${c} each and gets ${d} from {other}. "
        "How much money does {name} have now?",
        ("The {things} cost $[b*c].", "{name} has $[a-x] left.", "Now {he} has $[y+d]."),
        "hundred few few wide",
    ),
    Story(
        "{name} has {a} {things}. {He} buys {b} {group} with {c} {things} each and gives {d} {things} to "
        "{other}. How many {things} does {name} have left?",
        ("{He} buys [b*c] {things}.", "{He} has [a+x] {things}.", "{He} has [y-d] {things} left."),
        "wide few few wide",
    ),
    Story(
        "{name} had {a} {things}. {He} lost {b} of them, then (bought|found|got) {c} more and gave {d} to "
        "{other}. How many {things} does {name} have now?",
        ("{He} had [a-b] {things}.", "Then {he} had [x+c] {things}.", "Now {he} has [y-d] {things}."),
        "hundred wide wide few",
    ),
    Story(
        "{name} has {a} {things}. {other} has {b} times as many. "
        "They put all the {things} equally into {c} {group}. How many {things} are in each?",
        ("{other} has [b*a] {things}.", "Together they have [a+x] {things}.", "Each holds [y/c] {things}."),
        "few few few",
    ),
)

DRILLS = (
    Story("(What is {a} + {b}?|Calculate {a} + {b}.|{a} + {b} = ?)", ("The sum is [a+b].",), "hundred hundred"),
    Story("(What is {a} - {b}?|Calculate {a} - {b}.|{a} - {b} = ?)", ("The difference is [a-b].",), "hundred wide"),
    Story("(What is {a} * {b}?|Calculate {a} * {b}.|{a} * {b} = ?)", ("The product is [a*b].",), "table table"),
    Story("(What is {a} / {b}?|Calculate {a} / {b}.|{a} / {b} = ?)", ("The quotient is [a/b].",), "share table"),
)
