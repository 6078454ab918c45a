"""What tests of the command line share."""

import re


def assert_one_line(result, text):
    """Assert that a command ended with exit status 2 and one line about the error, in which the pattern `text` is found."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error"))
    assert re.search(text, line), line
