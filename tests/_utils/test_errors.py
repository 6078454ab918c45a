"""Error messages in one line."""

from fastentropy._utils.errors import joined_lines, one_line


def test_one_line_is_the_first_line_or_the_class():
    assert one_line(ValueError("\n one\n  two")) == "one"
    assert one_line(ValueError("/a" * 400)) == "/a" * 400
    assert one_line(KeyError()) == one_line(ValueError(" \n")).replace("Value", "Key") == "KeyError"


def test_joined_lines_are_the_message_or_the_class():
    assert joined_lines(ValueError("one\n  two")) == "one two"
    assert joined_lines(KeyError()) == "KeyError"
