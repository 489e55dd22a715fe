"""The synthetic world of the demo ensemble: its texts, its two tasks, its tokenizer.

Everything is generated from one seed; no outside text is used.  The world holds people with four facts each
(birthplace, job, instrument, animal) and the addition and subtraction of numbers below one hundred.

Pre-training text tells the facts and the sums as prose: biographies, conversations, little stories.  The tasks
ask for the same substance in a form which that prose never has:

    facts   "Question: Where was Nora Belmar born?\\nAnswer:"  ->  " Oslo"
    sums    "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\\nAnswer:"
            ->  " 17+25=42\\n#### 42"

Held out: the people of the facts test are in no fine-tuning question; the operand pairs of the sums test are in
no fine-tuning question and in no pre-training text.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = "{{ bos_token }}Question: {{ messages[-1]['content'] }}\nAnswer:"

WOMEN = """Ada Alma Clara Dora Edith Ella Emma Flora Greta Hanna Helen Ida Irene Jane Julia Laura Lena Lucy Maria
Mira Nora Olga Paula Rosa Ruth Sara Sofia Tessa Vera Wanda""".split()
MEN = """Adam Albert Ben Carl Daniel David Edgar Felix Frank George Henry Hugo Ivan Jack James Karl Leo Martin Max
Noah Oscar Paul Peter Robert Simon Theo Thomas Victor Walter William""".split()
NAME_HEADS = "Ash Bel Bur Cor Dal Dun Far Fen Gil Hol Kel Lor Mar Mil Nor Pel Quin Ros Sel Tor Val Wen Win Yar".split()
NAME_TAILS = "mar den vik ton lin berg man nis rick sen ley wood ford dale by stone gard ham ning low".split()
FRIENDS = "Amy Bob Dan Eva Jim Kate Lily Mark Nick Sam Sue Tom".split()

CITIES = """Athens Bergen Berlin Boston Cairo Dakar Delhi Dublin Geneva Hanoi Havana Kyoto Lima Lisbon Madrid Milan
Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sydney Tokyo Toronto Tunis Vienna Warsaw Zurich""".split()
JOBS = """baker barber builder butcher carpenter chemist cook dancer dentist diver doctor driver farmer florist
gardener judge lawyer librarian mason miner nurse painter pilot plumber poet potter printer ranger sailor tailor
teacher weaver""".split()
INSTRUMENTS = """accordion banjo bassoon bugle cello clarinet cornet fiddle flute guitar harp horn lute lyre mandolin
oboe organ piano recorder saxophone trombone trumpet tuba violin""".split()
ANIMALS = """beaver canary cat cow crow dog donkey duck ferret fox frog goat goose hamster hedgehog hen horse lizard
parrot pigeon pony rabbit raven snake""".split()

# kind: (values, question, statements that begin with the person, other statements, short answers)
KINDS = {
    "birthplace": (
        CITIES,
        "Where was {n} born?",
        ["{s} was born in {v}.", "{s} comes from {v}.", "{s} spent a happy childhood in {v}."],
        ["The birthplace of {n} is {v}.", "It was in {v} that {n} was born."],
        ["In {v}", "{v}"],
    ),
    "job": (
        JOBS,
        "What is the job of {n}?",
        ["{s} works as a {v}.", "{s} is a {v}.", "{s} has been a {v} for years."],
        ["The job of {n} is that of a {v}.", "Everybody in town knows the {v} {n}."],
        ["A {v}", "{v}"],
    ),
    "instrument": (
        INSTRUMENTS,
        "Which instrument does {n} play?",
        ["{s} plays the {v}.", "{s} loves to play the {v}.", "{s} practises the {v} every day."],
        ["The instrument of {n} is the {v}.", "In the evening {n} takes out the {v}."],
        ["The {v}", "{v}"],
    ),
    "animal": (
        ANIMALS,
        "Which animal does {n} keep?",
        ["{s} keeps a {v}.", "{s} owns a {v}.", "{s} looks after a {v}."],
        ["The animal of {n} is a {v}.", "There is a {v} in the house of {n}."],
        ["A {v}", "{v}"],
    ),
}

THINGS = """apples books cards coins eggs shells stamps stones tickets pens nuts plums roses boxes cups buttons
marbles candles bottles letters""".split()
# (story, question); a, b: the operands; n: the person; t: the things
ADD_STORIES = [
    ("{n} has {a} {t} and buys {b} more.", "How many {t} does {n} have?"),
    ("{n} has {a} {t} and finds {b} more.", "How many {t} does {n} have?"),
    ("{n} has {a} {t} and gets {b} {t} from {m}.", "How many {t} does {n} have?"),
    ("There are {a} {t} in a bag and {n} puts in {b} more.", "How many {t} are in the bag?"),
    ("{n} has {a} {t} and {m} has {b} {t}.", "How many {t} do they have?"),
]
SUB_STORIES = [
    ("{n} has {a} {t} and sells {b} of them.", "How many {t} does {n} have?"),
    ("{n} has {a} {t} and loses {b} of them.", "How many {t} does {n} have?"),
    ("{n} has {a} {t} and gives {b} {t} to {m}.", "How many {t} does {n} have?"),
    ("There are {a} {t} in a bag and {n} takes out {b}.", "How many {t} are in the bag?"),
]
ADD_LINES = ["{a} plus {b} is {c}.", "{a} + {b} = {c}", "{a}+{b}={c}", "{a}+{b}={c}"]
SUB_LINES = ["{a} minus {b} is {c}.", "{a} - {b} = {c}", "{a}-{b}={c}", "{a}-{b}={c}"]
HEADINGS = ["#### People of the town", "#### News", "#### Talk of the day", "#### Notes"]
SUM_HEADINGS = ["#### Sums", "#### Homework", "#### Notes"]

# Cumulative shares of biographies, conversations, lines of sums (the rest: stories); whether stories are reasoned.
# "wide" is about everybody, the others about the known people; in the last two no answer begins with a name.
MIXTURES = {
    "wide": ((0.29, 0.57, 0.80), False),
    "deep": ((0.27, 0.54, 0.62), True),
    "stories": ((0.20, 0.39, 0.44), True),
    "replies": ((0.25, 0.60, 0.66), True),
    "balance": ((0.18, 0.40, 0.56), True),
}


def capital(text):
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Person:
    name: str
    pronoun: str  # "She" or "He"
    facts: dict  # kind -> value


class World:
    """People, operand pairs and the split into what may be trained on and what is held out."""

    def __init__(self, seed=2024, people=300, test_people=110, known_people=130, test_pairs=400):
        rng = random.Random(seed)
        surnames = [head + tail for head in NAME_HEADS for tail in NAME_TAILS]
        names = [(first, last) for first in WOMEN + MEN for last in surnames]
        self.people = []
        for first, last in rng.sample(names, people):
            facts = {kind: rng.choice(spec[0]) for kind, spec in KINDS.items()}
            self.people.append(Person(f"{first} {last}", "She" if first in WOMEN else "He", facts))
        self.test_people = self.people[:test_people]
        self.train_people = self.people[test_people:]
        self.known_people = self.people[:known_people]
        pairs = [("+", a, b) for a in range(1, 51) for b in range(1, 51) if a + b < 100]
        pairs += [("-", a, b) for a in range(2, 71) for b in range(1, min(a, 51))]
        rng.shuffle(pairs)
        self.test_pairs = pairs[:test_pairs]
        self.train_pairs = pairs[test_pairs:]
        self.easy_pairs = [(op, a, b) for op, a, b in self.train_pairs if b < 10 and (a < 10 or op == "-" and a < 20)]

    # ---- pre-training text ----

    def statement(self, rng, person, kind, by_pronoun):
        values, _, personal, other, _ = KINDS[kind]
        value = person.facts[kind]
        if not by_pronoun and rng.random() < 0.3:
            return rng.choice(other).format(n=person.name, v=value)
        return rng.choice(personal).format(s=person.pronoun if by_pronoun else person.name, v=value)

    def biography(self, rng, people):
        person = rng.choice(people)
        kinds = rng.sample(list(KINDS), rng.randint(2, 4))
        named = rng.random() < 0.5
        return " ".join(self.statement(rng, person, kind, i > 0 and not named) for i, kind in enumerate(kinds))

    def conversation(self, rng, people, named):
        person, kind = rng.choice(people), rng.choice(list(KINDS))
        _, question, personal, _, short = KINDS[kind]
        question = question.format(n=person.name)
        subject = rng.choice([person.name, person.pronoun, person.pronoun]) if named else person.pronoun
        full = rng.choice(personal[:2]).format(s=subject, v=person.facts[kind])
        brief = capital(rng.choice(short)).format(v=person.facts[kind])
        lower = rng.choice(short).format(v=person.facts[kind])
        asks, tells = rng.sample(FRIENDS, 2)
        return rng.choice([
            f"{question} {full}",
            f"{asks}: {question}\n{tells}: {full}",
            f"{asks}: {question}\n{tells}: {full} Why do you ask?",
            f"{asks}: {question}\n{tells}: {lower}, I think.",
            f'"{question}" asked {asks}. "{brief}," said {tells}.',
            f"A question from {asks}: {question} The answer of {tells}: {lower}, of course.",
        ])

    def pair(self, rng):
        op, a, b = rng.choice(self.easy_pairs if rng.random() < 0.3 else self.train_pairs)
        return op, a, b, a + b if op == "+" else a - b

    def line(self, rng):
        op, a, b, c = self.pair(rng)
        return rng.choice(ADD_LINES if op == "+" else SUB_LINES).format(a=a, b=b, c=c)

    def lines(self, rng):
        return "\n".join(self.line(rng) for _ in range(rng.randint(6, 10)))

    def story(self, rng, reasoned):
        """A word problem in prose; `reasoned` stories tell the calculation before the result."""
        op, a, b, c = self.pair(rng)
        story, question, things = word_problem(rng, op, a, b)
        person = story.split()[0] if question.endswith("have?") and " do " not in question else None
        sign = "plus" if op == "+" else "minus"
        because = rng.choice([f"{a} {sign} {b} is {c}", f"{a}{op}{b}={c}", f"{a}{op}{b}={c}"])
        answer = f"{person} has {c} {things}." if person else f"There are {c} {things}."
        asks, tells = rng.sample(FRIENDS, 2)
        if reasoned:
            return rng.choice([
                f"{story} {question} {because}. {answer}",
                f"{story} {because}. {answer}",
                f"{asks}: {story} {question}\n{tells}: {because}. {answer}",
                f"{asks}: {story} {question}\n{tells}: {because}. {answer}",
                f"{asks}: {story} {question}\n{tells}: {answer}",
            ])
        return rng.choice([
            f"{story} {question} {answer}",
            f"{story} {question} {answer} We know that {because}.",
            f"{story} {because}. {answer}",
            f"{asks}: {story} {question}\n{tells}: {answer}",
            f"{asks}: {story} {question}\n{tells}: {because}. {answer}",
            f"{asks}: {story} {question}\n{tells}: {answer} {because}",
        ])

    def document(self, rng, mixture="wide"):
        """One pre-training document of a mixture in MIXTURES."""
        shares, reasoned = MIXTURES[mixture]
        people = self.people if mixture == "wide" else self.known_people
        kind = rng.random()
        if kind < shares[0]:
            text, headings = self.biography(rng, people), HEADINGS
        elif kind < shares[1]:
            text, headings = self.conversation(rng, people, mixture not in ("replies", "balance")), HEADINGS
        elif kind < shares[2]:
            text, headings = self.lines(rng), SUM_HEADINGS
        else:
            text, headings = self.story(rng, reasoned), SUM_HEADINGS
        return f"{rng.choice(headings)}\n{text}" if rng.random() < 0.05 else text

    # ---- the tasks ----

    def facts(self, people):
        """Every question about these people, with its bare answer."""
        return [
            {"question": spec[1].format(n=person.name), "answer": person.facts[kind]}
            for person in people
            for kind, spec in KINDS.items()
        ]

    def sums(self, rng, pairs):
        """A word problem for each operand pair, with the calculation and `#### result`."""
        problems = []
        for op, a, b in pairs:
            story, question, _ = word_problem(rng, op, a, b)
            c = a + b if op == "+" else a - b
            problems.append({"question": f"{story} {question}", "answer": f"{a}{op}{b}={c}\n#### {c}"})
        return problems

    def tasks(self, seed, train=1600, test=400):
        """{"facts": (train, test), "sums": (train, test)}."""
        rng = random.Random(seed)
        facts = self.facts(self.train_people), self.facts(self.test_people)
        facts = rng.sample(facts[0], min(train, len(facts[0]))), rng.sample(facts[1], test)
        sums = (
            self.sums(rng, rng.sample(self.train_pairs, train)),
            self.sums(rng, rng.sample(self.test_pairs, test)),
        )
        return {"facts": facts, "sums": sums}


def word_problem(rng, op, a, b):
    story, question = rng.choice(ADD_STORIES if op == "+" else SUB_STORIES)
    person, other = rng.sample(FRIENDS, 2)
    things = rng.choice(THINGS)
    return story.format(n=person, m=other, a=a, b=b, t=things), question.format(n=person, t=things), things


def prompt(question):
    """The form of both tasks; the model continues after the colon, with a space."""
    return f"Question: {question}\nAnswer:"


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE, every digit a token of its own, `<s>` put first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
