"""Teach nbval the notation `mean ± sd`: the last digits of training differ between processors, words and counts do not.

pyproject.toml loads this file with `-p conftest`, so that nbval has it even when only `notebooks` is named.
"""

import os
import re
from decimal import Decimal

os.environ["TQDM_DISABLE"] = "1"  # progress bars are not results; kernels inherit the environment

_NUMBER = r"[-+\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
# The guards leave `1e-5 ± 2e-6`, parts of a longer number and `nan ± nan` in the text, which is compared strictly.
PAIR = re.compile(rf"(?<![\w.])(?<![0-9],)(?<![eE][-+])({_NUMBER}) ± ({_NUMBER})(?![eE][-+]?[0-9]|[.,]?[0-9])")


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\u2212", "-"))


def _digits(number: Decimal) -> int:
    return number.as_tuple().exponent


def _close(first: tuple[Decimal, Decimal], second: tuple[Decimal, Decimal]) -> bool:
    (mean_1, sd_1), (mean_2, sd_2) = first, second
    if _digits(mean_1) != _digits(mean_2) or _digits(sd_1) != _digits(sd_2):
        return False
    last_digit = Decimal(1).scaleb(_digits(mean_1))
    return abs(mean_1 - mean_2) <= 3 * (sd_1 + sd_2) + last_digit


def split_pairs(text: str) -> tuple[str, list[tuple[Decimal, Decimal]]]:
    """Return the text without its `mean ± sd` pairs and the column widths that follow from them; and the pairs."""
    words = PAIR.sub("\0", text)
    words = re.sub(r" +", " ", words)
    words = re.sub(r"(?m)^ | $", "", words)
    words = re.sub(r"-{3,}", "---", words)
    return words, [(_number(mean), _number(sd)) for mean, sd in PAIR.findall(text)]


class ToleratedText(str):
    """A text that equals another when only their `mean ± sd` differ, and by no more than 3 (sd + sd) and one digit."""

    __hash__ = None  # close to is not transitive, so no hash can agree with it

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        (words, pairs), (other_words, other_pairs) = split_pairs(self), split_pairs(other)
        return (
            words == other_words
            and len(pairs) == len(other_pairs)
            and all(_close(*both) for both in zip(pairs, other_pairs, strict=True))
        )

    def __ne__(self, other: object) -> bool:  # str has its own, and nbval compares with it
        return not self == other


def _teach_nbval() -> None:
    try:
        from nbval.plugin import IPyNbCell
    except ImportError:  # the other tests run without nbval
        return
    strict = IPyNbCell.sanitize

    def sanitize(cell, output):
        output = strict(cell, output)
        return ToleratedText(output) if isinstance(output, str) else output

    IPyNbCell.sanitize = sanitize


_teach_nbval()
