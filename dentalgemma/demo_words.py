"""What the demo page says of itself, in English and in Spanish; questions and findings have their words elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_builders.sources import Language
from dentalgemma.answering import DISCLAIMER

LANGUAGES: Mapping[Language, str] = {"en": "English", "es": "Español"}
WORDS: Mapping[Language, Mapping[str, str]] = {
    "en": {
        "disclaimer": DISCLAIMER,
        "beside": "beside",
        "shown": "The picture that is asked about",
        "sample": "Synthetic panoramic {number}",
        "no_picture": "No picture yet: drop one below, paste it, or take a sample.",
        "as_read": "{width} × {height} pixels, as it was read.",
        "borders": "Borders of the regions are approximate.",
        "patient_right": "the patient's right",
        "patient_left": "the patient's left",
        "choose": "Choose a picture",
        "or_drop": "or drop it here, or paste it. It stays in memory while the model answers and is never stored.",
        "kind": "Kind of picture",
        "samples": "Samples: synthetic drawings, of no patient",
        "drawn": "Drawn: {truth}",
        "nothing_drawn": "nothing abnormal",
        "question": "Question",
        "ask": "Ask",
        "report": "Region report",
        "stop": "Stop",
        "answer": "Answer",
        "tuned": "Tuned: {name}",
        "base": "Base: {name}",
        "answer_here": "The answer appears here.",
        "empty_answer": "(empty answer)",
        "region": "Region",
        "footer": "Pictures and questions are held in memory while they are answered; they are not stored, not logged, "
        "and sent nowhere else. Do not send pictures that show who the patient is.",
        "please_check": "Please check",
        "failed": "Failed",
        "see_log": "The model could not answer; the machine that serves this page has the reason in its log.",
        "no_question": "Type a question first.",
        "long_question": "The question is too long: at most {limit:,} characters.",
        "picture_first": "Choose a picture first, or take a sample.",
        "large_picture": "The file is too large: at most {limit} MB.",
        "broken_picture": "The file did not arrive whole; choose it again.",
        "unreadable": "{reason}",
        "panoramic_only": "Regions are defined on a panoramic radiograph; choose that kind of picture.",
        "no_such_request": "This page sends no such request; load it again.",
    },
    "es": {
        "disclaimer": "Solo para investigación y enseñanza. No es un producto sanitario ni da diagnósticos; lo que "
        "dice un modelo debe comprobarlo un profesional de la odontología.",
        "beside": "junto a",
        "shown": "La imagen sobre la que se pregunta",
        "sample": "Panorámica sintética {number}",
        "no_picture": "Aún no hay imagen: suelte una abajo, péguela o tome una muestra.",
        "as_read": "{width} × {height} píxeles, tal como se leyó.",
        "borders": "Los límites de las regiones son aproximados.",
        "patient_right": "derecha del paciente",
        "patient_left": "izquierda del paciente",
        "choose": "Elija una imagen",
        "or_drop": "o suéltela aquí, o péguela. Queda en memoria mientras el modelo responde y nunca se guarda.",
        "kind": "Tipo de imagen",
        "samples": "Muestras: dibujos sintéticos, de ningún paciente",
        "drawn": "Dibujado: {truth}",
        "nothing_drawn": "nada anormal",
        "question": "Pregunta",
        "ask": "Preguntar",
        "report": "Informe por regiones",
        "stop": "Detener",
        "answer": "Respuesta",
        "tuned": "Ajustado: {name}",
        "base": "Base: {name}",
        "answer_here": "La respuesta aparece aquí.",
        "empty_answer": "(respuesta vacía)",
        "region": "Región",
        "footer": "Las imágenes y las preguntas quedan en memoria mientras se responden; no se guardan, no se "
        "registran y no se envían a ningún otro lugar. No envíe imágenes que muestren quién es el paciente.",
        "please_check": "Compruebe",
        "failed": "Error",
        "see_log": "El modelo no pudo responder; la máquina que sirve esta página tiene la causa en su registro.",
        "no_question": "Escriba primero una pregunta.",
        "long_question": "La pregunta es demasiado larga: {limit} caracteres como máximo.",
        "picture_first": "Elija primero una imagen o tome una muestra.",
        "large_picture": "El archivo es demasiado grande: {limit} MB como máximo.",
        "broken_picture": "El archivo no llegó entero; elíjalo otra vez.",
        "unreadable": "No se puede leer esta imagen. {reason}",
        "panoramic_only": "Las regiones se definen en una radiografía panorámica; elija ese tipo de imagen.",
        "no_such_request": "Esta página no envía tal petición; cárguela de nuevo.",
    },
}


def take_words(language: object) -> Mapping[str, str]:
    """The page's words in one of its languages; English for whatever else a request may say."""
    return WORDS["es" if language == "es" else "en"]


def name_column(names: Sequence[str], number: int, language: Language) -> str:
    """The title over the answers of one of the models."""
    words = WORDS[language]
    if len(names) == 1:
        return words["answer"]
    return words["tuned" if number == 0 else "base"].format(name=names[number])
