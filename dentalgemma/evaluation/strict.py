"""Protocol `strict`: the option that an answer in English or Spanish declares, as a careful reader would take it.

Frozen like `seed`: a changed rule or phrase is a new protocol. Text is read without accents ("opcion"), except "sí",
which would become "if". In this order, the first that finds something decides:

1. Reasoning (`<think>` and its like) is taken out, whether it was closed or not, and so are asides: what ranks lower
   ("less likely: A", "my second choice is A") and what others would choose.
2. Declarations: a JSON answer, `<answer>`, `\\boxed{}`, and phrases ("the answer is", "me quedo con"). The last wins.
3. A letter that opens or closes the answer: "B", "C) Impacted tooth", "[A] because".
4. Letters that are marked as options ("option B", "(B)"), then whole option texts, when only one is left that is not
   negated; at last one short answer that is an option but for its spelling.

Two options in one declaration, a letter beside another option's text, a refusal: `abstained`. Nothing: `failed`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

# --- the phrases, English then Spanish; plain words, joined to patterns below ---------------------------------------

NOUNS = (  # what an answer is called: "<noun> … is X", "<noun>: X"
    r"answers?|ans|choice|option|selection|pick|response|solution|verdict|conclusion|diagnosis|final|letter|guess"
    r"|(?:correct|right|best) (?:one|match|fit)|(?:correct|right)(?=:)|(?:(?:most )?(?:likely|probable)|main) finding"
    r"|respuesta|opcion|eleccion|alternativa|seleccion|conclusion|solucion|letra|inciso|diagnostico"
    r"|(?:la|lo) correct[ao]|correct[ao](?=:)"
    r"|hallazgo (?:mas probable|principal)"
)
IS = (
    r"is|would be|should be|must be|will be|has to be|seems to be|appears to be"
    r"|es|sera|seria|debe ser|deberia ser|tiene que ser|parece ser|corresponde a|corresponderia a"
)
CHOOSE = (  # "<phrase> X" chooses X
    r"\b(?:i|we)(?:'d| would|'ll| will|'m| am)?(?: \w+ly)? (?:choose|chose|pick|select|say|answer|opt for|conclude"
    r"|go(?:ing)? (?:with|for)|settle on|lean towards?|leaning towards?|vote for|believe|think)"
    r"(?: that)?(?: (?:it'?s|it is|it would be|it must be))?"
    r"|\bmy (?:answer|choice|pick|guess|vote)\b|\b(?:go|going) with\b"
    r"|\b(?:(?:that|this|which) leaves|leaving|leaning)\b"
    r"|\b(?:only|sol[oa]|solamente)"
    r"(?= (?:la |option |la opcion )?\(?[a-z]\)? (?:can |could |puede )?(?:explain|account|explica))"
    r"|\bi (?:prefer|favou?r)\b|\b(?:choose|select|choosing|selecting)\b"
    r"|\b(?:corresponds?|corresponding|points?) (?:best )?(?:to|with)\b|\bmatch(?:es)?(?: with)?\b"
    r"|\b(?:elijo|escojo|selecciono|elegiria|escogeria|seleccionaria|opto por|optaria por|me quedo con|me inclino por"
    r"|me inclinaria por|prefiero|queda(?:ria)?|marco|marcaria|respondo|responderia|diria|digo|creo|pienso|considero)"
    r"(?: que)?(?: (?:es|seria|se trata de))?\b|\bmi (?:respuesta|eleccion)\b|\b(?:corresponde|equivale) (?:a|con)\b"
)
FOLLOWS = (  # as CHOOSE, when nothing but the end of the clause or a reason follows the choice
    r"\b(?:it'?s|it is|that'?s|it must be|must be|has to be|(?:it|that) (?:would|should) be|therefore|thus|hence|so"
    r"|no(?=[,:])|(?<!anything )but|rather|actually|wait|no wait|correction|sorry|i mean|on second thoughts?"
    r"|probably|likely|most likely|definitely|clearly|certainly|finally|i'?d|looks like)\b"
    r"|\b(?:es|seria|debe ser|tiene que ser|se trata de|por tanto|por lo tanto|asi que|entonces|luego|sino|mejor dicho"
    r"|mas bien|mejor|en realidad|corrijo|correccion|perdon|digo|probablemente|(?<!poco )probable|seguramente"
    r"|claramente|definitivamente|finalmente)\b|->|=>|[→⇒]"
)
CORRECT = (  # "X <phrase>" chooses X
    r"(?:is|would be|seems|appears|remains|looks|fits|es|seria|parece|resulta)"
    r"(?: (?:to be|clearly|definitely|indeed|therefore|probably|thus|claramente|definitivamente|sin duda))?"
    r"(?: (?:the|my|la|el|mi|lo))?(?: (?:most|single|only|best|mas|unica|mejor))?"
    r" ?\b(?:correct|right|answer|choice|option|likely|appropriate|accurate|best|plausible|probable|consistent|true|one"
    r"|what (?:the|this) \w+ (?:tell|show|suggest|indicate)s?"
    r"|correct[ao]|respuesta|opcion|adecuad[ao]|acertad[ao]|apropiad[ao]|indicad[ao]|verdader[ao])\b"
    r"(?! (?:wrong|incorrect|false|not|excluded|incorrecta|falsa|answer is not))"
)
REASON = r"because|since|as|due|given|for|which|where|with|based|porque|ya que|puesto|dado|debido|pues|por|segun|basad"
FILLER = (
    r"the|an?|option|choice|letter|answer|number|most|likely|probably|definitely|clearly|indeed|just|only|also|that"
    r"|la|el|lo|una?|opcion|letra|alternativa|respuesta|inciso|que|mas|probablemente|claramente|is|be|it'?s|it|es|sea"
    r"|correct|correcta|final|presence|of|de|case|caso|no:|not:"
)
NEGATES = (  # before a choice, in its clause
    r"not|\w+n't|cannot|never|neither|nor|no|without|unlikely|doubt|whether|incorrect|wrong|false|exclud\w+"
    r"|rul(?:e|es|ed|ing) out|eliminat\w+|reject\w*|discard\w*|dismiss\w*|instead of|rather than|than|except|unlike"
    r"|absence of|negative for|free of|if (?:the|it|option|answer)|lacks?|(?<!at )least|each|every|wrongly|cada"
    r"|ni|nunca|tampoco|sin|descart\w+|exclu\w+|elimin\w+|rechaz\w+|incorrect[ao]s?|fals[ao]s?|dudo|ausencia de"
    r"|en lugar de|en vez de|salvo|excepto|poco probable|improbable|no:|si (?:la|el|fuera|es)|libre de"
    r"|(?<!al )(?<!mas o )menos"
)
NEGATED = (  # after a choice: "A is unlikely"
    r"incorrect|wrong|false|unlikely|(?:less|least) \w+|excluded|eliminated|ruled out|rejected|discarded|dismissed"
    r"|absent|implausible|impossible|out of|inconsistent|incorrect[ao]s?|fals[ao]s?|improbables?|(?:poco|menos) \w+"
    r"|descart\w+|excluid[ao]s?|eliminad[ao]s?|ausentes?|inconsistentes?"
)
VERB = (
    r"is|are|was|were|can|could|would|should|does|do|did|seems?|appears?|looks?|be|been|has|have"
    r"|es|son|esta|estan|queda|quedan|se|puede|pueden|parece|parecen|seria|serian|ha|han"
)
POINTS_TO = (  # decides between several option texts
    r"diagnosis|impression|finding|consistent with|compatible with|suggest\w*(?: of)?|indicat\w+(?: of)?|represents?"
    r"|diagnostico|impresion|hallazgo|compatibles? con|consistentes? con|sugiere\w*|sugestiv\w+ de|indica\w*|representa"
)
REFUSES = (
    r"(?:i|we) (?:cannot|can ?not|can't|could not|couldn't|am unable|are unable|am not able|do not|don't) (?:to )?"
    r"(?:see|view|access|answer|determine|provide|assist|help|identify|interpret|analy[sz]e|diagnose|choose|tell|say"
    r"|give|offer|make|have|know|process|select|open|comply|review|evaluate|assess|decide)"
    r"|(?:i'm|i am|we are) (?:unable|not able|sorry)|^sorry|unable to (?:see|answer|determine|choose|view|provide)"
    r"|as an ai|please (?:provide|upload|share|attach)|(?:not sufficient|insufficient|not enough) (?:to|for|info|data)"
    r"|no (?:puedo|podemos|es posible|soy capaz|tengo) |lo siento|como (?:una? )?(?:ia|modelo|asistente)"
    r"|por favor,? (?:proporcione|suba|envie|adjunte|comparta)|imposible (?:determinar|responder)"
)
SURE = (  # holds a word of NEGATES and means the opposite
    r"there is no doubt(?: that)?|no doubt(?: that)?|without (?:a |any )?doubt|not only|no question"
    r"|by (?:a |the )?(?:process of )?elimination"
    r"|sin (?:ninguna |lugar a )?dudas?|no hay dudas?(?: de que)?|no cabe dudas?(?: de que)?|no solo"
    r"|por (?:descarte|eliminacion)"
)
LESS_LIKELY = (  # what follows is no choice
    r"(?:less|least|menos|poco) (?:likely|probabl[ey]s?|probablemente|plausibles?|possible|posibles?)"
)
RANKED_LOWER = (  # begins an aside on what is not the choice
    r"(?:second|third|next|2nd|3rd)[ -](?:best|most)|my (?:second|third|next|other) (?:choice|option|answer|guess|pick)"
    r"|(?:second|2nd|third|3rd|segunda|tercera) (?:choice|option|guess|pick|opcion|eleccion|alternativa)"
    r"(?: mas probable\b|:|(?: is| would be| es| seria)?(?: option| la| la opcion)? \(?(?-i:[A-Z])\b)"
    r"|mi (?:segunda|tercera|otra) (?:opcion|respuesta|eleccion|alternativa)|segunda mejor|en segundo lugar"
    r"|runner-?up|close second|as an alternative|alternatively|como alternativa|alternativamente|de lo contrario"
    r"|(?:otherwise|si no)(?=[,:]| (?:i|the|option|la|el|yo)\b| (?-i:[A-Z])\b)"
)
OTHERS_CHOOSE = (  # begins an aside as well: whose choice it is, and that it is one
    r"(?:(?:many|some|most|several|others?|few|muchos|muchas|algunos|algunas|varios|otros|la mayoria(?: de)?)"
    r"(?: (?!(?:i|we|and|or|to|then|likely|probably)\b)[^\W\d_]+){0,2}"
    r"|an? (?:beginner|novice|student|layperson)|un (?:alumno|estudiante))"
    r" (?:(?:would|might|may|could|will|can) (?:choose|pick|select|say|answer|guess|go for)|choose|select|say"
    r"|(?:podrian? |suelen? )?(?:elegir(?:ian?)?|escoger(?:ian?)?|responder(?:ian?)?|marcar(?:ian?)?"
    r"|seleccionar(?:ian?)?|eligen|responden|marcan|dicen|dirian?))"
)
BREAKS = r"but|however|so|therefore|thus|hence|because|whereas|while|although|sino|pero|aunque|entonces|porque|mientras"
EXPLAINS = r"explanation|rationale|reason(?:ing|s)?|justification|explicacion|justificacion|razon(?:amiento)?|motivos?"
NOT_ANSWERS = (  # what a single capital may be the name of
    r"vitamins?|vitamina|hepatitis|type|tipo|class|clase|grade|grado|group|grupo|figure|figura|fig|panel|image|imagen"
    r"|point|punto|stage|estadio|plan|virus|influenza|score|appendix|apendice|table|tabla|section|seccion|area|zone"
)
YES_NO = {"yes", "no", "sí", "si"}

# --- patterns -------------------------------------------------------------------------------------------------------

LONGEST = 10_000  # characters read at either end of an answer that runs on
CONFUSABLE = str.maketrans("АВСЕΑΒΕ", "ABCEABE")  # Cyrillic and Greek capitals that look the same
ALSO_WORDS = "AEIOY"  # a capital that may open a sentence as a word of English or Spanish
SPELLING = 0.8  # mean similarity of an option's words to those of a short answer

_REASONING = re.compile(
    r"(?P<open><\s*(?:think(?:ing)?|thought|reasoning|analysis|scratchpad|reflection|razonamiento|pensamiento)\s*>"
    r"|\[\s*think\s*\]|◁think▷|<unused94>(?:thought)?|<\|channel>\s*thought"
    r"|<\|channel\|>\s*(?:analysis|commentary)\b(?:<\|message\|>)?)"
    r"|(?P<close><\s*/\s*(?:think(?:ing)?|thought|reasoning|analysis|scratchpad|reflection|razonamiento|pensamiento)\s*>"
    r"|\[\s*/\s*think\s*\]|◁/think▷|<unused95>|<channel\|>|<\|channel\|>\s*final\b(?:<\|message\|>)?)",
    re.IGNORECASE,
)
_TAGS = re.compile(
    r"<\|?/?(?:b|strong|i|em|p|br|span|div|u|code|end|start|message|return|eot_id|im_start|im_end|s|bos|eos|pad"
    r"|start_of_turn|end_of_turn)\b[^<>\n]{0,80}>"
)
_MARKUP = (
    (re.compile(r"[\W_]{60,}"), lambda match: match[0][:30] + match[0][-30:]),  # rows of marks say nothing
    (re.compile(r"~~[^~\n]*~~"), " "),  # struck out
    (_TAGS, " "),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|rm|bf)\s*\{([^{}\n]*)\}"), r"\1"),
    (re.compile(r"<\|begin_of_box\|>([^<\n]*)<\|end_of_box\|>"), r"\\boxed{\1}"),
    (re.compile(r"(?<![^\W_])[*_`$\"'“”‘’«»]{1,6}([A-Za-z])[*_`$\"'“”‘’«»]{1,6}(?![^\W_])"), r"(\1)"),
    (re.compile(r"[*`$]+|(?<![^\W_])_+|_+(?![^\W_])"), ""),
)
_LETTER = r"(?P<letter>[A-Za-z])(?![\w°]|['’]\w|-\w|\+)"
_OPENING = r"[\s,:=\-–—>→\"'«“(\[{]*"
_AFTER_CUE = re.compile(rf"{_OPENING}(?:(?:{FILLER})(?!\w){_OPENING}){{0,6}}?{_LETTER}", re.IGNORECASE)
_BEFORE_TEXT = re.compile(rf"{_OPENING}(?:(?:{FILLER})(?!\w){_OPENING}){{0,6}}", re.IGNORECASE)
_GAP = r"(?:[ ]+(?!not\b|no\b|never\b|isn\b|if\b)[^\W\d_][\w-]*){0,7}?"
_CUE = re.compile(
    rf"(?P<tag>[<\[]\s*(?:\w+_)?(?:answer|ans|respuesta|choice|option|letter|opcion)(?:_\w+)?\s*[>\]])"
    rf"|(?P<box>\\(?:boxed|fbox)\s*\{{)"
    rf"|(?P<noun>\b(?:\w+_)?(?:{NOUNS})(?:_\w+)?\b[\"')]*(?:{_GAP}\s*(?::|=|->|→|[–—]|-(?=\s))|{_GAP}[ ]+(?:{IS})\b"
    rf"|(?=\s+\(?[A-Za-z]\)?\W*$)))"
    rf"|(?P<choose>{CHOOSE})|(?P<follows>{FOLLOWS})",
    re.IGNORECASE | re.MULTILINE,
)
_TAG_END, _BOX_END = re.compile(r"<|\[(?:/|\w\w)"), re.compile(r"\}")
_CORRECT = re.compile(rf"(?<![\w°'’-]){_LETTER}[)\].:,\"'»”]{{0,2}}[ ]+(?={CORRECT})", re.IGNORECASE)
_IS_CORRECT = re.compile(rf"[\"')]*\s+{CORRECT}", re.IGNORECASE)
_CLOSED = re.compile(rf"[)\]}}\"'»”]*\s*(?:$|[.,;:!?\n)\]<}}✓✔✅–—-]|\((?!\w\))|(?:{REASON})\b)", re.IGNORECASE)
_LOWER_CLOSED = re.compile(r"\s*(?:$|\n|[)\]}.:\"'»”<])")
_AND = r"[)\]\"'»”.]*\s*(?:,|/|&|\+|\b(?:and/or|and|or|y/o|y|o|u|e|nor|ni)\b)+"
_MORE = re.compile(rf"(?:{_AND}\s*(?:(?:{FILLER})\s+){{0,2}}[(\[\"'«“]*[A-Z](?![\w'’°]|-\w))+", re.IGNORECASE)
_AND_BEFORE = re.compile(rf"(?:{_AND})\s*\(?$", re.IGNORECASE)
_LIST_GAP = re.compile(
    r"[\s,/&)\](\[\"'.]*(?:(?:and|or|nor|y|o|u|e|ni|the|a|an|la|el|options?|opcion(?:es)?)\b[\s,)\](\[\"']*)*",
    re.IGNORECASE,
)
_BARE = re.compile(rf"^[\s>#\-•(\[\"'«“]*(?:Q?\d{{1,2}}[.):]\s*)?{_LETTER}", re.MULTILINE)
_BARE_CLOSED = re.compile(
    rf"[)\]\"'»”]*(?:\s*(?:$|\n|[)\].:,;!?=✓✔✅–—-])|\s+(?:{REASON}|not|rather|over|no|en lugar|en vez)\b)",
    re.IGNORECASE,
)
_LABELLED = re.compile(r"^[^\W\d_][\w ]{0,30}[:=]\s*\(?(?P<letter>[A-Z])\)?[\W_]*\Z", re.MULTILINE)
_LAST_WORD = re.compile(r"(?P<before>[\n.!?,])[^\w\n]*(?P<letter>[A-Z])[\W_]*\Z")
_LONE_LETTER = {
    "\n": re.compile(r"^[^\w\n]*([A-Z])[^\w\n]*$", re.MULTILINE),  # on a line
    ".": re.compile(r"(?:^|[\n.!?])[^\w\n]*([A-Z])(?=[^\w\n]*(?:$|[\n.!?]))"),  # as a sentence
    ",": re.compile(r"(?<![\w°'’-])([A-Z])(?![\w°'’-])"),  # anywhere
}
_BETWEEN_TWO = re.compile(r"[\s})\]$]*(?:,|/|&|\bor\b|\band\b|\bo\b|\by\b)[\s$]*", re.IGNORECASE)
_BETWEEN_TEXTS = re.compile(r"\s*(?:,|/|\bor\b|\band\b|\bo\b|\by\b)\s*(?:an? |the |una? )?", re.IGNORECASE)
_MARKED = re.compile(
    r"(?:\b(?:options?|choices?|answers?|letter|opcion(?:es)?|respuesta|letra|alternativa|inciso|la)\s+"
    r"[(\[]?(?P<named>[A-Za-z])|[(\[](?P<letter>[A-Za-z])[)\]])(?![\w°]|['’]\w|-\w)",
    re.IGNORECASE,
)
_NEGATES = re.compile(rf"(?<![\w'])(?:{NEGATES})(?![\w'])", re.IGNORECASE)
_NEGATED = re.compile(
    rf"[)\].:\"'»”]*\s*(?:[-–—:]\s*)?(?:(?:{VERB})\s+(?:\w+\s+){{0,2}}?(?:not\b|never\b|{NEGATED})|(?:{NEGATED})\b(?!\s*:)"
    rf"|(?:\w+n't|cannot|can not|no (?:es|se|son|corresponde|parece|puede|hay|esta|coincide|encaja))\b|[✗✘❌])",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(r"[)\]\"'»”]*\s+(?:if|unless|only if|si)\b", re.IGNORECASE)
_ASIDE = re.compile(  # up to the end of the sentence, and with the list that a colon announces
    rf"(?:\b(?:(?:the|an?|una?) )?(?:{RANKED_LOWER}|{OTHERS_CHOOSE})(?!\w)"
    rf"|(?P<kept>\b{LESS_LIKELY}(?=\s*:|,? (?:(?:is|would be|es|seria|option|la|opcion) ){{0,2}}\(?(?-i:[A-Z])\b)))"
    r"(?:(?!\b(?:but|so|pero|asi que)\b)[^.;!?\n])*(?:(?<=:)(?:\s*[^\w\n]*(?-i:[A-Z])[).:][^\n]*)+)?",
    re.IGNORECASE,
)
_SURE = re.compile(rf"\b(?:{SURE})\b", re.IGNORECASE)
_BREAK = re.compile(BREAKS, re.IGNORECASE)
_CLAUSE = re.compile(rf"[.;!?\n,:]|\b(?:{BREAKS})\b", re.IGNORECASE)
_REFUSES = re.compile(REFUSES, re.IGNORECASE | re.MULTILINE)
_POINTS_TO = re.compile(rf"\b(?:{POINTS_TO})\b(?:\W+\w+){{0,3}}?\W+$", re.IGNORECASE)
_EXPLAINS = re.compile(rf"^\W*(?:{EXPLAINS})\b|\n\s*\n", re.IGNORECASE | re.MULTILINE)
_NOT_ANSWER = re.compile(rf"\b(?:{NOT_ANSWERS})[\s:]+\(?$", re.IGNORECASE)
_ANSWER_KEY = re.compile(rf"(?:\w+[_ ])?(?:{NOUNS})(?:[_ ]\w+)?", re.IGNORECASE)


class Choice(NamedTuple):
    """An option that is mentioned at a place of the text; without a letter it cannot be told which."""

    start: int
    end: int
    letter: str | None
    method: str = "declared"


class Answer:
    """An answer made ready to be read, with the texts of the options and where its clauses begin."""

    def __init__(self, text: str, options: Mapping[str, str], *, quoted: bool = False) -> None:
        self.options = options
        self.quoted = quoted  # it stood in a tag, a box or JSON itself, and those are not read twice
        self.by_text: dict[str, list[str]] = {}
        for letter, option in options.items():
            words = " ".join(_prepare(option).casefold().split()).strip(" .")
            if re.search(r"[^\W_]", words):  # an empty option would be found in every text
                self.by_text.setdefault(words, []).append(letter)
        spelled = sorted(self.by_text, key=len, reverse=True)  # at one place the longest wins
        alternatives = "|".join(r"\s+".join(map(re.escape, words.split())) for words in spelled)
        number = r"(?<!\d[.,])"  # "3" is not in "3.5"
        self.any_text = re.compile(rf"(?<![^\W_]){number}(?:{alternatives or '(?!)'})(?![^\W_]|[.,]\d)", re.IGNORECASE)
        self.text = text = self.without_asides(text)
        self.clauses = [0, *(match.end() for match in _CLAUSE.finditer(text))]

    def without_asides(self, text: str) -> str:
        """The text without its asides; that options are less likely is kept, for what stands before it."""
        kept, start = [], 0
        for match in _ASIDE.finditer(text):
            if match.start() < start:
                continue
            kept += [text[start : match.start()], f"{match['kept']}:" if match["kept"] else ""]
            start = match.end()
            own = self.any_text.match(text, _skip(text, start))  # "My second choice is A. Dental caries"
            if own and text[start - 1].isupper():
                start = own.end()
        return "".join([*kept, text[start:]])

    def letters_of(self, mention: str) -> list[str]:
        """The letters of the options with this text."""
        return self.by_text.get(" ".join(mention.casefold().split()), [])

    def letter_of(self, mention: str) -> str | None:
        """The letter of an option's text, if exactly one option has it."""
        letters = self.letters_of(mention)
        return letters[0] if len(letters) == 1 else None

    def clause_before(self, place: int) -> str:
        """What stands before a place in its clause, at most 200 characters of it."""
        return self.text[max(self.clauses[bisect_right(self.clauses, place) - 1], place - 200) : place]


def read_strict(output: str, options: Mapping[str, str]) -> tuple[str | None, str]:
    """The letter that an answer declares, and how: see the top of this file. Never raises."""
    text = _drop_reasoning(unicodedata.normalize("NFKC", output))
    return _read_json(text, options) or _read(_prepare(text), options)


def _read(text: str, options: Mapping[str, str], *, quoted: bool = False) -> tuple[str | None, str]:
    answer = Answer(text, options, quoted=quoted)
    for find in (_find_whole, _find_declared, _find_bare, _find_opening, _find_refusal, _find_mentioned, _find_similar):
        if choice := find(answer):
            return (choice.letter, choice.method) if choice.letter in options else (None, "abstained")
    return None, "failed"


# --- making ready ---------------------------------------------------------------------------------------------------


def _drop_reasoning(text: str) -> str:
    """The text without what the model thinks before it answers; what opens and never closes goes to the end."""
    kept, start, inside = [], 0, False
    for match in _REASONING.finditer(text):
        if match["open"]:
            if not inside:
                kept.append(text[start : match.start()])
            inside = True
        else:
            if not inside:
                kept = []  # the prompt had opened it
            inside, start = False, match.end()
    return "\n".join(kept if inside else [*kept, text[start:]])


def _prepare(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    if len(text) > 2 * LONGEST:
        text = text[:LONGEST] + "\n\n" + text[-LONGEST:]
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    text = re.sub(r"(?<![^\W_])[АВСЕΑΒΕ](?![^\W_])", lambda match: match[0].translate(CONFUSABLE), text)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = re.sub(r"[^\W\d_]+", lambda match: _without_accents(match[0]), text).strip()
    return _SURE.sub("definitely", text)


def _without_accents(word: str) -> str:
    if word.isascii() or word.casefold() == "sí":
        return word
    letters = unicodedata.normalize("NFD", word)
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")


# --- what an answer is, declares, opens with, mentions --------------------------------------------------------------


def _find_whole(answer: Answer) -> Choice | None:
    """An answer that is an option's text or letter and nothing else, be it several times."""
    tokens = {token.upper() for token in re.findall(r"\w+", answer.text)}
    if len(tokens) == 1 and tokens <= set(answer.options):
        return Choice(0, 0, tokens.pop(), "bare_letter")
    words = " ".join(answer.text.casefold().split()).strip(" .,;:!?\"'()[]-")
    words = "sí" if words == "si" and "sí" in answer.by_text else words
    if words in answer.by_text:
        return Choice(0, 0, answer.letter_of(words), "option_text")
    return None


def _find_declared(answer: Answer) -> Choice | None:
    declared = [*_declared_by_cue(answer), *_called_correct(answer)]
    labelled = _LABELLED.search(answer.text)
    if labelled and not _NOT_ANSWER.search(answer.text[: labelled.start("letter")]):
        declared.append(Choice(*labelled.span("letter"), labelled["letter"]))
    last = _LAST_WORD.search(answer.text[-200:])
    if last and set(_LONE_LETTER.get(last["before"], _LONE_LETTER["."]).findall(answer.text)) == {last["letter"]}:
        declared.append(Choice(len(answer.text), len(answer.text), last["letter"], "bare_letter"))
    declared.sort(key=lambda choice: choice.start)
    if len(declared) > 1 and _BETWEEN_TWO.fullmatch(answer.text, declared[-2].end, declared[-1].start):
        return declared[-1]._replace(letter=None)
    return declared[-1] if declared else None


def _read_json(text: str, options: Mapping[str, str]) -> tuple[str | None, str] | None:
    """The answer's value in a JSON object, the last one if there are several."""
    start, end = text.find("{"), text.rfind("}")
    try:
        document = json.loads(text[start : end + 1]) if 0 <= start < end else {}
    except (ValueError, RecursionError):
        return None
    values = [value for key, value in document.items() if isinstance(value, str) and _ANSWER_KEY.fullmatch(key)]
    for value in reversed(values):
        letter, method = _read(_prepare(value), options, quoted=True)
        if method != "failed":
            return letter, method if letter is None else "json"
    return None


def _declared_by_cue(answer: Answer) -> Iterator[Choice]:
    text, inside = answer.text, -1
    for cue in _CUE.finditer(text):
        if cue.start() < inside or (answer.quoted and (cue["tag"] or cue["box"])):
            continue
        if cue["tag"] or cue["box"]:
            end = (_TAG_END if cue["tag"] else _BOX_END).search(text, cue.end())
            inside = end.start() if end else len(text)
            letter, method = _read(text[cue.end() : inside][:2000], answer.options, quoted=True)
            if method != "failed":
                yield Choice(cue.start(), inside, letter, "tagged" if cue["tag"] else "boxed")
        elif not _NEGATES.search(_lead(answer, cue)):
            choice = _letter_after(answer, cue) or _text_after(answer, cue)
            if choice:
                yield choice


def _lead(answer: Answer, cue: re.Match) -> str:
    """The clause up to what is chosen; "but" and its like begin one."""
    if cue["follows"] and _BREAK.fullmatch(cue["follows"]):
        return ""
    return answer.clause_before(cue.start()) + (cue["noun"] or "")


def _letter_after(answer: Answer, cue: re.Match) -> Choice | None:
    text, place = answer.text, cue.end()
    for _ in range(2):  # "a" may be the article before what is chosen
        match = _AFTER_CUE.match(text, place)
        if match is None:
            return None
        if _is_letter(answer, match, "letter"):
            break
        place = match.end()
    else:
        return None
    closed = _CLOSED.match(text, match.end())
    if cue["follows"] and not (closed and match["letter"].upper() in answer.options):
        return None
    return _settle(answer, *match.span("letter"))


def _is_letter(answer: Answer, match: re.Match, group: str) -> bool:
    """Whether a single letter is a choice, and not an article or another short word."""
    letter, end = match[group], match.end(group)
    if letter.upper() == "I" and "I" not in answer.options:
        return False
    if letter.islower():
        return bool(_LOWER_CLOSED.match(answer.text, end))
    if letter not in ALSO_WORDS or _CLOSED.match(answer.text, end):
        return True
    own = answer.any_text.match(answer.text, end + 1)
    return bool(own and letter in answer.letters_of(own[0]) and answer.text[own.start()].isupper())


def _settle(answer: Answer, start: int, end: int) -> Choice | None:
    """A letter, unless it is denied or one of several; two options at once are a conflict."""
    text, letter = answer.text, answer.text[start:end].upper()
    beside = re.compile(r"[)\]}.:,\-–—\s\"'»”(=]*(?:(?:the|an?|la|el|una?) )?").match(text, end).end()
    own = answer.any_text.match(text, beside)
    more = _MORE.match(text, end)
    if own and letter in answer.letters_of(own[0]):
        end = own.end()
        more = _MORE.match(text, end)
    elif own and not more and not _NEGATED.match(text, own.end()):
        return Choice(start, own.end(), None)
    if _HYPOTHESIS.match(text, end) or (not more and _NEGATED.match(text, end)):
        return None
    if more and not _NEGATED.match(text, more.end()):
        return Choice(start, more.end(), None)
    return Choice(start, end, letter)


def _text_after(answer: Answer, cue: re.Match) -> Choice | None:
    mention = answer.any_text.search(answer.text, cue.end(), cue.end() + 400)
    if mention is None or not _BEFORE_TEXT.fullmatch(answer.text, cue.end(), mention.start()):
        return None
    if cue["follows"] and not _CLOSED.match(answer.text, mention.end()):
        return None
    if _NEGATED.match(answer.text, mention.end()) or _HYPOTHESIS.match(answer.text, mention.end()):
        return None
    other = answer.any_text.search(answer.text, mention.end(), mention.end() + 400)
    if other and _BETWEEN_TEXTS.fullmatch(answer.text, mention.end(), other.start()):
        return Choice(mention.start(), other.end(), None)
    return Choice(*mention.span(), answer.letter_of(mention[0]))


def _called_correct(answer: Answer) -> Iterator[Choice]:
    """ "B is correct", "impacted tooth is the answer"."""
    for match in _CORRECT.finditer(answer.text):
        before = answer.clause_before(match.start())
        marked = match["letter"].isupper() or re.search(r"(?:option|opcion|letter|letra|\()\s*$", before, re.IGNORECASE)
        alone = not (_NEGATES.search(before) or _AND_BEFORE.search(before))
        if marked and alone and match["letter"].upper() in answer.options:
            yield Choice(*match.span("letter"), match["letter"].upper())
    for mention in answer.any_text.finditer(answer.text):
        if _IS_CORRECT.match(answer.text, mention.end()) and not _NEGATES.search(answer.clause_before(mention.start())):
            yield Choice(*mention.span(), answer.letter_of(mention[0]))


def _find_bare(answer: Answer) -> Choice | None:
    """A letter that opens a line of the first or of the last paragraph, or of what precedes an explanation."""
    text = answer.text
    ends = [match.start() for match in _EXPLAINS.finditer(text) if match.start() > 0]
    last = text.rfind("\n\n") + 1
    bare = [
        choice
        for match in _BARE.finditer(text)
        if (not ends or match.start() < ends[0] or match.start() >= last) and _is_bare(answer, match)
        for choice in [_settle(answer, *match.span("letter"))]
        if choice
    ]
    if not bare:
        return None
    letters = [choice.letter for choice in bare]
    # A list of the options begins with A; after another letter on the first line, further ones are explained.
    opens = bare[0].start < 8 and letters[0] not in (None, "A") and letters[0] not in letters[1:]
    return Choice(0, 0, letters[0] if opens or len(set(letters)) == 1 else None, "bare_letter")


def _is_bare(answer: Answer, match: re.Match) -> bool:
    letter, end = match["letter"], match.end()
    if letter.upper() not in answer.options:
        return False
    own = answer.any_text.match(answer.text, end + 1)
    if own and letter in answer.letters_of(own[0]) and answer.text[end].isspace():
        return True
    if letter.islower():
        return bool(_LOWER_CLOSED.match(answer.text, end))
    return bool(_BARE_CLOSED.match(answer.text, end) or _MORE.match(answer.text, end))


def _find_opening(answer: Answer) -> Choice | None:
    """An option's text that is the first sentence or line, or a "Yes," at the start."""
    text = re.sub(r"^(\W*)si(?=\s*[.,;:!])", r"\1sí", answer.text, flags=re.IGNORECASE)
    match = answer.any_text.search(text, 0, 500)
    if match is None or re.search(r"[^\W_]", text[: match.start()]):
        return None
    after = r"\s*(?:[.,;:!]|[–—-]\s)" if match[0].casefold() in YES_NO else r"[ ]*(?:[.;!]|\n|[–—-]\s)"
    if re.compile(after).match(text, match.end()):
        return Choice(*match.span(), answer.letter_of(match[0]), "option_text")
    return None


def _find_refusal(answer: Answer) -> Choice | None:
    """A refusal, unless it is the text of an option ("Cannot be determined")."""
    options = [mention.span() for mention in answer.any_text.finditer(answer.text)]
    for match in _REFUSES.finditer(answer.text):
        if not any(start < match.end() and match.start() < end for start, end in options):
            return Choice(*match.span(), None)
    return None


def _find_mentioned(answer: Answer) -> Choice | None:
    """The one option that is mentioned without being negated; letters before texts."""
    letters = {choice.letter for choice in _affirmed(answer, list(_marked(answer)))}
    every = [Choice(*mention.span(), answer.letter_of(mention[0])) for mention in answer.any_text.finditer(answer.text)]
    kept = _affirmed(answer, every)
    texts = {choice.letter for choice in kept}
    if letters:
        agree = len(letters) == 1 and (not texts or letters <= texts)
        return Choice(0, 0, letters.pop() if agree else None, "bare_letter")
    if len(texts) > 1:
        pointed = {c.letter for c in kept if _POINTS_TO.search(answer.text[max(0, c.start - 120) : c.start])}
        texts = pointed if len(pointed) == 1 else {None}
    if texts:
        return Choice(0, 0, texts.pop(), "option_text")
    return Choice(0, 0, None) if every else None


def _marked(answer: Answer) -> Iterator[Choice]:
    text = answer.text
    for match in _MARKED.finditer(text):
        group = "named" if match["named"] else "letter"
        start, end = match.span(group)
        if match[group].upper() not in answer.options or _NOT_ANSWER.search(text[max(0, start - 30) : start]):
            continue
        if match["named"] and match[group].islower() and not _LOWER_CLOSED.match(text, end):
            continue
        yield Choice(start, end, match[group].upper())
        more = _MORE.match(text, end)
        for other in re.finditer(r"(?<![\w'])[A-Z](?!\w)", more[0]) if more else ():
            if other[0] in answer.options:
                yield Choice(end + other.start(), end + other.end(), other[0])


def _affirmed(answer: Answer, mentions: list[Choice]) -> list[Choice]:
    """The mentions that are not negated; a negation holds for a whole list ("no caries or abscess")."""
    text = answer.text
    before, after = [], []
    for choice in mentions:
        end = choice.end
        own = answer.any_text.match(text, _skip(text, end))
        if own and choice.letter in answer.letters_of(own[0]):
            end = own.end()
        negated = _NEGATES.search(answer.clause_before(choice.start))
        before.append(bool(negated) and text[choice.start : choice.end].casefold() not in YES_NO)
        after.append(bool(_NEGATED.match(text, end)))
    joined = [b.start >= a.end and bool(_LIST_GAP.fullmatch(text, a.end, b.start)) for a, b in pairwise(mentions)]
    for number, together in enumerate(joined):
        before[number + 1] |= together and before[number]
    for number in reversed(range(len(joined))):
        after[number] |= joined[number] and after[number + 1]
    return [choice for choice, *denied in zip(mentions, before, after, strict=True) if not any(denied)]


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in ")].:, -–—\"'":
        place += 1
    return place


def _find_similar(answer: Answer) -> Choice | None:
    """The one option whose words a short answer has, but for their spelling ("periapical abcess", "peri-apical")."""
    text = answer.text[:200].casefold()
    words = {*re.findall(r"[^\W_]+", text), *re.findall(r"[^\W_]+", re.sub(r"(?<=\w)-(?=\w)", "", text))}
    if len(answer.text) > 100 or not words or _NEGATES.search(answer.text):
        return None
    alike = {}
    for text, letters in answer.by_text.items():
        option = re.findall(r"[^\W_]+", text)
        if min(map(len, option)) > 1 and len(words) <= len(option) + 4 and sum(map(len, option)) > 5:
            ratios = [max(SequenceMatcher(None, word, other).ratio() for other in words) for word in option]
            if sum(ratios) / len(ratios) >= SPELLING:
                alike[text] = letters[0] if len(letters) == 1 else None
    return Choice(0, 0, alike.popitem()[1], "similar_text") if len(alike) == 1 else None
