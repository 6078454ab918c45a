"""Error messages in one line."""

from fastentropy._utils.errors import one_line


def test_one_line_is_the_message_or_the_class():
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(KeyError()) == "KeyError"
