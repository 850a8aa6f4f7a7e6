"""The number that an answer to a word problem ends with, in one spelling.

Looked for in this order, and the last of its kind each time:

    #### 18                         the first number of that line
    \\boxed{18}                      the first number within the braces
    The answer is 18. Answer: $18   the first number behind the words, in their line
    … and so 18 eggs are left.      the last number of all

Commas between thousands, $, %, units and zeros behind the point say nothing: 1,200.00, $1200 and
1200 are one number. A minus directly before a number or its $ is its sign, unless it follows a
letter, a digit or a closing bracket: 10-5 is two numbers. What a slash or a colon joins (1/2, 3:30)
is left alone: one thing that is not computed and equals only itself.
"""

import re

_NUMBER = re.compile(
    r"""
    (?<!\d)(?<!\d[/:])
    (?P<sign>(?<![\w)\]}])[-\u2212])?
    (?:\\?\$(?P<inner_sign>[-\u2212])?)?
    (?P<digits>
        \d+(?:[/:]\d+)+
      | \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?
      | \d+(?:\.\d+)?
      | \.\d+
    )
    """,
    re.VERBOSE,
)
_ANSWER_WORDS = re.compile(r"\banswer\b(?:\s+is\b|\W*?[:=])", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")


def final_number(text: str) -> str | None:
    """Find the number that a text gives as its answer; None where it has no number at all."""
    text = _LATEX_FRACTION.sub(r"\1/\2", text).replace("{,}", ",")
    for places in (_behind_hashes(text), _in_boxes(text), _behind_words(text)):
        for place in reversed(places):
            if numbers := _numbers(place):
                return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def number_behind_hashes(text: str) -> str | None:
    """The number of the last line with ####, as gsm8k's own answers end; None without one."""
    places = _behind_hashes(text)
    numbers = _numbers(places[-1]) if places else []
    return numbers[0] if numbers else None


def _behind_hashes(text: str) -> list[str]:
    return [line.rpartition("####")[2] for line in text.splitlines() if "####" in line]


def _in_boxes(text: str) -> list[str]:
    boxes = []
    for part in text.split("\\boxed{")[1:]:
        depth, end = 1, 0
        while depth and end < len(part):
            depth += {"{": 1, "}": -1}.get(part[end], 0)
            end += 1
        boxes.append(part[:end])
    return boxes


def _behind_words(text: str) -> list[str]:
    return [text[found.end() :].partition("\n")[0] for found in _ANSWER_WORDS.finditer(text)]


def _numbers(text: str) -> list[str]:
    return [_spell(found) for found in _NUMBER.finditer(text)]


def _spell(found: re.Match[str]) -> str:
    """One spelling for each number."""
    digits = found["digits"]
    if "/" not in digits and ":" not in digits:
        whole, _, decimals = digits.replace(",", "").partition(".")
        decimals = decimals.rstrip("0")
        digits = (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
    is_negative = found["sign"] is not None or found["inner_sign"] is not None
    return f"-{digits}" if is_negative and digits != "0" else digits
