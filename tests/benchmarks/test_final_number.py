"""Which number of a text is taken for its answer."""

import pytest

from benchmarks.serving.final_number import final_number, number_behind_hashes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 6 = 11\n#### 11", "11"),
        ("#### 3\nNo, one more.\n#### 4 eggs, not 5", "4"),
        (r"So 6 * 3 = \boxed{18} dollars in 2 days.", "18"),
        (r"\boxed{17} was wrong: it is $\boxed{\$18.00}$ for 3 days.", "18"),
        (r"\boxed{\text{about } 18 \text{ eggs}} in 2 days", "18"),
        ("The answer is 18. She has 2 left.", "18"),
        ("the answer is: **$1,234.50** for 3 days", "1234.5"),
        ("**Answer:** 7 apples\nThat took 3 steps.", "7"),
        ("The answer is 3.\nWait.\nThe answer is 4.\nThat took 2 steps.", "4"),
        ("He sells 3 and 4, which makes 12 a day.", "12"),
        # The order of the kinds: hashes, then a box, then words, then the last number.
        ("The answer is 3, so \\boxed{4}, no:\n#### 5\nin 6 steps", "5"),
        ("The answer is 3, so \\boxed{4} in 6 steps", "4"),
        # What has no number behind it does not count.
        ("#### none\nThe answer is below.\n\\boxed{}\nIt is 9", "9"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_where_the_number_is_found(text: str, number: str | None):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("$18", "18"),
        (r"\$18", "18"),
        ("18$", "18"),
        ("50%", "50"),
        ("18.00", "18"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("007", "7"),
        ("-3", "-3"),
        ("\u22123", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("-0", "0"),
        ("+3", "3"),
        ("10-5", "5"),
        ("(2+3)-5", "5"),
        ("* - 5", "5"),
        ("60mph", "60"),
        ("x=24.", "24"),
        ("x-24", "24"),
        ("Total:24", "24"),
        ("miles/24", "24"),
        ("3, 4", "4"),
        ("1,2345", "2345"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        # Left alone: neither computed nor taken apart.
        ("1/2", "1/2"),
        ("18 is 1/2 of it", "1/2"),
        (r"\frac{1}{2}", "1/2"),
        ("at 3:30", "3:30"),
    ],
)
def test_how_a_number_is_read(text: str, number: str):
    assert final_number(text) == number
    assert final_number(f"In 2 steps.\nThe answer is {text}") == final_number(f"#### {text}")


def test_a_fraction_is_not_the_number_that_it_is_worth():
    assert final_number("The answer is 1/2") != final_number("The answer is 0.5")


def test_only_a_line_with_hashes_counts_in_the_data_sets_own_answers():
    assert number_behind_hashes("2 + 3 = 5\n#### 5") == "5"
    assert number_behind_hashes("The answer is 5") is None
    assert number_behind_hashes("5 ####") is None
