"""Pictures of the chat page for docs/serving.md: narrow, wide and dark, with answers of the demo and a scripted one.

    python figures/page.py            # writes docs/page_narrow.png, docs/page_wide.png and docs/page_dark.png

Chromium shows the page; server.py's application answers with the demo, and a scripted server with what the demo cannot
write: Markdown, formulas and code.
"""

import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "inference"), str(ROOT / "tests")]

from PIL import Image  # noqa: E402

from engine.engine import Engine  # noqa: E402
from support.chat_page import (  # type: ignore[import-not-found]  # noqa: E402
    NARROW,
    WIDE,
    Page,
    opened_browser,
    scripted,
)
from support.http_server import serving  # type: ignore[import-not-found]  # noqa: E402

QUESTION = "How is the Gaussian integral computed?"
ANSWER = r"""The integral $I = \int_{-\infty}^{\infty} e^{-x^2}\,dx$ has no elementary antiderivative, but its
**square** is easy in polar coordinates:

$$
I^2 = \int_0^{2\pi}\!\!\int_0^{\infty} e^{-r^2}\,r\,dr\,d\theta = 2\pi \cdot \tfrac12 = \pi
$$

So $I = \sqrt{\pi}$. A sum over a grid agrees:

```python
import math

def gauss(step: float, limit: float = 6.0) -> float:
    n = int(limit / step)
    return step * sum(math.exp(-(i * step) ** 2) for i in range(-n, n + 1))  # close to sqrt(pi)
```

| step | sum | error |
|-----:|----:|------:|
| 1 | 1.7726372 | 0.0001833 |
| 0.5 | 1.7724539 | less than $10^{-15}$ |
"""


def shot(page: Page, name: str) -> None:
    """Few colours: a tenth of the bytes, and the same to the eye."""
    page.run("document.activeElement.blur()")
    picture = Image.open(io.BytesIO(page.browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(ROOT / "docs" / f"page_{name}.png", optimize=True)


def scripted_answer(page: Page) -> None:
    """A wide page with all that Markdown has."""
    with scripted() as server:
        server.model |= {"model": "DeepSeek-V3.1", "thinking_switch": True, "context": 131072}
        page.open(server.url, WIDE)
        for question, answer in [("Name three oceans.", "The Pacific, the Atlantic, the Arctic."), (QUESTION, ANSWER)]:
            page.run("document.getElementById('fresh').click()")
            server.say(reasoning_content="Polar coordinates.")
            for at in range(0, len(answer), 4):
                server.say(content=answer[at : at + 4])
            page.ask(question)
            server.end(tokens=len(answer) // 4)
            server.next_question()
            page.idle()
        page.until(lambda: page.all(".katex-display") and page.all(".hljs-keyword"), "the libraries have loaded")
        page.until(lambda: page.run("return document.fonts.status") == "loaded", "fonts")
        # a script's speed is no figure
        page.run("document.querySelector('.figures').remove()")
        page.run("document.querySelector('summary').textContent = 'Thought'")
        page.run("document.getElementById('scroller').scrollTop = 0")
        shot(page, "wide")
        page.browser.get("about:blank")


def demo_answers(page: Page) -> None:
    """The demo's examples on a narrow page, and one of its answers token by token on a dark one."""
    engine = Engine.from_pretrained(ROOT / "demo" / "checkpoint", dtype="float32", max_model_len=1024, mtp=1)
    with serving(engine) as running:
        page.open(f"{running.url}/", NARROW)
        page.until(lambda: page.all("#examples button"), "the examples")
        page.all("#examples button")[0].click()
        page.until(lambda: page.shown(".figures"), "an answer")
        page.idle()
        page.press("summary")
        shot(page, "narrow")
        page.resize(WIDE, dark=True)
        for place in (2, 1):
            page.run("document.getElementById('fresh').click()")
            page.all("#examples button")[place].click()
            page.until(lambda: page.shown(".figures"), "an answer")
            page.idle()
        page.press("[title='Show drafted tokens']")
        page.run("document.getElementById('scroller').scrollTop = 0")
        shot(page, "dark")
        page.browser.get("about:blank")


if __name__ == "__main__":
    with opened_browser() as opened:
        scripted_answer(opened)
        demo_answers(opened)
