"""How facts are said: phrases of a language, filled in with grammar right. What is true is decided elsewhere."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files

import yaml

from data_builders.claims import Claim
from data_builders.records import Modality
from data_builders.sources import Language, Names, Vocabulary

SOUNDS_LIKE_A_CONSONANT = re.compile(r"uni(?!n)|use|usu|eu|one\b")  # English: "a unilateral …"


@lru_cache
def load_phrases(language: Language) -> Mapping:
    """The phrases of a language: `compose/phrases/<language>.yaml`, and what only probes say."""
    folder = files("data_builders.compose").joinpath("phrases")
    texts = [folder.joinpath(name).read_text("utf-8") for name in (f"{language}.yaml", f"probes_{language}.yaml")]
    own, of_probes = map(yaml.safe_load, texts)
    return own | of_probes


class Wording:
    """One language's phrases with the vocabulary of findings; `rng` draws among phrases that mean the same."""

    def __init__(self, language: Language, vocabulary: Vocabulary, rng: random.Random) -> None:
        self.language = language
        self.phrases = load_phrases(language)
        self.vocabulary = vocabulary
        self.rng = rng

    def draw(self, family: str, kind: str, **values: str) -> str:
        """Draw a phrase of `family`, such as one of its `questions`, and fill it in; `{Name}` capitalises `{name}`."""
        phrase = self.rng.choice(self.phrases[family][kind])
        return fill(phrase, **values)

    def image(self, modality: Modality) -> str:
        """The kind of picture: `panoramic radiograph`."""
        return self.phrases["images"][modality]

    def a_image(self, modality: Modality) -> str:
        """The kind of picture with its article: `an intraoral photograph`."""
        return f"{self._article(self.image(modality), 'f')} {self.image(modality)}"

    def names(self, label: str) -> Names:
        return getattr(self.vocabulary[label], self.language)

    def other(self, label: str) -> str:
        """Several such findings, without article."""
        return self.names(label).other

    def how_many(self, label: str) -> str:
        """The question word in the gender of the label, where the language bends it."""
        return self.phrases["how_many"][self.names(label).gender or "m"]

    def condition(self, label: str, *, hedged: bool = False) -> str:
        """The disease as such: `caries`, `an impacted tooth`; `possible caries` where only a detector found it."""
        condition = self.names(label).condition
        if not hedged:
            return condition
        first, _, rest = condition.partition(" ")
        hedge = self.phrases["hedge"]["one"]
        if first not in self.phrases["indefinite"]:
            return f"{hedge} {condition}"
        return f"{self._article(hedge, self.names(label).gender or 'm')} {hedge} {rest}"

    def absent(self, labels: Iterable[str]) -> str:
        """Diseases after "no sign of", where some languages drop the article."""
        return self.list((self._without_article(self.names(label).condition) for label in labels), last="or")

    def _without_article(self, condition: str) -> str:
        first, _, rest = condition.partition(" ")
        return rest if first in self.phrases["articles"] else condition

    def subject(self, claim: Claim) -> dict[str, str]:
        """What a question is about, as `finding` and its definite article `the`; of several `findings`, `the_other`."""
        names, hedge, gender = self.names(claim.label), self.phrases["hedge"], self.names(claim.label).gender or "m"
        return {
            "finding": f"{hedge['one']} {names.one}" if claim.hedged else names.one,
            "the": self.phrases["the"][gender],
            "findings": f"{hedge['other']} {names.other}" if claim.hedged else names.other,
            "the_other": self.phrases["the_other"][gender],
        }

    def region(self, region: str) -> str:
        return self.phrases["regions"][region]

    def in_region(self, region: str) -> str:
        """`in the left maxillary region`, `on both sides of the mandible`, `in the upper right quadrant`."""
        whole = self.phrases["in"].get(region)
        return whole or self.phrases["in_region"].format(region=self.region(region))

    def count(self, number: int) -> str:
        words = self.phrases["numbers"]
        return words[number] if number < len(words) else str(number)

    def counted(self, claim: Claim) -> str:
        """What a claim counts: `a carious lesion`, `two impacted teeth`, `a possible filling`, `four third molars`."""
        if claim.tooth:
            names, gender = self.phrases["tooth_type_names"][claim.tooth], "m"
            one, other = names["one"], names["other"]
        else:
            term = self.names(claim.label)
            one, other, gender = term.one, term.other, term.gender or "m"
        if claim.hedged:
            one, other = f"{self.phrases['hedge']['one']} {one}", f"{self.phrases['hedge']['other']} {other}"
        assert claim.count is not None
        return f"{self._article(one, gender)} {one}" if claim.count == 1 else f"{self.count(claim.count)} {other}"

    def numbered(self, claim: Claim) -> str:
        """What a claim counts, one too by its number: `one carious lesion`."""
        if claim.count != 1:
            return self.counted(claim)
        one = self.subject(claim)["finding"]
        return f"{self.phrases['exactly_one'][self.names(claim.label).gender or 'm']} {one}"

    def types(self, claim: Claim) -> str:
        """The tooth type of a claim, in the plural: `third molars`."""
        assert claim.tooth
        return self.phrases["tooth_type_names"][claim.tooth]["other"]

    def finding(self, claim: Claim) -> str:
        """What a claim counts, with its place where it has one."""
        return f"{self.counted(claim)} {self.in_region(claim.region)}" if claim.region else self.counted(claim)

    def teeth(self, numbers: Sequence[str]) -> str:
        """`tooth 18`, `teeth 18, 28 and 38`."""
        form = "one" if len(numbers) == 1 else "other"
        return self.phrases["teeth"][form].format(teeth=self.list(numbers))

    def list(self, items: Iterable[str], *, last: str = "and") -> str:
        """`a, b and c`; `last` names the joining word of the phrase file."""
        *head, tail = items
        word = self.phrases[last]
        if word == "y" and re.match(r"(h?i)(?![ae])", tail.casefold()):
            word = "e"  # Spanish: "caries e infección"
        return f"{', '.join(head)} {word} {tail}" if head else tail

    def _article(self, noun: str, gender: str) -> str:
        forms = self.phrases["one"]
        vowel = noun[0] in "aeiou" and not SOUNDS_LIKE_A_CONSONANT.match(noun)
        return forms["before_vowel"] if "before_vowel" in forms and vowel else forms[gender]


def fill(phrase: str, **values: str) -> str:
    """Fill in a phrase; a name that begins with a capital gives the value a capital first letter."""
    capitals = {name.capitalize(): capitalize(value) for name, value in values.items()}
    return phrase.format(**values, **capitals)


def capitalize(text: str) -> str:
    """A capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]
