#!/usr/bin/env python3
"""Makes tests/goldens/rouge.json with the package that ROUGE is compared with.

    python -m venv venv && venv/bin/pip install rouge-score==0.1.2 && venv/bin/python tools/make_rouge_goldens.py

Pairs of texts with the F1 of rouge1, rouge2 and rougeL, with and without the stemmer; and stems by NLTK's Porter
stemmer of every word that its rules treat in a way of its own, and of words put together at random.
"""

import json
import random
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

TEXTS = [
    ("The cat sat on the mat.", "the cat is on the mat"),
    ("", "anything"),
    ("anything", ""),
    ("", ""),
    ("one", "one"),
    ("one", "two"),
    ("a a a a", "a a"),
    ("Café naïve — résumé, 3.14% of U.S. GDP!", "cafe naive resume 3 14 of us gdp"),
    ("İstanbul'da İki kişi; Kelvin K", "istanbul da iki kisi kelvin k"),
    ("police killed the gunman", "the gunman police killed"),
    ("日本語 text とtext", "text text text"),
    ("running runners ran easily and happily", "run runner running easy happy"),
    ("The officials were meeting; agreed, relational conditions hopefulness.", "official meetings agree relate condition hopeful"),
    ("It 's a 2-1 win for the under_dogs\nwho played\twell.", "A 2 1 win, the underdogs who played well."),
]
WORDS = """caresses ponies ties caress cats feed agreed plastered bled motoring sing conflated troubled sized hopping tanned
falling hissing fizzed failing filing happy sky relational conditional rational valenci hesitanci digitizer conformabli
radicalli differentli vileli analogousli vietnamization predication operator feudalism decisiveness hopefulness
callousness formaliti sensitiviti sensibiliti triplicate formative formalize electriciti electrical hopeful goodness
revival allowance inference airliner gyroscopic adjustable defensible irritant replacement adjustment dependent adoption
homologou communism activate angulariti homologous effective bowdlerize probate rate cease controll roll dying lying
tying news innings inning outings outing cannings canning howe proceed exceed succeed skies dies died lied tied tries
tried enjoy enjoyment fly spy by say yyyy syzygy apologi geology geologi logi analogi fulli hopefulli beautifulli
generalli fataally alli balli sensational ingoing inged eed owed using aging ated bling ize ion sion onion
2nds 100s 4ed 9ing a1ies ies ied oed ying yed aed""".split()


def sentence(random, vocabulary):
    return " ".join(random.choice(vocabulary) for _ in range(random.randint(0, 40)))


def main():
    rng = random.Random(20)
    vocabulary = WORDS[:60] + ["the", "a", "of", "and", "to", "was"] * 5
    pairs = TEXTS + [(sentence(rng, vocabulary), sentence(rng, vocabulary)) for _ in range(60)]
    kinds = ["rouge1", "rouge2", "rougeL"]
    cases = []
    for target, prediction in pairs:
        case = {"target": target, "prediction": prediction}
        for key, stemmer in (("plain", False), ("stemmed", True)):
            scores = RougeScorer(kinds, use_stemmer=stemmer).score(target, prediction)
            case[key] = [scores[kind].fmeasure for kind in kinds]
        cases.append(case)

    ends = "s es ies sses ed eed ied ing y ational tional enci anci izer bli alli entli eli ousli ization ation ator alism"
    ends += " iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic"
    ends += " able ible ant ement ment ent ion ou ism ate iti ous ive ize e ll l ating bled izing"
    words = set(WORDS)
    while len(words) < 1500:
        start = "".join(rng.choice("aeiouybcdhklmnprstwxz") for _ in range(rng.randint(0, 6)))
        words.add(start + "".join(rng.choice(ends.split()) for _ in range(rng.randint(1, 2))))
    stemmer = PorterStemmer()
    # The package stems only words of more than three letters.
    stems = {word: stemmer.stem(word) for word in sorted(words) if len(word) > 3}

    path = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "rouge.json"
    path.write_text(json.dumps({"cases": cases, "stems": stems}, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
