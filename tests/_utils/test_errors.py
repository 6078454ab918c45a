"""Error messages in one line."""

from fastentropy._utils.errors import joined_lines, one_line, reason


def test_one_line_is_the_first_line_or_the_class():
    assert one_line(ValueError("\n one\n  two")) == "one"
    assert one_line(ValueError("/a" * 400)) == "/a" * 400
    assert one_line(KeyError()) == one_line(ValueError(" \n")).replace("Value", "Key") == "KeyError"


def test_joined_lines_are_the_message_or_the_class():
    assert joined_lines(ValueError("one\n  two")) == "one two"
    assert joined_lines(KeyError()) == "KeyError"


def test_an_error_of_the_system_is_told_without_number_and_class():
    error = FileNotFoundError(2, "No such file or directory", "runs/.tmp-12-a/a")
    assert one_line(error) == "runs/.tmp-12-a/a: No such file or directory"
    assert reason(error) == "No such file or directory"
    assert one_line(PermissionError("no")) == reason(PermissionError("no")) == "no"


def test_reason_names_what_is_missing():
    assert reason(KeyError("steps")) == "'steps' is missing"
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("one\n  two")) == "one two"
