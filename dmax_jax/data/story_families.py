"""The kinds of story that `stories` tells: numbers, question sentences, and the steps of the answer, as data.

Every sentence and every step has several phrasings, and each phrasing is as likely as the others. The phrasings of a
step differ in word order, in length and in where the equation stands: tokens that are guessed independently of each
other then mix phrasings and come out wrong, which is what makes an answer hard to write in parallel.
"""

from typing import NamedTuple

FACTOR = (2, 9)  # both sides of a product, divisor and quotient
AMOUNT = (2, 20)  # what somebody has, gets or gives away


class Step(NamedTuple):
    """One equation `left op right = result`; in its phrasings x, y, z and eq are operands, result and equation."""

    result: str
    left: str
    op: str
    right: str
    phrasings: tuple[str, ...]
    who: str = "name"  # whom the step is about: name, friend, child or plate


class Family(NamedTuple):
    """One structure of a story. The steps of one stage are independent: the answer tells them in any order."""

    name: str
    numbers: dict[str, tuple[int, int]]
    question: tuple[tuple[str, ...], ...]
    stages: tuple[tuple[Step, ...], ...]


PACKED = (
    "{x} {bags} of {y} {noun} make {eq} {noun}.",
    "{who}'s {bags} hold {z} {noun}, since {eq}.",
    "{eq}, so {who} gets {z} {noun} from the {bags}.",
    "With {y} {noun} in each {bag}, {who} has {eq} of them there.",
    "Multiplying {y} by {x} makes {z} {noun} for {who} ({eq}).",
    "There are {eq} {noun} in the {x} {bags} of {who}.",
)
ADDED = (
    "{who} ends up with {eq} {noun}.",
    "Adding {y} to {x} gives {z} {noun}, as {eq}.",
    "{eq}, so there are {z} {noun} at the end.",
    "Now {z} {noun} are there, because {eq}.",
    "In total that is {eq}.",
)
TAKEN = (
    "{who} keeps {eq} {noun}.",
    "After that {z} {noun} are left, because {eq}.",
    "{eq}, so {who} still has {z} {noun}.",
    "Taking {y} from {x} leaves {z} ({eq}).",
    "Without those {y} {noun}, {who} is down to {eq}.",
)
SHARED = (
    "Each {who} gets {eq} {noun}.",
    "Split {y} ways, {x} {noun} come to {z} each, since {eq}.",
    "{eq}, which means {z} {noun} per {who}.",
    "So there are {z} {noun} for every {who} ({eq}).",
    "Dividing by {y} gives {eq}.",
)
TOGETHER = (
    "Together they have {eq} {noun}.",
    "The two own {z} {noun}, because {eq}.",
    "{eq}, so {name} and {friend} have {z} {noun} between them.",
    "Add {x} and {y} to get {z} {noun} ({eq}).",
    "Both collections combined make {eq}.",
)
AHEAD = (
    "{who} has {eq} more {noun}.",
    "{friend} is behind by {z} {noun}, because {eq}.",
    "{eq}, so the difference is {z} {noun}.",
    "Subtract {y} from {x} to get {z} ({eq}).",
    "That puts {who} ahead of {friend} by {eq}.",
)
COUNTED_UP = (
    "{who} has {eq} {noun}.",
    "So {who} owns {z} {noun}, because {eq}.",
    "{eq}, which is what {who} has.",
    "With {y} more than {name}, {who} comes to {z} ({eq}).",
    "Counting up {y} from {x} gives {eq} for {who}.",
)
SOLD = (
    "{who} gets {eq} dollars.",
    "At {y} dollars each, the {noun} bring in {z} dollars ({eq}).",
    "{eq}, so the sale earns {z} dollars.",
    "Selling {x} {noun} makes {eq} dollars.",
    "The money comes to {z} dollars, since {eq}.",
)
EARNED = (
    "{who} earns {eq} dollars.",
    "{x} hours of work pay {z} dollars, since {eq}.",
    "{eq}, so the work brings in {z} dollars.",
    "The pay for {x} hours at {y} dollars is {eq}.",
    "Working makes {who} richer by {z} dollars ({eq}).",
)
SPENT = (
    "The {noun} cost {eq} dollars.",
    "{x} {noun} at {y} dollars take {z} dollars, since {eq}.",
    "{eq}, so {who} spends {z} dollars.",
    "For the {noun} {who} pays {eq} dollars.",
    "Shopping makes {who} poorer by {z} dollars ({eq}).",
)
REMAINING = (
    "{who} has {eq} dollars left.",
    "What is left is {z} dollars, because {eq}.",
    "{eq}, so {z} dollars remain.",
    "Taking {y} from {x} leaves {z} ({eq}).",
    "After spending {y} dollars, {who} keeps {eq}.",
)

# What stands before the first step, before the others, and before the last line.
OPENINGS = (
    "We can work this out step by step.",
    "Let us begin with what we know.",
    "Here is the first step.",
    "First we look at the numbers in the story.",
    "Start with the part that is easy to see.",
)
TRANSITIONS = (
    "Now we can go on from there.",
    "Here is the next step.",
    "That is one part of it.",
    "With this we know enough for the next part.",
    "Then comes the rest.",
)
CONCLUSIONS = (
    "So the answer is {z}.",
    "This gives {z} as the answer.",
    "{z} is the number that was asked for.",
    "Now we know the answer, and it is {z}.",
    "The question is answered by {z}.",
)

# Sentences of questions.
HAS = ("{name} has {s} {noun}.", "{name} starts with {s} {noun}.", "At first {name} owns {s} {noun}.")
HAS_BAGS = ("{name} has {a} {bags} of {b} {noun}.", "{name} owns {a} {bags} with {b} {noun} in each.")
FRIEND_HAS_BAGS = ("{friend} has {c} {bags} of {d} {noun}.", "{friend} owns {c} {bags} with {d} {noun} in each.")
HOW_MANY = ("How many {noun} does {name} have now?", "How many {noun} is that in the end?")
HOW_MANY_TOGETHER = ("How many {noun} do they have together?", "How many {noun} is that for both of them?")
HOW_MANY_EACH = ("How many {noun} does each child get?", "How many {noun} are there for every child?")

IN_BAGS = Step("p", "a", "*", "b", PACKED)
FRIEND_IN_BAGS = Step("q", "c", "*", "d", PACKED, who="friend")
FOUR_FACTORS = {"a": FACTOR, "b": FACTOR, "c": FACTOR, "d": FACTOR}

FAMILIES = (
    Family(
        "buy",
        {"s": AMOUNT, "a": FACTOR, "b": FACTOR},
        (
            HAS,
            ("{name} buys {a} {bags} of {b} {noun}.", "{friend} brings {name} {a} {bags} with {b} {noun} in each."),
            HOW_MANY,
        ),
        ((IN_BAGS,), (Step("t", "s", "+", "p", ADDED),)),
    ),
    Family(
        "sell",
        {"s": AMOUNT, "g": AMOUNT, "f": FACTOR},
        (
            HAS,
            ("{name} gives {g} {noun} to {friend}.", "{name} lets {friend} have {g} of them."),
            ("{name} sells the other {noun} for {f} dollars each.", "Then {name} sells the rest at {f} dollars each."),
            ("How many dollars does {name} get?", "How much money is that?"),
        ),
        ((Step("r", "s", "-", "g", TAKEN),), (Step("d", "r", "*", "f", SOLD),)),
    ),
    Family(
        "together",
        FOUR_FACTORS,
        (HAS_BAGS, FRIEND_HAS_BAGS, HOW_MANY_TOGETHER),
        ((IN_BAGS, FRIEND_IN_BAGS), (Step("t", "p", "+", "q", TOGETHER),)),
    ),
    Family(
        "compare",
        FOUR_FACTORS,
        (
            HAS_BAGS,
            FRIEND_HAS_BAGS,
            ("How many more {noun} does {name} have than {friend}?", "By how many {noun} is {name} ahead of {friend}?"),
        ),
        ((IN_BAGS, FRIEND_IN_BAGS), (Step("t", "p", "-", "q", AHEAD),)),
    ),
    Family(
        "share",
        {"a": FACTOR, "b": FACTOR, "k": FACTOR},
        (
            HAS_BAGS,
            ("{k} children share all of them equally.", "{name} shares them equally among {k} children."),
            HOW_MANY_EACH,
        ),
        ((IN_BAGS,), (Step("q", "p", "/", "k", SHARED, who="child"),)),
    ),
    Family(
        "pool",
        {"s": AMOUNT, "g": AMOUNT, "k": FACTOR},
        (
            ("{name} has {s} {noun} and {friend} has {g}.", "{friend} owns {g} {noun}, and {name} owns {s}."),
            ("They put all of them equally on {k} plates.", "All their {noun} are spread evenly over {k} plates."),
            ("How many {noun} lie on each plate?", "How many {noun} does one plate hold?"),
        ),
        ((Step("t", "s", "+", "g", TOGETHER),), (Step("q", "t", "/", "k", SHARED, who="plate"),)),
    ),
    Family(
        "earn",
        FOUR_FACTORS,
        (
            (
                "{name} works {a} hours at {b} dollars each.",
                "{name} earns {b} dollars an hour and works {a} hours.",
            ),
            ("{name} buys {c} {noun} for {d} dollars each.", "Then {name} pays {d} dollars each for {c} {noun}."),
            ("How many dollars are left?", "How much money does {name} have left?"),
        ),
        (
            (Step("p", "a", "*", "b", EARNED), Step("q", "c", "*", "d", SPENT)),
            (Step("t", "p", "-", "q", REMAINING),),
        ),
    ),
    Family(
        "swap",
        {"s": AMOUNT, "g": AMOUNT, "a": FACTOR, "b": FACTOR},
        (
            HAS,
            ("{name} gives {g} of them away.", "{name} loses {g} {noun} on the way."),
            ("Later {name} gets {a} {bags} of {b} {noun}.", "Then {a} {bags} with {b} {noun} in each arrive."),
            HOW_MANY,
        ),
        ((Step("r", "s", "-", "g", TAKEN), IN_BAGS), (Step("t", "r", "+", "p", ADDED),)),
    ),
    Family(
        "more",
        {"s": AMOUNT, "k": AMOUNT},
        (
            ("{name} has {s} {noun}.", "{name} owns {s} {noun}."),
            ("{friend} has {k} {noun} more.", "{friend} has {k} more {noun} than {name}."),
            HOW_MANY_TOGETHER,
        ),
        ((Step("f", "s", "+", "k", COUNTED_UP, who="friend"),), (Step("t", "s", "+", "f", TOGETHER),)),
    ),
    Family(
        "rest",
        {"a": FACTOR, "b": FACTOR, "g": AMOUNT, "k": FACTOR},
        (
            HAS_BAGS,
            ("{friend} takes {g} {noun} away.", "{name} sells {g} of them.", "{g} {noun} are lost."),
            ("The rest is shared equally by {k} children.", "{k} children split the rest evenly."),
            HOW_MANY_EACH,
        ),
        ((IN_BAGS,), (Step("r", "p", "-", "g", TAKEN),), (Step("q", "r", "/", "k", SHARED, who="child"),)),
    ),
)
