"""IFEval's verifiable instructions, checked with the standard library alone.

The 25 instructions are those of Zhou et al. 2023, "Instruction-Following Evaluation for Large
Language Models" (arXiv 2311.07911, table 1), under the ids of its data set google/IFEval.
Each check decides as google-research's published code does, except for what README.md lists, most
of it because that code needs nltk's punkt and langdetect, which have to be downloaded.

A check takes a reply and the instruction's arguments and tells whether the reply follows it. An
instruction that is not in CHECKS cannot be judged; its item has to be left out, and counted.
"""

import inspect
import json
import operator
import re
from collections.abc import Callable, Iterable
from numbers import Real

from mmpeft.tasks.retention.language import LANGUAGES, is_in

CHECKS: dict[str, Callable[..., bool]] = {}  # by instruction id
RELATIONS = {"less than": operator.lt, "at least": operator.ge}
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def instruction(name: str):
    """Make a function the check of the instruction of this name."""

    def register(check: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = check
        return check

    return register


# --- keywords -----------------------------------------------------------------------------------


@instruction("keywords:existence")
def has_keywords(reply: str, keywords: list[str]) -> bool:
    return all(keyword.lower() in reply.lower() for keyword in keywords)


@instruction("keywords:frequency")
def keyword_frequency(reply: str, keyword: str, frequency: int, relation: str) -> bool:
    return RELATIONS[relation](reply.lower().count(keyword.strip().lower()), frequency)


@instruction("keywords:forbidden_words")
def no_forbidden_words(reply: str, forbidden_words: list[str]) -> bool:
    words = "|".join(map(re.escape, forbidden_words))
    return not re.search(rf"\b(?:{words})\b", reply, re.IGNORECASE)


@instruction("keywords:letter_frequency")
def letter_frequency(reply: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return RELATIONS[let_relation](reply.lower().count(letter.lower()), let_frequency)


# --- language and length ------------------------------------------------------------------------


@instruction("language:response_language")
def response_language(reply: str, language: str) -> bool:
    return is_in(reply, language)


NOT_AN_END = re.compile(  # the number of a list's item, initials, abbreviations
    r"(^\s*\d+|\b(?:[A-HJ-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Co|vs|a\.m|p\.m|e\.g|i\.e))\.",
    re.MULTILINE,
)
# a run of marks, closing quotes or brackets, then space or the end; East Asian marks need no space
SENTENCE_END = re.compile(r"[.!?…।]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+")  # noqa: RUF001


def sentences(text: str) -> int:
    """How many sentences: full stops and the like, plus one for words after the last of them."""
    *ended, rest = SENTENCE_END.split(NOT_AN_END.sub(r"\1", text))
    return len(ended) + bool(re.search(r"\w", rest))


def parts(text: str, divider: str) -> list[str]:
    """What stands between the dividers, less an empty start or end."""
    first, *others = map(str.strip, text.split(divider))
    *inner, last = others or [""]
    return [*filter(None, [first]), *inner, *filter(None, [last])]


@instruction("length_constraints:number_sentences")
def number_of_sentences(reply: str, num_sentences: int, relation: str) -> bool:
    return RELATIONS[relation](sentences(reply), num_sentences)


@instruction("length_constraints:number_paragraphs")
def number_of_paragraphs(reply: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by `***`; one that holds nothing may only come first or last."""
    paragraphs = parts(reply, "***")
    return len(paragraphs) == num_paragraphs and all(paragraphs)


@instruction("length_constraints:number_words")
def number_of_words(reply: str, num_words: int, relation: str) -> bool:
    return RELATIONS[relation](len(re.findall(r"\w+", reply)), num_words)


@instruction("length_constraints:nth_paragraph_first_word")
def first_word_of_a_paragraph(
    reply: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Paragraphs are divided by an empty line and counted from 1."""
    paragraphs = [part.strip() for part in reply.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# --- content and format -------------------------------------------------------------------------


@instruction("detectable_content:number_placeholders")
def number_of_placeholders(reply: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", reply)) >= num_placeholders


@instruction("detectable_content:postscript")
def has_postscript(reply: str, postscript_marker: str) -> bool:
    """The marker in any case; its letters may stand apart (P. S.)."""
    letters = re.escape(postscript_marker.strip()).replace(r"\.", r"\.\s?")
    return bool(re.search(letters, reply, re.IGNORECASE))


@instruction("detectable_format:number_bullet_lists")
def number_of_bullets(reply: str, num_bullets: int) -> bool:
    """Bullets are lines that begin with `*` or `-`; not with `**`, which is bold."""
    return len(re.findall(r"^\s*(?:\*(?!\*).|-)", reply, re.MULTILINE)) == num_bullets


@instruction("detectable_format:constrained_response")
def one_of_the_options(reply: str) -> bool:
    return any(option in reply for option in OPTIONS)


@instruction("detectable_format:number_highlighted_sections")
def number_of_highlights(reply: str, num_highlights: int) -> bool:
    """`*so*` or `**so**`, within a line; `***so***` counts as both."""
    italics, bold = (re.findall(mark, reply) for mark in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*"))
    return sum(highlight.strip() != "" for highlight in italics + bold) >= num_highlights


@instruction("detectable_format:multiple_sections")
def number_of_sections(reply: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", reply)) >= num_sections


@instruction("detectable_format:json_format")
def is_json(reply: str) -> bool:
    """JSON and nothing else, with or without a Markdown fence."""
    body = re.sub(r"^```(?:json)?|```$", "", reply.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except (ValueError, RecursionError):  # a reply of brackets alone nests too deep
        return False
    return True


@instruction("detectable_format:title")
def has_title(reply: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", reply))


# --- combinations, start and end, case, punctuation ---------------------------------------------


@instruction("combination:two_responses")
def two_responses(reply: str) -> bool:
    """Two that differ, divided by `******`; an empty one may only come first or last."""
    answers = parts(reply, "******")
    return len(answers) == 2 and all(answers) and answers[0] != answers[1]


@instruction("combination:repeat_prompt")
def repeats_the_prompt(reply: str, prompt_to_repeat: str) -> bool:
    return reply.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def ends_with(reply: str, end_phrase: str) -> bool:
    return reply.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def in_quotation_marks(reply: str) -> bool:
    reply = reply.strip()
    return len(reply) > 1 and reply[0] == reply[-1] == '"'


@instruction("change_case:capital_word_frequency")
def words_in_capitals(reply: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words joined by a hyphen, a full stop or a slash are one; `I` is a word in capitals."""
    words = re.findall(r"\w+(?:[-./&]\w+)*", reply)
    return RELATIONS[capital_relation](sum(map(str.isupper, words)), capital_frequency)


@instruction("change_case:english_capital")
def english_capitals(reply: str) -> bool:
    return reply.isupper() and is_in(reply, "en")


@instruction("change_case:english_lowercase")
def english_lowercase(reply: str) -> bool:
    return reply.islower() and is_in(reply, "en")


@instruction("punctuation:no_comma")
def no_comma(reply: str) -> bool:
    return "," not in reply


# --- whole replies ------------------------------------------------------------------------------


def unsupported(name: str, arguments: dict) -> str | None:
    """Why no check here can judge the instruction; None if one can."""
    if name not in CHECKS:
        return f"unknown instruction {name!r}"
    if name == "language:response_language" and arguments.get("language") not in LANGUAGES:
        return f"no way to tell the language {arguments.get('language')!r}"
    return None


def mistake(name: str, arguments: dict) -> str | None:
    """What is wrong with the arguments of an instruction; None if they are as they should be."""
    parameters = list(inspect.signature(CHECKS[name]).parameters.values())[1:]
    expected = sorted(parameter.name for parameter in parameters)
    if sorted(arguments) != expected:
        return f"{name} takes the arguments {expected}, not {sorted(arguments)}"
    for parameter in parameters:
        value = arguments[parameter.name]
        if not _is_a(value, parameter.annotation):
            return f"{name} cannot have {parameter.name}={value!r}"
        if parameter.name.endswith("relation") and value not in RELATIONS:
            return f"{name} cannot have {parameter.name}={value!r}; known: {', '.join(RELATIONS)}"
    return None


def _is_a(value, kind) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
    return isinstance(value, Real if kind is int else kind)


def given(arguments: dict) -> dict:
    """Less what a table of many instructions fills up with None."""
    return {name: value for name, value in arguments.items() if value is not None}


def followed(doc: dict, reply: str) -> list[bool]:
    """Which instructions of an IFEval row the reply follows; an empty reply follows none."""
    return [
        bool(reply.strip()) and CHECKS[name](reply, **given(arguments))
        for name, arguments in zip(doc["instruction_id_list"], doc["kwargs"], strict=True)
    ]


def loosely_followed(doc: dict, reply: str) -> list[bool]:
    """The same where any of eight variants of the reply will do, the loose accuracy of the paper:
    without its first line, its last line or both, and each of them without asterisks."""
    lines = reply.split("\n")
    variants = [reply, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    variants += [variant.replace("*", "") for variant in variants]
    return [any(each) for each in zip(*(followed(doc, v) for v in variants), strict=True)]


def all_followed(doc: dict, results: list[str]) -> dict:
    """lm-eval's process_results: `acc` is 1 if the reply follows every instruction, else 0."""
    return {"acc": float(all(followed(doc, results[0])))}


def ifeval(doc: dict, results: list[str]) -> dict:
    """lm-eval's process_results, with the metrics of its own ifeval."""
    strict, loose = followed(doc, results[0]), loosely_followed(doc, results[0])
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
    }


def share_of_instructions(items: Iterable[list[bool]]) -> float:
    """lm-eval's aggregation of an inst_level metric: the share of all instructions."""
    every = [one for item in items for one in item]
    return sum(every) / len(every)
