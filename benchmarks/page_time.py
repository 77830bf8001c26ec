"""What a token costs the chat page in a browser, early and late in an answer.

    python benchmarks/page_time.py --output benchmarks/results/page_time.json

Chromium (Debian's chromium and chromium-driver) has the page open, and a server in this process streams an answer to
it, of one kind of text each time. Up to each place tokens come as fast as they are read; then WINDOW tokens come one
by one, PACE apart, so that each is in a frame of its own. The cost is the time that the page's main thread was busy
meanwhile, as Chromium counts it (TaskDuration of its Performance domain), by token; of it script, layout and style are
told apart. The rest is mostly painting.
"""

import argparse
import sys
import time
from typing import Any

from lib import ROOT, report

sys.path.append(str(ROOT / "tests"))
from support.chat_page import (  # type: ignore[import-not-found]
    WIDE,
    Page,
    Scripted,
    has_browser,
    opened_browser,
    scripted,
)

PLACES = (100, 4000, 16000)  # tokens
WINDOW, PACE = 100, 0.03  # tokens; seconds
TOKEN = 4  # characters
PARTS = {"task": "TaskDuration", "script": "ScriptDuration", "layout": "LayoutDuration", "style": "RecalcStyleDuration"}
MIXED = r"""## A heading

Some words of *a paragraph* with `code` in it, a [link](https://example.com) and a formula $x^2 + y^2$, and then some
more of them that fill another line.

$$\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt\pi}{2}$$

1. An item of a list
2. **Another** one
   - with a list in it

| a | table |
|---|------:|
| of | 3 |
| rows | 4 |

```python
def square(x):
    return x * x  # a comment
```

"""
KINDS = {  # (how the answer begins, what then repeats)
    "Markdown of all kinds": ("", MIXED),
    "one list": ("", "- an item of a list that goes on and on\n"),
    "one table": ("| a | b |\n|---|---|\n", "| a cell | another cell |\n"),
    "one block of code": ("```python\n", "    value = function(value, 1)  # again\n"),
    "one paragraph": ("", "some words and more of them "),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--places", type=lambda text: [*map(int, text.split(","))], default=list(PLACES), metavar="N,N",
                        help="tokens of the answer at which to measure (default: 100,4000,16000)")  # fmt: skip
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    if not has_browser():
        print("measured nothing: there is no browser (chromium and chromium-driver)")
        return
    with opened_browser() as page:
        version = page.browser.capabilities["browserVersion"]
        print(f"Chromium {version}; ms of the main thread a token, at {', '.join(map(str, args.places))} tokens")
        rows = []
        for kind, (begin, unit) in KINDS.items():
            costs = measure(page, begin, unit, args.places)
            rows.append({"kind": kind, "at": costs})
            shown = (f"{cost['task']:.2f} (script {cost['script']:.2f})" for cost in costs)
            print(f"{kind:24} {', '.join(shown)}", flush=True)
    report.save(args.output, {"chromium": version, "window": WINDOW, "pace_s": PACE, "rows": rows})


def measure(page: Page, begin: str, unit: str, places: list[int]) -> list[dict[str, Any]]:
    """Milliseconds a token at each place of one answer."""
    with scripted() as server:
        page.open(server.url, WIDE)
        page.browser.execute_cdp_cmd("Performance.enable", {})
        page.ask("question")
        server.next_question()
        text = begin + unit * (2 * TOKEN * (places[-1] + WINDOW) // len(unit))
        tokens = [text[at : at + TOKEN] for at in range(0, TOKEN * (places[-1] + WINDOW), TOKEN)]
        done, found = 0, []
        for place in places:
            stream(server, page, tokens[done:place])
            before = counters(page)
            for token in tokens[place : place + WINDOW]:
                server.say(content=token)
                time.sleep(PACE)
            after = counters(page)
            done = place + WINDOW
            cost = {name: 1000 * (after[name] - before[name]) / WINDOW for name in PARTS}
            found.append({"tokens": place, **cost})
        server.end()
        page.idle()
        page.browser.get("about:blank")
    return found


def stream(server: Scripted, page: Page, tokens: list[str]) -> None:
    """Sends tokens as fast as they are read, and waits until the page has rested."""
    for at in range(0, len(tokens), 50):
        server.send(*({"choices": [{"delta": {"content": token}}]} for token in tokens[at : at + 50]))
    page.until(server.said.empty, "they are sent")
    busy = counters(page)["task"]
    while True:
        time.sleep(0.5)
        if (now := counters(page)["task"]) - busy < 0.02:
            return
        busy = now


def counters(page: Page) -> dict[str, float]:
    """Seconds since the page was opened that its main thread was busy, in all and with each part."""
    metrics = page.browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    by_name = {metric["name"]: metric["value"] for metric in metrics}
    return {name: by_name[metric] for name, metric in PARTS.items()}


if __name__ == "__main__":
    main()
