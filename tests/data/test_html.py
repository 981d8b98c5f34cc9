"""HTML as text."""

import errno

import pytest

from engine.data.html import CHUNK_SIZE, strip_html, strip_many


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a</p>\n\n<p>b</p>\n", "a\n\nb"),
        ("<p>use <code>x &lt; y</code> now</p>", "use <code>x < y</code> now"),
        ('<p>see <a href="http://x">this <em>page</em></a>.</p>', "see this page."),
        ("<pre><code>if a:\n    b\n</code></pre>", "<code>if a:\n    b\n</code>"),
        ("<ul>\n<li>a</li>\n<li>b <b>c</b></li>\n</ul>", "- a\n- b c"),
        ("<p>x</p><ol><li><p>a</p></li><li>b<ul><li>c</li></ul></li></ol>", "x\n\n1. a\n2. b\n  - c"),
        ("<ul><li>a<pre><code>x\n y</code></pre></li></ul>", "- a\n  <code>x\n y</code>"),
        ("<blockquote><p>a</p><p>b</p></blockquote><h2>c</h2>", "a\n\nb\n\nc"),
        ("a<br>b<!-- c --><script>d</script>", "a\nb"),
        ("plain <b>text</b><p>p</p>tail", "plain text\n\np\n\ntail"),
        ('<a href="x"><p>in a link</p></a>', "in a link"),
        ("1 < 2 &amp; 3", "1 < 2 & 3"),
        ("", ""),
    ],
)
def test_strip_html(html, text):
    assert strip_html(html) == text


def test_html_as_deep_as_may_be():
    assert strip_html("<b>" * 248 + "x<p>y") == "x\n\ny"
    assert strip_html("<b>" * 249 + "x") == "x"


def test_without_shared_memory_html_is_stripped_in_one_process(monkeypatch, capsys):
    """As in containers with a small /dev/shm: semaphores are kept there."""

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    items = [(number, [f"<p>{number}</p>"]) for number in range(CHUNK_SIZE + 1)]
    assert list(strip_many(items)) == [(number, [str(number)]) for number in range(CHUNK_SIZE + 1)]
    assert capsys.readouterr().out == "stripping HTML in one process: no shared memory (No space left on device)\n"
