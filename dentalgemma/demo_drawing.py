"""What the demo page shows, as HTML: the picture with its regions, the table, the samples; every text is escaped.

What is in English is there in Spanish too; the style sheet shows the language that is chosen.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from data_builders.compose.wording import capitalize, load_phrases
from data_builders.dentition import ANTERIOR_HALF_WIDTH, REGIONS, finding_region
from data_builders.phantom import Phantom
from data_builders.sources import Language, load_vocabulary
from dentalgemma import __version__
from dentalgemma.demo_words import LANGUAGES, WORDS, name_column

PREVIEW = 1200  # pixels on the longer side


class Sample(NamedTuple):
    """A synthetic picture that the page offers: its file, and what was drawn in it."""

    content: str  # base64 of a PNG
    truth: Mapping[Language, str]


def make_sample(phantom: Phantom) -> Sample:
    """Keep a synthetic picture as the page sends it."""
    buffer = io.BytesIO()
    phantom.image.save(buffer, format="PNG")
    truth = {language: _tell_findings(phantom, language) for language in LANGUAGES}
    return Sample(base64.b64encode(buffer.getvalue()).decode(), truth)


def _tell_findings(phantom: Phantom, language: Language) -> str:
    vocabulary, regions = load_vocabulary(), load_phrases(language)["regions"]
    drawn = [
        f"{getattr(vocabulary[finding.label], language).one}, {regions[finding_region(finding)]}"
        for finding in phantom.findings
    ]
    words = WORDS[language]
    return words["drawn"].format(truth="; ".join(drawn) or words["nothing_drawn"])


def draw_title(names: Sequence[str]) -> str:
    """The head of the page: which models answer."""
    models = f" {_say('beside')} ".join(f"<code>{html.escape(name)}</code>" for name in names)
    return f'<div class="title"><h1>DentalGemma</h1><p>{models}</p></div>'


def draw_disclaimer() -> str:
    """The disclaimer in both languages, whichever is chosen."""
    lines = "".join(f'<p lang="{language}">{html.escape(WORDS[language]["disclaimer"])}</p>' for language in LANGUAGES)
    return f'<div class="disclaimer" role="note">{lines}</div>'


def draw_drop_zone() -> str:
    """The field for a picture."""
    return (
        f'<label class="drop"><input type="file" accept="image/*,.tif,.tiff,.dcm" aria-label="{_describe("choose")}">'
        f"<strong>{_say('choose')}</strong><small>{_say('or_drop')}</small></label>"
    )


def draw_gallery(samples: Sequence[Sample]) -> str:
    """The samples, each with what was drawn in it."""
    buttons = "".join(
        f'<button type="button" data-number="{number}"><img alt="{_describe("sample", number=number + 1)}" '
        f'src="data:image/png;base64,{sample.content}"><small>{_in_each(sample.truth)}</small></button>'
        for number, sample in enumerate(samples)
    )
    return f'<p class="label">{_say("samples")}</p><div class="gallery">{buttons}</div>'


def draw_footer() -> str:
    """What happens to what a visitor sends."""
    return f'<p class="foot">DentalGemma {html.escape(__version__)}. {_say("footer")}</p>'


def draw_preview(picture: Image.Image | None, *, regions: bool = False) -> str:
    """The picture as it was read, with the six regions of a panoramic drawn over it."""
    if picture is None:
        return f'<div class="empty"><p>{_say("no_picture")}</p></div>'
    small = picture.copy()
    small.info.clear()
    small.thumbnail((PREVIEW, PREVIEW))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    source = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{_describe("shown")}" src="data:image/jpeg;base64,{source}">'
    note = _say("as_read", width=picture.width, height=picture.height)
    if not regions:
        return f'<figure><div class="frame">{image}</div><figcaption>{note}</figcaption></figure>'
    share = 2 * ANTERIOR_HALF_WIDTH
    columns = f"grid-template-columns: {1 - share:g}fr {2 * share:g}fr {1 - share:g}fr"
    cells = "".join(f"<div>{_name_region(region)}</div>" for region in REGIONS)
    return (
        f'<figure><div class="frame">{image}<div class="grid" style="{columns}">{cells}</div></div>'
        f'<div class="sides"><div><b>R</b> {_say("patient_right")}</div>'
        f"<div>{_say('patient_left')} <b>L</b></div></div>"
        f"<figcaption>{note} {_say('borders')}</figcaption></figure>"
    )


def draw_table(rows: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """The answers of each model, region by region."""
    heads = "".join(
        f"<th>{_in_each({language: name_column(names, number, language) for language in LANGUAGES})}</th>"
        for number in range(len(names))
    )
    lines = []
    for region, answers in rows.items():
        waiting = ["…"] * (len(names) - len(answers))
        cells = "".join(f"<td><div>{html.escape(text)}</div></td>" for text in (*answers, *waiting))
        lines.append(f'<tr><th scope="row">{_name_region(region)}</th>{cells}</tr>')
    head = f"<thead><tr><th>{_say('region')}</th>{heads}</tr></thead>"
    return f'<table style="--models: {len(names)}">{head}<tbody>{"".join(lines)}</tbody></table>'


def _name_region(region: str) -> str:
    return _in_each({language: capitalize(load_phrases(language)["regions"][region]) for language in LANGUAGES})


def _say(key: str, **values: object) -> str:
    return _in_each({language: WORDS[language][key].format(**values) for language in LANGUAGES})


def _describe(key: str, **values: object) -> str:
    """What cannot be shown or hidden by a style sheet is in both languages."""
    return " / ".join(html.escape(WORDS[language][key].format(**values)) for language in LANGUAGES)


def _in_each(texts: Mapping[Language, str]) -> str:
    """A text in each language, of which the style sheet hides all but one."""
    return "".join(
        f'<span class="in-{language}" lang="{language}">{html.escape(text)}</span>' for language, text in texts.items()
    )
