"""How facts are said: phrases of a language, filled in with grammar right. What is true is decided elsewhere."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files

import yaml

from data_builders.claims import Claim
from data_builders.sources import Language, Vocabulary


@lru_cache
def load_phrases(language: Language) -> Mapping:
    """The phrase file of a language, `compose/phrases/<language>.yaml`."""
    return yaml.safe_load(files("data_builders.compose").joinpath(f"phrases/{language}.yaml").read_text("utf-8"))


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

    def image(self, modality: str) -> str:
        return self.phrases["images"][modality]

    def name(self, label: str) -> str:
        """One such finding, without article."""
        return getattr(self.vocabulary[label], self.language).one

    def condition(self, label: str) -> str:
        """The disease as such: `caries`, `an impacted tooth`."""
        return getattr(self.vocabulary[label], self.language).condition

    def absent(self, label: str) -> str:
        """The disease after "no sign of", where some languages drop the article."""
        first, _, rest = self.condition(label).partition(" ")
        return rest if first in self.phrases["articles"] else self.condition(label)

    def the(self, label: str) -> str:
        """The definite article of a label, where the language bends it."""
        return {"f": "la", "m": "el"}.get(getattr(self.vocabulary[label], self.language).gender or "", "the")

    def region(self, region: str) -> str:
        return self.phrases["regions"][region]

    def in_region(self, region: str) -> str:
        """`in the left maxillary region`, `on both sides of the mandible`."""
        preposition = "on_both_sides" if region.startswith("bilateral") else "in_region"
        return self.phrases[preposition].format(region=self.region(region))

    def count(self, number: int) -> str:
        words = self.phrases["numbers"]
        return words[number] if number < len(words) else str(number)

    def counted(self, claim: Claim) -> str:
        """What a claim counts: `a carious lesion`, `two impacted teeth`, `four third molars`."""
        if claim.tooth:
            names, gender = self.phrases["tooth_type_names"][claim.tooth], "m"
            one, other = names["one"], names["other"]
        else:
            term = getattr(self.vocabulary[claim.label], self.language)
            one, other, gender = term.one, term.other, term.gender or "m"
        assert claim.count is not None
        if claim.count == 1:
            return f"{self._article(one, gender)} {one}"
        return f"{self.count(claim.count)} {other}"

    def finding(self, claim: Claim) -> str:
        """What a claim counts, with its place where it has one."""
        return f"{self.counted(claim)} {self.in_region(claim.region)}" if claim.region else self.counted(claim)

    def teeth(self, numbers: Sequence[str]) -> str:
        """`tooth 18`, `teeth 18, 28 and 38`."""
        form = "one" if len(numbers) == 1 else "other"
        return self.phrases["tooth_number"][form].format(teeth=self.list(numbers))

    def list(self, items: Iterable[str], *, last: str = "and") -> str:
        """`a, b and c`; `last` names the joining word of the phrase file."""
        *head, tail = items
        word = self.phrases[last]
        if word == "y" and tail.casefold().startswith(("i", "hi")):
            word = "e"  # Spanish: "caries e infección"
        return f"{', '.join(head)} {word} {tail}" if head else tail

    def _article(self, noun: str, gender: str) -> str:
        forms = self.phrases["one"]
        return forms["before_vowel"] if "before_vowel" in forms and noun[0] in "aeiou" else forms[gender]


def fill(phrase: str, **values: str) -> str:
    """Fill in a phrase; a name that begins with a capital gives the value a capital first letter."""
    capitals = {name.capitalize(): capitalize(value) for name, value in values.items()}
    return phrase.format(**values, **capitals)


def capitalize(text: str) -> str:
    """A capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]
