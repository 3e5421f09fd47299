"""The two-way proof: rows as they are composed pass, and whatever is changed in them is caught."""

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.claims import SEVERITY, Claim
from data_builders.compose.questions import compose_pairs
from data_builders.compose.rows import choose_rows, compose_rows
from data_builders.compose.wording import load_phrases
from data_builders.phantom import CONDITIONS, make_phantoms
from data_builders.proof import check_claims, check_dataset, check_row, check_text
from data_builders.reading import read_text
from data_builders.records import Finding, ImageRecord, InputError
from data_builders.sources import Questions, Source, SourcesError, SourcesFile, load_vocabulary

VOCABULARY = load_vocabulary()
KINDS = ("panoramic", "intraoral_photo", "flipped", "detector")


def sources():
    common = {"reader": "yolo", "root": Path(), "classes": {0: "caries"}, "modality": "panoramic"}
    return SourcesFile(
        path=Path("sources.yaml"), languages=("en", "es"), sources=[Source(name=kind, **common) for kind in KINDS]
    )


def records(count):
    """Phantoms as panoramics with every tooth, photographs with grades, flipped images, and a detector's findings."""
    rng = random.Random(5)
    for number, phantom in enumerate(make_phantoms(count, seed=9)):
        record = ImageRecord(
            path=Path(phantom.name), image_id=phantom.name, width=448, height=224, modality="panoramic",
            source="panoramic", group_id=f"g{number}", declared_split=None, exhaustive=(*CONDITIONS, "tooth"),
            findings=(*phantom.findings, *phantom.teeth),
        )  # fmt: skip
        kind = KINDS[number % 8] if number % 8 < len(KINDS) else "panoramic"
        diseases = tuple(replace(finding, tooth=None) for finding in phantom.findings)
        if kind == "intraoral_photo":
            grades = rng.choice(({}, {SEVERITY: "mild"}, {SEVERITY: "severe"}))
            graded = tuple(replace(finding, attributes=grades) for finding in diseases)
            record = replace(record, modality="intraoral_photo", findings=graded, exhaustive=CONDITIONS)
        elif kind == "flipped":
            record = replace(record, locations=False, findings=diseases, exhaustive=CONDITIONS)
        elif kind == "detector":
            found = tuple(replace(finding, origin="model", confidence=0.7) for finding in phantom.findings)
            record = replace(record, findings=found, exhaustive=())
        yield replace(record, source=kind)


@pytest.fixture(scope="module")
def composed():
    """More than 10,000 rows in two languages, each with the record of its image; composing proves them too."""
    loaded = sources()
    by_name = {source.name: source for source in loaded.sources}
    return [
        (row, pair, record)
        for record in records(270)
        for row, pair in compose_rows(record, by_name[record.source], loaded, seed=1)
    ]


def test_ten_thousand_rows_agree_with_their_annotations_both_ways(composed):
    wrong = [(row["completion"], found) for row, _, record in composed if (found := check_row(row, record, VOCABULARY))]

    assert len(composed) > 10_000
    assert wrong == []
    assert {row["language"] for row, _, _ in composed} == {"en", "es"}
    assert len({row["question_type"] for row, _, _ in composed}) == 22


def test_no_answer_can_be_had_from_its_question_beyond_the_stated_cap(composed):
    balanced = choose_rows({"train": [(row, pair) for row, pair, _ in composed]}, sources(), seed=1)["train"]

    print("\nmajority-answer baseline per family, of", len(balanced.rows), "rows:")
    for family, share in balanced.baselines.items():
        print(f"  {family:<20} {share:.3f}")
    assert all(share <= 0.5 for share in balanced.baselines.values())
    # By the words of the questions too, where they are asked often enough to tell.
    asked: dict[str, Counter] = {}
    for row in balanced.rows:
        claims = re.sub(r'"annotations":\[[^]]*\],?', "", row["claims"])
        asked.setdefault(row["prompt"][-1]["content"], Counter())[claims] += 1
    often = {question: answers for question, answers in asked.items() if answers.total() >= 40}
    assert len(often) > 50
    assert max(answers.most_common(1)[0][1] / answers.total() for answers in often.values()) < 0.7


@pytest.mark.parametrize("language", ["en", "es"])
def test_every_phrase_is_made_of_words_that_can_be_read(language):
    """Also those that no phantom needs."""
    phrases = load_phrases(language)
    unread = []
    for family, kinds in phrases.items():
        for kind, texts in kinds.items() if isinstance(kinds, dict) else ():
            for text in texts if isinstance(texts, list) else ():
                words = re.sub(r"\{\w+\}", ":", text.replace("{universal}", "17"))
                question = "question" in kind or family == "dialogue"
                unread += [(family, word) for word in read_text(words, language, VOCABULARY, question=question).unknown]

    assert unread == []


def test_yes_and_no_are_equally_many_for_each_condition(composed):
    balanced = {
        row["row_id"]
        for row in choose_rows({"train": [(row, pair) for row, pair, _ in composed]}, sources(), seed=1)["train"].rows
    }
    verdicts = Counter(
        (row["source"], row["language"], pair.asks, pair.verdict)
        for row, pair, _ in composed
        if row["row_id"] in balanced and row["question_type"] == "presence"
    )

    assert verdicts
    for (source, language, asks, verdict), number in verdicts.items():
        assert verdicts[source, language, asks, not verdict] == number


def test_a_small_split_is_not_emptied_by_the_balance(composed):
    """What could be guessed is judged over all splits: a single row of a question says nothing about it."""
    items = [(row, pair) for row, pair, _ in composed if row["question_type"] == "location"]
    balanced = choose_rows({"train": items[40:], "test": items[:40]}, sources(), seed=1)

    assert len(balanced["test"].rows) > 30
    assert balanced["train"].baselines["location"] <= 0.5


def test_an_image_gets_as_many_questions_as_asked_for_from_what_the_balance_left(composed):
    loaded = sources().model_copy(update={"questions": Questions(per_image=2, weights={"dialogue": 0.0})})
    items = [(row, pair) for row, pair, _ in composed if row["source"] == "panoramic" and pair.history == ()]
    rows = choose_rows({"train": items}, loaded, seed=1)["train"].rows
    per_image = Counter((row["image_id"], row["language"]) for row in rows)

    assert max(per_image.values()) == 2
    assert len(rows) > 0.85 * 2 * len({(row["image_id"], row["language"]) for row, _ in items})
    pairs = {(row["image_id"], row["question_type"], row["claims"]): set() for row in rows}
    for row in rows:
        pairs[row["image_id"], row["question_type"], row["claims"]].add(row["language"])
    assert all(languages == {"en", "es"} for languages in pairs.values())


# What is changed in the words: in each language, what stands there and what is put in its place.
SWAPS = {
    "en": {
        "side": {"right": "left", "left": "right"},
        "region": {
            "maxillary": "mandibular",
            "mandibular": "maxillary",
            "anterior": "right",
            "in the maxilla": "in the mandible",
            "in the mandible": "in the maxilla",
            "upper": "lower",
            "lower": "upper",
        },
        "negation": {
            "there is no sign of": "there are signs of",
            "no sign of": "visible",
            "shows no sign of": "shows",
            "No, ": "Yes, ",
            "Yes, ": "No, ",
            "Yes: ": "No, ",
            "Not present": "Present",
            "Abnormal:": "Nothing abnormal:",
            "Nothing abnormal": "Abnormal",
        },
        "count": {
            r"(?:an?|one) (?=FINDING)": "two ",
            r"two (?=FINDING)": "three ",
            r"three (?=FINDING)": "two ",
            r"four (?=FINDING)": "three ",
            r"\d+ (?=of the|FINDING|in the)": "9 ",
        },
        "modality": {"panoramic radiograph": "clinical photograph", "clinical photograph": "bitewing radiograph"},
        "severity": {
            "mild": "severe",
            "severe": "moderate",
            "cannot be determined from this image alone": "is on the patient's left",
        },
        "hedge": {"possible ": "", "Possible ": ""},
    },
    "es": {
        "side": {"derecha": "izquierda", "izquierda": "derecha", "derecho": "izquierdo", "izquierdo": "derecho"},
        "region": {
            "región maxilar": "región mandibular",
            "región mandibular": "región maxilar",
            "región maxilar anterior": "región maxilar derecha",
            "arcada superior": "arcada inferior",
            "arcada inferior": "arcada superior",
            "superior": "inferior",
            "inferior": "superior",
        },
        "negation": {
            "no hay signos de": "hay",
            "no muestra signos de": "muestra",
            "sin signos de": "con",
            "No, ": "Sí, ",
            "Sí, ": "No, ",
            "Sí: ": "No, ",
            "No están presentes": "Están presentes",
            "Anormal:": "Nada anormal:",
            "Nada anormal": "Anormal",
        },
        "count": {
            r"una? (?=FINDING)": "dos ",
            r"dos (?=FINDING)": "tres ",
            r"tres (?=FINDING)": "dos ",
            r"cuatro (?=FINDING)": "tres ",
            r"\d+ (?=de los|FINDING|en la)": "9 ",
        },
        "modality": {
            "radiografía panorámica": "fotografía clínica",
            "fotografía clínica": "radiografía periapical",
        },
        "severity": {
            "leve": "severa",
            "severa": "moderada",
            "no se puede determinar solo con esta imagen": "está a la izquierda del paciente",
        },
        "hedge": {"posible ": "", "Posible ": "", "posibles ": ""},
    },
}
ANSWERS_ONLY = ("count", "severity", "negation", "hedge")  # a question states none of them
NAMES = {
    language: sorted(
        {name for term in VOCABULARY.values() for name in (getattr(term, language).one, getattr(term, language).other)},
        key=len,
        reverse=True,
    )
    for language in SWAPS
}
FINDING = {
    language: "(?:possible |posibles? )?(?:" + "|".join(map(re.escape, names)) + ")"
    for language, names in NAMES.items()
}
TEETH = {"en": r"((?:tooth|teeth) (?:\d\d, )*)(\d\d)", "es": r"(dientes? (?:\d\d, )*)(\d\d)"}
MARKER = {"en": "As general guidance", "es": "Como orientación general"}


def mutate_text(text, language, kind, number):
    """The text with one thing changed, or `None` where there is no such thing in it; `number` chooses among them."""
    if kind == "tooth":
        found = list(re.finditer(TEETH[language], text))
        spans = [(match.start(2), match.end(2), "18" if match[2] != "18" else "27") for match in found]
    elif kind == "universal":
        pattern = r"(\d+)(?= in the Universal| en el sistema universal)"
        spans = [(m.start(), m.end(), str(int(m[0]) % 32 + 1)) for m in re.finditer(pattern, text)]
    elif kind == "finding":
        known = rf"\b(?:{FINDING[language]})\b"
        spans = [(m.start(), m.end(), "gingivitis") for m in re.finditer(known, text)]
    else:
        spans = [
            (match.start(), match.end(), new)
            for old, new in SWAPS[language][kind].items()
            for match in re.finditer(rf"\b{old.replace('FINDING', FINDING[language])}", text)
        ]
    cut = text.find(MARKER[language])
    spans = [span for span in spans if cut < 0 or span[0] < cut]
    if not spans:
        return None
    start, end, new = spans[number % len(spans)]
    return text[:start] + new + text[end:]


def texts(row):
    """Where the words of a row are: every user and assistant turn."""
    turns = [message for message in (*row["prompt"], *row["completion"]) if message["role"] != "system"]
    return [(number, turn["role"] == "assistant") for number, turn in enumerate(turns)]


def with_text(row, number, change):
    """A copy of the row in which the turn `number` is changed, or `None`."""
    copied = json.loads(json.dumps(row))
    turn = [message for message in (*copied["prompt"], *copied["completion"]) if message["role"] != "system"][number]
    changed = change(turn["content"])
    if changed is None or changed == turn["content"]:
        return None
    turn["content"] = changed
    return copied


WORD_KINDS = ("side", "region", "negation", "count", "tooth", "universal", "finding", "modality", "severity", "hedge")


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_a_changed_word_is_caught(composed, kind):
    """Every place of every third row at which a word of this kind can be exchanged."""
    tried, escaped = 0, []
    for row, _, record in composed[::3]:
        for number, is_answer in texts(row):
            if not is_answer and kind in ANSWERS_ONLY:
                continue
            seen = set()
            for position in range(12):
                changed = with_text(
                    row, number, lambda text, row=row, at=position: mutate_text(text, row["language"], kind, at)
                )
                if changed is None or (words := str(changed["prompt"]) + str(changed["completion"])) in seen:
                    continue
                seen.add(words)
                tried += 1
                if not check_row(changed, record, VOCABULARY):
                    escaped.append((row["question_type"], changed["prompt"][-1], changed["completion"]))

    assert tried > 20
    assert escaped == []


def mutate_claim(claim, field, rng):
    changed = dict(claim)
    if field == "label":
        changed["label"] = rng.choice([name for name in VOCABULARY if name != claim["label"]])
    elif field == "region":
        changed["region"] = rng.choice([r for r in ("left_maxillary", "right_mandibular") if r != claim.get("region")])
    elif field == "side":
        changed["side"] = "left" if claim.get("side") == "right" else "right"
    elif field == "count":
        changed["count"] = claim.get("count", 1) + 1
    elif field == "tooth":
        changed["tooth"] = "18" if claim.get("tooth") != "18" else "27"
    elif field == "negated":
        changed["negated"] = not claim.get("negated", False)
    elif field == "annotations":
        changed["annotations"] = [*claim.get("annotations", ()), "another"]
    elif field == "severity":
        changed["severity"] = "moderate"
    elif field == "hedged":
        changed["hedged"] = not claim.get("hedged", False)
    elif field == "modality":
        changed["modality"] = "periapical"
    return changed


FIELDS = ("label", "region", "side", "count", "tooth", "negated", "annotations", "severity", "hedged", "modality")


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_claim_is_caught(composed, field):
    rng = random.Random(field)
    for row, _, record in composed[::5]:
        document = json.loads(row["claims"])
        at = rng.randrange(len(document["claims"]))
        document["claims"][at] = mutate_claim(document["claims"][at], field, rng)
        changed = {**row, "claims": json.dumps(document)}

        assert check_row(changed, record, VOCABULARY), (row["question_type"], document["claims"][at])


@settings(derandomize=True, deadline=None, max_examples=600)
@given(data=st.data())
def test_no_change_drawn_at_random_passes(composed, data):
    row, _, record = composed[data.draw(st.integers(0, len(composed) - 1), label="row")]
    kind = data.draw(st.sampled_from((*WORD_KINDS, *FIELDS)), label="what is changed")
    if kind in FIELDS and data.draw(st.booleans(), label="in the claims"):
        document = json.loads(row["claims"])
        at = data.draw(st.integers(0, len(document["claims"]) - 1))
        document["claims"][at] = mutate_claim(document["claims"][at], kind, random.Random(at))
        changed = {**row, "claims": json.dumps(document)}
    elif kind in WORD_KINDS:
        turns = [number for number, is_answer in texts(row) if is_answer or kind not in ANSWERS_ONLY]
        number = data.draw(st.sampled_from(turns), label="turn")
        at = data.draw(st.integers(0, 11), label="place")
        changed = with_text(row, number, lambda text: mutate_text(text, row["language"], kind, at))
    else:
        changed = None
    if changed is not None:
        assert check_row(changed, record, VOCABULARY)


def test_words_and_claims_that_lie_together_are_caught_by_the_annotations(composed):
    tried = 0
    for row, _, record in composed[::2]:
        if row["question_type"] != "location" or row["language"] != "en":
            continue
        region = json.loads(row["claims"])["claims"][0]["region"]
        other = "left_maxillary" if region != "left_maxillary" else "right_mandibular"
        changed = json.loads(json.dumps(row).replace(region, other))
        changed["completion"][0]["content"] = f"In the {other.replace('_', ' ')} region."

        assert check_row(changed, record, VOCABULARY)
        tried += 1
    assert tried > 30


def test_the_record_of_another_image_does_not_carry_a_row(composed):
    by_image = {record.image_id: record for _, _, record in composed}
    identities = list(by_image)
    for row, _, record in composed[:3000]:
        other = by_image[identities[(identities.index(record.image_id) + 8) % len(identities)]]
        if (
            row["question_type"] in ("location", "side", "quadrant", "structured_report")
            and other.source == record.source
        ):
            assert check_row(row, other, VOCABULARY)


RING = ((0.75, 0.6), (0.85, 0.6), (0.85, 0.8), (0.75, 0.8))
CARIES = Finding("f", "caries", "box", (RING,))


def panoramic(*findings, **changed):
    record = ImageRecord(Path("a"), "a", 100, 50, "panoramic", "s", "g", None, (), findings)
    return replace(record, **changed)


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        ("en", "Yes, this panoramic radiograph does not show caries."),
        ("en", "Yes, caries has been ruled out."),
        ("en", "Yes, this panoramic radiograph shows caries and a cyst."),
        ("en", "Yes, this panoramic radiograph shows caries and gingivitis."),
        ("en", "Yes, this panoramic radiograph shows caries, otherwise unremarkable."),
        ("en", "Yes, this panoramic radiograph shows caries. Urgent treatment with antibiotics is needed."),
        ("en", "Yes, this panoramic radiograph shows extensive caries."),
        ("en", "Yes, this panoramic radiograph shows severe caries."),
        ("en", "Yes, this panoramic radiograph shows several carious lesions."),
        ("en", "Yes, this panoramic radiograph shows eleven carious lesions."),
        ("en", "Yes, this panoramic radiograph shows caries in upper molars."),
        ("en", "Yes, this panoramic radiograph shows caries on the left."),
        ("en", "Yes, this panoramic radiograph shows caries of UL6."),
        ("en", "Yes, this OPG shows caries."),
        ("en", "Yes, this x-ray shows caries."),
        ("en", "Yes, this photograph shows caries."),
        ("en", "Yes, this panoramic radiograph shows cari\u200bes."),
        ("en", "Yes, this panoramic radiograph shows caries and crοwn."),  # a Greek letter
        ("en", "No, this panoramic radiograph shows caries."),
        ("en", "Possibly: caries."),
        ("en", "Caries."),  # a yes/no question without a yes or no
        ("en", "Yes, caries. As general guidance, not about this patient: extract tooth 18 on the left today."),
        ("es", "Sí, en esta radiografía panorámica no se observa caries."),
        ("es", "Sí, esta radiografía panorámica muestra caries extensa."),
        ("es", "Sí, esta radiografía panorámica muestra caries en la arcada superior izquierda."),
        ("es", "Sí, esta ortopantomografía muestra caries."),
        ("es", "Yes, this panoramic radiograph shows caries."),
    ],
)
def test_what_no_claim_states_may_not_be_said(language, answer):
    record, claims = panoramic(CARIES), (Claim("caries", annotations=("f",)),)
    question, right = {
        "en": ("Is there caries on this panoramic radiograph?", "Yes, this panoramic radiograph shows caries."),
        "es": ("¿Hay caries en esta radiografía panorámica?", "Sí, esta radiografía panorámica muestra caries."),
    }[language]

    def check(said):
        return check_text(question, said, claims, record, language, VOCABULARY, question_type="presence")

    assert check(right) == []
    assert check(answer)


@pytest.mark.parametrize(
    "question",
    [
        "Is there caries on this photograph?",
        "Is there caries of tooth 36?",
        "Is there caries in the left mandibular region?",
        "Is there severe caries?",
        "Are there three carious lesions?",
        "Is there no sign of caries?",
        "Is there an abscess?",
        "Is there gingivitis?",
        "Is there caries? As general guidance, not about this patient: yes.",
    ],
)
def test_a_question_states_nothing_and_asks_for_what_is_answered(question):
    claims = (Claim("caries", annotations=("f",)),)

    assert check_text(question, "Yes: caries.", claims, panoramic(CARIES), "en", VOCABULARY, question_type="presence")


@pytest.mark.parametrize(
    ("claim", "finding"),
    [
        (Claim("caries", region="upper_left", negated=True), {"parts": (((0.2, 0.25), (0.8, 0.25), (0.8, 0.4)),)}),
        (Claim("caries", side="left", negated=True), {"parts": (((0.2, 0.25), (0.8, 0.25), (0.8, 0.4)),)}),
        (Claim("caries", region="maxillary", negated=True), {"parts": (), "shape": "image"}),
        (Claim("caries", region="upper_left", negated=True), {"parts": (((0.49, 0.2), (0.52, 0.2), (0.52, 0.3)),)}),
        (Claim("caries", tooth="36", negated=True), {}),
        (Claim("tooth", tooth="38", negated=True), {"label": "impacted_tooth"}),
    ],
)
def test_a_denial_falls_where_something_may_lie(claim, finding):
    record = panoramic(replace(CARIES, **finding), exhaustive=("caries", "tooth"))

    assert check_claims([claim], record)
    assert not check_claims([claim], replace(record, findings=()))


@pytest.mark.parametrize("changed", [{"locations": False}, {"modality": "intraoral_photo"}])
def test_a_tooth_number_is_a_place(changed):
    numbered = panoramic(replace(CARIES, tooth="36"), exhaustive=("tooth",))
    teeth = tuple(Finding(f"t{n}", "tooth", "box", (RING,), tooth=n) for n in ("11", "21"))
    claim = Claim("caries", tooth="36", annotations=("f",))

    assert check_claims([claim], numbered) == []
    assert check_claims([claim], replace(numbered, **changed))
    for record in (replace(numbered, **changed), panoramic(*teeth, exhaustive=("tooth",), **changed)):
        composed = list(compose_pairs(record, vocabulary=VOCABULARY, language="en", seed=1))
        assert not {"tooth_number", "completeness"} & {pair.question_type for pair in composed}


def test_what_names_all_leaves_nothing_out(composed):
    tried = 0
    for row, _, record in composed:
        if row["question_type"] == "structured_report" and len(record.findings) > 1:
            extra = replace(CARIES, finding_id="extra", label="gingivitis")
            wrong = check_row(row, replace(record, findings=(*record.findings, extra)), VOCABULARY)
            assert any("leaves out extra" in problem for problem in wrong)
            tried += 1
    assert tried > 50


@pytest.mark.parametrize(
    "claims",
    ["[]", "null", "{}", '{"schema_version":2,"claims":[]}', '{"schema_version":2,"claims":[{"label":["a"]}]}',
     '{"schema_version":2,"claims":[{"label":"caries","count":true,"annotations":["f"]}]}',
     '{"schema_version":2,"claims":[{"label":"caries","annotations":["f"]},{"label":"caries","annotations":["f"]}]}'],
)  # fmt: skip
def test_claims_of_another_form_are_a_finding_and_no_crash(claims):
    row = {
        "prompt": [{"role": "user", "content": "Is there caries?"}],
        "completion": [{"role": "assistant", "content": "Yes: caries."}],
        "language": "en", "question_type": "presence", "claims": claims,
    }  # fmt: skip

    assert check_row(row, panoramic(CARIES), VOCABULARY)


def test_turns_in_another_order_and_other_languages_are_refused(composed):
    row, _, record = composed[0]
    user, assistant = row["prompt"][-1:], row["completion"]

    assert check_row({**row, "prompt": assistant, "completion": user}, record, VOCABULARY)
    smuggled = [*row["prompt"], {"role": "system", "content": "It is in the right maxilla."}]
    assert check_row({**row, "prompt": smuggled}, record, VOCABULARY)
    assert check_row({**row, "language": "xx"}, record, VOCABULARY)


@pytest.mark.parametrize(
    "names",
    [
        {"one": "carious lesion", "other": "root lesions", "condition": "root caries"},  # another finding's name
        {"one": "tooth 38 problem", "other": "problems", "condition": "a problem"},
        {"one": "st. lesion", "other": "lesions", "condition": "a lesion"},
        {"one": " lesion", "other": "lesions", "condition": "a lesion"},
    ],
)
def test_names_that_cannot_be_read_back_are_refused(tmp_path, names):
    path = tmp_path / "vocabulary.yaml"
    spanish = {"one": "cosa", "other": "cosas", "condition": "una cosa", "gender": "f"}
    path.write_text(json.dumps({"own": {"kind": "pathology", "en": names, "es": spanish}}))

    with pytest.raises(SourcesError, match=r"own"):
        load_vocabulary(path)


def test_a_dataset_folder_is_proven_from_what_stands_in_it(vqa_dataset, tmp_path):
    folder = tmp_path / "vqa"
    shutil.copytree(vqa_dataset, folder)
    assert all(wrong == [] for _, wrong in check_dataset(folder))
    shard = next((folder / "data").glob("test-*"))
    table = pq.read_table(shard)
    columns = table.to_pydict()
    columns["image_id"] = columns["image_id"][::-1]
    columns["question_type"] = ["counting", *columns["question_type"][1:]]
    pq.write_table(pa.table(columns, schema=table.schema), shard)

    assert sum(bool(wrong) for _, wrong in check_dataset(folder)) >= table.num_rows // 2
    (folder / "records.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"records.jsonl:1: is no record"):
        list(check_dataset(folder))
    shard.write_bytes(b"no parquet")
    shutil.copy(vqa_dataset / "records.jsonl", folder)
    with pytest.raises(InputError, match="cannot be read as rows"):
        list(check_dataset(folder))
