"""Rendering: inserted text is escaped, and the policy allows only the page's own script and style."""

import jinja2
import pytest

from lm.report import page

ABC = "'sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0='"  # of "abc", FIPS 180-2 appendix B.1
NOTHING = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"  # of ""


def test_the_policy_allows_the_pages_script_and_style_by_their_hash():
    made = page.policy("<style></style><p>x</p><script>abc</script>", "connect-src 'self'").split("; ")
    assert f"script-src {ABC}" in made and f"style-src {NOTHING}" in made and "connect-src 'self'" in made
    assert made[0] == "default-src 'none'" and "unsafe" not in "".join(made)


def test_values_are_escaped_and_the_hash_is_that_of_the_rendered_script(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("{{ policy }}<b>{{ text }}</b><script>{{ letters }}c</script>{{ data | tojson }}")
    made = page.render(template, text="<i>&", letters="ab", data={"a": ["</script>", 1]})
    assert ABC.replace("'", "&#39;") in made and "<b>&lt;i&gt;&amp;</b><script>abc</script>" in made
    assert made.endswith('{"a":["\\u003c/script\\u003e",1]}')
    with pytest.raises(jinja2.UndefinedError, match="letters"):
        page.render(template, text="", data=0)


def test_control_characters_are_escaped_except_tabs_and_line_breaks(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("<pre>{{ text }}</pre>{{ number }}{{ data | tojson }}")
    made = page.render(template, text="\x00\x1b[31m\t\n\x9b\u202e<\x7f", number=7, data={"a": "\x1b\x7f"})
    assert made == r"<pre>\x00\x1b[31m" "\t\n" r"\x9b\u202e&lt;\x7f</pre>7" '{"a":"\\u001b\\u007f"}'
