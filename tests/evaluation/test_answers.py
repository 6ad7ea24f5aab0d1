import pytest

from dmax_jax.evaluation.answers import extract


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 * 4 = 12 pens.\n#### 12", 12),
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 24\n", 24),  # as GSM8K's references
        ("#### 1,000", 1000),
        ("#### 12,345,678", 12345678),
        ("####-7", -7),
        ("#### 3\nNo, wait.\n#### 4", 4),
        ("#### 007", 7),
    ],
)
def test_the_integer_after_the_last_mark(text, number):
    assert extract(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "12", "####", "#### ", "#### 12 pens", "#### 12.5", "#### 12.", "#### $12", "#### 1,00", "#### 1,0000",
     "#### 5\n#### none", "#### - 5", "### 12", "#### 12\n13", "#### ١٢", "#### " + "1" * 5000, "####\n12"],
)  # fmt: skip
def test_anything_else_is_no_answer(text):
    assert extract(text) is None
